"""Codes → pixels, a few images at a time, and on GPUs in parallel with the codes of the next batch.

Shapes: B images of h × w codes, decoded to H' × W' pixels and resized to H × W.
"""

from collections.abc import Sequence
from copy import deepcopy
from math import isqrt
from threading import Lock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llamagen.finite import FiniteCheck, find_source, not_finite, not_finite_error
from llamagen.models.vqgan import VQGAN, to_uint8
from llamagen.option_checks import check_integer

PIXELS = {"cpu": 2**14, "cuda": 2**18}
"""Number of pixels decoded at a time, by type of device: enough to keep it busy, with little padding of the last part.
"""


class Images:
    """Images that a GPU may still be decoding. Several threads may read them.

    Args:
        parts: batches of images, uint8 (…, H, W, 3), B images in total.
        ready: for each part, the CUDA event recorded after it was queued; None if it is complete.
        checks: for each part, a check for values that are not finite, run when the images are read; None if the part
            was already checked. Empty if all parts were.
    """

    def __init__(
        self,
        parts: Sequence[Tensor],
        ready: "Sequence[torch.cuda.Event | None]",
        checks: Sequence[FiniteCheck | None] = (),
    ) -> None:
        self._parts, self._ready = list(parts), list(ready)
        self._checks = list(checks) or [None] * len(self._parts)
        self._lock = Lock()
        self._array: np.ndarray | None = None

    @classmethod
    def concatenate(cls, images: "Sequence[Images]") -> "Images":
        """Join the images of several batches."""
        return cls(
            [part for each in images for part in each._parts],
            [event for each in images for event in each._ready],
            [check for each in images for check in each._checks],
        )

    def tensor(self) -> Tensor:
        """(B, H, W, 3) uint8 on the device of the images.

        Raises:
            FloatingPointError: if some pixels are not finite.
        """
        for part, ready, check in zip(self._parts, self._ready, self._checks, strict=True):
            if ready is not None:
                stream = torch.cuda.current_stream(part.device)
                stream.wait_event(ready)
                part.record_stream(stream)
            if check is not None:
                check()
        return torch.cat(self._parts)

    def numpy(self) -> np.ndarray:
        """(B, H, W, 3) uint8 on the CPU. Only the calling thread waits for the device.

        Raises:
            FloatingPointError: if some pixels are not finite.
        """
        with self._lock:
            if self._array is None:
                for check, ready in zip(self._checks, self._ready, strict=True):
                    if check is not None:
                        check.raise_if(torch.from_numpy(_fetch(check.broken, ready)))
                self._array = np.concatenate(list(map(_fetch, self._parts, self._ready)))
            return self._array


def _fetch(images: Tensor, ready: "torch.cuda.Event | None") -> np.ndarray:
    if ready is None:
        return images.cpu().numpy()
    ready.synchronize()
    with torch.cuda.stream(torch.cuda.Stream(images.device)):  # does not wait for work queued on the current stream
        return images.cpu().numpy()


def check_image_size(image_size: int | None) -> None:
    """Check an option ``image_size``.

    Args:
        image_size: side in pixels; None for the size as decoded.

    Raises:
        ValueError: if it is not an integer of at least 1.
    """
    if image_size is not None and (not isinstance(image_size, int) or image_size < 1):
        raise ValueError(f"image_size is {image_size}; it must be at least 1, or null for images as decoded")
    if image_size is not None:
        check_integer("image_size", image_size)


def to_pixels(decoded: Tensor, height: int, width: int) -> Tensor:
    """Convert decoded images to bytes. Images of another size are resized first.

    Resizing is that of the published evaluation: bicubic interpolation (Keys' kernel with a = −0.75) in float32 without
    antialiasing. footgun: values are clamped to [-1, 1] after resizing, not before.

    Args:
        decoded: (B, 3, H', W') floats, about [-1, 1], not clamped.
        height: H, at least 1.
        width: W, at least 1.

    Returns:
        (B, H, W, 3) uint8.
    """
    if decoded.shape[2:] != (height, width):
        decoded = F.interpolate(decoded.float(), (height, width), mode="bicubic", align_corners=False, antialias=False)
    return to_uint8(decoded).permute(0, 2, 3, 1)


