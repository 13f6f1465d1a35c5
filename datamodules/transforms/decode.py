"""Files of images as pixels: (H, W, 3) uint8, RGB, upright."""

import warnings
from io import BytesIO
from typing import Any

import numpy as np
from kornia_rs.io import decode_image_jpegturbo
from PIL import Image, UnidentifiedImageError

from datamodules.storage.bad_examples import BadExampleError

FORMATS = ("JPEG", "PNG", "WEBP")
"""The only decoders that are ever used: Pillow has others, some of which run programs (EPS runs Ghostscript)."""

MAX_PIXELS = 89_478_485
"""An image that claims to have more is refused before it is decoded; Pillow warns from here on."""

MAX_STRETCHED = 100
"""Longer side by shorter side, from where on an image is refused."""

ORIENTATION = 0x0112

TURNS = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: pixels[::-1].transpose(1, 0, 2),
    7: lambda pixels: pixels[::-1, ::-1].transpose(1, 0, 2),
    8: lambda pixels: pixels[:, ::-1].transpose(1, 0, 2),
}
"""What makes an image upright, by its EXIF orientation."""


def open_image(data: bytes, where: str) -> Image.Image:
    """The header of an image; its pixels are not decoded yet.

    Args:
        data: the file.
        where: it comes from, for messages.

    Raises:
        BadExampleError: if it is empty, none of :data:`FORMATS`, or too large.
    """
    if not data:
        raise BadExampleError("empty file", f"the image of {where} is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadExampleError("too many pixels", f"the image of {where} is too large ({error})") from error
    except UnidentifiedImageError as error:
        raise BadExampleError("broken image", f"the image of {where} is broken (no JPEG, PNG or WebP)") from error
    except (OSError, SyntaxError, ValueError) as error:  # all of them by Pillow
        raise BadExampleError("broken image", f"the image of {where} is broken ({error})") from error
    if image.width * image.height > MAX_PIXELS:
        raise BadExampleError(
            "too many pixels",
            f"the image of {where} has {image.width} × {image.height} pixels, more than {MAX_PIXELS}",
        )
    if max(image.size) > MAX_STRETCHED * min(image.size):
        raise BadExampleError(
            "too many pixels",
            f"the image of {where} has {image.width} × {image.height} pixels; a square as high as its short side is "
            f"less than 1/{MAX_STRETCHED} of it, and enlarging it would take gigabytes",
        )
    return image


def read_image(data: bytes, where: str) -> np.ndarray:
    """A JPEG, PNG or WebP file as pixels.

    Greyscale, CMYK and palette become RGB; transparency is left out; of 16 bits the upper 8 are kept; an image is
    turned as its EXIF orientation says, if that can be read.

    Args:
        data: the file.
        where: it comes from, for messages.

    Returns:
        (H, W, 3) uint8.

    Raises:
        BadExampleError: if it is empty, broken, of another format, or has too many pixels.
    """
    image = open_image(data, where)
    pixels = None
    if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
        try:
            pixels = decode_image_jpegturbo(data, "rgb")
        except Exception:  # it raises nothing narrower, and is stricter than Pillow
            pixels = None
    try:
        if pixels is None:
            pixels = np.array(_to_rgb(image))
    except Exception as error:  # Pillow raises all sorts, AssertionError for a missing palette
        said = str(error) or type(error).__name__
        raise BadExampleError("broken image", f"the image of {where} is broken ({said})") from error
    turn = TURNS.get(_orientation(image))
    return pixels if turn is None else np.ascontiguousarray(turn(pixels))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16 bits, which Pillow's own conversion would cut off at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transparency, which is left out
        return image.convert("RGB")


def _orientation(image: Image.Image) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return image.getexif().get(ORIENTATION, 1)
    except Exception:  # a damaged description is no reason to lose the image
        return 1
