"""What all stages of benchmarks/recipes.py share: recipes, and the steps of a bench as commands of the project.

Every step leaves its result in the bench's folder and is skipped if that is there, so a stopped bench continues.
"""

import csv
import json
import re
import shlex
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from llamagen.files import atomic_file

NAME = re.compile(r"\w[\w .-]*")
OVERLAYS = Path("benchmarks/recipe_data")


class Column(NamedTuple):
    """A metric in the table.

    Attributes:
        title: title of the column.
        better: ``min`` or ``max``: whether less or more is better, and recipes are judged by it; None for neither.
    """

    title: str
    better: str | None = None


class Preparation(NamedTuple):
    """A step of ``prepare``: its name, the file or folder that it leaves, and its command."""

    name: str
    result: Path
    command: Sequence[str]


class Stage(ABC):
    """What recipes change, on one dataset: how it is trained and measured, and what the report shows.

    Attributes:
        base: options of ``main.py`` before a recipe's overlays.
        recipes: those of the docs.
        columns: metrics of the table by their name in :meth:`results`.
        suffix: of the overlay, the folder of the runs and the record.
        data: name of the images.
    """

    base: ClassVar[tuple[str, ...]]
    recipes: ClassVar[tuple[str, ...]]
    columns: ClassVar[dict[str, Column]]
    suffix: ClassVar[str] = ""
    data: str

    @property
    def overlay(self) -> Path:
        """Size and budget of the models."""
        return OVERLAYS / f"{self.data}{self.suffix}.yaml"

    @property
    def record(self) -> str:
        """Name of the record in the bench's folder."""
        return f"recipes{self.suffix}.json"

    def run_folder(self, work: Path, recipe: "Recipe", seed: int) -> Path:
        """Folder of a run."""
        return work / f"runs{self.suffix}" / recipe.name / f"seed_{seed}"

    @abstractmethod
    def preparations(self, images: Path, work: Path, classifier: Path | None) -> list[Preparation]:
        """Steps of ``prepare``.

        Args:
            images: folder of class folders.
            work: folder of the bench.
            classifier: trained classifier of FID; None trains one.
        """

    @abstractmethod
    def is_prepared(self, work: Path) -> bool:
        """Whether ``prepare`` has left what the runs need."""

    @abstractmethod
    def perform(self, recipe: "Recipe", work: Path, seed: int, lpips: Path | None) -> None:
        """Train and measure one model, as far as that is not done. ``lpips``: weights of LPIPS, if it is measured."""

    @abstractmethod
    def results(self, recipe: "Recipe", work: Path, seed: int) -> dict[str, Any]:
        """Metrics of a run by name, and ``curve``, a list of [step, value]."""

    @abstractmethod
    def training_paths(self, work: Path, folder: Path) -> list[str]:
        """Options of ``fit`` that name data and the folder of the run."""

    @abstractmethod
    def training_step(self, cli: Any) -> Callable[[], None]:
        """A training step of the model of ``main.py fit``, to be timed."""

    def group_of(self, cli: Any) -> int | None:
        """Number of codes of the tokenizer of ``main.py fit``: only equal ones are compared. None compares all."""
        return None

    @abstractmethod
    def plot(self, record: dict[str, Any], path: Path) -> None:
        """Plot a record."""


