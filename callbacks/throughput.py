"""How fast a training is."""

import time
from typing import Any, Protocol, cast

import lightning.pytorch as pl
import torch

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
"""10¹² operations a second in products of dense bfloat16 matrices with sums in float32, from NVIDIA's data sheets, by
what is in the name of the GPU; the first that is counts."""


class CountsOperations(Protocol):
    """A module that says how much work a sequence is."""

    @property
    def flops_per_sequence(self) -> float:
        """Floating-point operations of a training step for one sequence."""


def known_peak(device: torch.device) -> float | None:
    """The peak of a GPU in 10¹² operations a second, None if it is not in :data:`PEAK_TFLOPS`."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


class Throughput(pl.Callback):
    """Log the speed of training under ``train/``, every ``log_every_n_steps`` steps of the trainer.

    - ``tokens_a_second`` and ``sequences_a_second``: codes and images that all ranks have trained on.
    - ``tflops_a_second``: of this rank's device, in 10¹² operations; those of the model, without recomputed blocks.
    - ``mfu``: its share of the peak, if that is known.
    - ``hours``: what the whole run has taken until then, the part before it was resumed included.

    Each but the last is over the time since it was logged last, with what lies between steps (waiting for data), but
    without validation, checkpoints and the time between epochs. The device is only waited for at the ends of such
    stretches.
    The first number holds whatever is slow at the start. Checkpoints of weights alone, which callbacks do not hear of,
    are not left out.

    Args:
        peak_tflops: of the device, in 10¹² operations a second; by default that of dense bfloat16 matrices, for GPUs
            that are known.
    """

    def __init__(self, peak_tflops: float | None = None) -> None:
        super().__init__()
        if peak_tflops is not None and not peak_tflops > 0:
            raise ValueError(f"peak_tflops is {peak_tflops}; it must be above 0, or null for that of a known GPU")
        self.peak_tflops = peak_tflops
        self._clear()
        self._started: float | None = None
        self._step = 0
        self._hours = 0.0

    def _clear(self) -> None:
        self._seconds, self._sequences, self._tokens = 0.0, 0, 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a module whose work is not known.

        Raises:
            ValueError: in one line.
        """
        if stage == "fit" and not hasattr(pl_module, "flops_per_sequence"):
            raise ValueError(
                f"{type(pl_module).__name__} does not say its operations; leave Throughput out of trainer.callbacks"
            )

    def state_dict(self) -> dict[str, Any]:
        """The time that the run has taken."""
        running = 0.0 if self._started is None else time.perf_counter() - self._started
        return {"hours": self._hours + running / 3600}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._hours = state_dict["hours"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin anew."""
        self._clear()
        self._started, self._step = None, trainer.global_step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Let the clock run, if it stands."""
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
        """Count, and log now and then."""
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
        # Not the time that was just taken: ranks may have waited for one another.
        self._started = _now(pl_module.device)

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        counts = torch.tensor([self._sequences, self._tokens], dtype=torch.float64, device="cpu")
        if trainer.world_size > 1:
            # In float32, which every device has, and which is exact up to 2²⁴ a number.
            counts = trainer.strategy.reduce(counts.float().to(pl_module.device), reduce_op="sum")
        sequences, tokens = counts.tolist()
        work = cast(CountsOperations, pl_module).flops_per_sequence * self._sequences / 1e12
        numbers = {
            "sequences_a_second": sequences / self._seconds,
            "tokens_a_second": tokens / self._seconds,
            "tflops_a_second": work / self._seconds,
            "hours": self._hours,
        }
        if peak := self.peak_tflops or known_peak(pl_module.device):
            numbers["mfu"] = numbers["tflops_a_second"] / peak
        for name, number in numbers.items():
            pl_module.log(f"train/{name}", number)

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
    """Seconds, when the device has done all that it was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
