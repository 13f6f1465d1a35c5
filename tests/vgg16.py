"""Deterministic weights of LPIPS' VGG16 with torchvision's names, see :mod:`tests.golden`."""

from functools import cache
from math import sqrt

from torch import Tensor

from tests.golden import normal_input

PUBLISHED = {
    (0, 64, 3), (2, 64, 64), (5, 128, 64), (7, 128, 128), (10, 256, 128), (12, 256, 256), (14, 256, 256),
    (17, 512, 256), (19, 512, 512), (21, 512, 512), (24, 512, 512), (26, 512, 512), (28, 512, 512),
}  # fmt: skip
"""Index, output and input channels of the convolutions in torchvision's VGG16."""


@cache
def vgg16_state() -> dict[str, Tensor]:
    """Weights and biases of the convolutions."""
    filled = {}
    for index, width, previous in sorted(PUBLISHED):
        name = f"features.{index}"
        filled[f"{name}.weight"] = normal_input(f"{name}.weight", (width, previous, 3, 3)) / sqrt(9 * previous)
        filled[f"{name}.bias"] = normal_input(f"{name}.bias", (width,)) * 0.02
    return filled
