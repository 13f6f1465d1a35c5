"""What people pass to the models: taken where it has one meaning, refused in one line where it has none.

Types and shapes are looked at always, which costs nothing; values on CPUs alone, where nobody waits for a device, and
never while a graph is compiled. Codes to decode are an exception: decoding them is no hot path.
"""

from collections.abc import Sequence
from math import isqrt
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

ImageInput = Tensor | np.ndarray | Image.Image | Sequence[Any]
CodeInput = Tensor | np.ndarray | Sequence[Any]

BYTES_AS_FLOATS = 10.0
"""Floats beyond this are no decoder's output that leaves [-1, 1] a little, but levels of 0 to 255."""
IMAGES = "images must be floats in [-1, 1] of shape (B, 3, H, W)"


def is_integer(dtype: torch.dtype) -> bool:
    """Whether a dtype is one of whole numbers, of any width, signed or not; bool is not."""
    return not (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool)


def to_tensor(values: Any, what: str) -> Tensor:
    """A tensor of an array or of (nested) lists; tensors are taken as they are.

    Args:
        values: to take; uint16 and big-endian arrays, too.
        what: these are, for messages.

    Raises:
        ValueError: if they are no numbers, or rows of a list have different lengths.
    """
    if isinstance(values, Tensor):
        return values
    if isinstance(values, list | tuple) and any(isinstance(each, Tensor) for each in values):
        shapes = {tuple(to_tensor(each, what).shape) for each in values}
        if len(shapes) > 1:
            raise ValueError(f"{what} in one list must have one shape, not {' and '.join(map(str, sorted(shapes)))}")
        return torch.stack([to_tensor(each, what) for each in values])
    try:
        array = np.asarray(values)
    except ValueError as error:  # rows of different lengths
        raise ValueError(f"{what} in one list must have one shape ({error})") from None
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{what} must be numbers in a tensor, an array or a list, not {_named(values)}")
    if not array.size and isinstance(values, list | tuple):
        array = array.astype(np.int64)  # numpy takes an empty list for floats
    native = np.require(array, array.dtype.newbyteorder("="), ["C", "W"])  # what torch can share
    return torch.from_numpy(native)


def grids_of_codes(codes: CodeInput, codebook_size: int, device: torch.device) -> Tensor:
    """Codes as (B, h, w) int64.

    Args:
        codes: whole numbers of any width in a tensor, an array or nested lists, (B, h, w), or (h, w) of one image.
        codebook_size: they must be below it.
        device: where they go.

    Raises:
        ValueError: if their type, shape or values do not fit.
    """
    found = to_tensor(codes, "codes")
    if not is_integer(found.dtype):
        raise ValueError(f"codes must be whole numbers, not {_dtype(found)}; give them as int64 or as stored, uint16")
    if found.dim() == 2:
        rows, length = found.shape
        side = isqrt(length)
        if rows != length and side * side == length and side > 1:
            raise ValueError(
                f"codes of shape ({rows}, {length}) may be {rows} images in rows, as generate gives them, or one grid; "
                f"give codes.reshape(-1, {side}, {side}) or codes[None]"
            )
        found = found[None]
    if found.dim() != 3:
        raise ValueError(f"codes must have shape (B, h, w), or (h, w) of one image, not {tuple(found.shape)}")
    found = found.to(device, torch.int64)
    if found.numel():
        low, high = int(found.min()), int(found.max())
        if low < 0 or high >= codebook_size:
            raise ValueError(
                f"codes {low} … {high} do not fit a codebook of {codebook_size} entries, whose codes are 0 to "
                f"{codebook_size - 1}; use the tokenizer that made them"
            )
    return found


