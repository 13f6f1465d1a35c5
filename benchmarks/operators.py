"""Time of a training step by kind of operator, and the operations and best rate of its convolutions."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

KINDS = {
    "convolutions": ("conv",),
    "GroupNorm and SiLU": ("group_norm", "silu", "_NormSiLU"),
    "attention, products": ("attention", "bmm", "mm", "addmm", "softmax"),
    "optimizer, EMA": ("adam", "lerp", "Optimizer.step"),
    "copies, casts": ("copy_", "cat", "contiguous"),
}
"""Parts of operator names; an operator that matches none is counted as ``OTHERS``."""
OTHERS = "everything else"


def kind_of(operator: str) -> str:
    """The first kind with a word that the operator's name contains."""
    return next((kind for kind, words in KINDS.items() if any(word in operator for word in words)), OTHERS)


class OperatorTimes:
    """Profiles the operators between :meth:`start` and :meth:`stop`."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self._profile: Any = profile(activities=[ProfilerActivity.CUDA if self.cuda else ProfilerActivity.CPU])

    def start(self) -> None:
        """Start profiling."""
        self._profile.start()

    def stop(self) -> dict[str, float]:
        """Seconds by kind of operator; an operator's time excludes the operators that it calls."""
        self._profile.stop()
        seconds = dict.fromkeys((*KINDS, OTHERS), 0.0)
        for event in self._profile.key_averages():
            spent = event.self_device_time_total if self.cuda else event.self_cpu_time_total
            seconds[kind_of(event.key)] += spent / 1e6
        return {kind: round(spent, 3) for kind, spent in seconds.items()}


def convolution_flops(step: Callable[[], None]) -> float:
    """Floating-point operations of the convolutions in a step, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        step()
    return float(sum(n for name, n in counter.get_flop_counts()["Global"].items() if "conv" in str(name)))


def fastest_convolution(device: str, dtype: torch.dtype, repeats: int = 20) -> float:
    """Operations per second of a 3 × 3 convolution of a favourable shape: 256 channels, 64 px, ``channels_last``."""
    batch, channels, side = 4, 256, 64
    x = torch.randn(batch, channels, side, side, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    times = []
    with torch.no_grad():
        for _ in range(repeats):
            start = time.perf_counter()
            F.conv2d(x, weight, padding=1)
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return 2 * batch * channels**2 * 9 * side**2 / statistics.median(times)
