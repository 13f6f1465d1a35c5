"""Saves the configuration of a run in its folder, and protects folders of other runs."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger

from llamagen.files import atomic_file

ROOT_KEY = "${trainer.default_root_dir}"
RESUMING = ("last", "best", "hpc", "registry")
"""Values of ``ckpt_path`` for the run's own checkpoints."""


class RunConfig(SaveConfigCallback):
    """Save the whole configuration of a stage in the run's folder, as ``fit.yaml``, ``predict.yaml`` and so on.

    It is written after data, model and checkpoint have been checked, so a run that cannot start leaves no files. A new
    run never overwrites another one. Paths in the run's folder are saved relative to ``${trainer.default_root_dir}``,
    so a new run with the saved file and another folder writes nothing into the old folder.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Protect the folder of another run.

        Raises:
            ValueError: if ``fit`` would write into the folder of another run.
        """
        if stage != "fit":
            return
        root, resumed = Path(trainer.default_root_dir), self.config.get("ckpt_path")
        own = resumed in RESUMING or (resumed is not None and _is_inside(resumed, root))
        advice = "choose another --trainer.default_root_dir, or resume the run with --ckpt_path last"
        if not own and self._path(trainer).exists():
            raise ValueError(f"{root} already holds a run; {advice}")
        for folder in _written_folders(trainer):
            if not own and any(folder.glob("*.ckpt")):
                raise ValueError(f"{folder} already holds checkpoints of another run; {advice}")
            other = next((place for place in (folder, *folder.parents) if _holds_run(place)), None)
            if other is not None and not _is_inside(folder, root):
                raise ValueError(
                    f"{folder} is in {other}, the folder of another run, and would be written to; set its option to a "
                    f"path under {ROOT_KEY}"
                )

    @staticmethod
    def _path(trainer: pl.Trainer) -> Path:
        assert trainer.state.fn is not None
        return Path(trainer.default_root_dir) / f"{trainer.state.fn.value}.yaml"

    def _save(self, trainer: pl.Trainer) -> None:
        if self.already_saved or not trainer.is_global_zero:
            return
        self.already_saved = True
        settings = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        if trainer.state.fn == "fit":
            settings["ckpt_path"] = None  # a resumed run has the configuration of an uninterrupted one
        for logger in trainer.loggers:
            if not isinstance(logger, CSVLogger):
                logger.log_hyperparams(settings)
        text = yaml.safe_dump(portable(settings), sort_keys=False, allow_unicode=True)
        with atomic_file(self._path(trainer)) as temporary:
            temporary.write_text(f"# lightning.pytorch=={pl.__version__}\n{text}")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Remove empty folders that loggers created for a run that did not start."""
        if self.already_saved or not trainer.is_global_zero:
            return
        # Not `trainer.log_dir`: it waits for the other processes, which may have ended.
        created = next((logger.log_dir for logger in trainer.loggers if logger.log_dir), trainer.default_root_dir)
        root, folder = Path(trainer.default_root_dir).absolute(), Path(created).absolute()
        while folder.is_relative_to(root) and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write ``fit.yaml``."""
        self._save(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write ``validate.yaml``."""
        if trainer.state.fn == "validate":
            self._save(trainer)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write ``test.yaml``."""
        self._save(trainer)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write ``predict.yaml``."""
        self._save(trainer)


def portable(settings: dict[str, Any]) -> dict[str, Any]:
    """Replace output paths in the run's folder by paths relative to ``${trainer.default_root_dir}``.

    Outputs are all paths under ``trainer``, such as those of callbacks and loggers, and all other paths that do not
    exist yet. The rest, such as a dataset in the run's folder, are inputs.

    Args:
        settings: settings of the stage, with ``trainer.default_root_dir``.
    """
    root = settings.get("trainer", {}).get("default_root_dir")
    if not root or "://" in str(root):
        return settings
    named = os.path.normpath(root)

    def rewritten(value: Any, keys: tuple[str, ...]) -> Any:
        if isinstance(value, dict):
            return {key: rewritten(each, (*keys, str(key))) for key, each in value.items()}
        if isinstance(value, list):
            return [rewritten(each, keys) for each in value]
        if not isinstance(value, str) or keys == ("trainer", "default_root_dir") or not _is_path(value):
            return value
        if not _is_inside(value, Path(root)) or (keys[0] != "trainer" and (named == "." or os.path.exists(value))):
            return value
        rest = os.path.relpath(os.path.abspath(value), os.path.abspath(root))
        return ROOT_KEY if rest == "." else f"{ROOT_KEY}/{rest}"

    result: dict[str, Any] = rewritten(settings, ())
    return result


def _is_path(value: str) -> bool:
    """Whether a string may be a path: it has a slash, and is neither an address nor text."""
    return "/" in value and "://" not in value and not re.search(r"[\n{}]|\$", value)


def _is_inside(path: str | Path, root: Path) -> bool:
    inner, outer = (os.path.realpath(os.path.abspath(each)) for each in (path, root))
    return inner == outer or inner.startswith(outer.rstrip(os.sep) + os.sep)


def _holds_run(folder: Path) -> bool:
    return (folder / "fit.yaml").is_file()


def _written_folders(trainer: pl.Trainer) -> Iterator[Path]:
    """Local folders of the run's checkpoints and loggers."""
    callbacks = [getattr(each, "dirpath", None) for each in trainer.checkpoint_callbacks]
    loggers = [getattr(each, "save_dir", None) for each in trainer.loggers]
    for folder in (*callbacks, *loggers):
        if folder is not None and "://" not in str(folder):
            yield Path(os.path.abspath(folder))
