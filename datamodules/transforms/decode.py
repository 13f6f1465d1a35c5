"""Decoding of image files to pixels: (H, W, 3) uint8, RGB, upright."""

import warnings
from io import BytesIO
from typing import Any

import numpy as np
from kornia_rs.io import decode_image_jpegturbo
from PIL import Image, UnidentifiedImageError

from datamodules.storage.bad_examples import BadExampleError
from llamagen.rgb import FORMATS, to_rgb

MAX_PIXELS = 89_478_485
"""Images that claim more pixels are refused before decoding. Pillow's own warning starts here."""

MAX_ASPECT_RATIO = 100
"""Maximum ratio of the long to the short side."""

ORIENTATION = 0x0112

UPRIGHT = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: pixels[::-1].transpose(1, 0, 2),
    7: lambda pixels: pixels[::-1, ::-1].transpose(1, 0, 2),
    8: lambda pixels: pixels[:, ::-1].transpose(1, 0, 2),
}
"""Functions that turn an image upright, by its EXIF orientation."""


def open_image(data: bytes, where: str) -> Image.Image:
    """Read the header of an image without decoding its pixels.

    Args:
        data: content of the file.
        where: origin of the file, for messages.

    Raises:
        BadExampleError: if the file is empty, not in one of :data:`~llamagen.rgb.FORMATS`, or too large.
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
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all of them
        raise BadExampleError("broken image", f"the image of {where} is broken ({error})") from error
    if image.width * image.height > MAX_PIXELS:
        raise BadExampleError(
            "too many pixels",
            f"the image of {where} has {image.width} × {image.height} pixels, more than {MAX_PIXELS}",
        )
    if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
        raise BadExampleError(
            "too many pixels",
            f"the image of {where} has {image.width} × {image.height} pixels, an aspect ratio of more than "
            f"{MAX_ASPECT_RATIO}; resizing it could take gigabytes of memory",
        )
    return image


def read_image(data: bytes, where: str) -> np.ndarray:
    """Decode a JPEG, PNG or WebP file.

    Greyscale, CMYK and palette images become RGB. Transparency is ignored. Images with 16 bits keep the upper 8. Images
    are turned upright by their EXIF orientation, if it is readable.

    Args:
        data: content of the file.
        where: origin of the file, for messages.

    Returns:
        (H, W, 3) uint8.

    Raises:
        BadExampleError: if the file is empty, broken, in another format, or has too many pixels.
    """
    image = open_image(data, where)
    pixels = None
    if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
        try:
            pixels = decode_image_jpegturbo(data, "rgb")
        except Exception:  # it raises no narrower type; it is stricter than Pillow, which then decodes the file
            pixels = None
    try:
        if pixels is None:
            pixels = np.array(to_rgb(image))
    except Exception as error:  # Pillow raises many types, for example AssertionError for a missing palette
        reason = str(error) or type(error).__name__
        raise BadExampleError("broken image", f"the image of {where} is broken ({reason})") from error
    turn = UPRIGHT.get(_orientation(image))
    return pixels if turn is None else np.ascontiguousarray(turn(pixels))


def _orientation(image: Image.Image) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged EXIF data are no reason to lose the image
        return 1
