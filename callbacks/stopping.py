"""Ends a run on a signal: after a complete step and a checkpoint, on all ranks at once."""

import os
import signal
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_info


class StopOnSignal(pl.Callback):
    """On a signal: finish the step, save a checkpoint, and end.

    Outside of training (during startup, and in ``validate``, ``test`` and ``predict``) the run ends at once, as it does
    on a second signal. A validation within ``fit`` is finished first.

    Lightning itself would end the run with exit code 0 and without a checkpoint. Its handler also waits for the other
    ranks. If the signal interrupts a step, they may never answer.

    Args:
        signals: names of the signals.

    Attributes:
        received: number of the signal that ended ``fit``, or None.
    """

    patient: ClassVar[bool] = False
    """Whether even a repeated signal, or one outside of training, waits for the end of a step."""

    def __init__(self, signals: Iterable[str] = ("SIGTERM", "SIGINT")) -> None:
        super().__init__()
        self.numbers = [_number(name) for name in signals]
        self.received: int | None = None
        self._previous: dict[int, Any] = {}
        self._requested: int | None = None
        self._training = self._listening = self._stopping = False
        self._limit: Any = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Install the signal handlers."""
        self._requested = self.received = None
        self._training = self._stopping = False
        self._trainer = trainer
        self._start()

    def _start(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        self._listening = True
        self._install()

    def _install(self) -> None:
        """Replace other handlers. This is repeated, because Lightning installs its own after ``setup``."""
        for number in self.numbers if self._listening else ():
            if (handler := signal.getsignal(number)) != self._handle:
                self._previous.setdefault(number, handler)
                signal.signal(number, self._handle)

    def _uninstall(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}
        self._listening = False

    def _handle(self, number: int, frame: Any) -> None:
        if not self._listening:  # Lightning has restored this handler after the run
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif self.patient:
            self._requested = number
        elif self._training and self._requested is None:
            self._requested = number
            # Written without a lock: a handler may interrupt another print.
            message = "saving at the end of this step; a second signal ends the run at once"
            os.write(2, f"{signal.Signals(number).name}: {message}\n".encode())
        else:
            self._end_now(number)

    def _end_now(self, number: int) -> None:
        launcher = self._trainer.strategy.launcher
        if launcher is not None:
            launcher.kill(signal.Signals(number))  # the other ranks of this node
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Replace Lightning's handlers."""
        self._install()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Replace Lightning's handlers; from now on, a signal waits for the end of a step."""
        self._install()
        self._training = True

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Replace Lightning's handlers."""
        self._install()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Replace Lightning's handlers."""
        self._install()

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Replace Lightning's handlers."""
        self._install()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop all ranks at the same optimizer step."""
        if (batch_idx + 1) % max(trainer.accumulate_grad_batches, 1) == 0:
            self._stop_if_requested(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop if the signal came during the validation at the end of the epoch."""
        self._stop_if_requested(trainer, pl_module)

    def _stop_if_requested(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        number = self._requested or 0
        if trainer.world_size > 1:  # if ranks received different signals, the largest number counts
            flags = torch.zeros(65, device=pl_module.device)
            flags[number] = 1.0
            received = torch.as_tensor(trainer.strategy.reduce(flags, reduce_op="sum")).nonzero()
            number = int(received.max())
        if number and not self._stopping:
            self._stopping, self.received = True, number
            trainer.should_stop = True
            rank_zero_info(f"{signal.Signals(number).name}: ending at step {trainer.global_step}")
            # No validation: there may be no time, and an uninterrupted run has none at this step.
            self._limit, trainer.limit_val_batches = trainer.limit_val_batches, 0

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save a checkpoint if no ModelCheckpoint has: some save only after validations."""
        saved = [getattr(each, "_last_global_step_saved", None) for each in trainer.checkpoint_callbacks]
        folder = getattr(trainer.checkpoint_callback, "dirpath", None)
        if self._stopping and folder is not None and trainer.global_step not in saved:
            trainer.save_checkpoint(Path(folder) / f"stopped_{trainer.global_step:07d}.ckpt")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restore the previous handlers."""
        self._uninstall()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the previous handlers."""
        self._uninstall()
        self._training = False
        if self._stopping:
            trainer.limit_val_batches = self._limit


def _number(name: str) -> signal.Signals:
    try:
        return signal.Signals[name]
    except KeyError:
        known = ", ".join(each.name for each in signal.Signals if each.name.startswith("SIGUSR"))
        raise ValueError(f"signal is {name!r}; it must be the name of a signal, for example {known}") from None
