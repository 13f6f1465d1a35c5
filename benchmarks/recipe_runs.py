"""Runs of benchmarks/recipes.py: preparation of the data, training, evaluation. Each is a command line of the project.

Every step leaves its result in the bench's folder and is skipped if that is there, so a stopped bench continues.
"""

import csv
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from benchmarks.guidance_sweep import metrics_of, value_of
from llamagen.files import atomic_file

NAME = re.compile(r"\w[\w .-]*")
OVERLAYS = Path("benchmarks/recipe_data")
BASE = ("--config", "configs/argen/base.yaml")
EVALUATION = ("--config", "configs/argen/evaluate.yaml", "--config", "docs/runs/evaluation_cifar10/compiled.yaml")


@dataclass(frozen=True)
class Data:
    """Images, their tokenizer and how samples are measured.

    Attributes:
        name: name of the overlay in ``benchmarks/recipe_data``.
        tokenizer: options of the tokenizer's training.
        classifier: epochs of the classifier whose features FID uses; 0 measures no FID, because there are too few
            images of each class to train one.
        per_class: samples of each class for FID.
    """

    name: str
    tokenizer: tuple[str, ...]
    classifier: int
    per_class: int

    @property
    def overlay(self) -> Path:
        """Size and budget of the autoregressive models."""
        return OVERLAYS / f"{self.name}.yaml"


DATA = {
    "cifar10": Data(
        "cifar10",
        (
            *("--data.init_args.image_size=32", "--data.init_args.batch_size=32", "--trainer.max_steps=900"),
            "--model.init_args.net.channel_multipliers=[1, 2, 2]",
        ),
        classifier=6,
        per_class=250,
    ),
    "imagenet64": Data(
        "imagenet64",
        ("--data.init_args.batch_size=16", "--trainer.max_steps=700"),
        classifier=0,
        per_class=0,
    ),
}


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

    def arguments(self, data: Data) -> list[str]:
        """Options of ``main.py`` without paths: base, the recipe's overlays, size and budget, the recipe's options."""
        files = [*self.overlays, str(data.overlay)]
        return [*BASE, *(part for file in files for part in ("--config", file)), *self.options]

    def identify(self, data: Data, work: Path) -> None:
        """Record in the folder of its runs what the recipe is, or compare it with what it was.

        Raises:
            ValueError: if runs of this name had other options, or another content of a file.
        """
        files = [item for item in self.arguments(data) if item.endswith(".yaml")]
        identity = {
            "arguments": self.arguments(data),
            "sha256": {file: sha256(Path(file).read_bytes()).hexdigest() for file in files if Path(file).is_file()},
        }
        path = work / "runs" / self.name / "recipe.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as temporary:
                temporary.write_text(json.dumps(identity, indent=1), encoding="utf-8")
        elif json.loads(path.read_text()) != identity:
            raise ValueError(
                f"{path.parent} holds runs of {self.name!r} with other options or files; give this recipe another "
                "name, or remove the folder"
            )


def prepare(data: Data, images: Path, work: Path) -> Iterator[str]:
    """Pack the images, train the tokenizer, encode the images, and train the classifier. Yields the name of each step.

    Args:
        data: which data.
        images: folder of class folders.
        work: folder of the bench.
    """
    packed, codes, tokenizer = work / "images", work / "codes", work / "tokenizer"
    training = [
        *("--config", "configs/vqgan/base.yaml", "--config", "configs/vqgan/small.yaml"),
        *(f"--data.init_args.root={packed}", "--data.init_args.num_workers=0", "--data.init_args.random_crop=false"),
        *("--model.init_args.loss.perceptual_weight=0", "--trainer.max_epochs=-1", *data.tokenizer),
    ]
    checkpoint = tokenizer / "checkpoints/last.ckpt"
    steps = [
        ("pack the images", packed, ["-m", "datamodules.packing", str(images), str(packed), "--val_share", "0.1"]),
        ("train the tokenizer", checkpoint, _main("fit", *training, f"--trainer.default_root_dir={tokenizer}")),
        (
            "encode the images",
            codes / "meta.json",
            _main(
                *("predict", *training, "--config", "configs/vqgan/extract.yaml", f"--ckpt_path={checkpoint}"),
                f"--trainer.default_root_dir={codes}",
            ),
        ),
    ]
    if data.classifier:
        features, classifier = work / "classifier.safetensors", "classifier"
        given = ["--features", "Classifier", "--features.weights", str(features)]
        size = ["--image_size", "32"]
        command = ["classifier", str(packed), str(features), classifier, "--epochs", str(data.classifier), *size]
        reference = ["reference", str(packed), str(work / "reference.npz"), "--split", "train", *size, *given]
        steps += [
            ("train the classifier", features, ["-m", "evaluation", *command]),
            ("compute the reference", work / "reference.npz", ["-m", "evaluation", *reference]),
        ]
    for name, result, command in steps:
        yield name
        if not result.exists():
            run(command, work / "logs" / f"{name.replace(' ', '_')}.log")


