"""Codes that ``predict`` of the tokenizer writes, and the figures of a training."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import main
from datamodules import CodeDataModule, DigitsDataModule
from lightning_modules import VQGANModule
from llamagen.checkpoints.contents import load_vqgan, weights_checksum
from tests.pipeline import Pipeline
from tests.ranks import succeeds, two_processes

SHARDS_OF_500 = "--trainer.callbacks=[{class_path: EMA}, {class_path: CodeWriter, init_args: {samples_per_shard: 500}}]"


def test_codes_are_those_of_the_averaged_tokenizer(pipeline: Pipeline) -> None:
    vqgan = load_vqgan(pipeline.tokenizer)
    digits = DigitsDataModule(pipeline.digits, image_size=8, batch_size=400)
    codes = CodeDataModule(pipeline.codes, batch_size=400, num_workers=0)
    digits.setup("predict")
    codes.setup("fit")
    seen = 0
    for split in ("train", "val"):
        for number in range(len(digits.datasets[split])):
            image, sample = digits.datasets[split][number, 0], codes.datasets[split][number, 0]
            assert (image["keys"], image["labels"]) == (sample["keys"], sample["condition"])
            if number % 50 == 0:
                with torch.no_grad():
                    expected = vqgan.encode(image["images"][None]).codes.flatten()
                assert torch.equal(sample["codes"], expected)
            seen += 1
    assert seen == 1797


def test_meta_describes_the_codes(pipeline: Pipeline) -> None:
    meta = json.loads((pipeline.codes / "meta.json").read_text())
    assert (meta["vocabulary"], meta["grid"], meta["views"], meta["num_classes"]) == (32, [4, 4], 1, 10)
    assert {split: entry["count"] for split, entry in meta["splits"].items()} == {"train": 1497, "val": 300}
    assert meta["tokenizer"] == weights_checksum(load_vqgan(pipeline.tokenizer))
    assert meta["classes"] == [str(digit) for digit in range(10)]
    for split, entry in meta["splits"].items():
        shards = sorted((pipeline.codes / split).iterdir())
        assert entry["shards"] == [
            {
                "name": path.name,
                "count": entry["count"],
                "bytes": path.stat().st_size,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
            for path in shards
        ]


def test_rejects_a_folder_with_codes(pipeline: Pipeline) -> None:
    before = sorted(pipeline.codes.rglob("*"))
    with pytest.raises(ValueError, match=r"already holds a complete dataset"):
        main.main([*pipeline.extract_arguments(pipeline.codes), f"--ckpt_path={pipeline.tokenizer}"])
    assert sorted(pipeline.codes.rglob("*")) == before


def interrupt_at(monkeypatch: pytest.MonkeyPatch, batch_idx: int, dataloader_idx: int) -> None:
    """Make the extraction fail at a batch."""
    predict_step = VQGANModule.predict_step

    def interrupted(self: VQGANModule, batch: Any, *place: int) -> Any:
        if place == (batch_idx, dataloader_idx):
            raise RuntimeError("interrupted")
        return predict_step(self, batch, *place)

    monkeypatch.setattr(VQGANModule, "predict_step", interrupted)


def test_an_interrupted_extraction_leaves_no_partial_shard(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*pipeline.extract_arguments(tmp_path / "codes"), f"--ckpt_path={pipeline.tokenizer}"]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, 0)
        with pytest.raises(RuntimeError, match=r"interrupted"):
            main.main(command)
    left = sorted(path.name for path in (tmp_path / "codes").rglob("*") if path.is_file())
    assert left == [".plan.json", "predict.yaml"]
    main.main(command)
    for split in ("train", "val"):
        name = f"{split}/{split}-000000.tar"
        assert (tmp_path / "codes" / name).read_bytes() == (pipeline.codes / name).read_bytes()


def test_two_processes_resume_an_extraction_with_one_shard_left(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*pipeline.extract_arguments(tmp_path), SHARDS_OF_500, f"--ckpt_path={pipeline.tokenizer}"]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1, 1)
        with pytest.raises(RuntimeError, match=r"interrupted"):
            main.main(command)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")}
    assert sorted(path.name for path in written) == [f"train-00000{number}.tar" for number in range(3)]
    succeeds(two_processes(command))
    assert {path: path.stat().st_mtime_ns for path in written} == written
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert {split: entry["count"] for split, entry in meta["splits"].items()} == {"train": 1497, "val": 300}


def test_grids_and_curves_are_in_the_run_folder(pipeline: Pipeline) -> None:
    reconstructions = sorted((pipeline.root / "tokenizer/reconstructions").iterdir())
    assert [path.name for path in reconstructions] == ["step_0000004.png", "step_0000008.png"]
    assert np.array(Image.open(reconstructions[0])).shape == (2 * 10 + 2, 10 * 10 + 2, 3)
    samples = sorted((pipeline.root / "argen/samples").iterdir())
    assert [path.name for path in samples] == ["step_0000004.png", "step_0000008.png"]
    assert np.array(Image.open(samples[0])).shape == (10 * 10 + 2, 8 * 10 + 2, 3)
    for run in ("tokenizer", "argen"):
        assert np.array(Image.open(pipeline.root / run / "curves.png")).std() > 1
