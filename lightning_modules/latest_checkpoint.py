"""Resolves ``--ckpt_path last`` to the newest complete checkpoint of a run."""

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
from llamagen.hub.download import is_remote, local_file

KEYWORDS = ("best", "last", "hpc", "registry")
SUFFIX = ".ckpt"
REPLACED = re.compile(r"\.(.+\.ckpt)\.(?:replaced\.tmp|old)")
"""Names of a sharded checkpoint while another one replaces it."""
MAX_LISTED = 3


class Progress(NamedTuple):
    """Training progress of a checkpoint; compared field by field, the largest is the newest.

    Attributes:
        steps: optimizer steps.
        batches: batches that a rank has seen.
        epochs: completed epochs.
        named_last: whether it is ``last.ckpt``, which Lightning writes after other checkpoints of the same step.
        changed: time of the last change in nanoseconds.
    """

    steps: int
    batches: int
    epochs: int
    named_last: bool
    changed: int


def resolve_checkpoint(ckpt_path: Any, trainer: pl.Trainer, stage: str) -> Any:
    """Resolve the option ``--ckpt_path`` to the checkpoint to load, and verify its checksums.

    ``last`` is the newest complete checkpoint in the folders of the run's callbacks, with any name. Checkpoints are
    ordered by training progress, not by file time. Unreadable ones are skipped with a warning.

    Args:
        ckpt_path: value of the option; ``hf://`` addresses are downloaded.
        trainer: the trainer, with its callbacks and loggers.
        stage: ``fit``, ``validate``, ``test`` or ``predict``.

    Returns:
        A path, or ``ckpt_path`` itself; None if ``fit`` starts from the beginning.

    Raises:
        ValueError: in one line, if no checkpoint can be read, or there is none and the stage needs one.
    """
    if ckpt_path == "last":
        folders = checkpoint_folders(trainer)
        if folders is None:  # addresses such as s3:// are left to Lightning
            return ckpt_path
        return _newest(folders, stage)
    if is_remote(ckpt_path):
        ckpt_path = str(local_file(ckpt_path))
    if ckpt_path and ckpt_path not in KEYWORDS and is_local(ckpt_path):
        check_integrity(local_path(ckpt_path))
    return ckpt_path


def checkpoint_folders(trainer: pl.Trainer) -> list[Path] | None:
    """Folders of a run's checkpoints: its own and those of its callbacks. None if one of them is not local."""
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
    """All checkpoints in the folders; a file with several names (links) counts once."""
    found: dict[Path, Path] = {}
    for number, folder in enumerate(folders):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            replaced = REPLACED.fullmatch(path.name)
            if number == 0 and not path.name.startswith("hpc_ckpt_"):  # the run's own folder: only those of SLURM
                continue
            if replaced:  # its process was killed between two renames
                if not (folder / replaced[1]).exists() and path.is_dir():
                    found[path.resolve()] = path
            elif path.suffix == SUFFIX and not path.name.startswith(".") and path.exists():
                found[path.resolve()] = path if _is_named_last(path) else found.get(path.resolve(), path)
    return list(found.values())


def _is_named_last(path: Path) -> bool:
    return path.name.removeprefix(".").startswith("last")


def _progress(path: Path, resumes: bool) -> Progress:
    """Training progress of a checkpoint.

    Raises:
        ValueError: in one line, if it cannot be read, or training cannot be resumed from it.
    """
    checkpoint = read_checkpoint(path, wanted=lambda _: False)
    if resumes and not {"optimizer_states", "loops"} <= checkpoint.keys():
        raise ValueError(f"{path} holds only weights")
    if "global_step" not in checkpoint:
        raise ValueError(f"{path} does not record the training progress")
    loops = checkpoint.get("loops", {}).get("fit_loop", {})
    batches = loops.get("epoch_loop.batch_progress", {}).get("total", {}).get("processed", 0)
    epochs = loops.get("epoch_progress", {}).get("current", {}).get("processed", 0)
    steps = int(checkpoint["global_step"])
    return Progress(steps, int(batches), int(epochs), _is_named_last(path), path.stat().st_mtime_ns)
