"""Shapes of the models that benchmarks build: the sizes of ``configs/argen/size``, and tiny ones to try a benchmark."""

from pathlib import Path
from typing import Any

import yaml

from llamagen.models.vqgan import VQGANConfig

FOLDER = Path("configs/argen/size")
TINY = "tiny"
"""A GPT that needs no time, for dry runs of benchmarks."""
TINY_TOKENIZER = VQGANConfig(
    channels=32, channel_multipliers=(1, 1, 2), num_res_blocks=1, z_channels=16, codebook_size=64, codebook_dim=4
)


def size_names() -> list[str]:
    """Names of all sizes."""
    return [*sorted(path.stem for path in FOLDER.glob("*.yaml")), TINY]


def gpt_shape(size: str) -> dict[str, Any]:
    """Layers, heads and width of a size, as arguments of ``GPTConfig``."""
    if size == TINY:
        return {"n_layer": 2, "n_head": 2, "dim": 64}
    shape: dict[str, Any] = yaml.safe_load((FOLDER / f"{size}.yaml").read_text())["model"]["init_args"]["net"]
    return shape
