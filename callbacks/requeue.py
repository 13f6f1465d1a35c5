"""Runs that end before their time is up, and begin again."""

import os
import signal
import subprocess
from typing import Any

import lightning.pytorch as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn


class Requeue(pl.Callback):
    """On a signal: finish the step, save, end, and have SLURM put the job back into its queue.

    ``#SBATCH --signal=SIGUSR1@300`` sends it five minutes before the time is up. With ``--ckpt_path last`` the same
    command then goes on where it was. Lightning's own requeueing saves within a step, on each rank at another place;
    where parameters are sharded, ranks would wait for each other for ever. Without SLURM a run ends in the same way.

    Args:
        signal: name of the signal.
    """

    def __init__(self, signal: str = "SIGUSR1") -> None:
        super().__init__()
        self.number = _number(signal)
        self._previous: Any = None
        self._asked = self._stopping = False
        self._listening = False
        self._limit: Any = None

    def _ask(self, number: int, frame: Any) -> None:
        self._asked = True

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Listen, before Lightning does.

        Raises:
            ValueError: if nothing would be saved at the end.
        """
        if stage == "fit":
            saved = [getattr(each, "_save_on_train_epoch_end", None) for each in trainer.checkpoint_callbacks]
            if not any(saved):
                raise ValueError(
                    "Requeue ends a run within an epoch, where no callback would save it; give a ModelCheckpoint "
                    "save_on_train_epoch_end: true"
                )
            self._asked = self._stopping = False
            self._previous = signal.signal(self.number, self._ask)
            self._listening = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop all ranks at the same step, behind accumulated batches."""
        if (batch_idx + 1) % max(trainer.accumulate_grad_batches, 1):
            return
        asked = self._asked
        if trainer.world_size > 1:
            flag = torch.tensor(float(asked), device=pl_module.device)
            asked = bool(trainer.strategy.reduce(flag, reduce_op="sum") > 0)
        if asked and not self._stopping:
            rank_zero_info(f"asked to stop by a signal: ending at step {trainer.global_step}")
            self._stopping = trainer.should_stop = True
            # There is no time for a validation, which a run that is left alone would not have here.
            self._limit, trainer.limit_val_batches = trainer.limit_val_batches, 0

    def _hear_no_more(self) -> None:
        if self._listening:
            signal.signal(self.number, signal.SIG_DFL if self._previous is None else self._previous)
            self._listening = False

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """The signal means again what it meant."""
        self._hear_no_more()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """When all is saved, put the job back."""
        if stage != "fit":
            return
        self._hear_no_more()
        if self._stopping:
            trainer.limit_val_batches = self._limit
        job = os.environ.get("SLURM_JOB_ID")
        if not self._stopping or job is None or not trainer.is_global_zero:
            return
        if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
            job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
        try:
            subprocess.run(["scontrol", "requeue", job], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            rank_zero_warn(f"job {job} could not be put back into the queue ({error}); submit it again")


def _number(name: str) -> signal.Signals:
    try:
        return signal.Signals[name]
    except KeyError:
        known = ", ".join(each.name for each in signal.Signals if each.name.startswith("SIGUSR"))
        raise ValueError(f"signal is {name!r}; it must be the name of a signal, for example {known}") from None
