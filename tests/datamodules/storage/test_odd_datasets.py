"""Unusual datasets: odd names, repeated keys, mixed formats, very few examples."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules import CodeDataModule, ImageDataModule
from datamodules.inspection import inspect
from datamodules.loading.order import NO_EPOCH
from datamodules.packing import pack
from datamodules.storage.shards import ShardDataset
from datamodules.storage.sources import hold_out
from datamodules.storage.tar_index import index_shard
from tests.datamodules.code_datasets import write_codes
from tests.datamodules.shard_files import assert_one_line, grey_image, write_shards


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def image_files(*classes: str, count: int = 10) -> dict[str, bytes]:
    return {f"{name}/{number}.png": grey_image(number) for name in classes for number in range(count)}


def image_data(root: Any = None, **options: Any) -> ImageDataModule:
    data = ImageDataModule(root, **{"image_size": 4, "batch_size": 4, "num_workers": 0, **options})
    data.setup("fit")
    return data


def epoch(data: Any) -> list[str]:
    return [key for batch in data.train_dataloader() for key in batch["keys"]]


def test_class_may_be_named_train(tmp_path: Path) -> None:
    data = image_data(str(write_folder(tmp_path, image_files("car", "train", "plane"))))
    assert data.class_names == ["car", "plane", "train"]
    assert len(data.datasets["train"]) + len(data.datasets["val"]) == 30  # type: ignore[arg-type]


def test_two_images_can_be_split_but_not_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        image_data(str(write_folder(tmp_path / "one", image_files("a", count=1))))
    assert_one_line(error, "hold no usable examples")
    data = image_data(str(write_folder(tmp_path / "two", image_files("a", count=2))), val_share=0.999)
    assert [len(data.datasets[split]) for split in ("train", "val")] == [1, 1]  # type: ignore[arg-type]


def test_shards_with_the_same_keys_hold_different_examples_out(tmp_path: Path) -> None:
    parts = [(f"{number}", {"png": grey_image(number)}) for number in range(20)]
    held_out = []
    for shard in range(10):
        (path,) = write_shards(tmp_path / f"s{shard}", parts, per_shard=20)
        held_out.append(tuple(np.flatnonzero(hold_out(index_shard(path), 0.2))))
    assert len(set(held_out)) > 5


def test_images_in_unsupported_formats_are_counted_as_bad(tmp_path: Path) -> None:
    files = {**image_files("a", "b", count=40), "a/x.bmp": b"BM", "b/y.GIF": b"GIF", "b/notes.txt": b"text"}
    data = image_data(str(write_folder(tmp_path / "few", files)))
    assert data.tallies["train"].by_reason() == {"no image": 2}
    many = {**files, **{f"c/{number}.tif": b"II" for number in range(10)}}
    with pytest.raises(ValueError, match=r"12 of 92 examples .*no image: 12; e.g. .* convert or remove it"):
        image_data(str(write_folder(tmp_path / "many", many)))


def test_half_a_surrogate_pair_in_a_caption_is_replaced(tmp_path: Path) -> None:
    text = json.dumps({"caption": "x \ud83d"}).encode()
    (shard,) = write_shards(tmp_path, [("0", {"png": grey_image(1), "json": text})])
    (example,) = index_shard(shard)
    assert example.read_caption() == "x ?"


def test_named_shards_of_codes_may_be_elsewhere_than_meta_json(tmp_path: Path) -> None:
    write_codes(tmp_path, train=6, val=3, per_shard=3)
    data = CodeDataModule(tmp_path, 2, num_workers=0, train=str(tmp_path / "train/train-000001.tar"),
                          val=str(tmp_path / "val/val-000000.tar"))  # fmt: skip
    data.setup("fit")
    assert sorted(epoch(data)) == ["train/3", "train/4", "train/5"]


def write_half_labelled(root: Path, shards: int, lost: int) -> str:
    for shard in range(shards):
        parts = [
            (f"{shard}_{number:03d}", {"png": grey_image(number % 200), **({} if number < lost else {"cls": b"1"})})
            for number in range(100)
        ]
        (path,) = write_shards(root / str(shard), parts, per_shard=100)
        path.rename(root / f"{shard}.tar")
    return f"{root}/{{0..{shards - 1}}}.tar"


def test_bad_share_of_a_stream_is_that_of_the_opened_shards(tmp_path: Path) -> None:
    good, bad = write_half_labelled(tmp_path / "a", 4, 3), write_half_labelled(tmp_path / "b", 4, 9)
    val = str(tmp_path / "a/0.tar")
    data = image_data(train=good, val=val, resampled_epoch=100)
    assert len(epoch(data)) == 100
    assert data.tallies["train"].counts["no label"] >= 3
    with pytest.raises(ValueError, match=r"examples of train are bad, more than max_bad_share 0.05"):
        epoch(image_data(train=bad, val=val, resampled_epoch=100))


def test_mixed_batch_of_dataset_reads_consecutive_examples(tmp_path: Path) -> None:
    data = image_data(train=write_half_labelled(tmp_path, 1, 4), val=str(tmp_path / "0.tar"))
    examples = data.datasets["train"].__getitems__([(number, NO_EPOCH) for number in range(3)])  # type: ignore[attr-defined]
    assert examples["keys"] == ["0_004", "0_005", "0_006"]
    assert torch.equal(examples["numbers"], torch.arange(3))


def test_packing_into_the_packed_folder_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, image_files("a", "b"))
    with pytest.raises(ValueError) as error:
        pack(str(tmp_path), tmp_path / "packed", workers=1)
    assert_one_line(error, tmp_path / "packed", "is inside")
    assert not (tmp_path / "packed").exists()


def test_packing_does_not_resume_with_other_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "set", image_files("b", "c"))
    monkeypatch.setattr(ShardDataset, "finish", lambda *_: None)  # stopped just before the end
    pack(str(tmp_path / "set"), tmp_path / "packed", workers=1)
    monkeypatch.undo()
    (tmp_path / "set/a").mkdir()  # every class moves on by one, but no example is added
    (tmp_path / "set/a/1.bmp").write_bytes(b"BM")
    with pytest.raises(ValueError) as error:
        pack(str(tmp_path / "set"), tmp_path / "packed", workers=1)
    assert_one_line(error, "another classes, samples")


def test_names_that_are_not_utf8_are_listed_in_skipped_tsv(tmp_path: Path) -> None:
    write_folder(tmp_path / "set", image_files("a", count=40))
    for name in (b"\xff.jpg", b"a\tb.jpg"):
        Path(os.fsdecode(os.fsencode(tmp_path / "set/a/") + b"/" + name)).write_bytes(b"")
    pack(str(tmp_path / "set"), tmp_path / "packed", workers=1, max_bad_share=0.1)
    lines = (tmp_path / "packed/skipped.tsv").read_text().splitlines()
    assert sorted(line.split("\t")[1] for line in lines[1:]) == ["a/\\udcff", "a/a b"]
    assert all(len(line.split("\t")) == 4 for line in lines)


def test_inspection_reports_all_examples_and_changed_shards(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", image_files("a", count=1))
    assert "all: 1 samples, in folders" in inspect(str(folder), num_workers=0)
    write_folder(tmp_path / "set", image_files("a", count=40))
    pack(str(folder), tmp_path / "packed", workers=1)
    assert inspect(str(tmp_path / "packed"), num_workers=0).count("  checksums: 1 of 1 correct") == 2
    shard = tmp_path / "packed/train/train-000000.tar"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1  # after the end mark, where nothing is read
    shard.write_bytes(data)
    lines = inspect(str(tmp_path / "packed"), num_workers=0)
    assert "  checksums: 0 of 1 correct" in lines
    assert f"    {shard} has changed since it was written" in lines
