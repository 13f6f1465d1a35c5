"""Compares an image with its reconstruction by the tokenizer."""

from dataclasses import dataclass
from math import inf, log10

import numpy as np
from PIL import Image

AMPLIFICATION = 4
"""Factor of the differences in the image that shows them."""
_GOLDEN_ANGLE = 0.618034


@dataclass(frozen=True)
class Reconstruction:
    """An image after the tokenizer.

    Attributes:
        reconstruction: the decoded image.
        difference: absolute difference, times :data:`AMPLIFICATION`.
        psnr: peak signal-to-noise ratio in dB.
        codes: (h, w) int64.
        codes_image: a colour for each code, of the size of the image.
    """

    reconstruction: Image.Image
    difference: Image.Image
    psnr: float
    codes: np.ndarray
    codes_image: Image.Image


def compare(image: Image.Image, pixels: np.ndarray, codes: np.ndarray) -> Reconstruction:
    """Compare an image with its reconstruction.

    Args:
        image: RGB image as the model sees it (see ``serving.page.uploads``), W × H pixels.
        pixels: (H, W, 3) uint8, its reconstruction.
        codes: (h, w) int64, its codes.
    """
    difference = np.abs(np.asarray(image).astype(np.int32) - pixels.astype(np.int32))
    error = float(np.mean(difference.astype(np.float64) ** 2))
    return Reconstruction(
        Image.fromarray(pixels),
        Image.fromarray((difference * AMPLIFICATION).clip(0, 255).astype(np.uint8)),
        10 * log10(255**2 / error) if error else inf,
        codes,
        colour_codes(codes).resize(image.size, Image.Resampling.NEAREST),
    )


def colour_codes(codes: np.ndarray) -> Image.Image:
    """Image (h, w) in which equal codes have equal colours. Codes have no order, so neither have the colours."""
    hue = codes * _GOLDEN_ANGLE % 1.0
    value = 0.55 + 0.45 * (codes * _GOLDEN_ANGLE**2 * 7 % 1.0)
    channels = np.stack([hue, np.full_like(hue, 0.6), value], -1)
    return Image.fromarray((channels * 255).astype(np.uint8), "HSV").convert("RGB")