def batch_of_images(images: ImageInput, factor: int, weight: Tensor) -> Tensor:
    """Images as (B, 3, H, W) in [-1, 1].

    Args:
        images: floats in [-1, 1], (B, 3, H, W) or (B, H, W, 3); or uint8 levels, which are scaled, likewise or without
            B of one image; in a tensor or an array, a Pillow image, or a list of images of one size.
        factor: H and W must be multiples of it.
        weight: of the model; gives dtype and device.

    Raises:
        ValueError: if their type, shape or values do not fit.
    """
    if isinstance(images, list | tuple) and not images:
        raise ValueError(f"{IMAGES}; this is an empty list")
    found = images if isinstance(images, Tensor) else to_tensor(_pixels(images), "images")
    if not found.dtype.is_floating_point and found.dtype is not torch.uint8:
        raise ValueError(f"{IMAGES}; these are {_dtype(found)}: as levels 0 to 255 give them as uint8")
    given = tuple(found.shape)
    if found.dim() == 3 and found.dtype is torch.uint8:
        found = found[None]
    if found.dim() == 4 and found.shape[1] != 3 and found.shape[3] == 3:
        found = found.permute(0, 3, 1, 2).contiguous()  # another order in memory is rounded differently
    if found.dim() != 4 or found.shape[1] != 3 or found.shape[2] % factor or found.shape[3] % factor:
        raise ValueError(
            f"images must have shape (B, 3, H, W) with H and W multiples of {factor}, not {given}{_advice(given)}"
        )
    if 0 in found.shape[2:]:
        raise ValueError(f"images must have shape (B, 3, H, W) with H and W at least {factor}, not {given}")
    if found.dtype is torch.uint8:
        return (found.contiguous().to(weight.device, torch.float32) / 127.5 - 1.0).to(weight.dtype)
    if found.device.type == "cpu" and found.numel() and not torch.compiler.is_compiling():
        low, high = (float(end) for end in found.detach().aminmax())
        if max(-low, high) > BYTES_AS_FLOATS:
            raise ValueError(
                f"{IMAGES}; these are {low:.4g} to {high:.4g}: give levels 0 to 255 as uint8, or images / 127.5 - 1"
            )
    if found.dtype is not weight.dtype or found.device != weight.device:
        found = found.to(weight.device, weight.dtype)
    return found


def _advice(shape: tuple[int, ...]) -> str:
    if len(shape) in (3, 4) and 4 in (shape[-1], shape[-3]):
        return "; leave the fourth channel, transparency, out"
    if len(shape) == 2 or (len(shape) in (3, 4) and 1 in (shape[-1], shape[-3])):
        return "; repeat grey images for three channels"
    return ""


def _pixels(images: Any) -> Any:
    """Pillow's images as arrays (H, W, 3) uint8."""
    if isinstance(images, Image.Image):
        return np.asarray(images.convert("RGB"))
    if isinstance(images, list | tuple):
        return [_pixels(image) for image in images]
    return images


def check_codes(codes: Tensor, vocab_size: int, name: str = "tokens") -> Tensor:
    """Codes as something that an embedding takes: int64 or int32.

    Args:
        codes: of any shape, whole numbers of any width.
        vocab_size: they must be below it; this is seen to on CPUs.
        name: what they are called in messages.

    Raises:
        ValueError: if they are no whole numbers, or out of range.
    """
    if codes.dtype not in (torch.int64, torch.int32):
        if not is_integer(codes.dtype):
            raise ValueError(f"{name} must be whole numbers, not {_dtype(codes)}; give int64")
        codes = codes.long()
    if codes.device.type == "cpu" and codes.numel() and not torch.compiler.is_compiling():
        low, high = (int(end) for end in codes.aminmax())
        if low < 0 or high >= vocab_size:
            raise ValueError(f"{name} {low} … {high} are out of range; the model takes 0 to {vocab_size - 1}")
    return codes


def _dtype(values: Tensor) -> str:
    return str(values.dtype).removeprefix("torch.")


def _named(values: Any) -> str:
    named = isinstance(values, str | bytes | dict | list | tuple)
    return f"{type(values).__name__} {' '.join(repr(values).split()):.40}" if named else type(values).__name__
