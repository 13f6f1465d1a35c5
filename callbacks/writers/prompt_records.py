"""Records of prompts: their part of the plan, marks of truncated ones, and ``metadata.jsonl``."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from PIL import Image

from callbacks.protocols import PredictsImages, PromptRequests
from callbacks.writers.sample_folder import METADATA, SampleFolder
from llamagen.files import atomic_file

TRUNCATED = "truncated"
"""Text keyword in the PNG of an image whose prompt was truncated. Rank zero and resumed runs read it from the file."""
MAX_NAMED = 5


def prompts_plan(prompts: Sequence[str], module: PredictsImages) -> dict[str, Any]:
    """Entries of the plan that only runs with prompts have.

    Args:
        prompts: all prompts of the run.
        module: its ``caption_metadata`` describes the text encoder.
    """
    return {
        "list of prompts": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest(),
        **{f"text.{name}": value for name, value in module.caption_metadata.items()},
    }


def image_text(truncated: bool) -> dict[str, str]:
    """Text chunks of an image's PNG."""
    return {TRUNCATED: "true"} if truncated else {}


def was_truncated(folder: SampleFolder, index: int) -> bool:
    """Whether the prompt of a finished image was longer than the model reads."""
    with Image.open(folder.path(index)) as image:  # reads only the header
        return TRUNCATED in image.info


def warn_about_truncation(folder: SampleFolder, prompts: Sequence[str]) -> None:
    """Warn once about all truncated prompts, also those of other ranks and of earlier runs of the folder."""
    truncated = sorted({int(folder.labels[index]) for index in folder.finished() if was_truncated(folder, index)})
    if truncated:
        named = [f"prompt {number} ({prompts[number][:40]!r} …)" for number in truncated[:MAX_NAMED]]
        more = f" and {len(truncated) - MAX_NAMED} more" if len(truncated) > MAX_NAMED else ""
        rank_zero_warn(
            f"{len(truncated)} of {len(prompts)} prompts were longer than the model reads and were truncated: "
            f"{', '.join(named)}{more}"
        )


def write_metadata(folder: SampleFolder, data: PromptRequests, module: PredictsImages) -> None:
    """Write ``metadata.jsonl``: one line for each image with its file, prompt, seed and settings.

    Args:
        folder: folder with all images.
        data: the DataModule that requested the images.
        module: the module that sampled them.
    """
    settings = {"seed": module.sample_seed, "sampling": module.sampling.image_settings()}
    with atomic_file(folder.root / METADATA) as temporary, temporary.open("w", encoding="utf-8") as file:
        for index, number in enumerate(folder.labels.tolist()):
            line = {
                "file_name": folder.path(index).relative_to(folder.root).as_posix(),
                "index": index,
                "prompt_number": number,
                "prompt": data.prompts[number],
                "columns": data.columns[number],
                "truncated": was_truncated(folder, index),
                **settings,
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
