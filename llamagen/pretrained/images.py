"""Images of users → what the tokenizer takes, and back. N images of S × S pixels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from llamagen.centre_crop import centre_crop
from llamagen.rgb import FORMATS, to_rgb

ImageLike = Image.Image | np.ndarray | Tensor | Path | str
"""An image: Pillow, a file, levels (H, W, 3) uint8, or a tensor (3, H, W) of levels or of floats in [-1, 1]."""


def prepare_images(images: ImageLike | Sequence[ImageLike], size: int | None, factor: int) -> Any:
    """Convert images to one batch. Pillow images, files and arrays are cropped to their centre and resized.

    Args:
        images: one image, or a list of them. A tensor (N, 3, H, W) is taken as it is.
        size: side S of the square crop; None keeps the size, cropped to multiples of ``factor``.
        factor: pixels per code along each side.

    Returns:
        (N, 3, H, W): uint8 levels, or the given floats.

    Raises:
        ValueError: in one line, if an image cannot be read, or images have different sizes.
    """
    if isinstance(images, Tensor) and images.numel():
        return images[None] if images.dim() == 3 else images
    if isinstance(images, np.ndarray) and images.ndim == 4:
        images = list(images)
    each = list(images) if isinstance(images, list | tuple | Tensor) else [images]
    if not each:
        raise ValueError("there are no images; give at least one")
    tensors = [_prepare(image, size, factor) for image in each]
    shapes = {tuple(tensor.shape[1:]) for tensor in tensors}
    if len(shapes) > 1:
        raise ValueError(
            f"the images have different sizes ({', '.join(map(str, sorted(shapes)))}); encode them one by one"
        )
    return torch.stack(tensors)


def _prepare(image: Any, size: int | None, factor: int) -> Tensor:
    if isinstance(image, Tensor):
        return image
    pixels = to_pixels(image)
    if size is not None:
        pixels = centre_crop(pixels, size)
    else:
        height, width = (side - side % factor for side in pixels.shape[:2])
        if not height or not width:
            raise ValueError(
                f"the image has {pixels.shape[1]} × {pixels.shape[0]} pixels; it needs at least {factor} × {factor}"
            )
        top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
        pixels = pixels[top : top + height, left : left + width]
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)


def to_pixels(image: Any) -> np.ndarray:
    """Pixels of an image, (H, W, 3) uint8: upright by its EXIF orientation, without transparency.

    Raises:
        ValueError: in one line, if it is not an image.
    """
    if isinstance(image, str | Path):
        try:
            with Image.open(image, formats=FORMATS) as opened:
                opened.load()
                image = opened
        except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            reason = getattr(error, "strerror", None) or f"not a readable {', '.join(FORMATS)}"
            raise ValueError(f"the image {image} cannot be read ({reason}); give another file") from error
    if isinstance(image, Image.Image):
        return np.array(to_rgb(ImageOps.exif_transpose(image)))
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return image
    shape = f" of shape {image.shape} and {image.dtype}" if isinstance(image, np.ndarray) else ""
    raise ValueError(
        f"an image must be a Pillow image, a file or an array (H, W, 3) of uint8, not {type(image).__name__}{shape}"
    )


def is_single(images: Any) -> bool:
    """Whether images of a user are one image, and not a list or a batch."""
    if isinstance(images, Tensor | np.ndarray):
        return images.ndim == 3
    return not isinstance(images, list | tuple)


def to_pillow(images: np.ndarray) -> list[Image.Image]:
    """Pillow images of an array (N, H, W, 3) uint8."""
    return [Image.fromarray(image) for image in images]
