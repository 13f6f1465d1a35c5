"""Runs that end before their time is up, and begin again."""

import os
import subprocess
from typing import ClassVar

import lightning.pytorch as pl
from lightning_utilities.core.rank_zero import rank_zero_warn

from callbacks.stopping import StopOnSignal


class Requeue(StopOnSignal):
    """On a signal: finish the step, save, end, and have SLURM put the job back into its queue.

    ``#SBATCH --signal=SIGUSR1@300`` sends it five minutes before the time is up. With ``--ckpt_path last`` the same
    command then resumes where it was. Lightning's own requeueing saves within a step, on each rank at another place;
    where parameters are sharded, ranks would wait for each other for ever. Without SLURM a run ends in the same way.

    Args:
        signal: name of the signal.
    """

    patient: ClassVar[bool] = True

    def __init__(self, signal: str = "SIGUSR1") -> None:
        super().__init__([signal])

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Listen, before Lightning does.

        Raises:
            ValueError: if nothing would be saved at the end.
        """
        if stage != "fit":
            return
        saved = [getattr(each, "_save_on_train_epoch_end", None) for each in trainer.checkpoint_callbacks]
        if not any(saved):
            raise ValueError(
                "Requeue ends a run within an epoch, where no callback would save it; give a ModelCheckpoint "
                "save_on_train_epoch_end: true"
            )
        super().setup(trainer, pl_module, stage)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """When all is saved, put the job back."""
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
