"""A model card states what the run recorded about exactly the exported weights, and nothing else."""

import csv
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from llamagen.class_names import ClassNames
from llamagen.grids import captioned_grid
from llamagen.pretrained.card import Card
from llamagen.pretrained.export_folder import Export, export_model
from llamagen.pretrained.loading import Parts
from llamagen.pretrained.model import LlamaGen
from llamagen.pretrained.run_facts import Metric, RunFacts, read_run_facts
from llamagen.pretrained.run_folder import Run, read_run
from llamagen.pretrained.sample_images import Samples, sample_images
from llamagen.sampling import SamplingConfig
from tests.pipeline import Pipeline
from tests.small_models import small_gpt, small_vqgan

CHECKSUM = "a" * 64


@pytest.fixture
def folder(pipeline: Pipeline, tmp_path: Path) -> Path:
    """A copy of the run of the pipeline's class model, which was trained on 8 batches."""
    shutil.copytree(pipeline.root / "argen", tmp_path / "argen", symlinks=True)
    return tmp_path / "argen"


def run_in(folder: Path, **trainer: Any) -> Run:
    """The run in a folder, with other options of the trainer."""
    run = read_run(folder)
    assert run is not None
    run.settings["trainer"] |= trainer
    return run


def facts(folder: Path, run: Run | None = None, averaged: bool = True) -> RunFacts:
    return read_run_facts(run or run_in(folder), folder / "checkpoints/last.ckpt", averaged, CHECKSUM)


def log(folder: Path, version: int, *rows: Mapping[str, object]) -> None:
    path = folder / f"logs/version_{version}/metrics.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, sorted({name for row in rows for name in row}))
        writer.writeheader()
        writer.writerows(rows)


def class_model(names: list[str]) -> LlamaGen:
    parts = Parts("small", small_vqgan(), small_gpt(), SamplingConfig(), "float32", ClassNames(names))
    return LlamaGen(parts)


