"""Checkpoints of a run: the best one, the last one, and recent ones within an epoch."""

import os
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from llamagen.option_checks import check_integer


class RunCheckpoint(ModelCheckpoint):
    """Base of the callbacks below: a ``ModelCheckpoint`` that writes into the run's folder.

    Its state is stored under the key of ``ModelCheckpoint``, so that a run can resume from checkpoints of either class.

    Args:
        dirpath: folder of the checkpoints; None for ``subfolder`` of ``trainer.default_root_dir``.
        filename: name of the files, without metric names (``auto_insert_metric_name`` is off: a metric's name has a
            slash, which would make a folder).
        **options: other options of ``ModelCheckpoint``.
    """

    subfolder: ClassVar[str] = "checkpoints"

    def __init__(self, dirpath: Path | str | None, filename: str, **options: Any) -> None:
        super().__init__(dirpath, filename, auto_insert_metric_name=False, **options)

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint: that of Lightning's class with the same options."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def resolve_folder(self, trainer: pl.Trainer) -> None:
        """Set ``dirpath`` to its default if none was given.

        The command line calls this before the run's folder is checked; ``setup``, which Lightning calls last for
        checkpoint callbacks, would be too late.

        Args:
            trainer: its ``default_root_dir`` is the run's folder.
        """
        if self.dirpath is not None:
            return
        folder = os.path.join(trainer.default_root_dir, self.subfolder)
        if "://" in folder:
            self.dirpath = folder
            self.save_last = bool(self.save_last)  # links need a local file system
        else:
            # As Lightning resolves a given path: it restores the best checkpoints of a run only if the path is equal.
            self.dirpath = os.path.realpath(os.path.expanduser(folder))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Resolve the folder."""
        self.resolve_folder(trainer)
        super().setup(trainer, pl_module, stage)


class BestCheckpoint(RunCheckpoint):
    """Keep the best checkpoints by a metric, as ``checkpoints/best_<batches seen>.ckpt``.

    Args:
        monitor: name of the metric.
        mode: whether the smallest (``min``) or the largest (``max``) value is the best.
        save_top_k: how many checkpoints to keep; −1 for all.
        save_on_train_epoch_end: save at the end of each epoch; False saves right after each validation, as needed for a
            metric that is not measured at every validation.
        filename: name of the files.
        dirpath: folder; by default ``checkpoints`` in ``trainer.default_root_dir``.
    """

    def __init__(
        self,
        monitor: str = "val/loss",
        mode: Literal["min", "max"] = "min",
        save_top_k: int = 1,
        save_on_train_epoch_end: bool = True,
        filename: str = "best_{step:07d}",
        dirpath: Path | str | None = None,
    ) -> None:
        if save_top_k != -1:
            check_integer("save_top_k", save_top_k, 1)
        super().__init__(
            dirpath,
            filename,
            monitor=monitor,
            mode=mode,
            save_top_k=save_top_k,
            save_on_train_epoch_end=save_on_train_epoch_end,
        )


class LastCheckpoint(RunCheckpoint):
    """Save at the end of each epoch and of the run, as ``checkpoints/step_<batches seen>.ckpt``; keep only the last.

    ``checkpoints/last.ckpt`` is a link to it.

    Args:
        dirpath: folder; by default ``checkpoints`` in ``trainer.default_root_dir``.
        save_last: ``link`` makes ``last.ckpt`` a symbolic link; true writes a second file, for file systems without
            links; false omits it.
    """

    def __init__(self, dirpath: Path | str | None = None, save_last: bool | Literal["link"] = "link") -> None:
        # By default Lightning saves after validations, and loses the training steps after the last one.
        super().__init__(dirpath, "step_{step:07d}", save_last=save_last, save_on_train_epoch_end=True)


class StepCheckpoint(RunCheckpoint):
    """Save every few thousand steps, for runs that are killed within an epoch.

    The newest two are kept, as ``checkpoints/steps/step_<batches seen>.ckpt``.
    ``--ckpt_path last`` finds the newest complete checkpoint of all callbacks.

    Args:
        every_n_train_steps: optimizer steps from one checkpoint to the next.
        save_top_k: how many of the newest checkpoints to keep.
        dirpath: folder; by default ``checkpoints/steps`` in ``trainer.default_root_dir``.
    """

    subfolder: ClassVar[str] = "checkpoints/steps"

    def __init__(self, every_n_train_steps: int = 2500, save_top_k: int = 2, dirpath: Path | str | None = None) -> None:
        check_integer("every_n_train_steps", every_n_train_steps, 1)
        check_integer("save_top_k", save_top_k, 1)
        super().__init__(
            dirpath,
            "step_{step:07d}",
            monitor="step",
            mode="max",
            save_top_k=save_top_k,
            save_last="link",
            every_n_train_steps=every_n_train_steps,
        )
