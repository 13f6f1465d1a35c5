"""Images that visitors upload. They are untrusted."""

from pathlib import Path

import numpy as np
from PIL import Image

from llamagen import LlamaGen
from serving.engine.uploads import read_image


def read_upload(path: str | None, model: LlamaGen) -> Image.Image:
    """Read an image, cropped and resized as the model sees it.

    Args:
        path: file of a visitor; None if there is none.
        model: model of the page.

    Returns:
        RGB image, whose sides are multiples of the tokenizer's downsampling factor.

    Raises:
        ValueError: in one line, if it cannot be read.
    """
    if path is None:
        raise ValueError("there is no image; choose one first")
    name = f"the file {Path(path).name}"
    try:
        file = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"{name} is no longer kept; choose it again") from error
    return read_image(file, model.resolution, model.tokenizer.config.downsampling, name)


def mark_cut(image: Image.Image, rows: int, factor: int) -> Image.Image:
    """Show which part of an image is kept: a line below it, and the rest faded.

    Args:
        image: the image.
        rows: kept rows of codes.
        factor: pixels per code.
    """
    pixels = np.array(image)
    cut = rows * factor
    pixels[cut:] = pixels[cut:] // 4 + 144
    if 0 < cut < len(pixels):
        pixels[max(cut - max(1, len(pixels) // 128), 0) : cut] = (220, 38, 38)
    return Image.fromarray(pixels)
