"""Square crops of one size as in ADM (arXiv 2105.05233): centre, random, or ten crops.

Pixels are (H, W, 3) uint8.
"""

from collections.abc import Sequence
from math import ceil

import numpy as np

from llamagen.centre_crop import centre_crop, resize_short_side

MIN_CROP_SHARE = 0.8
"""Minimum side of a random crop, as a share of the image's short side."""

VIEWS = ("centre", "top-left", "top-right", "bottom-left", "bottom-right")


def random_crop(pixels: np.ndarray, size: int, generator: np.random.Generator) -> np.ndarray:
    """Resize the short side to a random length from ``size`` to ``size / 0.8``, rounded up, and crop at random.

    Args:
        pixels: (H, W, 3) uint8; resized as in :func:`centre_crop`.
        size: side of the result in pixels.
        generator: random numbers for the length of the short side, then for the position.

    Returns:
        (size, size, 3) uint8.
    """
    pixels = resize_short_side(pixels, int(generator.integers(size, ceil(size / MIN_CROP_SHARE), endpoint=True)))
    height, width = pixels.shape[:2]
    left, top = (int(generator.integers(side - size, endpoint=True)) for side in (width, height))
    return pixels[top : top + size, left : left + size]


def random_flip(pixels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Mirror an image horizontally with probability 0.5."""
    return pixels[:, ::-1] if generator.random() < 0.5 else pixels


def ten_crops(pixels: np.ndarray, size: int, ranges: Sequence[float]) -> list[np.ndarray]:
    """Ten crops per range: centre, corners and their mirror images, of a centre crop with side int(range · size).

    LlamaGen (arXiv 2406.06525), section 3.1: the model is trained on codes of ten crops instead of random crops.

    Args:
        pixels: (H, W, 3) uint8.
        size: side of the results in pixels.
        ranges: sizes of the centre crops as multiples of ``size``, each at least 1.

    Returns:
        10 images (size, size, 3) uint8 per range, in the order of :func:`view_names`.
    """
    views = []
    for factor in ranges:
        square = centre_crop(pixels, int(size * factor))
        margin = len(square) - size
        corners = [(margin // 2, margin // 2), (0, 0), (0, margin), (margin, 0), (margin, margin)]
        crops = [square[top : top + size, left : left + size] for top, left in corners]
        views += crops + [crop[:, ::-1] for crop in crops]
    return views


def view_names(kind: str, ranges: Sequence[float]) -> list[str]:
    """Names of the views of an image.

    Args:
        kind: ``centre``, ``flip`` (the centre crop and its mirror image) or ``ten_crop``.
        ranges: see :func:`ten_crops`.
    """
    if kind == "ten_crop":
        return [f"{factor:g} {name}{flip}" for factor in ranges for flip in ("", " flipped") for name in VIEWS]
    return ["centre", "centre flipped"] if kind == "flip" else ["centre"]
