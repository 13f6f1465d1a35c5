"""Images that others send. They are untrusted."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from llamagen.pretrained.images import prepare_images, to_pixels
from llamagen.pretrained.inpainting import masks_of_codes
from llamagen.rgb import FORMATS

MAX_PIXELS = 40_000_000
"""Maximum number of pixels, so that a small file cannot fill the memory."""
ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)
"""EXIF tag of the orientation, and its values with height and width exchanged."""
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


def read_mask(file: bytes, size: tuple[int, int], resolution: int, grid: int) -> tuple[int, ...]:
    """Codes of an image that its mask names.

    Args:
        file: PNG of the size of the image. Pixels that are fully transparent are generated again.
        size: height and width of the image, see :func:`image_size`.
        resolution: side of the model's images in pixels.
        grid: rows and columns of codes.

    Returns:
        Numbers, in raster order, of the codes whose cell has a transparent pixel.

    Raises:
        ValueError: in one line, if the mask cannot be read, has no transparency, or has another size than the image.
    """
    try:
        with Image.open(io.BytesIO(file), formats=["PNG"]) as opened:
            if opened.height * opened.width > MAX_PIXELS:
                raise ValueError(f"the mask is too large; choose one of at most {MAX_PIXELS:,} pixels")
            opened.load()
            alpha = np.asarray(opened.convert("RGBA"))[..., 3] if opened.has_transparency_data else None
    except Image.DecompressionBombError as error:
        raise ValueError(f"the mask is too large; choose one of at most {MAX_PIXELS:,} pixels") from error
    except (OSError, SyntaxError, KeyError, IndexError, TypeError, struct.error, zlib.error) as error:
        raise ValueError("the mask is not a readable PNG image; choose another file") from error
    if alpha is None:
        raise ValueError("the mask has no transparency; give a PNG whose transparent pixels are generated again")
    shape = np.broadcast_to(np.uint8(0), (*size, 3))  # needs no memory
    masks = masks_of_codes([alpha == 0], [shape], resolution, grid)
    return tuple(masks.flatten().nonzero()[:, 0].tolist())


def image_size(file: bytes) -> tuple[int, int]:
    """Height and width of an image that is upright by its EXIF orientation. Reads no pixels.

    Args:
        file: PNG, JPEG or WebP.

    Raises:
        ValueError: in one line, if it cannot be read.
    """
    try:
        with Image.open(io.BytesIO(file), formats=FORMATS) as opened:
            size, turned = opened.size, opened.getexif().get(ORIENTATION, 1) in TURNED
    except Image.DecompressionBombError as error:
        raise ValueError(f"the image is too large; choose one of at most {MAX_PIXELS:,} pixels") from error
    except Exception as error:  # a damaged file can end Pillow's decoders and EXIF reader with an error of any type
        raise ValueError("the image is not a readable JPEG, PNG or WebP image; choose another file") from error
    return size if turned else size[::-1]


def has_transparency(file: bytes) -> bool:
    """Whether an image, which :func:`image_size` can read, is a PNG with transparency. Reads no pixels."""
    with Image.open(io.BytesIO(file), formats=FORMATS) as opened:
        return opened.format == "PNG" and opened.has_transparency_data


class _TooLargeError(Exception):
    pass
