"""Masks of users → the codes of an image that are generated again.

Shapes: n images of H × W pixels, h × w codes of an image, L = h · w, of which K are known.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from llamagen.centre_crop import crop_parts
from llamagen.models.inputs import to_tensor
from llamagen.pretrained.images import ImageLike, to_pixels
from llamagen.rgb import FORMATS

MaskLike = Image.Image | np.ndarray | Tensor | Path | str
"""A mask: Pillow, a file, an array or tensor (H, W) of bool or uint8, or (h, w) of bool."""
Pixels = np.ndarray | Tensor
MASKED = 128
"""Level from which a pixel of a mask is white."""


class KnownCodes(NamedTuple):
    """Images with the same number of known codes, to be generated in one call.

    Attributes:
        rows: number of each image.
        order: (rows, L) int64, order of generation: the known codes first, then the missing ones, each in raster order.
        kept: (rows, K) int64, the known codes.
    """

    rows: list[int]
    order: Tensor
    kept: Tensor


def known_codes(codes: Tensor, masks: Tensor) -> list[KnownCodes]:
    """Group images by the number of codes that their masks leave.

    Args:
        codes: (n, h, w) int64.
        masks: (n, h, w) bool on the same device, True for codes that are generated again.
    """
    order = masks.flatten(1).int().argsort(dim=1, stable=True)
    ordered = codes.flatten(1).gather(1, order)
    counts = (~masks.flatten(1)).sum(1).tolist()
    groups = []
    for count in dict.fromkeys(counts):
        rows = [row for row, each in enumerate(counts) if each == count]
        groups.append(KnownCodes(rows, order[rows], ordered[rows, :count]))
    return groups


def matched(codes: Tensor, masks: Any, conditions: list[Any]) -> tuple[Tensor, Tensor, list[Any]]:
    """Codes, masks and conditions of n images, each given for all images or for each.

    Args:
        codes: (n, h, w) or (1, h, w).
        masks: bool (h, w), (1, h, w) or (n, h, w), in a tensor, an array or lists.
        conditions: n or 1 classes or prompts.

    Raises:
        ValueError: in one line, if their numbers or shapes do not match.
    """
    found = to_tensor(masks, "mask")
    if found.dtype is not torch.bool or found.dim() not in (2, 3) or found.shape[-2:] != codes.shape[1:]:
        raise ValueError(
            f"the mask has the shape {tuple(found.shape)} and {str(found.dtype).removeprefix('torch.')}; it must be "
            f"bool of shape {tuple(codes.shape[1:])}, or one for each image, True for codes that are generated again"
        )
    found = (found[None] if found.dim() == 2 else found).to(codes.device)
    counts = {len(codes), len(found), len(conditions)}
    count = 0 if 0 in counts else max(counts)
    if counts - {1, count}:
        raise ValueError(
            f"there are {len(codes)} images, {len(found)} masks and {len(conditions)} conditions; give one of each, or "
            "as many as images"
        )
    conditions = conditions * count if len(conditions) == 1 else conditions
    return codes.expand(count, -1, -1), found.expand(count, -1, -1), conditions


def pixels_of_images(images: ImageLike | Sequence[ImageLike]) -> list[Pixels]:
    """Images as arrays (H, W, 3) of their full size; tensors (3, H, W), which are not resized, as they are.

    Raises:
        ValueError: in one line, if there is no image, or one cannot be read.
    """
    if isinstance(images, Tensor | np.ndarray):
        each: list[Any] = list(images) if images.ndim == 4 else [images]
    else:
        each = list(images) if isinstance(images, list | tuple) else [images]
    if not each:
        raise ValueError("there are no images; give at least one")
    return [image if isinstance(image, Tensor) else to_pixels(image) for image in each]


def is_one_mask(masks: Any) -> bool:
    """Whether masks of a user are one mask, and not several."""
    if isinstance(masks, Tensor | np.ndarray):
        return masks.ndim == 2
    return not isinstance(masks, list | tuple)


def masks_of_codes(masks: Any, images: Sequence[Pixels], size: int, grid: int) -> Tensor:
    """Codes that are generated again: all whose cell of the grid has a masked pixel.

    Args:
        masks: one for all images, or one for each; of the size of the image before it is cropped and resized. White,
            True and 1 mean "generate again". Arrays (h, w) of bool name codes instead of pixels.
        images: (H, W, 3), or tensors (3, H, W).
        size: side of the cropped and resized image in pixels.
        grid: h = w.

    Returns:
        (n, h, w) bool on the CPU.

    Raises:
        ValueError: in one line, if a mask cannot be read, or has another size than its image.
    """
    each: list[Any] = [masks] if is_one_mask(masks) else list(masks)
    fits = len(each) in (1, len(images))
    is_array = isinstance(masks, Tensor | np.ndarray) and masks.ndim == 3
    if not fits and is_array and masks.shape[-1] in (1, 3, 4) and masks.shape[1:] != (grid, grid):
        raise ValueError(f"the mask has the shape {tuple(masks.shape)}; give an array (H, W), without channels")
    read = [_read(mask) for mask in each]
    if not fits:
        raise ValueError(
            f"there are {len(each)} masks for {len(images)} image{'s' * (len(images) != 1)}; give one mask, or one for "
            "each image"
        )
    pairs = zip(read * len(images) if len(read) == 1 else read, images, strict=True)
    return torch.from_numpy(np.stack([_cells(mask, image, size, grid) for mask, image in pairs]))


def _read(mask: Any) -> np.ndarray:
    """A mask as bool (H, W)."""
    if isinstance(mask, str | Path):
        try:
            with Image.open(mask, formats=FORMATS) as opened:
                opened.load()
                mask = opened
        except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            reason = getattr(error, "strerror", None) or f"not a readable {', '.join(FORMATS)}"
            raise ValueError(f"the mask {mask} cannot be read ({reason}); give another file") from error
    if isinstance(mask, Image.Image):
        mask = ImageOps.exif_transpose(mask)
        if mask.has_transparency_data and np.asarray(mask.convert("RGBA"))[..., 3].min() < 255:
            raise ValueError(
                "the mask is transparent; give a black-and-white image, in which white marks what to generate again"
            )
        mask = np.asarray(mask.convert("L"))
    array = mask.detach().cpu().numpy() if isinstance(mask, Tensor) else mask
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype not in (np.bool_, np.uint8):
        shape = f" of shape {tuple(array.shape)} and {array.dtype}" if isinstance(array, np.ndarray) else ""
        raise ValueError(
            "a mask must be a black-and-white image, a file, or an array (H, W) of bool or uint8, not "
            f"{type(mask).__name__}{shape}"
        )
    if array.dtype == np.bool_:
        return array
    levels = array * np.uint8(255) if array.size and array.max() == 1 else array  # 0 and 1
    return np.asarray(levels >= MASKED)


def _cells(mask: np.ndarray, image: Pixels, size: int, grid: int) -> np.ndarray:
    """Mask (h, w) of the codes of an image."""
    if mask.shape == (grid, grid):
        return mask
    height, width = image.shape[-2:] if isinstance(image, Tensor) else image.shape[:2]
    if mask.shape != (height, width):
        raise ValueError(
            f"the mask has {mask.shape[1]} × {mask.shape[0]} pixels, but the image {width} × {height}; give a mask of "
            f"the image's size, or one of {grid} × {grid} codes"
        )
    rows, columns = crop_parts(height, width, size, grid)
    strips = np.stack([mask[start:end].any(0) for start, end in rows])
    return np.stack([strips[:, start:end].any(1) for start, end in columns], axis=1)
