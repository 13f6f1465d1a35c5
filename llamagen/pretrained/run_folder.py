"""What the folder of a training run says about its model: checkpoint, tokenizer, sampling settings, precision."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

RUN_FILE = "fit.yaml"
PRECISIONS = {"bf16-mixed": "mixed", "bf16-true": "bfloat16"}
"""Precisions of Lightning, and the dtype for sampling that computes the same. All others are float32."""


class Run(NamedTuple):
    """A training run.

    Attributes:
        folder: its folder, ``trainer.default_root_dir``.
        settings: content of its ``fit.yaml``.
    """

    folder: Path
    settings: dict[str, Any]

    @property
    def model(self) -> str:
        """Class of the trained module, such as ``ARGenModule``."""
        return str(self.settings.get("model", {}).get("class_path", "")).rpartition(".")[2]

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of the trained module."""
        return dict(self.settings.get("model", {}).get("init_args") or {})

    @property
    def dtype(self) -> str:
        """Dtype for sampling, as ``predict`` with the run's configuration computes."""
        return PRECISIONS.get(str(self.settings.get("trainer", {}).get("precision")), "float32")

    @property
    def checkpoint(self) -> Path:
        """The run's ``last.ckpt``, or its newest checkpoint.

        Raises:
            ValueError: in one line, if there is none.
        """
        folder = self.folder / "checkpoints"
        found = sorted(folder.glob("[!.]*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
        if not found:
            raise ValueError(f"{folder} has no checkpoints; train the model first, or give the file of its weights")
        return next((path for path in found if path.name == "last.ckpt"), found[-1])

    def locate(self, path: str) -> str:
        """Find a file or folder that the settings name.

        Relative paths start from the folder in which the run was started. The run may have moved since then, together
        with other runs, so they are looked up in its parents, too. What is not found is returned as it is.
        """
        given = path.replace("${trainer.default_root_dir}", str(self.folder))
        places = [Path(given), *(parent / given for parent in self.folder.absolute().parents)]
        return next((str(place) for place in places if place.exists()), given)


def run_of(path: Path) -> Run | None:
    """The run that a checkpoint or folder belongs to; None if it belongs to none."""
    for folder in (path, *path.absolute().parents[:2]):  # RUN/checkpoints/last.ckpt
        if (run := read_run(folder)) is not None:
            return run
    return None


def read_run(folder: Path) -> Run | None:
    """Read the settings of a run; None if the folder is not one.

    Raises:
        ValueError: in one line, if the file is damaged.
    """
    file = folder / RUN_FILE
    if not file.is_file():
        return None
    try:
        settings = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{file} cannot be read ({type(error).__name__}); give the file of the weights") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file} holds no settings; give the file of the weights")
    return Run(folder, settings)


def find_run(folder: Path) -> Run:
    """The run in a folder, or in one of its subfolders, such as ``argen`` of the quickstart's.

    An autoregressive model takes precedence over tokenizers.

    Raises:
        ValueError: in one line, if there is no run, or there are several models.
    """
    if (run := read_run(folder)) is not None:
        return run
    runs = list(_runs_in(folder))
    found = [run for run in runs if run.model == "ARGenModule"] or runs
    if len(found) > 1:
        raise ValueError(f"{folder} has several runs; give one of {', '.join(str(run.folder) for run in found[:8])}")
    if not found:
        raise ValueError(
            f"{folder} holds no model; give a folder written by python -m llamagen.checkpoints.export, a run's folder "
            "or a file of weights"
        )
    return found[0]


def _runs_in(folder: Path) -> Iterator[Run]:
    for each in sorted(folder.iterdir()):
        if each.is_dir() and (run := read_run(each)) is not None:
            yield run
