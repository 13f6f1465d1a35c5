"""Images that visitors upload. They are untrusted."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from llamagen.pretrained.images import prepare_images, to_pixels
from llamagen.rgb import FORMATS
from serving.engine.facts import ModelFacts

MAX_PIXELS = 40_000_000
"""Maximum number of pixels, so that a small file cannot fill the memory."""
MAX_SIDE = 512
"""Longer side to which images are reduced for a tokenizer alone, which has no size of its own."""


def read_upload(path: str | None, facts: ModelFacts) -> Image.Image:
    """Read an image, cropped and resized as the model sees it.

    Args:
        path: file of a visitor; None if there is none.
        facts: the model of the page.

    Returns:
        RGB image, whose sides are multiples of the tokenizer's downsampling factor.

    Raises:
        ValueError: in one line, if it cannot be read.
    """
    if path is None:
        raise ValueError("there is no image; choose one first")
    name = Path(path).name
    try:
        with Image.open(path, formats=FORMATS) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise _TooLargeError
            opened.load()
            pixels = to_pixels(opened)
    except (_TooLargeError, Image.DecompressionBombError) as error:
        raise ValueError(f"the file {name} is too large; choose an image of at most {MAX_PIXELS:,} pixels") from error
    except FileNotFoundError as error:
        raise ValueError(f"the file {name} is no longer kept; choose it again") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"the file {name} is not a readable JPEG, PNG or WebP image; choose another file") from error
    if facts.resolution is None and max(pixels.shape[:2]) > MAX_SIDE:
        reduced = Image.fromarray(pixels)
        reduced.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        pixels = np.asarray(reduced)
    batch = prepare_images(pixels, facts.resolution, facts.downsampling)
    return Image.fromarray(batch[0].permute(1, 2, 0).contiguous().numpy())


def to_png(image: Image.Image) -> bytes:
    """PNG file of an image. A backend reads the same pixels from it."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)  # it is sent to a process or a machine nearby
    return buffer.getvalue()


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


class _TooLargeError(Exception):
    pass
