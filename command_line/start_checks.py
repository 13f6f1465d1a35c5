"""Checks before a run starts: names of monitored metrics, writable folders, space for a checkpoint."""

import difflib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from callbacks import EMA, FIDMonitor
from llamagen.output_paths import check_output_folder

OURS = ("callbacks", "command_line", "lightning", "lightning_modules")
"""Packages of callbacks and modules whose metrics are known."""


class StartChecks(pl.Callback):
    """Check at the start what would otherwise fail at the first checkpoint or at the end of the first epoch."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check monitored metrics and disk space, after the other callbacks have been set up.

        Raises:
            ValueError: in one line with the option, if a check fails.
        """
        if stage == "fit":
            check_monitors(trainer, pl_module)
            check_space(trainer, pl_module)


def check_folders(trainer: pl.Trainer) -> None:
    """Check that the folders of run, checkpoints and logs can be created and written.

    Args:
        trainer: the trainer, before its loggers create their folders.

    Raises:
        ValueError: in one line with the folder, if one cannot.
    """
    for folder in _folders(trainer):
        check_output_folder(folder, "", "change its permissions, or set trainer.default_root_dir to another folder")


def _folders(trainer: pl.Trainer) -> Iterable[Path]:
    places = [trainer.default_root_dir]
    places += [getattr(each, "dirpath", None) or trainer.default_root_dir for each in trainer.checkpoint_callbacks]
    places += [logger.save_dir for logger in trainer.loggers if logger.save_dir]
    return [Path(os.path.abspath(place)) for place in dict.fromkeys(places) if "://" not in str(place)]


def check_monitors(trainer: Any, module: pl.LightningModule) -> None:
    """Check that the metrics that callbacks monitor are logged.

    Nothing is checked if the module or a callback comes from another project, whose metrics are unknown.

    Args:
        trainer: the trainer, after its callbacks have been set up.
        module: the module that is trained.

    Raises:
        ValueError: in one line with similar names, if a metric is unknown.
    """
    parts = [module, *trainer.callbacks]
    if not hasattr(module, "metric_names") or any(
        type(part).__module__.partition(".")[0] not in OURS for part in parts
    ):
        return
    known = {"step", "epoch", *module.metric_names()}  # type: ignore[operator]
    for callback in trainer.callbacks:
        if isinstance(callback, FIDMonitor):
            known.update(callback.metric_names())
        if isinstance(callback, EMA) and callback.validate_raw:
            known.update(f"val_raw/{name.removeprefix('val/')}" for name in module.metric_names())  # type: ignore[operator]
    for callback in trainer.callbacks:
        name: Any = getattr(callback, "monitor", None)
        if not isinstance(callback, ModelCheckpoint | EarlyStopping) or name is None or name in known:
            continue
        if name.startswith(("train/", "skipped/")):  # not all are known before the data is read
            continue
        near = difflib.get_close_matches(name, sorted(known), 5, 0.4) or sorted(known)[:5]
        raise ValueError(
            f"{type(callback).__name__}.monitor is {name!r}, which this run does not log; set monitor to one of its "
            f"metrics, for example {', '.join(near)}"
        )


def check_space(trainer: Any, module: pl.LightningModule) -> None:
    """Check that there is room for one checkpoint.

    Args:
        trainer: the trainer, with its callbacks.
        module: the module that is trained.

    Raises:
        ValueError: in one line with the bytes needed, if there is not.
    """
    averaged = any(isinstance(callback, EMA) for callback in trainer.callbacks)
    needed = checkpoint_bytes(module, averaged)
    for callback in trainer.checkpoint_callbacks:
        folder = getattr(callback, "dirpath", None)
        if folder is None or "://" in str(folder):
            continue
        absolute = Path(os.path.abspath(folder))
        existing = next(place for place in (absolute, *absolute.parents) if place.is_dir())
        free = shutil.disk_usage(existing).free
        if free < needed:
            raise ValueError(
                f"a checkpoint needs about {needed:,} bytes, but {folder} has {free:,} bytes free; free some space, or "
                "set trainer.default_root_dir to another disk"
            )


def checkpoint_bytes(module: pl.LightningModule, averaged: bool) -> int:
    """Size of a checkpoint in bytes: weights, AdamW's two moments of trained weights, and averages, all in float32.

    Args:
        module: the module that is trained.
        averaged: whether the generator's weights are averaged (EMA).
    """
    weights: int = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
    trained: int = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    generator = getattr(module, "generator", None)
    mean: int = (
        sum(p.numel() for p in generator.parameters() if p.requires_grad) if averaged and generator is not None else 0
    )
    return weights + 4 * (2 * trained + mean)
