"""Conversion and checks of the inputs of the models: images, codes, labels.

Types and shapes are always checked. Values are checked on CPUs only, where that needs no synchronisation, and never in
a compiled graph. Codes that are decoded to pixels are checked on every device, because that is not a hot path.
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
"""Floats beyond this magnitude are taken for levels 0 to 255. Decoder outputs exceed [-1, 1] only slightly."""
IMAGES = "images must be floats in [-1, 1] of shape (B, 3, H, W)"


def is_integer(dtype: torch.dtype) -> bool:
    """Whether a dtype is an integer type of any width, signed or unsigned. bool is not."""
    return not (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool)


def to_tensor(values: Any, name: str) -> Tensor:
    """Convert an array or (nested) lists to a tensor. A tensor is returned as it is.

    Args:
        values: a tensor, an array (uint16, uint32 and big-endian too) or lists.
        name: name of the argument in messages.

    Raises:
        ValueError: if the values are not numbers, or rows of a list have different lengths.
    """
    if isinstance(values, Tensor):
        return values
    if isinstance(values, list | tuple) and any(isinstance(each, Tensor) for each in values):
        shapes = {tuple(to_tensor(each, name).shape) for each in values}
        if len(shapes) > 1:
            raise ValueError(f"{name} in one list must have one shape, not {' and '.join(map(str, sorted(shapes)))}")
        return torch.stack([to_tensor(each, name) for each in values])
    try:
        array = np.asarray(values)
    except ValueError as error:  # rows of different lengths
        raise ValueError(f"{name} in one list must have one shape ({error})") from None
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} must be numbers in a tensor, an array or a list, not {_describe(values)}")
    if not array.size and isinstance(values, list | tuple):
        array = array.astype(np.int64)  # NumPy converts an empty list to floats
    native = np.require(array, array.dtype.newbyteorder("="), ["C", "W"])  # torch needs native, writable memory
    return torch.from_numpy(native)


def grids_of_codes(codes: CodeInput, codebook_size: int, device: torch.device) -> Tensor:
    """Convert codes to (B, h, w) int64.

    Args:
        codes: integers of any width in a tensor, an array or nested lists: (B, h, w), or (h, w) for one image.
        codebook_size: upper bound, exclusive.
        device: target device.

    Raises:
        ValueError: if type, shape or values do not fit.
    """
    found = to_tensor(codes, "codes")
    if not is_integer(found.dtype):
        raise ValueError(
            f"codes must be integers, not {_dtype(found)}; pass int64, or uint16 or uint32 as in code shards"
        )
    if found.dim() == 2:
        rows, length = found.shape
        side = isqrt(length)
        if rows != length and side * side == length and side > 1:
            raise ValueError(
                f"codes of shape ({rows}, {length}) are ambiguous: {rows} images as returned by generate, or one grid; "
                f"pass codes.reshape(-1, {side}, {side}) or codes[None]"
            )
        found = found[None]
    if found.dim() != 3:
        raise ValueError(f"codes must have shape (B, h, w), or (h, w) for one image, not {tuple(found.shape)}")
    found = found.to(device, torch.int64)
    if found.numel():
        low, high = int(found.min()), int(found.max())
        if low < 0 or high >= codebook_size:
            raise ValueError(
                f"codes {low} … {high} do not fit a codebook of {codebook_size} entries, 0 to {codebook_size - 1}; "
                "use the tokenizer that encoded them"
            )
    return found


def batch_of_images(images: ImageInput, factor: int, weight: Tensor) -> Tensor:
    """Convert images to (B, 3, H, W) floats in [-1, 1].

    Args:
        images: a tensor or an array, a Pillow image, or a list of images of one size. Floats in [-1, 1] have shape
            (B, 3, H, W) or (B, H, W, 3). uint8 levels are scaled, and may also be one image without B.
        factor: H and W must be multiples of this.
        weight: a weight of the model; the result gets its dtype and device.

    Raises:
        ValueError: if type, shape or values do not fit.
    """
    if isinstance(images, list | tuple) and not images:
        raise ValueError(f"{IMAGES}; this is an empty list")
    found = images if isinstance(images, Tensor) else to_tensor(_pixels(images), "images")
    if not found.dtype.is_floating_point and found.dtype is not torch.uint8:
        raise ValueError(f"{IMAGES}, not {_dtype(found)}; pass levels 0 to 255 as uint8")
    given = tuple(found.shape)
    if found.dim() == 3 and found.dtype is torch.uint8:
        found = found[None]
    if found.dim() == 4 and found.shape[1] != 3 and found.shape[3] == 3:
        found = found.permute(0, 3, 1, 2).contiguous()  # convolutions round differently in another memory layout
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
                f"{IMAGES}, not {low:.4g} to {high:.4g}; pass levels 0 to 255 as uint8, or images / 127.5 - 1"
            )
    if found.dtype is not weight.dtype or found.device != weight.device:
        found = found.to(weight.device, weight.dtype)
    return found


def _advice(shape: tuple[int, ...]) -> str:
    if len(shape) in (3, 4) and 4 in (shape[-1], shape[-3]):
        return "; remove the fourth channel, transparency"
    if len(shape) == 2 or (len(shape) in (3, 4) and 1 in (shape[-1], shape[-3])):
        return "; repeat grey images for three channels"
    return ""


def _pixels(images: Any) -> Any:
    """Convert Pillow images to arrays (H, W, 3) uint8."""
    if isinstance(images, Image.Image):
        return np.asarray(images.convert("RGB"))
    if isinstance(images, list | tuple):
        return [_pixels(image) for image in images]
    return images


def check_codes(codes: Tensor, vocab_size: int, name: str = "tokens") -> Tensor:
    """Check codes and convert them to int64 or int32, as an embedding needs them.

    Args:
        codes: integers of any width and shape.
        vocab_size: upper bound, exclusive. Checked on CPUs only.
        name: name of the argument in messages.

    Raises:
        ValueError: if the codes are not integers, or out of range.
    """
    if codes.dtype not in (torch.int64, torch.int32):
        if not is_integer(codes.dtype):
            raise ValueError(f"{name} must be integers, not {_dtype(codes)}; pass int64")
        codes = codes.long()
    if codes.device.type == "cpu" and codes.numel() and not torch.compiler.is_compiling():
        low, high = (int(end) for end in codes.aminmax())
        if low < 0 or high >= vocab_size:
            raise ValueError(f"{name} {low} … {high} are out of range; the model takes 0 to {vocab_size - 1}")
    return codes


def check_positions(positions: Tensor, tokens: Tensor | None, block_size: int, name: str = "positions") -> Tensor:
    """Check the grid positions of tokens and convert them to int64 or int32.

    Args:
        positions: (T,) or (B, T) integers in [0, ``block_size``); the range is checked on CPUs only.
        tokens: (B, T), the codes at these positions.
        block_size: number of codes of an image.
        name: name of the argument in messages.

    Raises:
        ValueError: if shape, type or values do not fit.
    """
    shape = (0, 0) if tokens is None else tuple(tokens.shape)
    if tuple(positions.shape) not in (shape, shape[1:]):
        raise ValueError(
            f"{name} must have shape ({shape[1]},) or {shape}, one for each token, not {tuple(positions.shape)}"
        )
    return check_codes(positions, block_size, name)


def check_targets(target_aware: bool, positions: Tensor | None, targets: Tensor | None) -> None:
    """Check that the targets of outputs are given if and only if the model needs them.

    Args:
        target_aware: whether the model is target-aware.
        positions: positions of the tokens, or None for the next ones.
        targets: positions that the outputs predict, or None for the next ones.

    Raises:
        ValueError: if a target-aware model gets positions without targets, or another model gets targets.
    """
    if target_aware and positions is not None and targets is None:
        raise ValueError("a target-aware model needs targets with positions: the position that each output predicts")
    if targets is not None and not target_aware:
        raise ValueError("targets were passed to a model that is not target-aware; leave them out")


def _dtype(values: Tensor) -> str:
    return str(values.dtype).removeprefix("torch.")


def _describe(values: Any) -> str:
    """Type of a value, followed by the start of its text if the type has a readable one."""
    printable = isinstance(values, str | bytes | dict | list | tuple)
    return f"{type(values).__name__} {' '.join(repr(values).split()):.40}" if printable else type(values).__name__
