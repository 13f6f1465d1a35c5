"""What is kept of the prompts of a run beside their images."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from PIL import Image

from callbacks.writers.sample_folder import METADATA, SampleFolder
from llamagen.files import atomic_file

CUT = "truncated"
"""Keyword in the PNG of an image whose prompt was cut. It is there that all ranks, and later runs, find it."""
NAMED = 5


class PromptRequests(Protocol):
    """A DataModule that asks for images of prompts."""

    prompts: list[str]
    columns: list[dict[str, str]]
    """What else is known of each prompt."""


class SamplesPrompts(Protocol):
    """A module that draws images of prompts."""

    sampling: Any
    sample_seed: int


def prompts_plan(prompts: Sequence[str], module: Any) -> dict[str, Any]:
    """What decides the images of prompts, beside what decides any.

    Args:
        prompts: all of the run.
        module: may have ``caption_metadata``, which say by what the prompts are read: primitives by name.
    """
    facts: Mapping[str, Any] = getattr(module, "caption_metadata", None) or {}
    return {
        "list of prompts": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest(),
        **{f"text.{name}": value for name, value in facts.items()},
    }


def image_text(truncated: bool) -> dict[str, str]:
    """What the PNG of an image says of it."""
    return {CUT: "true"} if truncated else {}


def was_cut(folder: SampleFolder, index: int) -> bool:
    """Whether the prompt of an image that is there was longer than the model reads."""
    with Image.open(folder.path(index)) as image:  # reads the head of the file only
        return CUT in image.info


def warn_of_cut_prompts(folder: SampleFolder, prompts: Sequence[str]) -> None:
    """Say once which prompts, of those that were drawn on any rank and in any run of the folder, were cut."""
    cut = sorted({int(folder.labels[index]) for index in folder.drawn() if was_cut(folder, index)})
    if cut:
        named = [f"prompt {number} ({prompts[number][:40]!r} …)" for number in cut[:NAMED]]
        more = f" and {len(cut) - NAMED} more" if len(cut) > NAMED else ""
        rank_zero_warn(
            f"{len(cut)} of {len(prompts)} prompts were longer than the model reads and were cut: "
            f"{', '.join(named)}{more}"
        )


def write_metadata(folder: SampleFolder, data: PromptRequests, module: SamplesPrompts) -> None:
    """Write ``metadata.jsonl``: for each image a line with its file, prompt, seed and settings.

    Args:
        folder: holds all its images; the file gets its name when it is whole.
        data: asked for them.
        module: drew them.
    """
    drawn_with = {"seed": module.sample_seed, "sampling": asdict(module.sampling)}
    with atomic_file(folder.root / METADATA) as temporary, temporary.open("w", encoding="utf-8") as file:
        for index, number in enumerate(folder.labels.tolist()):
            line = {
                "file_name": folder.path(index).relative_to(folder.root).as_posix(),
                "index": index,
                "prompt_number": number,
                "prompt": data.prompts[number],
                "columns": data.columns[number],
                "truncated": was_cut(folder, index),
                **drawn_with,
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
