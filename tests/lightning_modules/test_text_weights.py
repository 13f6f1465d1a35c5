"""Weights of text models in the published layout: strict loading and export, with the unconditional features."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules import ARGenModule
from llamagen.checkpoints.export import export
from llamagen.checkpoints.weights import read_weights
from llamagen.models.gpt import GPT
from llamagen.sampling import SamplingConfig, generate
from tests.golden import golden, published_state_dict
from tests.golden_gpts import golden_gpt, golden_inputs
from tests.small_models import assert_same

ENTRY = "gpt_tiny_t2i"
UNCONDITIONAL = "cls_embedding.uncond_embedding"


def published(folder: Path, wrapper: str | None = "model", **changes: Tensor | None) -> Path:
    """A file of the golden text model in the authors' format; ``changes`` replace entries, None removes one."""
    state = dict(golden_gpt(ENTRY).state_dict()) | {"freqs_cis": torch.zeros(3)}
    state = {name: value for name, value in (state | changes).items() if value is not None}
    path = folder / "t2i.pt"
    torch.save({wrapper: state} if wrapper else state, path)
    return path


def greedy(gpt: GPT, scale: str = "4.0") -> list[list[int]]:
    """Greedy codes with guidance, which depend on the unconditional features."""
    condition, lengths = golden_inputs(ENTRY, gpt.config)
    codes: list[list[int]] = generate(
        gpt.eval(), condition, SamplingConfig(0.0, guidance_scale=float(scale)), caption_lengths=lengths
    ).tolist()
    return codes


def test_the_small_text_model_has_the_entries_of_the_published_one() -> None:
    _, entries = published_state_dict("GPT-XL t2i 256")
    first_block = {name for name in entries if not name.startswith("layers.") or name.startswith("layers.0.")}
    small = {name for name in golden_gpt(ENTRY).state_dict() if not name.startswith(("layers.1.", "layers.2."))}
    assert small == first_block


@pytest.mark.parametrize("wrapper", ["model", "module", "state_dict", None])
def test_a_published_file_samples_the_codes_of_the_published_code(wrapper: str | None, tmp_path: Path) -> None:
    module = ARGenModule(golden_gpt(ENTRY).config, init_from=published(tmp_path, wrapper))
    assert_same(dict(module.gpt.state_dict()), dict(golden_gpt(ENTRY).state_dict()))
    assert greedy(module.gpt) == golden(ENTRY)["greedy"]["4.0"]


def test_the_unconditional_features_come_from_the_file(tmp_path: Path) -> None:
    others = torch.randn(120, 32, generator=torch.Generator().manual_seed(0))
    module = ARGenModule(golden_gpt(ENTRY).config, init_from=published(tmp_path, **{UNCONDITIONAL: others}))
    assert torch.equal(module.gpt.state_dict()[UNCONDITIONAL], others)
    assert greedy(module.gpt) != golden(ENTRY)["greedy"]["4.0"]
    assert greedy(module.gpt, "1.0") == golden(ENTRY)["greedy"]["1.0"]


@pytest.mark.parametrize(
    ("name", "value", "phrase"),
    [
        (UNCONDITIONAL, None, f"missing: {UNCONDITIONAL}"),
        (UNCONDITIONAL, torch.zeros(119, 32), f"shape mismatch: {UNCONDITIONAL}"),
        ("cls_embedding.cap_proj.fc2.weight", None, "missing: cls_embedding.cap_proj.fc2.weight"),
        ("cls_embedding.embedding_table.weight", torch.zeros(11, 64), "unexpected: cls_embedding.embedding_table"),
    ],
)
def test_differences_from_the_published_layout_are_named(
    name: str, value: Tensor | None, phrase: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=phrase):
        ARGenModule(golden_gpt(ENTRY).config, init_from=published(tmp_path, **{name: value}))


@pytest.mark.parametrize("name", ["out.pt", "out.safetensors"])
def test_exported_weights_equal_the_loaded_ones(name: str, tmp_path: Path) -> None:
    module = ARGenModule(golden_gpt(ENTRY).config, init_from=published(tmp_path))
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    checkpoint["llamagen"]["captions"] = metadata = {"encoder": "t5", "weights": "0" * 64, "cleaned": True}
    torch.save(checkpoint, tmp_path / "run.ckpt")
    export(tmp_path / "run.ckpt", tmp_path / name)
    exported = metadata if name.endswith(".safetensors") else None
    assert read_weights(tmp_path / name).captions == exported
    again = ARGenModule(golden_gpt(ENTRY).config, init_from=tmp_path / name)
    assert again.caption_metadata == (exported or {})
    assert again.caption_cleaning == ("web" if exported else "unknown")
    assert_same(dict(read_weights(tmp_path / name).state), dict(golden_gpt(ENTRY).state_dict()))


def test_the_second_stage_starts_from_the_first_with_a_larger_grid(tmp_path: Path) -> None:
    larger = replace(golden_gpt(ENTRY).config, block_size=256)
    module = ARGenModule(larger, init_from=published(tmp_path), init_adapt=["block_size"])
    assert_same(dict(module.gpt.state_dict()), dict(golden_gpt(ENTRY).state_dict()))
    assert len(module.gpt.rope) > len(golden_gpt(ENTRY).rope)