@dataclass(frozen=True)
class Recipe:
    """A change of the paper's recipe.

    Attributes:
        name: name in the table, and of the folder of its runs.
        overlays: YAML files, applied before size and budget.
        options: options of ``main.py``, applied after them.
    """

    name: str
    overlays: tuple[str, ...]
    options: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "Recipe":
        """Parse ``NAME=PARTS``: overlays and options, separated by spaces.

        Raises:
            ValueError: if there is no name, an overlay does not exist, or a part is not of this form.
        """
        name, separator, parts = (part.strip() for part in text.partition("="))
        if not separator or not NAME.fullmatch(name):
            raise ValueError(
                f"recipe is {text!r}; give NAME=PARTS, such as 'QK-norm=--model.init_args.net.qk_norm=true'; a name "
                "has letters, digits, spaces, dots and hyphens"
            )
        items = shlex.split(parts)
        overlays = tuple(item for item in items if item.endswith(".yaml") and not item.startswith("-"))
        if wrong := [item for item in items if item in ("-c", "--config") or item.startswith(("-c=", "--config="))]:
            raise ValueError(f"recipe {name}: leave {wrong[0]} out, and give only the path of the overlay")
        if missing := [each for each in overlays if not Path(each).is_file()]:
            raise ValueError(f"recipe {name}: {missing[0]} does not exist; give the path of an overlay")
        return cls(name, overlays, tuple(item for item in items if item not in overlays))

    def arguments(self, stage: Stage) -> list[str]:
        """Options of ``main.py`` without paths: base, the recipe's overlays, size and budget, the recipe's options."""
        files = [*self.overlays, str(stage.overlay)]
        return [*stage.base, *(part for file in files for part in ("--config", file)), *self.options]

    def identify(self, stage: Stage, work: Path) -> None:
        """Record in the folder of its runs what the recipe is, or compare it with what it was.

        Raises:
            ValueError: if runs of this name had other options, or another content of a file.
        """
        files = [item for item in self.arguments(stage) if item.endswith(".yaml")]
        identity = {
            "arguments": self.arguments(stage),
            "sha256": {file: sha256(Path(file).read_bytes()).hexdigest() for file in files if Path(file).is_file()},
        }
        path = stage.run_folder(work, self, 0).parent / "recipe.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as temporary:
                temporary.write_text(json.dumps(identity, indent=1), encoding="utf-8")
        elif json.loads(path.read_text()) != identity:
            raise ValueError(
                f"{path.parent} holds runs of {self.name!r} with other options or files; give this recipe another "
                "name, or remove the folder"
            )


def prepare(stage: Stage, images: Path, work: Path, classifier: Path | None = None) -> Iterator[str]:
    """Prepare the data of a stage, step by step. Yields the name of each step.

    Args:
        stage: which stage and data.
        images: folder of class folders.
        work: folder of the bench.
        classifier: trained classifier of FID; None trains one.
    """
    for name, result, command in stage.preparations(images, work, classifier):
        yield name
        if not result.exists():
            run(command, work / "logs" / f"{name.replace(' ', '_')}.log")


def pack(images: Path, packed: Path, val_share: float) -> Preparation:
    """Pack a folder of class folders; a share of the images is held out."""
    command = ["-m", "datamodules.packing", str(images), str(packed), "--val_share", str(val_share)]
    return Preparation("pack the images", packed, command)


def train_classifier(packed: Path, features: Path, epochs: int) -> Preparation:
    """Train the classifier whose features FID uses."""
    options = [str(packed), str(features), "classifier", "--epochs", str(epochs), "--image_size", "32"]
    return Preparation("train the classifier", features, ["-m", "evaluation", "classifier", *options])


def run(command: Sequence[str], log: Path) -> None:
    """Run a command of this interpreter; its output goes to a file.

    Raises:
        ValueError: with the last line of its output, if it fails.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        code = subprocess.run([sys.executable, *command], stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        last = (log.read_text().strip().splitlines() or ["no output"])[-1]
        raise ValueError(f"{shlex.join(command[:3])} … failed: {last.strip()} (see {log})")


def logged(folder: Path, name: str) -> list[dict[str, str]]:
    """Rows of the log of a run, in which this metric has a value. A resumed run has several files."""
    rows: list[dict[str, str]] = []
    for path in sorted(folder.glob("logs/**/metrics.csv"), key=lambda file: file.stat().st_mtime):
        with path.open() as file:
            rows += [row for row in csv.DictReader(file) if row.get(name)]
    return rows


def curve(rows: Sequence[dict[str, str]], name: str) -> list[list[float]]:
    """[step, value] of a metric, by step; of a step that was repeated, the later value."""
    return [list(point) for point in sorted({int(float(row["step"])): float(row[name]) for row in rows}.items())]
