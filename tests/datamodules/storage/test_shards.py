"""The shard format: shards are complete or absent; writing resumes and never mixes datasets."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import webdataset

from datamodules.storage.bad_examples import Skipped
from datamodules.storage.shards import (
    META_FILE,
    PLAN_FILE,
    ShardDataset,
    ShardEntry,
    ShardWriter,
    read_meta,
    shard_entries,
)
from datamodules.storage.tar_index import index_shard
from tests.datamodules.shard_files import assert_one_line

HINT = "write it with the quickstart"
EXAMPLES = [
    ("000000", {"png": b"image", "cls": b"3"}),
    ("folder.v1.0/000001", {"png": bytes(range(256)) * 5, "cls": b"17"}),
    ("000002", {"npy": b"\x00" * 512, "cls": b"4"}),
    ("a b/ü", {"JPG": b"x" * 513}),
]
PLAN = {"seed": 3, "sizes": (4, 5)}


def files(folder: Path) -> dict[str, bytes]:
    """All files in a folder and its subfolders, including hidden ones."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_shard(path: Path, examples: list[tuple[str, dict[str, bytes]]]) -> None:
    with ShardWriter(path) as writer:
        for key, parts in examples:
            writer.write(key, parts)


def fill(
    shards: ShardDataset, split: str, number: int, labels: list[int], skipped: list[Skipped] | None = None
) -> None:
    """Write a shard with an example for each label."""
    with shards.shard(split, number) as writer:
        for place, label in enumerate(labels):
            writer.write(f"{split}{number}-{place}", {"txt": b"words"}, label)
        writer.skipped = skipped or []


