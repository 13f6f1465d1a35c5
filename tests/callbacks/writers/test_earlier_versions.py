"""Stopped ``predict`` runs of an earlier version, whose folder and plan used other names, are resumed."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from callbacks.writers.sample_folder import SampleFolder
from llamagen.sampling import IMAGE_SETTINGS
from tests.callbacks.writers.test_codes import COUNTS, extract, samples_of, write_set
from tests.callbacks.writers.test_images import TWO_BATCHES, sample, written_files
from tests.lightning_modules.runs import vqgan_module
from tests.pipeline import SAMPLING, Pipeline

OLD_KEYS = {"number of images": "number of pictures", "image_size": "picture_size"}


def rename_keys(plan: Path, names: dict[str, str]) -> None:
    content = json.loads(plan.read_text())
    assert names.keys() <= content.keys()
    plan.write_text(json.dumps({names.get(key, key): value for key, value in content.items()}))


def times(folder: Path, pattern: str) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob(pattern)}


def test_a_stopped_sampling_run_is_resumed(pipeline: Pipeline, tmp_path: Path) -> None:
    sample(pipeline, tmp_path, trainer=TWO_BATCHES)
    (tmp_path / "images").rename(tmp_path / "pictures")
    rename_keys(tmp_path / ".plan.json", OLD_KEYS)
    before = times(tmp_path / "pictures", "*.png")
    assert len(before) == 14
    with pytest.raises(ValueError, match=r"was started with another image_size \(None then, 5 now\)"):
        sample(pipeline, tmp_path, image_size=5)
    assert times(tmp_path / "pictures", "*.png") == before
    sample(pipeline, tmp_path, sampling=replace(SAMPLING, window=3))  # an option that did not exist then
    assert not (tmp_path / "pictures").exists()
    assert written_files(tmp_path) == written_files(pipeline.samples)
    assert before.items() <= times(tmp_path / "images", "*.png").items()
    plan = json.loads((tmp_path / ".plan.json").read_text())
    assert plan.keys() >= OLD_KEYS.keys()
    assert {name for name in plan if name.startswith("sampling.")} == {f"sampling.{name}" for name in IMAGE_SETTINGS}


def test_images_without_a_plan_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pictures/3").mkdir(parents=True)
    (tmp_path / "pictures/3/000003_class3.png").touch()
    with pytest.raises(ValueError, match=r"already holds samples"):
        SampleFolder(tmp_path, np.arange(10)).check_free()


def test_a_stopped_extraction_of_codes_is_resumed(tmp_path: Path) -> None:
    tokenizer, out = vqgan_module(), tmp_path / "codes"
    images = write_set(tmp_path / "images", *(samples_of(split, count) for split, count in COUNTS.items()))
    with pytest.raises(ValueError, match="is incomplete"):
        extract(tokenizer, images, out, trainer={"limit_predict_batches": 5})  # of 4 images each, of 10 in a shard
    before = times(out, "*.tar")
    assert before.keys() == {"train-000000.tar", "val-000000.tar", "val-000001.tar"}
    rename_keys(out / ".plan.json", {"images": "pictures"})
    extract(tokenizer, images, out)
    assert before.items() <= times(out, "*.tar").items()
    meta = json.loads((out / "meta.json").read_text())
    assert {split: entry["count"] for split, entry in meta["splits"].items()} == COUNTS
