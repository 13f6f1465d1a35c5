"""Shapes of the models that benchmarks build: the paper's sizes, and tiny ones to try a benchmark."""

from typing import Any

from llamagen.models.vqgan import VQGANConfig
from llamagen.pretrained.sizes import SIZES

TINY = "tiny"
"""A GPT that needs no time, for dry runs of benchmarks."""
TINY_TOKENIZER = VQGANConfig(
    channels=32, channel_multipliers=(1, 1, 2), num_res_blocks=1, z_channels=16, codebook_size=64, codebook_dim=4
)


def size_names() -> list[str]:
    """Names of all sizes."""
    return [*sorted(SIZES), TINY]


def gpt_shape(size: str) -> dict[str, Any]:
    """Layers, heads and width of a size, as arguments of ``GPTConfig``."""
    return {"n_layer": 2, "n_head": 2, "dim": 64} if size == TINY else SIZES[size]
