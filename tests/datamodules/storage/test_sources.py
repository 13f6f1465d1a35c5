"""Sources: what a user names as data is resolved, and missing data are named before training."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules.images import ImageDataModule
from datamodules.storage.index import ExampleIndex, Strings
from datamodules.storage.shards import META_FILE, ShardDataset
from datamodules.storage.sources import find_source, find_sources, hold_out
from tests.datamodules.shard_files import assert_one_line, grey_image, write_images, write_shards

HINT = "give a dataset"


def write_folder(root: Path, *names: str) -> Path:
    """Write PNG files to class folders."""
    for level, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(grey_image(level))
    return root


def write_dataset(root: Path, counts: dict[str, int]) -> Path:
    """Write a dataset with meta.json and two shards per split."""
    shards = ShardDataset(root, {}, HINT)
    shards.begin(list(counts))
    for split, count in counts.items():
        for number, first in enumerate((0, count // 2)):
            with shards.shard(split, number) as writer:
                for place in range(first, count // 2 if number == 0 else count):
                    writer.write(f"{split}{place}", {"png": grey_image(place)}, place % 3)
    meta = {"format": "llamagen-images", "classes": ["ant", "cat", "dog"]}
    shards.finish(dict.fromkeys(counts, 2), meta, {}, 0.0)
    return root


def sources(*args: Any, **more: Any) -> tuple[Any, Any, dict[str, Any]]:
    return find_sources(*args, **more, hint=HINT)


def refusal(*args: Any, **more: Any) -> pytest.ExceptionInfo[ValueError]:
    with pytest.raises(ValueError) as error:
        sources(*args, **more)
    return error


def keys(**options: Any) -> dict[str, list[str]]:
    """The keys of each split, as a DataModule reads them."""
    data = ImageDataModule(**options, num_workers=0)
    data.setup("fit")
    return {split: list(data.datasets[split].examples.keys) for split in ("train", "val")}  # type: ignore[attr-defined]


def test_folder_of_class_folders_is_the_training_split(tmp_path: Path) -> None:
    train, val, meta = sources(write_folder(tmp_path, "dog/1.png", "ant/1.png"), None, None)
    assert (train.folder, train.classes, train.shards) == (tmp_path, ["ant", "dog"], [])
    assert (val, meta) == (None, {})
    found = keys(root=tmp_path)
    assert sorted(found["train"] + found["val"]) == ["ant/1", "dog/1"]
    assert len(found["val"]) == 1


def test_folders_train_and_val_are_the_splits(tmp_path: Path) -> None:
    write_folder(tmp_path, "train/dog/1.png", "train/ant/1.png", "val/dog/2.png")
    train, val, _ = sources(tmp_path, None, None)
    assert (train.folder, val.folder) == (tmp_path / "train", tmp_path / "val")
    assert val.classes == ["ant", "dog"]
    assert keys(root=tmp_path) == {"train": ["ant/1", "dog/1"], "val": ["dog/2"]}


def test_shards_in_a_folder_are_the_training_split_in_the_order_of_their_names(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [(str(i), {"png": grey_image(i)}) for i in range(5)], per_shard=2)
    train, val, meta = sources(tmp_path, None, None)
    assert train.shards == [str(shard) for shard in shards]
    assert (train.folder, val, meta) == (None, None, {})


def test_shards_in_train_and_val_are_the_splits_without_meta_json(tmp_path: Path) -> None:
    write_images(tmp_path, train=4, val=2)
    train, val, meta = sources(str(tmp_path), None, None)
    assert [len(train.shards), len(val.shards), meta, train.entries] == [2, 1, {}, {}]
    assert keys(root=tmp_path) == {"train": [f"train/{i}" for i in range(4)], "val": ["val/0", "val/1"]}


def test_dataset_with_meta_json_consists_of_the_listed_shards(tmp_path: Path) -> None:
    write_dataset(tmp_path, {"train": 5, "val": 2})
    write_shards(tmp_path / "stray", [("stray", {"png": grey_image(0), "cls": b"0"})])
    (tmp_path / "stray/stray-000000.tar").rename(tmp_path / "train/stray.tar")
    train, val, meta = sources(tmp_path, None, None)
    assert train.shards == [f"{tmp_path}/train/train-00000{i}.tar" for i in range(2)]
    assert [train.entries[shard].examples for shard in train.shards] == [2, 3]
    assert (train.classes, val.name, meta["num_classes"]) == (["ant", "cat", "dog"], f"{tmp_path}/val", 3)
    assert keys(root=tmp_path)["train"] == [f"train{i}" for i in range(5)]


def test_dataset_with_meta_json_without_validation_split_holds_examples_out(tmp_path: Path) -> None:
    found = keys(root=write_dataset(tmp_path, {"train": 40}), val_share=0.2)
    assert sorted(found["train"] + found["val"]) == sorted(f"train{i}" for i in range(40))
    assert 1 <= len(found["val"]) <= 16


def test_val_replaces_the_validation_split_of_root(tmp_path: Path) -> None:
    write_images(tmp_path / "set", train=4, val=2)
    (other,) = write_shards(tmp_path / "other", [("other", {"png": grey_image(0), "cls": b"0"})])
    found = keys(root=tmp_path / "set", val=str(other))
    assert found == {"train": [f"train/{i}" for i in range(4)], "val": ["other"]}


def test_patterns_are_expanded_like_in_a_shell(tmp_path: Path) -> None:
    source = find_source(f"{tmp_path}/{{a,b}}-{{008..011}}.tar", HINT)
    assert source.shards == [f"{tmp_path}/{letter}-{n:03d}.tar" for letter in "ab" for n in range(8, 12)]
    remote = find_source("https://example.org/set-{0..1}.tar?a=b", HINT)
    assert remote.shards == ["https://example.org/set-0.tar?a=b", "https://example.org/set-1.tar?a=b"]


def test_list_is_read_in_order(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "a", [(str(i), {"png": grey_image(i)}) for i in range(4)], per_shard=1)
    names = [str(shards[3]), "s3://bucket/{0..1}.tar", str(tmp_path / "a")]
    remote = ["s3://bucket/0.tar", "s3://bucket/1.tar"]
    assert find_source(names, HINT).shards == [str(shards[3]), *remote, *map(str, shards)]
    assert keys(train=[str(shards[2]), f"{tmp_path}/a/a-{{000000..000001}}.tar"], val=[str(shards[3])]) == {
        "train": ["2", "0", "1"],
        "val": ["3"],
    }


def test_list_of_one_folder_is_that_folder(tmp_path: Path) -> None:
    write_folder(tmp_path, "a/1.png")
    assert find_source([str(tmp_path)], HINT).folder == tmp_path


def test_list_of_a_folder_and_others_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", "x/1.png")
    (shard,) = write_shards(tmp_path / "b", [("0", {"png": b"a"})])
    for names in ([str(tmp_path / "a"), str(shard)], [str(tmp_path / "a")] * 2, []):
        with pytest.raises(ValueError) as error:
            find_source(names, HINT)
        assert_one_line(error, str(names), "one folder of class folders", HINT)


def test_missing_shard_is_named_before_training(tmp_path: Path) -> None:
    write_images(tmp_path, train=4, val=2)
    missing = f"{tmp_path}/train/train-000002.tar"
    data = ImageDataModule(train=f"{tmp_path}/train/train-{{000000..000002}}.tar", val=f"{tmp_path}/val", num_workers=0)
    with pytest.raises(ValueError) as error:
        data.setup("fit")
    assert_one_line(error, missing, "does not exist")


def test_missing_shard_listed_in_meta_json_is_named_before_training(tmp_path: Path) -> None:
    write_dataset(tmp_path, {"train": 5, "val": 2})
    (tmp_path / "val/val-000001.tar").unlink()
    with pytest.raises(ValueError) as error:
        ImageDataModule(tmp_path, num_workers=0).setup("fit")
    assert_one_line(error, f"{tmp_path}/val/val-000001.tar", "does not exist")


@pytest.mark.parametrize(
    ("count", "phrase"), [(3, "says 3"), (1, "says 1"), ("two", "does not describe the shards of train")]
)
def test_shard_that_does_not_match_meta_json_is_refused(tmp_path: Path, count: Any, phrase: str) -> None:
    write_dataset(tmp_path, {"train": 5, "val": 2})
    meta = json.loads((tmp_path / META_FILE).read_text())
    meta["splits"]["train"]["shards"][0]["count"] = count
    (tmp_path / META_FILE).write_text(json.dumps(meta))
    with pytest.raises(ValueError) as error:
        ImageDataModule(tmp_path, num_workers=0).setup("fit")
    assert_one_line(error, tmp_path, phrase, "write the dataset again")


@pytest.mark.parametrize("splits", [None, 3, [1]], ids=str)
def test_meta_json_with_invalid_splits_is_refused(tmp_path: Path, splits: Any) -> None:
    (tmp_path / META_FILE).write_text(json.dumps({"format": "llamagen-images", "splits": splits}))
    with pytest.raises(ValueError) as error:
        ImageDataModule(tmp_path, num_workers=0).setup("fit")
    assert_one_line(error, tmp_path, f"splits in {META_FILE}", ImageDataModule.hint)


def test_unrelated_meta_json_is_ignored(tmp_path: Path) -> None:
    write_images(tmp_path, train=4, val=2)
    (tmp_path / META_FILE).write_text(json.dumps({"format": "another", "splits": 3}))
    train, val, meta = sources(tmp_path, None, None)
    assert (len(train.shards), len(val.shards), meta["splits"]) == (2, 1, 3)


def test_commands_are_refused_unless_they_are_allowed(tmp_path: Path) -> None:
    command = f"pipe:touch {tmp_path}/done; cat {{a,b}}.tar"
    for names in (command, [command]):
        assert_one_line(refusal(None, names, None), command, "run a command", "allow_pipe")
        assert_one_line(refusal(None, "a.tar", names), command, "allow_pipe")
    assert_one_line(refusal(command, None, None), command, "allow_pipe")
    assert sources(command, None, None, allow_pipe=True)[0].shards == [command]
    with pytest.raises(ValueError, match=r"allow_pipe"):
        ImageDataModule(train=command, num_workers=0).setup("fit")
    assert sources(None, command, None, allow_pipe=True)[0].shards == [command]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("address", ["ftp://example.org/a.tar", "file:///etc/a.tar", "S3://bucket/{0..1}.tar"])
def test_unknown_scheme_is_refused(address: str) -> None:
    for args in ((None, address, None), (None, "a.tar", address), (address, None, None)):
        assert_one_line(refusal(*args), address.split("{")[0], "unknown scheme", "https, s3, gs")


def test_train_replaces_all_of_root(tmp_path: Path) -> None:
    write_images(tmp_path / "set", train=4, val=2)
    shards = write_shards(tmp_path / "other", [(str(i), {"png": grey_image(i), "cls": b"0"}) for i in range(20)])
    train, val, meta = sources(tmp_path / "set", str(tmp_path / "other"), None)
    assert (train.shards, val, meta) == ([str(shard) for shard in shards], None, {})


@pytest.mark.parametrize("form", ["path", "pattern"])
def test_shards_may_be_the_root(tmp_path: Path, form: str) -> None:
    shards = write_shards(tmp_path, [(str(i), {"png": grey_image(i)}) for i in range(4)], per_shard=2)
    root = str(shards[1]) if form == "path" else f"{shards[0].parent}/{shards[0].stem[:-1]}{{0..1}}.tar"
    assert sources(root, None, None)[0].shards == [str(s) for s in (shards[1:] if form == "path" else shards)]


def test_neither_root_nor_train_is_refused() -> None:
    assert_one_line(refusal(None, None, "a.tar"), "neither root nor train", HINT)


def test_missing_or_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for args in ((tmp_path / "nowhere", None, None), (None, str(tmp_path / "nowhere"), None)):
        assert_one_line(refusal(*args), tmp_path / "nowhere", "does not exist", HINT)
    for args in ((tmp_path / "empty", None, None), (None, str(tmp_path / "empty"), None)):
        assert_one_line(refusal(*args), tmp_path / "empty", "neither .tar files nor folders of images", HINT)
    assert_one_line(refusal(tmp_path / "file", None, None), tmp_path / "file", HINT)


def test_root_with_only_validation_data_can_be_validated_but_not_trained_on(tmp_path: Path) -> None:
    write_folder(tmp_path, "val/dog/1.png")
    data = ImageDataModule(tmp_path, num_workers=0)
    data.setup("validate")
    assert len(data.datasets["val"]) == 1  # type: ignore[arg-type]
    with pytest.raises(ValueError) as error:
        ImageDataModule(tmp_path, num_workers=0).setup("fit")
    assert_one_line(error, "no train data", ImageDataModule.hint)


def test_class_folders_without_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "dog").mkdir()
    with pytest.raises(ValueError) as error:
        ImageDataModule(tmp_path, num_workers=0).setup("fit")
    assert_one_line(error, tmp_path, "hold no examples", ImageDataModule.hint)


def index_of(names: list[str]) -> ExampleIndex:
    count = len(names)
    return ExampleIndex(
        Strings.from_strings(["a.tar"]), np.zeros(count, np.int64), Strings.from_strings(names), {}, np.zeros(count)
    )


def held_out(names: list[str], share: float) -> list[str]:
    return [name for name, kept in zip(names, hold_out(index_of(names), share), strict=True) if kept]


@pytest.mark.parametrize("share", [0.01, 0.05, 0.5])
def test_about_the_requested_share_is_held_out(share: float) -> None:
    for names in ([f"{number:06d}" for number in range(20_000)], [f"dog/IMG_{n}" for n in range(20_000)]):
        count = len(held_out(names, share))
        assert abs(count - 20_000 * share) < 4 * (20_000 * share * (1 - share)) ** 0.5


def test_held_out_examples_depend_only_on_the_key() -> None:
    names = [f"ü/{number}" for number in range(500)]
    few, many = held_out(names[:200], 0.1), held_out(names, 0.1)
    assert few
    assert [name for name in many if name in names[:200]] == few
    assert sorted(held_out(names[::-1], 0.1)) == sorted(many)
    assert set(many) < set(held_out(names, 0.3))


def test_at_least_one_example_is_held_out() -> None:
    assert len(held_out(["a", "b", "c"], 1e-9)) == 1
    assert len(hold_out(index_of([]), 0.5)) == 0


def test_held_out_splits_are_reproducible_and_disjoint(tmp_path: Path) -> None:
    write_folder(tmp_path, *(f"{'abc'[i % 3]}/{i}.png" for i in range(30)))
    first, second = (keys(root=tmp_path, val_share=0.3, seed=seed) for seed in (0, 1))
    assert first == second
    assert not set(first["train"]) & set(first["val"])
    assert len(first["train"]) + len(first["val"]) == 30
