"""Square images of one size, cut out as in ADM (arXiv 2105.05233): in the middle, at random, or ten of them.

Pixels are (H, W, 3) uint8. The resampling is Pillow's, done by PyTorch's kernel for bytes, which takes a quarter of the
time and differs by at most 2 levels.
"""

from collections.abc import Sequence
from math import ceil

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

SMALLEST_SHARE = 0.8
"""A random crop has at least this share of the image's short side."""

VIEWS = ("centre", "top-left", "top-right", "bottom-left", "bottom-right")


def centre_crop(pixels: np.ndarray, size: int) -> np.ndarray:
    """Shrink the short side to ``size``, cut out the middle.

    Large images are first halved with a box filter while the short side is at least twice the target, then resized
    bicubically; small images are enlarged the same way.

    Args:
        pixels: (H, W, 3) uint8.
        size: side of the result in pixels.

    Returns:
        (size, size, 3) uint8.
    """
    pixels = _resize(pixels, size)
    top, left = ((side - size) // 2 for side in pixels.shape[:2])
    return pixels[top : top + size, left : left + size]


def random_crop(pixels: np.ndarray, size: int, generator: np.random.Generator) -> np.ndarray:
    """Shrink the short side to something from ``size`` to ``size / 0.8``, rounded up; cut out any place.

    Args:
        pixels: (H, W, 3) uint8; resized as by :func:`centre_crop`.
        size: side of the result in pixels.
        generator: draws the length of the short side, then the place.

    Returns:
        (size, size, 3) uint8.
    """
    pixels = _resize(pixels, int(generator.integers(size, ceil(size / SMALLEST_SHARE), endpoint=True)))
    height, width = pixels.shape[:2]
    left, top = (int(generator.integers(side - size, endpoint=True)) for side in (width, height))
    return pixels[top : top + size, left : left + size]


def random_flip(pixels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Half of the images with left and right exchanged."""
    return pixels[:, ::-1] if generator.random() < 0.5 else pixels


def ten_crops(pixels: np.ndarray, size: int, ranges: Sequence[float]) -> list[np.ndarray]:
    """For each range the middle, the four corners, and their mirror images, of the centre crop to int(range · size).

    LlamaGen, section 3.1: codes of ten crops instead of random ones.

    Args:
        pixels: (H, W, 3) uint8.
        size: side of the results in pixels.
        ranges: each at least 1.

    Returns:
        10 · ranges images (size, size, 3) uint8, in the order of :func:`view_names`.
    """
    views = []
    for share in ranges:
        square = centre_crop(pixels, int(size * share))
        rest = len(square) - size
        places = [(rest // 2, rest // 2), (0, 0), (0, rest), (rest, 0), (rest, rest)]
        crops = [square[top : top + size, left : left + size] for top, left in places]
        views += crops + [crop[:, ::-1] for crop in crops]
    return views


def view_names(kind: str, ranges: Sequence[float]) -> list[str]:
    """Names of the views of an image.

    Args:
        kind: ``centre``, ``flip`` (the centre crop and its mirror image) or ``ten_crop``.
        ranges: of :func:`ten_crops`.
    """
    if kind == "ten_crop":
        return [f"{share:g} {name}{flip}" for share in ranges for flip in ("", " flipped") for name in VIEWS]
    return ["centre", "centre flipped"] if kind == "flip" else ["centre"]


def _resize(pixels: np.ndarray, short_side: int) -> np.ndarray:
    height, width = pixels.shape[:2]
    while min(height, width) >= 2 * short_side:
        width, height = width // 2, height // 2
        pixels = np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BOX))
    scale = short_side / min(height, width)
    target = round(height * scale), round(width * scale)
    if height > 2 * width:  # here Pillow has an order of its own, and the order shows where colours are cut off
        return np.array(Image.fromarray(pixels).resize(target[::-1], Image.Resampling.BICUBIC))
    planes = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    resized = F.interpolate(planes, target, mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()
