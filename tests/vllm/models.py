"""Small models exported for vLLM, requests to them, and the codes that :func:`generate` samples for these."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamagen.checkpoints.weights import Weights
from llamagen.checkpoints.writing import write_weights
from llamagen.models.gpt import GPT
from llamagen.pretrained.export_folder import Export, export_model
from llamagen.sampling import generate
from serving.vllm.prompts import caption_prompt, embedder_of, label_prompt
from tests.small_models import caption_lengths_for, codes_for, condition_for, small_gpt, small_vqgan

IMAGES = 3
"""Images of each case."""


@dataclass(frozen=True)
class Case:
    """Settings of sampling, and the number of kept codes."""

    settings: dict[str, Any] = field(default_factory=dict)
    kept: int = 0


# Each value of guidance, schedule, interval, temperature, top-k and top-p, in combinations of two and more.
CASES = (
    Case({"temperature": 0.0}),
    Case({"temperature": 0.0, "guidance_scale": 1.75}, kept=4),
    Case({"temperature": 0.0, "guidance_scale": 7.5, "guidance_schedule": "linear"}),
    Case(),
    Case({"top_k": 10}, kept=5),
    Case({"top_p": 0.8, "temperature": 0.7}),
    Case({"guidance_scale": 1.75, "top_k": 20, "top_p": 0.9}),
    Case({"guidance_scale": 7.5, "top_k": 1}),
    Case({"guidance_scale": 7.5, "guidance_start": 3, "guidance_steps": 9}),
    Case({"guidance_scale": 1.75, "guidance_schedule": "cosine", "top_p": 0.5}, kept=15),
    Case({"guidance_scale": 7.5, "guidance_schedule": "power_cosine", "guidance_power": 1.5, "temperature": 1.3}),
    Case({"guidance_scale": 0.0, "guidance_steps": 8}),
)
UNGUIDED_CASES = tuple(case for case in CASES if "guidance_scale" not in case.settings)


def export_small(folder: Path, unguided: bool = False, **options: Any) -> GPT:
    """Export a small model as a user does, and return it.

    Args:
        folder: folder to write.
        unguided: whether to leave out the second branch.
        options: options of ``small_gpt``.
    """
    gpt = small_gpt(**options)
    export_model(Export(**checkpoint_files(gpt, folder), samples=0, unguided=unguided), folder)
    return gpt


def checkpoint_files(gpt: GPT, folder: Path) -> dict[str, str]:
    """Write the weights of a model and a tokenizer next to a folder; returns their names as options of ``Export``."""
    files = folder.with_name(f"{folder.name}_files")
    files.mkdir()
    for name, model in (("checkpoint", gpt), ("tokenizer", small_vqgan())):
        weights = Weights(dict(model.state_dict()), None, None, None, name)
        write_weights(model, weights, files / f"{name}.safetensors")
    return {name: str(files / f"{name}.safetensors") for name in ("checkpoint", "tokenizer")}


@dataclass
class Requests:
    """Images of several cases, as prompts and extra arguments of vLLM, and their codes.

    Args:
        gpt: the model.
        cases: settings; each has :data:`IMAGES` images.
        guided: whether prompts have both branches.
    """

    gpt: GPT
    cases: Sequence[Case] = CASES
    guided: bool = True

    def __post_init__(self) -> None:
        self.prompts, self.settings, self.kept, self.codes = [], [], [], []
        condition, lengths = condition_for(self.gpt, IMAGES), caption_lengths_for(self.gpt, IMAGES)
        for number, case in enumerate(self.cases):
            kept, seed = codes_for(self.gpt, IMAGES, case.kept), 100 + number
            indices = torch.arange(IMAGES) + 2**40 * (number % 2)
            arguments = {"caption_lengths": lengths, "seed": seed, "indices": indices, "kept": kept}
            self.codes += list(generate(self.gpt, condition, case.settings, **arguments))
            for row in range(IMAGES):
                length = None if lengths is None else int(lengths[row])
                self.prompts.append(self.prompt(condition[row], length, kept[row].tolist()))
                self.settings.append(case.settings | {"seed": seed, "index": int(indices[row])})
                self.kept.append(kept[row].tolist())

    def prompt(self, condition: Tensor, length: int | None, kept: list[int]) -> dict[str, Any]:
        if self.gpt.config.condition == "class":
            return label_prompt(self.gpt.config, int(condition), kept)
        embedder = embedder_of(self.gpt)
        return caption_prompt(self.gpt.config, embedder, condition, length, kept, self.guided)

    def assert_equal(self, sampled: Sequence[Sequence[int]]) -> None:
        """Assert that the codes after the kept ones are those of ``generate``."""
        assert len(sampled) == len(self.codes)
        for row, (kept, codes) in enumerate(zip(self.kept, sampled, strict=True)):
            assert [*kept, *codes] == self.codes[row].tolist(), (self.settings[row], row)
