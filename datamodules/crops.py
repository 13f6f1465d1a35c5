"""Square pictures of one size, cut out as in ADM (arXiv 2105.05233): in the middle, or at random for training."""

from math import ceil

import numpy as np
from PIL import Image, ImageOps

SMALLEST_SHARE = 0.8
"""A random crop has at least this share of the picture's short side."""


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Shrink the short side to ``size``, cut out the middle.

    Large pictures are first halved with a box filter while the short side is at least twice the target, then resized
    bicubically; small pictures are enlarged the same way.

    Args:
        image: any mode, any size.
        size: side of the result in pixels.

    Returns:
        ``size`` × ``size``, same mode.
    """
    image = _resize(image, size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def random_crop(image: Image.Image, size: int, generator: np.random.Generator) -> Image.Image:
    """Shrink the short side to something from ``size`` to ``size / 0.8``, rounded up; cut out any place.

    Args:
        image: any mode, any size; it is resized as by :func:`centre_crop`.
        size: side of the result in pixels.
        generator: draws the length of the short side, then the place.

    Returns:
        ``size`` × ``size``, same mode.
    """
    image = _resize(image, int(generator.integers(size, ceil(size / SMALLEST_SHARE), endpoint=True)))
    left, top = (int(generator.integers(side - size, endpoint=True)) for side in image.size)
    return image.crop((left, top, left + size, top + size))


def random_flip(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Half of the pictures with left and right exchanged."""
    return ImageOps.mirror(image) if generator.random() < 0.5 else image


def _resize(image: Image.Image, short_side: int) -> Image.Image:
    while min(image.size) >= 2 * short_side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = short_side / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
