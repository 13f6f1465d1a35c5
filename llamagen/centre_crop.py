"""Resizing and centre crop as in ADM (arXiv 2105.05233), section on data preparation.

Resizing follows Pillow but uses PyTorch's kernel for bytes, which takes a quarter of the time and differs by at most 2
levels.
"""

from itertools import pairwise

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F


def centre_crop(pixels: np.ndarray, size: int) -> np.ndarray:
    """Resize the short side to ``size`` and crop the centre.

    While the short side is at least twice the target, images are halved with a box filter. Then they are resized
    bicubically, to a smaller or larger size.

    Args:
        pixels: (H, W, 3) uint8.
        size: side of the result in pixels.

    Returns:
        (size, size, 3) uint8.
    """
    pixels = resize_short_side(pixels, size)
    top, left = ((side - size) // 2 for side in pixels.shape[:2])
    return pixels[top : top + size, left : left + size]


def crop_parts(height: int, width: int, size: int, parts: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Where the pixels of a :func:`centre_crop` come from.

    Args:
        height: H of the image.
        width: W of the image.
        size: side of the crop in pixels, a multiple of ``parts``.
        parts: number of equal parts of each side of the crop.

    Returns:
        For each part of the height, first row and end of the rows of the image that lie in it, at least in part; and
        the same for the columns.
    """
    found = []
    for side, resized in zip((height, width), _resized(height, width, size), strict=True):
        edges = [(resized - size) // 2 + part * (size // parts) for part in range(parts + 1)]
        found.append([(low * side // resized, -(-high * side // resized)) for low, high in pairwise(edges)])
    return found[0], found[1]


def _resized(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Height and width after :func:`resize_short_side`."""
    while min(height, width) >= 2 * short_side:
        height, width = height // 2, width // 2
    scale = short_side / min(height, width)
    return round(height * scale), round(width * scale)


def resize_short_side(pixels: np.ndarray, short_side: int) -> np.ndarray:
    """Resize an image so that its short side has a given length.

    Args:
        pixels: (H, W, 3) uint8.
        short_side: length in pixels.

    Returns:
        The resized image, uint8.
    """
    height, width = pixels.shape[:2]
    while min(height, width) >= 2 * short_side:
        width, height = width // 2, height // 2
        pixels = np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BOX))
    target = _resized(height, width, short_side)
    if (
        height > 2 * width
    ):  # Pillow resizes tall images in another order of axes, which matters where levels are clipped
        return np.array(Image.fromarray(pixels).resize(target[::-1], Image.Resampling.BICUBIC))
    planes = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    resized = F.interpolate(planes, target, mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()
