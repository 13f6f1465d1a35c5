"""Parts of the benchmarks of training steps: the Trainer, the stopwatch, and the memory of a process."""

import statistics
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.operators import OperatorTimes
from benchmarks.timing import synchronize
from callbacks import EMA

WARM_UP, PROFILED = 3, 3
SIDES = ("ours", "plain")
"""This project's step, and the plain implementation that it is compared with."""
PRECISIONS = {"bf16": "bf16-mixed", "fp32": "32-true", "fp16": "16-mixed"}
"""Names of Lightning's precisions."""


def autocast_of(device: str, precision: str) -> torch.autocast:
    """A new context for the forward pass: bfloat16 for ``bf16``, else off."""
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


def train(
    module: pl.LightningModule, batches: Iterable[dict[str, Tensor]], device: str, precision: str, *callbacks: Any
) -> None:
    """One epoch in Lightning's Trainer, as the recipes train: with clipping and EMA."""
    on_cpu = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]}  # Lightning's is for GPUs
    chosen: dict[str, Any] = on_cpu if (device, precision) == ("cpu", "fp16") else {"precision": PRECISIONS[precision]}
    pl.Trainer(
        **chosen,
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        max_epochs=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[EMA(), *callbacks],
    ).fit(module, DataLoader(list(batches), batch_size=None))  # type: ignore[arg-type]


class Stopwatch(pl.Callback, ABC):
    """Time each step of the Trainer and, right after it, a plain step. The last steps are profiled instead of timed.

    Args:
        device: ``cpu`` or ``cuda``.
        steps: number of steps of the Trainer.
        sides: ``ours`` alone, or both.
        profiled: number of the last steps, which are profiled.

    Attributes:
        times: seconds of each step that was not profiled, by side.
        profiles: seconds by kind of operator of each profiled step, by side.
    """

    def __init__(self, device: str, steps: int, sides: tuple[str, ...] = SIDES, profiled: int = PROFILED) -> None:
        self.device, self.first_profiled, self.sides = device, steps - profiled, sides
        self.times: dict[str, list[float]] = {name: [] for name in sides}
        self.profiles: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        self._profiler: OperatorTimes | None = None
        self._started = 0.0

    @abstractmethod
    def prepare_plain_step(self, module: Any) -> None:
        """Build the plain implementation when first called."""

    @abstractmethod
    def plain_step(self, batch: dict[str, Tensor]) -> None:
        """Do a plain step on the batch of the Trainer's step."""

    def _start(self, batch_idx: int) -> None:
        self._profiler = OperatorTimes(self.device) if batch_idx >= self.first_profiled else None
        synchronize()
        if self._profiler is not None:
            self._profiler.start()
        self._started = time.perf_counter()

    def _stop(self, name: str) -> None:
        synchronize()
        if self._profiler is None:
            self.times[name].append(time.perf_counter() - self._started)
        else:
            self.profiles[name].append(self._profiler.stop())

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start."""
        self._start(batch_idx)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop, then do the plain step."""
        self._stop("ours")
        if "plain" in self.sides:
            self.prepare_plain_step(pl_module)
            with torch.enable_grad():
                self._start(batch_idx)
                self.plain_step(batch)
                self._stop("plain")
        if batch_idx < self.first_profiled:
            seconds = ", ".join(f"{name} {each[-1]:.3f} s" for name, each in self.times.items())
            print(f"step {batch_idx}: {seconds}", flush=True)


def medians(profiles: list[dict[str, float]]) -> dict[str, float]:
    """Seconds by kind of operator, each the median of several steps."""
    return {kind: round(statistics.median(each[kind] for each in profiles), 3) for kind in profiles[0]}


def resident(field: str) -> float:
    """Memory of this process in GiB: ``VmRSS``, or its peak ``VmHWM``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 2**20


def peak_since(before: float, device: str) -> float:
    """Peak memory in GiB: of the GPU's allocator, or of the process minus its memory before."""
    return torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else resident("VmHWM") - before


def memory_in_own_process(benchmark: str, side: str) -> float:
    """Peak memory in GiB of one side, measured by the same benchmark with the same options in a new process."""
    command = [sys.executable, "-m", f"benchmarks.{benchmark}", *sys.argv[1:], "--memory-of", side]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(output.strip().splitlines()[-1])
