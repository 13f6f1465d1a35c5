"""What can be known to fail before a run starts: names of metrics, places to write to, space for a checkpoint."""

import difflib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from callbacks import EMA, FIDMonitor

OURS = ("callbacks", "command_line", "lightning", "lightning_modules")
"""Packages of callbacks and modules of which it is known what they log."""


class StartChecks(pl.Callback):
    """Refuse a run that would fail after hours: at the first checkpoint, or at the end of the first epoch."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check, when other callbacks are set up.

        Raises:
            ValueError: in one line, with the option.
        """
        if stage == "fit":
            check_monitors(trainer, pl_module)
            check_space(trainer, pl_module)


def check_places(trainer: pl.Trainer) -> None:
    """Refuse a run's folder, or one of checkpoints or logs, that cannot be made or written to.

    Args:
        trainer: before its loggers make their folders.

    Raises:
        ValueError: in one line.
    """
    for folder in _folders(trainer):
        check_writable(folder)


def _folders(trainer: pl.Trainer) -> Iterable[Path]:
    places = [trainer.default_root_dir]
    places += [getattr(each, "dirpath", None) or trainer.default_root_dir for each in trainer.checkpoint_callbacks]
    places += [logger.save_dir for logger in trainer.loggers if logger.save_dir]
    return [Path(os.path.abspath(place)) for place in dict.fromkeys(places) if "://" not in str(place)]


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be made or written to.

    Args:
        folder: absolute; it need not exist.

    Raises:
        ValueError: in one line.
    """
    there = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not there.is_dir():
        raise ValueError(
            f"{folder} cannot be written to: {there} is not a folder; set trainer.default_root_dir to another"
        )
    if not _may_write(there):
        raise ValueError(
            f"{there} cannot be written to; change its permissions, or set trainer.default_root_dir to another"
        )


def _may_write(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK)


def check_monitors(trainer: Any, module: pl.LightningModule) -> None:
    """Refuse callbacks that monitor what nothing logs.

    Args:
        trainer: with its callbacks set up.
        module: that is trained; of one of another project it is not known what it logs.

    Raises:
        ValueError: in one line, with similar names.
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
        if name.startswith(("train/", "skipped/")):  # some of these depend on the data
            continue
        near = difflib.get_close_matches(name, sorted(known), 5, 0.4) or sorted(known)[:5]
        raise ValueError(
            f"{type(callback).__name__}.monitor is {name!r}, which this run does not log; set monitor to one of its "
            f"metrics, for example {', '.join(near)}"
        )


def check_space(trainer: Any, module: pl.LightningModule) -> None:
    """Refuse a disk that is too full for a single checkpoint.

    Args:
        trainer: with its callbacks.
        module: whose parameters, moments and averages a checkpoint holds.

    Raises:
        ValueError: in one line, with the bytes needed.
    """
    averaged = any(isinstance(callback, EMA) for callback in trainer.callbacks)
    needed = checkpoint_bytes(module, averaged)
    for callback in trainer.checkpoint_callbacks:
        folder = getattr(callback, "dirpath", None)
        if folder is None or "://" in str(folder):
            continue
        absolute = Path(os.path.abspath(folder))
        there = next(place for place in (absolute, *absolute.parents) if place.is_dir())
        free = shutil.disk_usage(there).free
        if free < needed:
            raise ValueError(
                f"a checkpoint needs about {needed:,} bytes, but {folder} has {free:,} bytes free; free some space, or "
                "set trainer.default_root_dir to another disk"
            )


def checkpoint_bytes(module: pl.LightningModule, averaged: bool) -> int:
    """Bytes of a checkpoint: weights, two moments in AdamW of what is trained, and its averages in float32.

    Args:
        module: that is trained.
        averaged: whether the generator's weights are averaged (EMA).
    """
    weights: int = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
    trained: int = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    generator = getattr(module, "generator", None)
    mean: int = (
        sum(p.numel() for p in generator.parameters() if p.requires_grad) if averaged and generator is not None else 0
    )
    return weights + 4 * (2 * trained + mean)
