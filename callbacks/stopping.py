"""Runs that a signal ends: at the end of a step, saved, on all ranks together."""

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
    """On a signal: finish the step, save, and end.

    Outside of training (while starting, and in ``validate``, ``test`` and ``predict``) the run ends at once, and so it
    does when the signal comes a second time. A validation within ``fit`` is finished first.

    Lightning by itself ends a run with exit code 0 then and saves nothing, and its handler waits for other ranks
    wherever the signal finds it.

    Args:
        signals: names of the signals.

    Attributes:
        received: number of the signal that ended ``fit``, else None.
    """

    patient: ClassVar[bool] = False
    """Whether a signal waits for the end of a step, wherever it comes and however often."""

    def __init__(self, signals: Iterable[str] = ("SIGTERM", "SIGINT")) -> None:
        super().__init__()
        self.numbers = [_number(name) for name in signals]
        self.received: int | None = None
        self._previous: dict[int, Any] = {}
        self._asked: int | None = None
        self._training = self._listening = self._stopping = False
        self._limit: Any = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Listen."""
        self._asked = self.received = None
        self._training = self._stopping = False
        self._trainer = trainer
        self._listen()

    def _listen(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        self._listening = True
        self._keep_listening()

    def _keep_listening(self) -> None:
        """Take the place of other handlers; Lightning installs its own after ``setup``."""
        for number in self.numbers if self._listening else ():
            if (handler := signal.getsignal(number)) != self._hear:
                self._previous.setdefault(number, handler)
                signal.signal(number, self._hear)

    def _listen_no_more(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}
        self._listening = False

    def _hear(self, number: int, frame: Any) -> None:
        if not self._listening:  # Lightning has put this handler back after the end
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif self.patient:
            self._asked = number
        elif self._training and self._asked is None:
            self._asked = number
            # Written without a lock: a handler may interrupt another print.
            os.write(
                2, f"{signal.Signals(number).name}: saving at the end of this step; once more ends at once\n".encode()
            )
        else:
            self._end_now(number)

    def _end_now(self, number: int) -> None:
        launcher = self._trainer.strategy.launcher
        if launcher is not None:
            launcher.kill(signal.Signals(number))  # the other ranks of this node, which it started
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen in Lightning's place."""
        self._keep_listening()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here on a step can be finished."""
        self._keep_listening()
        self._training = True

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen in Lightning's place."""
        self._keep_listening()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen in Lightning's place."""
        self._keep_listening()

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen in Lightning's place."""
        self._keep_listening()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop all ranks at the same step, after accumulated batches."""
        if (batch_idx + 1) % max(trainer.accumulate_grad_batches, 1) == 0:
            self._stop_if_asked(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop where the signal came during the validation at the end of the epoch."""
        self._stop_if_asked(trainer, pl_module)

    def _stop_if_asked(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        asked = self._asked or 0
        if trainer.world_size > 1:  # with the largest number, where ranks got different signals
            numbers = torch.zeros(65, device=pl_module.device)
            numbers[asked] = 1.0
            heard = torch.as_tensor(trainer.strategy.reduce(numbers, reduce_op="sum")).nonzero()
            asked = int(heard.max())
        if asked and not self._stopping:
            self._stopping, self.received = True, asked
            trainer.should_stop = True
            rank_zero_info(f"{signal.Signals(asked).name}: ending at step {trainer.global_step}")
            # There is no time for a validation, which a run that is left alone would not have here.
            self._limit, trainer.limit_val_batches = trainer.limit_val_batches, 0

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save what no ModelCheckpoint has saved, as some save after validations only."""
        saved = [getattr(each, "_last_global_step_saved", None) for each in trainer.checkpoint_callbacks]
        folder = getattr(trainer.checkpoint_callback, "dirpath", None)
        if self._stopping and folder is not None and trainer.global_step not in saved:
            trainer.save_checkpoint(Path(folder) / f"stopped_{trainer.global_step:07d}.ckpt")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """The signals mean again what they meant."""
        self._listen_no_more()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """The signals mean again what they meant."""
        self._listen_no_more()
        self._training = False
        if self._stopping:
            trainer.limit_val_batches = self._limit


def _number(name: str) -> signal.Signals:
    try:
        return signal.Signals[name]
    except KeyError:
        known = ", ".join(each.name for each in signal.Signals if each.name.startswith("SIGUSR"))
        raise ValueError(f"signal is {name!r}; it must be the name of a signal, for example {known}") from None