def header(card: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return content


def test_the_card_of_a_run_has_its_facts(pipeline: Pipeline, tmp_path: Path) -> None:
    export_model(Export(str(pipeline.argen), samples=2, license="cc-by-4.0"), tmp_path / "digits")
    card = (tmp_path / "digits/README.md").read_text()
    assert header(card) == {
        "license": "cc-by-4.0",
        "library_name": "llamagen-lightning",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["llamagen", "image-generation", "autoregressive", "class-conditional", "vqgan"],
    }
    with next((pipeline.root / "argen").rglob("metrics.csv")).open() as file:
        last = [row for row in csv.DictReader(file) if row["val/loss"]][-1]
    for line in (
        "# digits",
        "8 × 8 pixels of 10 classes",
        "`model.generate([0, 5], images_per_prompt=1, seed=0)`",
        'model = LlamaGen.from_pretrained("digits")',
        "| Parameters | 29,184 |",
        "| Layers, heads, width | 2, 2, 32 |",
        "| Codes of an image | 4 × 4 of 32 |",
        "| Data | codes |",
        "| Training images | 1,497 |",
        "| Optimizer steps | 8 |",
        f"| Epochs | {8 * 16 / 1497:.4g} |",
        "| Batch size | 16 on each device |",
        "AdamW (lr 0.0015",
        "| Precision | 32-true |",
        "| Weights | averages (EMA) with decay 0.995 |",
        "| Seed | 0 |",
        f"| `val/loss` | {float(last['val/loss']):.4g} | 8 |",
        "The weights have the licence `cc-by-4.0`.",
    ):
        assert line in card, line
    assert str(pipeline.root) not in card
    samples = np.asarray(Image.open(tmp_path / "digits/samples.png"))
    expected = LlamaGen.from_pretrained(pipeline.argen).generate([0, 5], progress=False)
    assert np.array_equal(samples, np.asarray(captioned_grid([[np.asarray(each) for each in expected]], [["0", "5"]])))


def test_the_licence_is_stated_only_if_it_is_given(folder: Path) -> None:
    card = Card(class_model(list("abcdefg")), "x", facts(folder)).markdown()
    assert "icen" not in card.replace("llamagen", "")
    based = Card(class_model(list("abcdefg")), "x", RunFacts(), base="owner/repository").markdown()
    assert "The weights started from those of [owner/repository](https://huggingface.co/owner/repository)" in based
    assert header(based)["base_model"] == "owner/repository"


def test_metrics_are_the_last_ones_up_to_the_checkpoint(folder: Path) -> None:
    log(folder, 0, {"step": 4, "val/loss": 3.0, "gfid/x": 9.0, "train/loss": 2.0}, {"step": 8, "val/loss": 2.0})
    # A run that was stopped and resumed; version 10 is after version 9.
    log(folder, 9, {"step": 8, "val/loss": 1.5, "inception_score": float("nan")})
    log(folder, 10, {"step": 8, "val/loss": 1.0}, {"step": 12, "val/loss": 0.5, "gfid/x": 7.0, "val_raw/loss": 4.0})
    found = facts(folder)
    assert set(found.metrics) == {Metric("val/loss", 1.0, 8), Metric("gfid/x", 9.0, 4)}
    assert found.best == (Metric("gfid/x", 7.0, 12),)


def test_metrics_of_raw_weights_are_not_those_of_the_averages(folder: Path) -> None:
    log(folder, 0, {"step": 8, "val/loss": 3.0, "gfid/x": 9.0, "val_raw/loss": 4.0})
    assert facts(folder, averaged=False).metrics == (Metric("val_raw/loss", 4.0, 8),)
    assert facts(folder, averaged=False).training["Weights"] == "raw, without averages (EMA)"
    without = run_in(folder, callbacks=[])
    assert Metric("val/loss", 3.0, 8) in facts(folder, without, averaged=False).metrics


@pytest.mark.parametrize(
    ("trainer", "size"),
    [
        ({"devices": "auto"}, "16 on each device"),
        ({"devices": 4, "num_nodes": 2}, "16 × 8 devices"),
        ({"devices": "2", "accumulate_grad_batches": 3}, "16 × 2 devices × 3 accumulated batches"),
    ],
)
def test_the_batch_size_names_devices_only_if_they_are_recorded(
    folder: Path, trainer: dict[str, Any], size: str
) -> None:
    assert facts(folder, run_in(folder, **trainer)).training["Batch size"] == size


def test_an_evaluation_is_reported_only_for_the_same_weights(folder: Path) -> None:
    report = {
        "metrics": {"gfid/ref": 1.25, "broken": None},
        "images": {"count": 1500, "resolution": 32},
        "reference": {"name": "ref"},
        "extractor": {"name": "inception"},
        "model": {"weights": CHECKSUM},
        "sampling": {"top_k": 0, "guidance_steps": None},
        "versions": {"torch": "2.13.0"},
    }
    (folder / "report").mkdir()
    file = folder / "report/metrics.json"
    file.write_text(json.dumps(report))
    found = facts(folder)
    assert found.evaluation is not None
    assert found.evaluation.metrics == {"gfid/ref": 1.25}
    card = Card(class_model(list("abcdefg")), "x", found).markdown()
    for line in ("| `gfid/ref` | 1.25 |", "- Images: 1,500 of 32 px", "- Compared with: ref", "- Sampling: top_k 0\n"):
        assert line in card
    file.write_text(json.dumps(report | {"model": {"weights": "b" * 64}}))
    assert facts(folder).evaluation is None


def test_damaged_records_are_left_out(folder: Path) -> None:
    (folder / "report").mkdir()
    (folder / "report/metrics.json").write_text('{"model": [')
    (folder / "logs/version_0/metrics.csv").write_bytes(b"\xff\xfe\x00")
    run = Run(folder, {"trainer": None, "data": "codes", "model": {"class_path": "ARGenModule"}})
    found = facts(folder, run)
    assert (found.metrics, found.evaluation) == ((), None)
    assert set(found.training) == {"Optimizer steps", "Lightning"}
    assert read_run_facts(None, folder / "missing.ckpt", True, CHECKSUM) == RunFacts()


@pytest.mark.parametrize(
    ("start", "base", "shown"),
    [
        ("c2i_B_256", "FoundationVision/LlamaGen", "`c2i_B_256`"),
        ("weights/c2i_B_256.pt", "FoundationVision/LlamaGen", "`c2i_B_256.pt`"),
        ("hf://me/mine/model.pt@v1", "me/mine", "`hf://me/mine/model.pt@v1`"),
        ("/home/me/runs/first.ckpt", None, "`first.ckpt`"),
    ],
)
def test_the_card_names_the_initial_weights(folder: Path, tmp_path: Path, start: str, base: str, shown: str) -> None:
    config = folder / "fit.yaml"
    config.write_text(config.read_text().replace("init_from: null", f"init_from: {start}"))
    export_model(Export(str(folder), samples=0), tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert header(card).get("base_model") == base
    assert f"| Initialised from | {shown} |" in card
    assert "/home/me" not in card


def test_class_names_cannot_break_the_card() -> None:
    names = ["cat", "<script>", "a|b", "dog, hound", "dog", "two\nlines", "7"]
    card = Card(class_model(names), "x", RunFacts(), names_classes=True).markdown()
    for line in (
        "- 1: &lt;script>",
        "- 2: a\\|b",
        "- 5: two lines",
        'generate(["cat", "<script>"], seed=0)'.replace('"', "'"),
    ):
        assert line in card
    many = Card(class_model(names * 4), "x", RunFacts(), names_classes=True).markdown()
    assert "<details><summary>28 classes</summary>" in many
    # A name of two classes does not find the class.
    assert "generate([0, 'dog']" in Card(class_model(["cat", "dog", "cat"]), "x", RunFacts()).markdown()


def test_samples_are_spread_over_the_classes() -> None:
    model = class_model(list("abcdefg"))

    def sampled(count: int, *conditions: str) -> tuple[tuple[int | str, ...], int]:
        samples = sample_images(model, count, conditions, ())
        assert isinstance(samples, Samples)
        return samples.conditions, samples.images_per_prompt

    assert sampled(3) == ((0, 2, 4), 1)
    assert sampled(15) == ((0, 1, 2, 3, 4, 5, 6), 2)
    assert sampled(4, "b", "6") == (("b", "6"), 2)
    assert sampled(1, "a", "b") == (("a", "b"), 1)
    assert sample_images(model, 0, ("a",), ()) is None
