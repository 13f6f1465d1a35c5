"""Codes and pictures that ``predict`` leaves behind."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import main
from datamodules import CodeDataModule, DigitsDataModule
from llamagen.checkpoint import load_vqgan, weights_checksum
from tests.pipeline import Pipeline


def test_codes_are_those_of_the_averaged_tokenizer(pipeline: Pipeline) -> None:
    vqgan = load_vqgan(pipeline.tokenizer)
    digits = DigitsDataModule(pipeline.digits, image_size=8, batch_size=400)
    codes = CodeDataModule(pipeline.codes, batch_size=400, num_workers=0)
    digits.setup("predict")
    codes.setup("fit")
    seen = 0
    for split in ("train", "val"):
        for number in range(len(digits.datasets[split])):
            picture, sample = digits.datasets[split][number, 0], codes.datasets[split][number, 0]
            assert (picture["keys"], picture["labels"]) == (sample["keys"], sample["condition"])
            if number % 50 == 0:
                with torch.no_grad():
                    expected = vqgan.encode(picture["images"][None]).codes.flatten()
                assert torch.equal(sample["codes"], expected)
            seen += 1
    assert seen == 1797


def test_meta_describes_the_codes(pipeline: Pipeline) -> None:
    meta = json.loads((pipeline.codes / "meta.json").read_text())
    assert (meta["vocabulary"], meta["grid"], meta["views"], meta["num_classes"]) == (32, [4, 4], 1, 10)
    assert {split: entry["count"] for split, entry in meta["splits"].items()} == {"train": 1497, "val": 300}
    assert meta["tokenizer"] == weights_checksum(load_vqgan(pipeline.tokenizer))
    written = sorted(path.name for path in (pipeline.codes / "train").iterdir())
    assert written == meta["splits"]["train"]["shards"]


def test_extraction_refuses_a_folder_with_codes(pipeline: Pipeline) -> None:
    before = sorted(pipeline.codes.rglob("*"))
    with pytest.raises(ValueError, match="already holds codes"):
        main.main([*pipeline.extract_arguments(pipeline.codes), f"--ckpt_path={pipeline.tokenizer}"])
    assert sorted(pipeline.codes.rglob("*")) == before


def test_an_interrupted_extraction_leaves_no_half_written_shard(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_modules import VQGANModule

    predict_step = VQGANModule.predict_step

    def interrupted(self: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        if batch_idx == 3:
            raise RuntimeError("pulled the plug")
        return predict_step(self, batch, batch_idx, dataloader_idx)

    monkeypatch.setattr(VQGANModule, "predict_step", interrupted)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        main.main([*pipeline.extract_arguments(tmp_path / "codes"), f"--ckpt_path={pipeline.tokenizer}"])
    assert [path.name for path in (tmp_path / "codes").rglob("*") if path.is_file()] == ["predict.yaml"]


def test_samples_have_the_promised_names_and_archive(pipeline: Pipeline) -> None:
    names = [f"{index:06d}_class{index % 10}.png" for index in range(30)]
    assert sorted(path.name for path in pipeline.samples.glob("*_class*.png")) == names
    with np.load(pipeline.samples / "samples.npz") as archive:
        pictures, labels = archive["arr_0"], archive["arr_1"]
    assert (pictures.dtype, pictures.shape) == (np.uint8, (30, 8, 8, 3))
    assert labels.dtype == np.int64
    assert labels.tolist() == [index % 10 for index in range(30)]
    for name, picture in zip(names, pictures, strict=True):
        assert np.array_equal(np.array(Image.open(pipeline.samples / name)), picture)


def test_the_grid_has_a_row_for_each_class(pipeline: Pipeline) -> None:
    grid = np.array(Image.open(pipeline.samples / "grid.png"))
    assert grid.shape == (10 * 10 + 2, 3 * 10 + 2, 3)
    with np.load(pipeline.samples / "samples.npz") as archive:
        assert np.array_equal(grid[2 + 10 * 4 : 10 + 10 * 4, 12:20], archive["arr_0"][14])


def test_sampling_refuses_a_folder_with_samples(pipeline: Pipeline) -> None:
    with pytest.raises(ValueError, match="already holds samples"):
        main.main([*pipeline.sample_arguments(pipeline.samples), f"--ckpt_path={pipeline.argen}"])


def test_pictures_do_not_depend_on_the_batch_size(pipeline: Pipeline, tmp_path: Path) -> None:
    main.main([*pipeline.sample_arguments(tmp_path), f"--ckpt_path={pipeline.argen}", "--data.init_args.batch_size=30"])
    with np.load(tmp_path / "samples.npz") as other, np.load(pipeline.samples / "samples.npz") as first:
        # The codes are equal; the decoder's convolutions may round differently for another batch size.
        assert np.abs(other["arr_0"].astype(int) - first["arr_0"].astype(int)).max() <= 1


def test_grids_and_curves_are_in_the_run_folder(pipeline: Pipeline) -> None:
    reconstructions = sorted((pipeline.root / "tokenizer/reconstructions").iterdir())
    assert [path.name for path in reconstructions] == ["step_0000004.png", "step_0000008.png"]
    assert np.array(Image.open(reconstructions[0])).shape == (2 * 10 + 2, 10 * 10 + 2, 3)
    samples = sorted((pipeline.root / "argen/samples").iterdir())
    assert [path.name for path in samples] == ["step_0000004.png", "step_0000008.png"]
    assert np.array(Image.open(samples[0])).shape == (10 * 10 + 2, 8 * 10 + 2, 3)
    for run in ("tokenizer", "argen"):
        assert np.array(Image.open(pipeline.root / run / "curves.png")).std() > 1
