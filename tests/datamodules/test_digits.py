"""The digits: written once, complete or absent, with the pixels of scikit-learn."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from datamodules.digits import DigitsDataModule
from datamodules.storage.shards import META_FILE, ShardDataset, ShardWriter, read_meta
from tests.datamodules.shard_files import assert_one_line, use_few_digits


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> DigitsDataModule:
    """The digits in their original size."""
    data = DigitsDataModule(tmp_path_factory.mktemp("data") / "digits", image_size=8, batch_size=100)
    data.prepare_data()
    data.setup("fit")
    return data


def files(root: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in root.rglob("*")}


def test_digits_are_split_into_1497_and_300(written: DigitsDataModule) -> None:
    keys = {split: list(written.datasets[split].examples.keys) for split in ("train", "val")}  # type: ignore[attr-defined]
    assert {split: len(names) for split, names in keys.items()} == {"train": 1497, "val": 300}
    assert sorted(keys["train"] + keys["val"]) == [f"{number:06d}" for number in range(1797)]
    root = Path(str(written.root))
    meta = read_meta(root, "")
    assert {split: entry["count"] for split, entry in meta["splits"].items()} == {"train": 1497, "val": 300}
    assert (meta["format"], meta["num_classes"], meta["classes"]) == ("llamagen-images", 10, list("0123456789"))
    assert written.class_names == meta["classes"]
    for split, entry in meta["splits"].items():
        shards = sorted((root / split).iterdir())
        assert [(shard["name"], shard["bytes"], shard["sha256"]) for shard in entry["shards"]] == [
            (path.name, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()) for path in shards
        ]
        assert sum(shard["count"] for shard in entry["shards"]) == entry["count"]


def test_pixels_and_labels_are_those_of_scikit_learn(written: DigitsDataModule) -> None:
    reference = load_digits()
    seen = 0
    for loader in written.predict_dataloader():
        for batch in loader:
            numbers = [int(key) for key in batch["keys"]]
            sixteenths = (batch["images"].numpy() + 1) * 8
            assert batch["images"].shape[1:] == (3, 8, 8)
            assert abs(sixteenths - reference.images[numbers][:, None]).max() < 16 / 255
            assert np.array_equal(batch["labels"], reference.target[numbers])
            seen += len(numbers)
    assert seen == 1797


def test_every_class_is_in_both_splits(written: DigitsDataModule) -> None:
    for split in ("train", "val"):
        labels = written.datasets[split].examples.labels  # type: ignore[attr-defined]
        counts = np.bincount(labels, minlength=10)
        assert counts.min() > 0.7 * counts.mean()
        assert counts.shape == (10,)


def test_digits_are_enlarged_to_the_image_size(written: DigitsDataModule) -> None:
    enlarged = DigitsDataModule(written.root, image_size=32, batch_size=4)
    enlarged.setup("validate")
    assert next(iter(enlarged.val_dataloader()))["images"].shape == (4, 3, 32, 32)


def test_existing_digits_are_not_written_again(written: DigitsDataModule) -> None:
    before = files(Path(str(written.root)))
    DigitsDataModule(written.root).prepare_data()
    assert files(Path(str(written.root))) == before
    assert len(before) == 1 + 2 + 3 + 1  # meta.json, two folders, shards of 500


# In the first shard of the validation split, in the second one of the training split, and in the last one.
@pytest.mark.parametrize("stop", [0, 25, 59])
def test_interrupt_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    write = ShardWriter.write

    def interrupted(writer: ShardWriter, key: str, parts: Mapping[str, bytes], label: int = -1) -> None:
        if key == f"{stop:06d}":
            raise KeyboardInterrupt
        write(writer, key, parts, label)

    use_few_digits(monkeypatch)
    monkeypatch.setattr(ShardWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        DigitsDataModule(tmp_path / "data" / "digits").prepare_data()
    assert list((tmp_path / "data").iterdir()) == []


def test_interrupt_before_meta_json_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(shards: ShardDataset, *args: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    use_few_digits(monkeypatch)
    monkeypatch.setattr(ShardDataset, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        DigitsDataModule(tmp_path / "digits").prepare_data()
    assert list(tmp_path.iterdir()) == []


def test_digits_can_be_written_after_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_few_digits(monkeypatch)
    (tmp_path / ".digits-interrupted").mkdir()
    for name in ("digits", "again/digits"):
        DigitsDataModule(tmp_path / name).prepare_data()
    meta = read_meta(tmp_path / "digits", "")
    assert {split: entry["count"] for split, entry in meta["splits"].items()} == {"train": 50, "val": 10}
    assert meta == read_meta(tmp_path / "again/digits", "")


def test_folder_with_other_files_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError) as error:
        DigitsDataModule(tmp_path).prepare_data()
    assert_one_line(error, tmp_path, f"no {META_FILE}", "choose another root")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_dataset_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / META_FILE).write_text(json.dumps({"format": "llamagen-codes"}))
    with pytest.raises(ValueError) as error:
        DigitsDataModule(tmp_path).prepare_data()
    assert_one_line(error, tmp_path, "choose another root")


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> DigitsDataModule:
    """Sixty digits with captions."""
    data = DigitsDataModule(tmp_path_factory.mktemp("data") / "digits", image_size=8, batch_size=100, captions=True)
    with pytest.MonkeyPatch.context() as patch:
        use_few_digits(patch)
        data.prepare_data()
    data.setup("predict")
    return data


def test_digits_have_captions_that_name_them(captioned: DigitsDataModule) -> None:
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    seen: list[int] = []
    for loader in captioned.predict_dataloader():
        for batch in loader:
            assert batch["captions"] == [f"a handwritten {words[label]}" for label in batch["labels"]]
            seen += batch["labels"].tolist()
    assert len(seen) == 60
    assert set(seen) == set(range(10))
    assert read_meta(str(captioned.root), "")["captions"] is True


def test_digits_have_no_captions_by_default(written: DigitsDataModule) -> None:
    for split in ("train", "val"):
        assert "txt" not in written.datasets[split].examples.members  # type: ignore[attr-defined]
    assert read_meta(str(written.root), "")["captions"] is False


def test_digits_without_captions_are_refused_if_captions_are_required(written: DigitsDataModule) -> None:
    before = files(Path(str(written.root)))
    with pytest.raises(ValueError) as error:
        DigitsDataModule(written.root, captions=True).prepare_data()
    assert_one_line(error, written.root, "without captions", "delete it or choose another root")
    assert files(Path(str(written.root))) == before


def test_digits_with_captions_can_be_read_without_captions(captioned: DigitsDataModule) -> None:
    data = DigitsDataModule(captioned.root, image_size=8)
    data.prepare_data()
    data.setup("fit")
    assert len(data.datasets["train"]) == 50  # type: ignore[arg-type]
