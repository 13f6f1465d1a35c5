"""Codes → pixels, some pictures at a time, and on GPUs beside the next batch's codes.

B pictures of H × W pixels, h × w codes.
"""

from copy import deepcopy
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from llamagen.models.vqgan import VQGAN, to_uint8

PIXELS = {"cpu": 2**14, "cuda": 2**20}
"""Pixels that are decoded at a time, by kind of device: enough to keep it busy."""


class Pictures:
    """Pictures that a GPU may still be working on.

    Args:
        images: (B, H, W, 3) uint8.
        ready: recorded behind them on their stream; None if they are there.
    """

    def __init__(self, images: Tensor, ready: "torch.cuda.Event | None" = None) -> None:
        self._images, self._ready = images, ready
        self._lock = Lock()  # several threads may ask
        self._array: np.ndarray | None = None

    def tensor(self) -> Tensor:
        """(B, H, W, 3) uint8 on their device; what is computed with them next waits for them."""
        if self._ready is not None:
            stream = torch.cuda.current_stream(self._images.device)
            stream.wait_event(self._ready)
            self._images.record_stream(stream)
        return self._images

    def numpy(self) -> np.ndarray:
        """(B, H, W, 3) uint8, as soon as they are there; only the calling thread waits."""
        with self._lock:
            if self._array is None:
                self._array = self._fetched()
            return self._array

    def __len__(self) -> int:
        """B."""
        return len(self._images)

    def _fetched(self) -> np.ndarray:
        if self._ready is None:
            return self._images.cpu().numpy()
        self._ready.synchronize()
        with torch.cuda.stream(torch.cuda.Stream(self._images.device)):  # not behind what this thread's stream does
            return self._images.cpu().numpy()


class PixelDecoder:
    """The decoder of a tokenizer for sampling: channels last, in the dtype of the sampling.

    Pictures are decoded so many at a time whatever the batch, so a picture's pixels do not depend on the batch.

    Args:
        tokenizer: its decoder is used, or a copy in the dtype if that is not float32.
        device: where the codes are.
        dtype: of the computation.
    """

    def __init__(self, tokenizer: VQGAN, device: torch.device, dtype: torch.dtype) -> None:
        tokenizer = tokenizer if dtype is torch.float32 else deepcopy(tokenizer)
        self.tokenizer = tokenizer.to(device, dtype).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @torch.no_grad()
    def __call__(self, codes: Tensor) -> Pictures:
        """Decode.

        Args:
            codes: (B, h, w) int64.
        """
        if self._stream is None:
            return Pictures(self._decode(codes))
        self._stream.wait_stream(torch.cuda.current_stream(codes.device))
        codes.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            return Pictures(self._decode(codes), self._stream.record_event())

    def _decode(self, codes: Tensor) -> Tensor:
        tokenizer, side = self.tokenizer, self.tokenizer.config.downsampling
        pixels = codes.shape[1] * codes.shape[2] * side**2
        count = max(1, PIXELS.get(codes.device.type, PIXELS["cpu"]) // pixels)
        images = []
        for part in codes.split(count):
            full = torch.cat([part, part[:1].expand(count - len(part), -1, -1)])
            with torch.autocast(codes.device.type, enabled=False):
                # Not by `decode_codes`, which looks at the codes and so waits for them.
                looked_up = tokenizer.quantize.lookup(full).contiguous(memory_format=torch.channels_last)
                images.append(to_uint8(tokenizer.decode(looked_up))[: len(part)].permute(0, 2, 3, 1))
        if not images:
            height, width = codes.shape[1] * side, codes.shape[2] * side
            return torch.zeros(0, height, width, 3, dtype=torch.uint8, device=codes.device)
        return torch.cat(images).contiguous()
