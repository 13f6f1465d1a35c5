"""Images that others send. They are untrusted."""

import io

import numpy as np
from PIL import Image

from llamagen.pretrained.images import prepare_images, to_pixels
from llamagen.rgb import FORMATS

MAX_PIXELS = 40_000_000
"""Maximum number of pixels, so that a small file cannot fill the memory."""
MAX_SIDE = 512
"""Longer side to which images are reduced for a tokenizer alone, which has no size of its own."""


def read_image(file: bytes, resolution: int | None, downsampling: int, name: str = "the image") -> Image.Image:
    """Read an image, cropped and resized as the model sees it.

    Args:
        file: PNG, JPEG or WebP.
        resolution: side of the model's images in pixels; None for a tokenizer.
        downsampling: pixels per code in each direction.
        name: what messages call it.

    Returns:
        RGB image, whose sides are multiples of ``downsampling``.

    Raises:
        ValueError: in one line, if it cannot be read.
    """
    try:
        with Image.open(io.BytesIO(file), formats=FORMATS) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise _TooLargeError
            opened.load()
            pixels = to_pixels(opened)
    except (_TooLargeError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} is too large; choose one of at most {MAX_PIXELS:,} pixels") from error
    except Exception as error:  # a damaged file can end Pillow's decoders and EXIF reader with an error of any type
        raise ValueError(f"{name} is not a readable JPEG, PNG or WebP image; choose another file") from error
    if resolution is None and max(pixels.shape[:2]) > MAX_SIDE:
        reduced = Image.fromarray(pixels)
        reduced.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        pixels = np.array(reduced)
    batch = prepare_images(pixels, resolution, downsampling)
    return Image.fromarray(batch[0].permute(1, 2, 0).contiguous().numpy())


class _TooLargeError(Exception):
    pass
