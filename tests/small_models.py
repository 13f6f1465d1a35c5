"""Models that are small enough for fast tests, with weights that give every part an effect."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llamagen.models.gpt import GPT, GPTConfig
from llamagen.models.vqgan import VQGAN, VQGANConfig
from tests.golden import fill, integer_input, normal_input

CLASS_GPT = GPTConfig(
    dim=32, n_layer=2, n_head=4, multiple_of=16, vocab_size=48, block_size=16, num_classes=7,
    condition_dropout=0.0, token_dropout=0.0, resid_dropout=0.0, ffn_dropout=0.0,
)  # fmt: skip
TEXT_GPT = replace(CLASS_GPT, condition="text", caption_dim=12, caption_length=6)
SMALL_VQGAN = VQGANConfig(
    channels=32, channel_multipliers=(1, 1, 2), num_res_blocks=1, z_channels=16, codebook_size=64, codebook_dim=4
)

GPT_VARIANTS: dict[str, dict[str, Any]] = {
    "class": {},
    "class, grouped queries": {"n_kv_head": 2},
    "class, one key-value head, identity rotation": {"n_kv_head": 1, "rope_condition": "identity"},
    "text": {"condition": "text"},
    "text, grouped queries, identity rotation": {"condition": "text", "n_kv_head": 2, "rope_condition": "identity"},
}

RECIPE_VARIANTS: dict[str, dict[str, Any]] = {
    "QK-norm": {"qk_norm": True, "n_kv_head": 2},
    "adaptive norms": {"adaptive_norm": True},
    "target-aware, text": {"target_aware": True, "condition": "text"},
    "QK-norm, target-aware, text": {"qk_norm": True, "target_aware": True, "condition": "text", "n_kv_head": 1},
    "QK-norm, adaptive norms, target-aware": {
        "qk_norm": True, "adaptive_norm": True, "target_aware": True, "dim": 144, "n_head": 3, "n_kv_head": 1,
    },
}  # fmt: skip
"""Options beyond the paper, alone and together."""

HEAD_VARIANTS: dict[str, dict[str, Any]] = {
    f"heads of {size}, {kind}{' grouped' if kv else ''}": {
        "dim": 2 * size, "n_head": 2, "n_kv_head": kv, "condition": kind, "vocab_size": 50, "multiple_of": 24,
    }
    for size in (32, 64, 100, 128) for kind, kv in (("class", None), ("text", 1))
}  # fmt: skip


def small_gpt(**options: Any) -> GPT:
    """A GPT of :data:`CLASS_GPT` or :data:`TEXT_GPT` with other options, filled weights, in evaluation mode."""
    base = TEXT_GPT if options.get("condition") == "text" else CLASS_GPT
    return fill(GPT(replace(base, **options))).eval()


def small_vqgan(**options: Any) -> VQGAN:
    """A VQGAN of :data:`SMALL_VQGAN` with other options, filled weights, in evaluation mode."""
    return fill(VQGAN(replace(SMALL_VQGAN, **options))).eval()


def condition_for(gpt: GPT, batch_size: int) -> Tensor:
    """Labels that differ from row to row, or caption features, which are not zero in padding."""
    if gpt.config.condition == "class":
        return torch.arange(batch_size) % gpt.config.num_classes
    return normal_input("small/caption", (batch_size, gpt.config.caption_length, gpt.config.caption_dim))


def caption_lengths_for(gpt: GPT, batch_size: int) -> Tensor | None:
    """A different number of real caption tokens for each row, at least 1; None for class labels."""
    if gpt.config.condition == "class":
        return None
    return torch.arange(batch_size) % gpt.config.caption_length + 1


def codes_for(gpt: GPT, batch_size: int, count: int) -> Tensor:
    """The first ``count`` codes of each image."""
    return integer_input("small/codes", gpt.config.vocab_size, (batch_size, gpt.config.block_size))[:, :count]


def images_for(batch_size: int, height: int, width: int) -> Tensor:
    """Images in [-1, 1]."""
    return normal_input("small/image", (batch_size, 3, height, width)).tanh()


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Assert that two state dicts have the same entries, bit for bit."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name