class PixelDecoder:
    """The tokenizer's decoder for sampling: in channels-last layout and in the dtype of sampling.

    A fixed number of images is decoded at a time, so the pixels of an image do not depend on the batch.

    Args:
        tokenizer: the tokenizer; its weights are copied if they have another dtype or device.
        device: device of the codes.
        dtype: dtype of the computation.
        image_size: side in pixels to which images are resized, see :func:`to_pixels`; None keeps the size as decoded.

    Raises:
        ValueError: if ``image_size`` is below 1.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self, tokenizer: VQGAN, device: torch.device, dtype: torch.dtype, image_size: int | None = None
    ) -> None:
        check_image_size(image_size)
        self._side, self._image_size = tokenizer.config.downsampling, image_size
        weight = tokenizer.post_quant_conv.weight
        parts: list[nn.Module] = [tokenizer.quantize, tokenizer.post_quant_conv, tokenizer.decoder]
        if weight.dtype is not dtype or weight.device != device:
            parts = [deepcopy(part).to(device, dtype).to(memory_format=torch.channels_last) for part in parts]  # type: ignore[call-overload]
        self._quantize, self._post, self._decoder = (part.eval() for part in parts)
        self._dtype = dtype
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @torch.no_grad()
    def __call__(self, codes: Tensor) -> Images:
        """Decode.

        Args:
            codes: (B, h, w) int64, below the codebook size; this is not checked.

        Returns:
            B images; square if there is an ``image_size``.

        Raises:
            FloatingPointError: if some pixels are not finite; on a GPU when the images are read.
        """
        if self._stream is None:
            images, broken = self._decode(codes)
            self._finite_check(broken, codes)()
            return Images([images], [None])
        self._stream.wait_stream(torch.cuda.current_stream(codes.device))
        codes.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            images, broken = self._decode(codes)
            return Images([images], [self._stream.record_event()], [self._finite_check(broken, codes)])

    @torch.no_grad()
    def preview(self, codes: Tensor, rows: int) -> Tensor:
        """Decode the first rows of partly generated grids, to show progress.

        The result differs from the same part of the final image: near the lower edge convolutions see padding instead
        of the rows that follow, and normalisation and attention use all rows that there are. When more rows follow,
        pixels near the lower edge change visibly, and the others slightly. Previews are not resized to ``image_size``
        and not checked for values that are not finite. Final images do not depend on them.

        Args:
            codes: (B, L) int64 of square grids in raster order, or (B, h, w); below the codebook size.
            rows: number of complete rows, 1 … h; later codes are not read.

        Returns:
            (B, rows · f, W, 3) uint8 on the device of the codes, with f pixels for each code.

        Raises:
            ValueError: if ``rows`` is not in 1 … h.
        """
        if codes.dim() == 2:
            side = isqrt(codes.shape[1])
            codes = codes.unflatten(1, (side, side))
        if not 1 <= rows <= codes.shape[1]:
            raise ValueError(f"rows is {rows}; a preview of this grid has 1 to {codes.shape[1]} rows")
        height, width = rows * self._side, codes.shape[2] * self._side
        parts = codes[:, :rows].split(_images_at_a_time(codes.device, height, width))
        return torch.cat([to_pixels(self._forward(part), height, width) for part in parts])

    def _finite_check(self, broken: Tensor, codes: Tensor) -> FiniteCheck:
        parts = {"quantize": self._quantize, "post_quant_conv": self._post, "decoder": self._decoder}

        def explain(rows: list[int]) -> FloatingPointError:
            blame = find_source(parts, lambda: self._decode(codes[rows[:1]]))
            precision = str(self._dtype).removeprefix("torch.")
            return not_finite_error("the pixels that the tokenizer decodes are", precision, blame, rows, len(broken))

        return FiniteCheck(broken, explain)

    @torch.no_grad()
    def _decode(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, H, W, 3) uint8, and (B,) bool: which of them are not finite."""
        height, width = codes.shape[1] * self._side, codes.shape[2] * self._side
        count = _images_at_a_time(codes.device, height, width)
        if self._image_size is not None:
            height = width = self._image_size
        images = codes.new_empty((len(codes), height, width, 3), dtype=torch.uint8)
        broken = codes.new_zeros(len(codes), dtype=torch.bool)
        for start in range(0, len(codes), count):
            part = codes[start : start + count]
            full = torch.cat([part, part[:1].expand(count - len(part), -1, -1)])
            decoded = self._forward(full)
            resized = to_pixels(decoded, height, width)
            broken[start : start + count] = not_finite(decoded)[: len(part)]
            images[start : start + count] = resized[: len(part)]
        return images, broken

    def _forward(self, codes: Tensor) -> Tensor:
        """Codes (B, h, w) → (B, 3, H', W') in the dtype of the decoder."""
        with torch.autocast(codes.device.type, enabled=False):
            latent = self._quantize.lookup(codes).to(self._dtype).contiguous(memory_format=torch.channels_last)  # type: ignore[operator]
            decoded: Tensor = self._decoder(self._post(latent))
        return decoded


def _images_at_a_time(device: torch.device, height: int, width: int) -> int:
    return max(1, PIXELS.get(device.type, PIXELS["cpu"]) // (height * width))