def train(recipe: Recipe, data: Data, work: Path, seed: int) -> None:
    """Train one model, or resume it. ``metrics.csv`` of the run has its losses."""
    folder = run_folder(work, recipe, seed)
    if (folder / "finished").exists():
        return
    options = [*recipe.arguments(data), *training_paths(work, folder), f"--seed_everything={seed}", "--ckpt_path=last"]
    run(_main("fit", *options), folder.with_suffix(".log"))
    with atomic_file(folder / "finished") as temporary:
        temporary.write_text("")


def evaluate(recipe: Recipe, data: Data, work: Path, seed: int) -> None:
    """Sample from one model and measure FID."""
    folder = run_folder(work, recipe, seed)
    if not data.classifier or (folder / "report/metrics.json").exists():
        return
    checkpoint = folder / "checkpoints/last.ckpt"
    options = [
        *(
            *recipe.arguments(data),
            *EVALUATION,
            f"--model.init_args.tokenizer={work / 'tokenizer/checkpoints/last.ckpt'}",
        ),
        *(f"--trainer.default_root_dir={folder}", f"--ckpt_path={checkpoint}"),
        *(f"--data.init_args.per_class={data.per_class}", "--data.init_args.batch_size=250"),
        f"--trainer.callbacks.reference={work / 'reference.npz'}",
        *(
            "--trainer.callbacks.features=Classifier",
            f"--trainer.callbacks.features.weights={work / 'classifier.safetensors'}",
        ),
    ]
    run(_main("test", *options), folder.with_suffix(".log"))


def run_folder(work: Path, recipe: Recipe, seed: int) -> Path:
    """Folder of a run."""
    return work / "runs" / recipe.name / f"seed_{seed}"


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


def results(recipe: Recipe, work: Path, seed: int) -> dict[str, Any]:
    """Validation losses over the steps, and the metrics of the samples."""
    folder = run_folder(work, recipe, seed)
    rows: list[dict[str, str]] = []  # a resumed run has several files
    for path in sorted(folder.glob("logs/**/metrics.csv"), key=lambda file: file.stat().st_mtime):
        with path.open() as file:
            rows += [row for row in csv.DictReader(file) if row.get("val/loss")]
    curve = [list(point) for point in sorted({int(float(row["step"])): float(row["val/loss"]) for row in rows}.items())]
    found: dict[str, Any] = {"val_loss": curve[-1][1], "curve": curve}
    if rows[-1].get("val/loss_random_order"):
        found["val_loss_random_order"] = float(rows[-1]["val/loss_random_order"])
    if (folder / "report/metrics.json").exists():
        metrics = metrics_of(folder / "report")
        found |= {name: value_of(metrics, name) for name in ("gfid", "precision", "recall")}
    return found


def _main(*arguments: str) -> list[str]:
    return ["main.py", *arguments]


def training_paths(work: Path, folder: Path) -> list[str]:
    """Options of ``fit`` that name the codes, the tokenizer and the folder of the run."""
    tokenizer = work / "tokenizer/checkpoints/last.ckpt"
    return [
        *(f"--data.init_args.root={work / 'codes'}", f"--model.init_args.tokenizer={tokenizer}"),
        f"--trainer.default_root_dir={folder}",
    ]
