"""Throughput of training."""

import time
from typing import Any

import lightning.pytorch as pl
import torch

from callbacks.protocols import CountsOperations, require

PEAK_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "H200": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}
"""Peak of dense bfloat16 matrix products with float32 accumulation in 10¹² operations per second, from NVIDIA's data
sheets, by a part of the GPU's name. The first match counts."""


def known_peak(device: torch.device) -> float | None:
    """Peak of a GPU in 10¹² operations per second, None if it is not in :data:`PEAK_TFLOPS`."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


class Throughput(pl.Callback):
    """Log the throughput of training under ``train/``, every ``log_every_n_steps`` steps of the trainer.

    - ``tokens_a_second`` and ``sequences_a_second``: codes and images, over all ranks.
    - ``tflops_a_second``: 10¹² operations of the model per second on this rank's device, without recomputed blocks.
    - ``mfu``: model FLOPs utilization, the fraction of the device's peak; for known GPUs.
    - ``hours``: training time of the run, including the time before it was resumed.

    All but ``hours`` are measured over the window since they were last logged. A window includes waiting for data, and
    excludes validation, saving checkpoints and the time between epochs. The device is synchronised only at the ends of
    a window. The first window includes one-time costs such as compilation. Saving checkpoints that hold only weights
    is not excluded: Lightning does not report it to callbacks.

    Args:
        peak_tflops: peak of the device in 10¹² operations per second; by default that of dense bfloat16 matrix products
            of a known GPU.
    """

    def __init__(self, peak_tflops: float | None = None) -> None:
        super().__init__()
        if peak_tflops is not None and not peak_tflops > 0:
            raise ValueError(f"peak_tflops is {peak_tflops}; it must be above 0, or null for the peak of a known GPU")
        self.peak_tflops = peak_tflops
        self._clear()
        self._started: float | None = None
        self._step = 0
        self._hours = 0.0

    def _clear(self) -> None:
        self._seconds, self._sequences, self._tokens = 0.0, 0, 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the module.

        Raises:
            ValueError: if it does not count its operations.
        """
        if stage == "fit":
            require(CountsOperations, pl_module, self)

    def state_dict(self) -> dict[str, Any]:
        """Training time of the run so far."""
        running = 0.0 if self._started is None else time.perf_counter() - self._started
        return {"hours": self._hours + running / 3600}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue counting."""
        self._hours = state_dict["hours"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reset the window."""
        self._clear()
        self._started, self._step = None, trainer.global_step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock, unless it runs."""
        if self._started is None:
            self._started = _now(pl_module.device)

    def _stop(self, pl_module: pl.LightningModule) -> None:
        if self._started is not None:
            passed = _now(pl_module.device) - self._started
            self._seconds += passed
            self._hours += passed / 3600
            self._started = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count, and log every ``log_every_n_steps`` steps."""
        self._sequences += len(batch["codes"])
        self._tokens += batch["codes"].numel()
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        if every < 1 or not stepped or self._step % every:
            return
        self._stop(pl_module)
        if self._seconds > 0:
            self._log(trainer, pl_module)
        self._clear()
        # Read the time again: ranks wait for each other while they log, which is not part of a window.
        self._started = _now(pl_module.device)

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        counts = torch.tensor([self._sequences, self._tokens], dtype=torch.float64, device="cpu")
        if trainer.world_size > 1:
            # Reduced in float32, which every device supports; exact up to 2²⁴.
            counts = trainer.strategy.reduce(counts.float().to(pl_module.device), reduce_op="sum")
        sequences, tokens = counts.tolist()
        tera_operations = require(CountsOperations, pl_module, self).flops_per_sequence * self._sequences / 1e12
        metrics = {
            "sequences_a_second": sequences / self._seconds,
            "tokens_a_second": tokens / self._seconds,
            "tflops_a_second": tera_operations / self._seconds,
            "hours": self._hours,
        }
        if peak := self.peak_tflops or known_peak(pl_module.device):
            metrics["mfu"] = metrics["tflops_a_second"] / peak
        for name, value in metrics.items():
            pl_module.log(f"train/{name}", value)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        self._stop(pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Stop the clock."""
        self._stop(pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        self._stop(pl_module)


def _now(device: torch.device) -> float:
    """Time in seconds, after the device has finished its queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
