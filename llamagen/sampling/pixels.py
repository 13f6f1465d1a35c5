"""Codes → pixels, some images at a time, and on GPUs beside the next batch's codes.

B images of H × W pixels, as decoded H' × W', h × w codes.
"""

from collections.abc import Sequence
from copy import deepcopy
from threading import Lock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llamagen.finite import FiniteCheck, find_source, not_finite, not_finite_error
from llamagen.models.vqgan import VQGAN, to_uint8
from llamagen.option_checks import check_integer

PIXELS = {"cpu": 2**14, "cuda": 2**18}
"""Pixels that are decoded at a time, by kind of device: enough to keep it busy, and few to fill up the last time."""


class Images:
    """Images that a GPU may still be working on.

    Args:
        parts: (…, H, W, 3) uint8 tensors, together B images.
        ready: for each part what was recorded behind it on its stream; None if it is there.
        checks: whether parts that are not there yet are finite, looked at when they are fetched.
    """

    def __init__(
        self,
        parts: Sequence[Tensor],
        ready: "Sequence[torch.cuda.Event | None]",
        checks: Sequence[FiniteCheck | None] = (),
    ) -> None:
        self._parts, self._ready = list(parts), list(ready)
        self._checks = list(checks) or [None] * len(self._parts)
        self._lock = Lock()  # several threads may ask
        self._array: np.ndarray | None = None

    @classmethod
    def together(cls, images: "Sequence[Images]") -> "Images":
        """Those of several batches as one."""
        return cls(
            [part for each in images for part in each._parts],
            [event for each in images for event in each._ready],
            [check for each in images for check in each._checks],
        )

    def tensor(self) -> Tensor:
        """(B, H, W, 3) uint8 on their device.

        Raises:
            FloatingPointError: if some are not finite.
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
        """(B, H, W, 3) uint8, as soon as they are there; only the calling thread waits.

        Raises:
            FloatingPointError: if some are not finite.
        """
        with self._lock:
            if self._array is None:
                for check, ready in zip(self._checks, self._ready, strict=True):
                    if check is not None:
                        check.raise_if(torch.from_numpy(_fetched(check.broken, ready)))
                self._array = np.concatenate(list(map(_fetched, self._parts, self._ready)))
            return self._array


def _fetched(images: Tensor, ready: "torch.cuda.Event | None") -> np.ndarray:
    if ready is None:
        return images.cpu().numpy()
    ready.synchronize()
    with torch.cuda.stream(torch.cuda.Stream(images.device)):  # not behind what this thread's stream does
        return images.cpu().numpy()


def check_image_size(image_size: int | None) -> None:
    """Refuse a side that no image can have.

    Args:
        image_size: in pixels; None for images as decoded.

    Raises:
        ValueError: if it is below 1, or no whole number.
    """
    if image_size is not None and (not isinstance(image_size, int) or image_size < 1):
        raise ValueError(f"image_size is {image_size}; it must be at least 1, or null for images as decoded")
    if image_size is not None:
        check_integer("image_size", image_size)


def to_pixels(decoded: Tensor, height: int, width: int) -> Tensor:
    """Bytes of images, which are resized first if they are of another size.

    Resized as in the published evaluation, in float32: by bicubic interpolation (Keys' kernel with a = −0.75) without
    antialiasing, of values that are clamped only afterwards.

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
    """The decoder of a tokenizer for sampling: channels last, in the dtype of the sampling.

    Images are decoded so many at a time whatever the batch, so an image's pixels do not depend on the batch.

    Args:
        tokenizer: left as it is; what decodes is copied, if it is in another dtype or on another device.
        device: where the codes are.
        dtype: of the computation.
        image_size: side in pixels to which images are resized, see :func:`to_pixels`; None leaves them as decoded.

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
            codes: (B, h, w) int64, which are taken to be in the codebook.

        Returns:
            B images, with an ``image_size`` square whatever h and w.

        Raises:
            FloatingPointError: if some are not finite; of a GPU's images when they are fetched.
        """
        if self._stream is None:
            images, broken = self._decode(codes)
            self._check_of(broken, codes)()
            return Images([images], [None])
        self._stream.wait_stream(torch.cuda.current_stream(codes.device))
        codes.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            images, broken = self._decode(codes)
            return Images([images], [self._stream.record_event()], [self._check_of(broken, codes)])

    def _check_of(self, broken: Tensor, codes: Tensor) -> FiniteCheck:
        parts = {"quantize": self._quantize, "post_quant_conv": self._post, "decoder": self._decoder}

        def explain(rows: list[int]) -> FloatingPointError:
            blame = find_source(parts, lambda: self._decode(codes[rows[:1]]))
            precision = str(self._dtype).removeprefix("torch.")
            return not_finite_error("the pixels that the tokenizer decodes are", precision, blame, rows, len(broken))

        return FiniteCheck(broken, explain)

    @torch.no_grad()
    def _decode(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, H, W, 3) uint8, and (B,) bool: which are not finite."""
        height, width = codes.shape[1] * self._side, codes.shape[2] * self._side
        count = max(1, PIXELS.get(codes.device.type, PIXELS["cpu"]) // (height * width))
        if self._image_size is not None:
            height = width = self._image_size
        images = codes.new_empty((len(codes), height, width, 3), dtype=torch.uint8)
        broken = codes.new_zeros(len(codes), dtype=torch.bool)
        for start in range(0, len(codes), count):
            part = codes[start : start + count]
            full = torch.cat([part, part[:1].expand(count - len(part), -1, -1)])
            with torch.autocast(codes.device.type, enabled=False):
                latent = self._quantize.lookup(full).to(self._dtype).contiguous(memory_format=torch.channels_last)  # type: ignore[operator]
                decoded = self._decoder(self._post(latent))
                resized = to_pixels(decoded, height, width)
            broken[start : start + count] = not_finite(decoded)[: len(part)]
            images[start : start + count] = resized[: len(part)]
        return images, broken