def test_written_examples_are_read_back(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", EXAMPLES)
    found = [(s.key, {part: s.read(part) for part in s.members}, s.label) for s in index_shard(tmp_path / "a.tar")]
    lower = [(key, {part.lower(): data for part, data in parts.items()}) for key, parts in EXAMPLES]
    assert [(key, parts) for key, parts, _ in found] == lower
    assert [label for _, _, label in found] == [3, 17, 4, -1]


def test_shard_is_read_by_webdataset(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", EXAMPLES)
    found = [
        (example["__key__"], {part: data for part, data in example.items() if not part.startswith("__")})
        for example in webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)
    ]
    assert found == [(key, {part.lower(): data for part, data in parts.items()}) for key, parts in EXAMPLES]


def test_same_examples_give_the_same_file(tmp_path: Path) -> None:
    for name in ("first.tar", "second.tar"):
        write_shard(tmp_path / name, EXAMPLES)
    assert (tmp_path / "first.tar").read_bytes() == (tmp_path / "second.tar").read_bytes()


def test_label_is_written_as_cls_member_if_present(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a.tar") as writer:
        for key, label in (("a", 12), ("b", -1), ("c", 0)):
            writer.write(key, {"txt": b"words"}, label)
    assert (writer.count, writer.highest_label) == (3, 12)
    found = index_shard(tmp_path / "a.tar")
    assert [sorted(example.members) for example in found] == [["cls", "txt"], ["txt"], ["cls", "txt"]]
    assert [found[0].read("cls"), found[2].read("cls")] == [b"12", b"0"]


def test_unfinished_shard_has_a_hidden_name(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "a.tar")
    writer.write(*EXAMPLES[0])
    (name,) = files(tmp_path)
    assert name.startswith(".")
    assert name.endswith(".tmp")
    writer.close()
    assert set(files(tmp_path)) == {"a.tar", ".a.tar.json"}


def write_and_fail(writer: ShardWriter) -> None:
    with writer:
        writer.write(*EXAMPLES[0])
        raise KeyboardInterrupt


def write_a_bad_part(writer: ShardWriter) -> None:
    bad: Any = {"cls": b"0", "png": 3}
    with writer:
        writer.write(*EXAMPLES[0])
        writer.write("2", bad)


def end_with_error(writer: ShardWriter) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_and_fail(writer)


def end_with_bad_part(writer: ShardWriter) -> None:
    with pytest.raises(ValueError):
        write_a_bad_part(writer)


def end_with_abort(writer: ShardWriter) -> None:
    writer.write(*EXAMPLES[0])
    writer.abort()


@pytest.mark.parametrize("end", [end_with_error, end_with_bad_part, end_with_abort])
def test_stopped_writer_leaves_nothing(tmp_path: Path, end: Callable[[ShardWriter], None]) -> None:
    end(ShardWriter(tmp_path / "a.tar"))
    assert files(tmp_path) == {}


def test_stopped_writer_keeps_an_older_shard(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", EXAMPLES[:1])
    before = files(tmp_path)
    end_with_error(ShardWriter(tmp_path / "a.tar"))
    assert files(tmp_path) == before


def test_full_disk_leaves_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    close = webdataset.TarWriter.close

    def fail(writer: webdataset.TarWriter) -> None:
        close(writer)
        raise OSError("no space left on device")

    monkeypatch.setattr(webdataset.TarWriter, "close", fail)
    with pytest.raises(OSError, match="no space"), ShardWriter(tmp_path / "a.tar") as writer:
        writer.write(*EXAMPLES[0])
    assert files(tmp_path) == {}


def test_dots_in_a_key_become_underscores(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [(key, EXAMPLES[0][1]) for key in ("22.05", "folder.d/a.b.c", "22_05")])
    assert [example.key for example in index_shard(tmp_path / "a.tar")] == ["22_05", "folder.d/a_b_c", "22_05_"]


@pytest.mark.parametrize("key", ["", "folder/"])
def test_key_without_a_name_is_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be written") as error, ShardWriter(tmp_path / "a.tar") as writer:
        writer.write(key, {"cls": b"1"})
    assert_one_line(error, repr(key))
    assert files(tmp_path) == {}


def test_repeated_key_gets_a_unique_name(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [EXAMPLES[0], EXAMPLES[1], EXAMPLES[0], EXAMPLES[0]])
    first, second = EXAMPLES[0][0], EXAMPLES[1][0]
    assert [example.key for example in index_shard(tmp_path / "a.tar")] == [first, second, f"{first}_", f"{first}__"]


def test_meta_json_holds_counts_sizes_and_checksums(tmp_path: Path) -> None:
    shards = ShardDataset(tmp_path, PLAN, HINT)
    shards.check()
    shards.begin(["train", "val"])
    fill(shards, "train", 0, [0, 5])
    fill(shards, "train", 1, [2])
    fill(shards, "val", 0, [-1, -1, -1])
    shards.finish({"train": 2, "val": 1}, {"format": "words"}, {}, 0.0)
    names = {"train": ["train-000000.tar", "train-000001.tar"], "val": ["val-000000.tar"]}
    assert set(files(tmp_path)) == {META_FILE, *(f"{split}/{name}" for split in names for name in names[split])}
    meta = read_meta(tmp_path, HINT)
    assert (meta["format"], meta["num_classes"]) == ("words", 6)
    assert {split: entry["count"] for split, entry in meta["splits"].items()} == {"train": 3, "val": 3}
    for split, counts in {"train": [2, 1], "val": [3]}.items():
        contents = [(tmp_path / split / name).read_bytes() for name in names[split]]
        assert meta["splits"][split]["shards"] == [
            {"name": name, "count": count, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, count, data in zip(names[split], counts, contents, strict=True)
        ]
        assert shard_entries(meta, split, tmp_path) == [
            ShardEntry(name, count, hashlib.sha256(data).hexdigest())
            for name, count, data in zip(names[split], counts, contents, strict=True)
        ]


@pytest.mark.parametrize(("given", "expected"), [(0, 3), (3, 3), (10, 10)])
def test_number_of_classes_grows_to_the_highest_label(tmp_path: Path, given: int, expected: int) -> None:
    shards = ShardDataset(tmp_path, PLAN, HINT)
    shards.begin(["train"])
    fill(shards, "train", 0, [2, 1])
    shards.finish({"train": 1}, {"num_classes": given}, {}, 0.0)
    assert read_meta(tmp_path, HINT)["num_classes"] == expected


def test_bad_examples_are_counted_by_reason_and_listed(tmp_path: Path) -> None:
    shards = ShardDataset(tmp_path, PLAN, HINT)
    shards.begin(["train", "val"])
    fill(shards, "train", 0, [0], [Skipped(1, "dog/1", "empty file", "example dog/1 is\tempty\nindeed")])
    fill(shards, "train", 1, [0], [Skipped(3, "dog/3", "empty file", "example dog/3 is empty")])
    fill(shards, "val", 0, [0])
    known = {"train": [Skipped(-1, "dog/7", "no label", "example dog/7 has none")]}
    shards.finish({"train": 2, "val": 1}, {}, known, 0.7)
    splits = read_meta(tmp_path, HINT)["splits"]
    assert splits["train"]["skipped"] == {"empty file": 2, "no label": 1}
    assert splits["train"]["count"] == 2
    assert splits["val"]["skipped"] == {}
    assert (tmp_path / "skipped.tsv").read_text().splitlines() == [
        "split\tkey\treason\tmessage",
        "train\tdog/7\tno label\texample dog/7 has none",
        "train\tdog/1\tempty file\texample dog/1 is empty indeed",
        "train\tdog/3\tempty file\texample dog/3 is empty",
    ]


def test_too_many_bad_examples_are_refused(tmp_path: Path) -> None:
    shards = ShardDataset(tmp_path, PLAN, HINT)
    shards.begin(["train"])
    fill(shards, "train", 0, [0, 1, 2], [Skipped(3, "dog/1", "empty file", "example dog/1 is empty")])
    with pytest.raises(ValueError) as error:
        shards.finish({"train": 1}, {}, {}, 0.24)
    assert_one_line(error, "1 of 4 examples of the dataset", "empty file: 1", "example dog/1 is empty", "0.24")
    assert not (tmp_path / META_FILE).exists()
    shards.finish({"train": 1}, {}, {}, 0.25)
    assert (tmp_path / META_FILE).exists()


def test_dataset_with_a_missing_shard_is_not_finished(tmp_path: Path) -> None:
    shards = ShardDataset(tmp_path, PLAN, HINT)
    shards.begin(["train"])
    fill(shards, "train", 0, [0])
    fill(shards, "train", 2, [0])
    with pytest.raises(ValueError) as error:
        shards.finish({"train": 3}, {}, {}, 0.0)
    assert_one_line(error, "train-000001.tar", "repeat the command to resume")
    assert not (tmp_path / META_FILE).exists()


def test_shard_counts_as_written_only_when_complete(tmp_path: Path) -> None:
    shards = ShardDataset(tmp_path, PLAN, HINT)
    shards.begin(["train"])
    assert not shards.is_written("train", 0)
    writer = shards.shard("train", 0)
    writer.write(*EXAMPLES[0])
    assert not shards.is_written("train", 0)
    writer.close()
    assert shards.is_written("train", 0)
    assert not shards.is_written("train", 1)
    (tmp_path / "train/.train-000000.tar.json").unlink()
    assert not shards.is_written("train", 0)


def test_dataset_resumes_and_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    shards = ShardDataset(tmp_path, PLAN, HINT)
    shards.begin(["train"])
    fill(shards, "train", 0, [0])
    before = files(tmp_path)
    (tmp_path / "train/.train-000001.tar-4711.tmp").write_bytes(b"half")
    again = ShardDataset(tmp_path, PLAN, HINT)
    again.check()
    again.begin(["train"])
    assert files(tmp_path) == before
    fill(again, "train", 1, [0])
    again.finish({"train": 2}, {}, {}, 0.0)
    assert [note.examples for note in shard_entries(read_meta(tmp_path, HINT), "train", tmp_path)] == [1, 1]


@pytest.mark.parametrize(
    ("plan", "phrase"),
    [
        ({**PLAN, "seed": 4}, "another seed"),
        ({"sizes": [4, 5], "colour": "red"}, "another colour, seed"),
        ({"seed": 3, "sizes": [4, 6]}, "another sizes"),
    ],
)
def test_dataset_started_with_another_plan_is_refused(tmp_path: Path, plan: dict[str, Any], phrase: str) -> None:
    shards = ShardDataset(tmp_path, PLAN, HINT)
    shards.begin(["train"])
    fill(shards, "train", 0, [0])
    before = files(tmp_path)
    with pytest.raises(ValueError) as error:
        ShardDataset(tmp_path, plan, HINT).check()
    assert_one_line(error, tmp_path, f"started with {phrase};", HINT)
    assert files(tmp_path) == before


def test_complete_dataset_is_refused(tmp_path: Path) -> None:
    shards = ShardDataset(tmp_path, PLAN, HINT)
    shards.begin(["train"])
    fill(shards, "train", 0, [0])
    shards.finish({"train": 1}, {}, {}, 0.0)
    assert not (tmp_path / PLAN_FILE).exists()
    with pytest.raises(ValueError) as error:
        shards.check()
    assert_one_line(error, tmp_path, "already holds a complete dataset", HINT)


def test_shards_without_a_plan_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    write_shard(tmp_path / "train/other.tar", EXAMPLES)
    with pytest.raises(ValueError) as error:
        ShardDataset(tmp_path, PLAN, HINT).check()
    assert_one_line(error, tmp_path, "other.tar", HINT)


def test_other_files_in_the_folder_are_allowed(tmp_path: Path) -> None:
    (tmp_path / "predict.yaml").touch()
    ShardDataset(tmp_path, PLAN, HINT).check()
    ShardDataset(tmp_path / "nowhere", PLAN, HINT).check()
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        (None, "it is incomplete"),
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\xff\xfe\x00{", "not valid JSON"),
        (b"[1]", "must hold a JSON object"),
    ],
    ids=str,
)
def test_missing_or_invalid_meta_json_is_refused(tmp_path: Path, text: bytes | None, phrase: str) -> None:
    if text is not None:
        (tmp_path / META_FILE).write_bytes(text)
    with pytest.raises(ValueError) as error:
        read_meta(tmp_path, HINT)
    assert_one_line(error, tmp_path, META_FILE, phrase, HINT)


def test_meta_json_in_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        read_meta(tmp_path / "nowhere", HINT)
    assert_one_line(error, tmp_path / "nowhere", "does not exist", HINT)


def test_trailing_slash_of_a_folder_is_ignored(tmp_path: Path) -> None:
    (tmp_path / META_FILE).write_text(json.dumps({"format": "words"}))
    assert read_meta(f"{tmp_path}/", HINT) == {"format": "words"}


NOTE = {"name": "train-000000.tar", "count": 3, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "splits",
    [
        {},
        None,
        ["train"],
        {"train": None},
        {"train": {"count": 3}},
        {"train": {"shards": ["train-000000.tar"]}},
        {"train": {"shards": [{**NOTE, "count": "many"}]}},
        {"train": {"shards": [{"name": "train-000000.tar", "count": 3}]}},
    ],
    ids=str,
)
def test_meta_json_without_the_shards_of_a_split_is_refused(tmp_path: Path, splits: Any) -> None:
    with pytest.raises(ValueError) as error:
        shard_entries({"splits": splits}, "train", tmp_path)
    assert_one_line(error, tmp_path, META_FILE, "the shards of train", "write the dataset again")


@pytest.mark.parametrize("name", ["../a.tar", "/etc/a.tar", "..\\a.tar", ".a.tar", "a.zip", "", "b/a.tar"])
def test_shard_name_that_is_a_path_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError) as error:
        shard_entries({"splits": {"train": {"shards": [NOTE, {**NOTE, "name": name}]}}}, "train", tmp_path)
    assert_one_line(error, tmp_path, repr(name), "not a file name")
