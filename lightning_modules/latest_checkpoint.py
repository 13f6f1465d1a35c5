"""Which checkpoint ``--ckpt_path last`` means: the newest one of the run that is complete."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_modules.checkpoint_files import is_local, local_path
from llamagen.checkpoints.contents import read_checkpoint
from llamagen.checkpoints.integrity import check_integrity

KEYWORDS = ("best", "last", "hpc", "registry")
SUFFIX = ".ckpt"
REPLACED = re.compile(r"\.(.+\.ckpt)\.(?:replaced\.tmp|old)")
"""Names of a sharded checkpoint in the moment in which another takes its place."""
MAX_LISTED = 3


class Progress(NamedTuple):
    """How far a run was; the larger is the newer.

    Attributes:
        steps: of the optimizer.
        batches: that a rank has seen.
        epochs: that were ended.
        named_last: among equals, the one that Lightning writes last is taken.
        changed: time of the last change in nanoseconds.
    """

    steps: int
    batches: int
    epochs: int
    named_last: bool
    changed: int


def resolve_checkpoint(ckpt_path: Any, trainer: pl.Trainer, stage: str) -> Any:
    """What to load for a ``--ckpt_path``.

    A file or folder is compared with its checksums. ``last`` is the newest complete checkpoint among those that the
    run's callbacks keep, whatever their names: by training progress, not by the time of the file. Those that cannot be
    read are reported and skipped.

    Args:
        ckpt_path: as given.
        trainer: with its callbacks and loggers.
        stage: ``fit``, ``validate``, ``test`` or ``predict``.

    Returns:
        A path, or what was given; None for a ``fit`` that begins.

    Raises:
        ValueError: in one line, if what is there cannot be read, or nothing is there and the stage needs it.
    """
    if ckpt_path == "last":
        folders = checkpoint_folders(trainer)
        if folders is None:  # addresses such as s3:// are left to Lightning
            return ckpt_path
        return _newest(folders, stage)
    if ckpt_path and ckpt_path not in KEYWORDS and is_local(ckpt_path):
        check_integrity(local_path(ckpt_path))
    return ckpt_path


def checkpoint_folders(trainer: pl.Trainer) -> list[Path] | None:
    """The folders in which the callbacks of a run keep checkpoints, and the run's own; None if one is no local one."""
    root = str(trainer.default_root_dir)
    found: list[Any] = [root, f"{root}/checkpoints"]
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelCheckpoint):
            found.append(callback._ModelCheckpoint__resolve_ckpt_dir(trainer))  # type: ignore[attr-defined]
        elif isinstance(callback, OnExceptionCheckpoint):
            found.append(callback.dirpath)
    if not all(is_local(folder) for folder in found):
        return None
    return list(dict.fromkeys(local_path(folder) for folder in found))


def _newest(folders: list[Path], stage: str) -> str | None:
    """The path of the newest complete checkpoint; None if there is none to resume from."""
    paths = _candidates(folders)
    resumes = stage == "fit"
    ranked, refused = [], list[str]()
    for path in paths:
        try:
            ranked.append((_progress(path, resumes), path))
        except ValueError as error:
            refused.append(str(error))
    for _, path in sorted(ranked, reverse=True):
        try:
            check_integrity(path)
        except ValueError as error:
            refused.append(str(error))
            continue
        for reason in refused:
            rank_zero_warn(f"skipped a checkpoint: {reason}; --ckpt_path last takes {path}")
        return str(path)
    places = ", ".join(map(str, folders))
    if paths:
        more = f"; and {len(refused) - MAX_LISTED} more" if len(refused) > MAX_LISTED else ""
        raise ValueError(
            f"--ckpt_path last: no checkpoint of this run can be read ({'; '.join(refused[:MAX_LISTED])}{more}); give "
            "the path of another one, or choose another trainer.default_root_dir to start from the beginning"
        )
    if not resumes:
        raise ValueError(f"--ckpt_path last: there is no checkpoint in {places}; give --ckpt_path the .ckpt of a run")
    rank_zero_warn(f"--ckpt_path last: there is no checkpoint in {places} yet; starting from the beginning")
    return None


def _candidates(folders: Iterable[Path]) -> list[Path]:
    """All checkpoints in some folders, a file that has several names once."""
    found: dict[Path, Path] = {}
    for number, folder in enumerate(folders):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            replaced = REPLACED.fullmatch(path.name)
            if number == 0 and not path.name.startswith("hpc_ckpt_"):  # in the run's own folder, those of SLURM alone
                continue
            if replaced:  # a killed process had no time to give the new one this name
                if not (folder / replaced[1]).exists() and path.is_dir():
                    found[path.resolve()] = path
            elif path.suffix == SUFFIX and not path.name.startswith(".") and path.exists():
                found[path.resolve()] = path if _is_named_last(path) else found.get(path.resolve(), path)
    return list(found.values())


def _is_named_last(path: Path) -> bool:
    return path.name.removeprefix(".").startswith("last")


def _progress(path: Path, resumes: bool) -> Progress:
    """How far the run was when it wrote a checkpoint.

    Raises:
        ValueError: in one line, if it cannot be read or the training cannot be resumed with it.
    """
    checkpoint = read_checkpoint(path, wanted=lambda _: False)
    if resumes and not {"optimizer_states", "loops"} <= checkpoint.keys():
        raise ValueError(f"{path} holds weights alone")
    if "global_step" not in checkpoint:
        raise ValueError(f"{path} does not say how far its run was")
    loops = checkpoint.get("loops", {}).get("fit_loop", {})
    batches = loops.get("epoch_loop.batch_progress", {}).get("total", {}).get("processed", 0)
    epochs = loops.get("epoch_progress", {}).get("current", {}).get("processed", 0)
    steps = int(checkpoint["global_step"])
    return Progress(steps, int(batches), int(epochs), _is_named_last(path), path.stat().st_mtime_ns)
