"""Runs that end before their time limit and are put back into the queue."""

import os
import subprocess
from typing import ClassVar

import lightning.pytorch as pl
from lightning_utilities.core.rank_zero import rank_zero_warn

from callbacks.stopping import StopOnSignal


class Requeue(StopOnSignal):
    """On a signal: finish the step, save a checkpoint, end, and let SLURM requeue the job.

    ``#SBATCH --signal=SIGUSR1@300`` sends the signal five minutes before the time limit. With ``--ckpt_path last`` the
    same command then resumes the run. Without SLURM a run ends in the same way. Lightning's own requeueing saves in the
    signal handler, which may interrupt a step; with sharded parameters, ranks would then wait for each other forever.

    Args:
        signal: name of the signal.
    """

    patient: ClassVar[bool] = True

    def __init__(self, signal: str = "SIGUSR1") -> None:
        super().__init__([signal])

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Install the signal handler, before Lightning installs its own.

        Raises:
            ValueError: if no callback would save a checkpoint at the end.
        """
        if stage != "fit":
            return
        saved = [getattr(each, "_save_on_train_epoch_end", None) for each in trainer.checkpoint_callbacks]
        if not any(saved):
            raise ValueError(
                "Requeue ends a run within an epoch, where no callback saves a checkpoint; add LastCheckpoint to "
                "trainer.callbacks, or set save_on_train_epoch_end of a ModelCheckpoint to true"
            )
        super().setup(trainer, pl_module, stage)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Requeue the job, after the checkpoint has been saved."""
        super().teardown(trainer, pl_module, stage)
        job = os.environ.get("SLURM_JOB_ID")
        if stage != "fit" or not self._stopping or job is None or not trainer.is_global_zero:
            return
        if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
            job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
        try:
            subprocess.run(["scontrol", "requeue", job], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            rank_zero_warn(f"job {job} could not be put back into the queue ({error}); submit it again")
