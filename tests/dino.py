"""Deterministic weights of small ViTs with the names of DINO's files, see :mod:`tests.golden`."""

from functools import cache
from math import sqrt
from pathlib import Path

import torch
from torch import Tensor

from tests.golden import normal_input

WIDTH, DEPTH, PATCH, GRID = 64, 3, 4, 4


@cache
def dino_state(width: int = WIDTH, depth: int = DEPTH, patch: int = PATCH, grid: int = GRID) -> dict[str, Tensor]:
    """Weights, with those of the last norm, which is in the files."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + grid**2, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for block in range(depth):
        for name, outputs, inputs in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", 4 * width, width),
            ("mlp.fc2", width, 4 * width),
        ):
            shapes[f"blocks.{block}.{name}.weight"] = (outputs, inputs)
            shapes[f"blocks.{block}.{name}.bias"] = (outputs,)
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{block}.{name}.weight": (width,), f"blocks.{block}.{name}.bias": (width,)}
    state = {}
    for name, shape in shapes.items():
        scale = 1 / sqrt(torch.Size(shape[1:]).numel()) if name.endswith("weight") and len(shape) > 1 else 0.2
        state[name] = normal_input(name, shape) * scale + (1.0 if "norm" in name and "weight" in name else 0.0)
    return state


def save_dino(path: Path, **shape: int) -> Path:
    """Save such weights, and return the path."""
    torch.save(dino_state(**shape), path)
    return path
