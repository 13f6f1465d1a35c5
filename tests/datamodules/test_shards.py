"""The shard format: what is written is read, whole or not at all, and damage is named."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset

from datamodules.shards import (
    META_FILE,
    Sample,
    ShardSetWriter,
    describe_split,
    find_shards,
    index_shard,
    read_meta,
    write_meta,
)
from tests.datamodules.shard_files import assert_one_line, write_shards

HINT = "write it with the quickstart"
SAMPLES = [
    ("000000", {"png": b"picture", "cls": b"3"}),
    ("folder.v1.0/000001", {"png": bytes(range(256)) * 5, "cls": b"17"}),
    ("000002", {"tar.gz": b"", "seg.npy": b"\x00" * 512, "cls": b"4"}),
    ("a b/ü", {"JPG": b"x" * 513}),
    ("000004", {"cls": b"0"}),
]


def contents(samples: list[Sample]) -> list[tuple[str, dict[str, bytes]]]:
    """Key and parts of each sample, read from its shard."""
    return [(sample.key, {part: sample.read(part) for part in sample.members}) for sample in samples]


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    """A tar file as plain ``tarfile`` makes it."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))


@pytest.mark.parametrize("per_shard", [1, 2, 5, 100])
def test_what_is_written_is_read(tmp_path: Path, per_shard: int) -> None:
    shards = write_shards(tmp_path / "train", SAMPLES, per_shard)
    assert [shard.name for shard in shards] == [f"train-{i:06d}.tar" for i in range(-(-len(SAMPLES) // per_shard))]
    assert find_shards(tmp_path / "train", HINT) == shards
    indexed = [index_shard(shard) for shard in shards]
    assert [len(samples) for samples in indexed[:-1]] == [per_shard] * (len(shards) - 1)
    expected = [(key, {part.lower(): data for part, data in parts.items()}) for key, parts in SAMPLES]
    assert contents([sample for samples in indexed for sample in samples]) == expected


def test_a_shard_set_is_described_by_its_count_and_file_names(tmp_path: Path) -> None:
    with ShardSetWriter(tmp_path / "val", "val", 2) as writer:
        for key, parts in SAMPLES:
            writer.write(key, parts)
    write_meta(tmp_path, {"splits": {"val": describe_split(writer.shards, writer.count)}})
    shards = ["val-000000.tar", "val-000001.tar", "val-000002.tar"]
    assert read_meta(tmp_path, HINT) == {"splits": {"val": {"count": 5, "shards": shards}}}
    assert sorted(path.name for path in tmp_path.iterdir()) == [META_FILE, "val"]


def test_the_shards_are_read_by_webdataset(tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path / "train", SAMPLES[:3])
    found = [
        (sample["__key__"], {part: data for part, data in sample.items() if not part.startswith("__")})
        for sample in webdataset.WebDataset(str(shard), shardshuffle=False)
    ]
    assert found == SAMPLES[:3]


def test_a_tar_file_of_webdataset_is_read(tmp_path: Path) -> None:
    with webdataset.ShardWriter(str(tmp_path / "set-%03d.tar"), maxcount=2, encoder=False, verbose=0) as writer:
        for key, parts in SAMPLES[:3]:
            writer.write({"__key__": key, **parts})
    shards = find_shards(tmp_path, HINT)
    assert len(shards) == 2
    assert contents([sample for shard in shards for sample in index_shard(shard)]) == SAMPLES[:3]


def test_a_plain_tar_file_is_read_without_its_folders_links_and_hidden_files(tmp_path: Path) -> None:
    path = tmp_path / "plain.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("./n0144.jpg", tarfile.DIRTYPE), ("./n0144.jpg/1.cls", tarfile.SYMTYPE)):
            header = tarfile.TarInfo(name)
            header.type = kind
            tar.addfile(header)
        for name in ("./n0144.jpg/0.JPEG", "./n0144.jpg/0.cls", "./._0.JPEG", "./README", f"./{'long' * 60}/2.png"):
            header = tarfile.TarInfo(name)
            header.size = len(name)
            tar.addfile(header, io.BytesIO(name.encode()))
    first, second = index_shard(path)
    assert (first.key, first.read("jpeg"), first.read("cls")) == (
        "./n0144.jpg/0",
        b"./n0144.jpg/0.JPEG",
        b"./n0144.jpg/0.cls",
    )
    assert second.key == f"./{'long' * 60}/2"
    assert list(second.members) == ["png"]


def test_a_tar_file_without_samples_has_none(tmp_path: Path) -> None:
    write_tar(tmp_path / "none.tar", {})
    assert index_shard(tmp_path / "none.tar") == []


def test_a_missing_part_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path / "train", SAMPLES[:1])
    with pytest.raises(ValueError) as error:
        index_shard(shard)[0].read("npy")
    assert_one_line(error, shard, "000000", ".npy", "cls", "png")


# A member is a header of 512 bytes and its data, padded to a multiple of 512.
MEMBERS = {"0.bin": bytes(700), "0.cls": b"1", "1.bin": bytes(700), "1.cls": b"1"}
PLACES = {
    "empty file": 0,
    "inside the first header": 100,
    "inside data": 512 + 300,
    "inside padding": 512 + 700 + 10,
    "between members of a sample": 1536,
    "inside a later header": 1536 + 200,
    "between samples": 2560,
    "inside the last data": 4096 + 512,
    "before the end mark": 5120,
}


@pytest.mark.parametrize("size", PLACES.values(), ids=PLACES)
def test_a_truncated_shard_is_refused(tmp_path: Path, size: int) -> None:
    shard = tmp_path / "train.tar"
    write_tar(shard, MEMBERS)
    assert len(index_shard(shard)) == 2
    shard.write_bytes(shard.read_bytes()[:size])
    with pytest.raises(ValueError) as error:
        index_shard(shard)
    assert_one_line(error, shard, "write it again")


@pytest.mark.parametrize("offset", [0, 1536, 2560], ids=["first member", "second member", "second sample"])
def test_a_shard_with_a_damaged_header_is_refused(tmp_path: Path, offset: int) -> None:
    shard = tmp_path / "train.tar"
    write_tar(shard, MEMBERS)
    data = shard.read_bytes()
    shard.write_bytes(data[:offset] + b"\x55" * 512 + data[offset + 512 :])
    with pytest.raises(ValueError) as error:
        index_shard(shard)
    assert_one_line(error, shard, "write it again")


def test_a_shard_that_shrinks_after_indexing_is_refused_on_reading(tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path / "train", [("0", {"bin": bytes(700)})])
    (sample,) = index_shard(shard)
    shard.write_bytes(shard.read_bytes()[: sample.members["bin"].offset + 600])
    with pytest.raises(ValueError) as error:
        sample.read("bin")
    assert_one_line(error, shard, "sample 0", "write it again")


def test_a_missing_and_an_empty_shard_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        find_shards(tmp_path / "nowhere", HINT)
    assert_one_line(error, tmp_path / "nowhere", "does not exist", HINT)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".train-000000.tar.tmp").touch()
    with pytest.raises(ValueError) as error:
        find_shards(tmp_path / "empty", HINT)
    assert_one_line(error, tmp_path / "empty", "no .tar file", HINT)


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        (None, "not written to its end"),
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\xff\xfe\x00{", "not valid JSON"),
        (b"[1]", "must hold a JSON object"),
    ],
    ids=str,
)
def test_a_missing_or_bad_description_is_refused(tmp_path: Path, text: bytes | None, phrase: str) -> None:
    if text is not None:
        (tmp_path / META_FILE).write_bytes(text)
    with pytest.raises(ValueError) as error:
        read_meta(tmp_path, HINT)
    assert_one_line(error, tmp_path, META_FILE, phrase, HINT)


def test_a_description_in_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        read_meta(tmp_path / "nowhere", HINT)
    assert_one_line(error, tmp_path / "nowhere", "does not exist", HINT)


def write_and_fail(writer: ShardSetWriter) -> None:
    with writer:
        for key, parts in SAMPLES[:3]:
            writer.write(key, parts)
        raise KeyboardInterrupt


def write_a_bad_part(writer: ShardSetWriter) -> None:
    with writer:
        for key, parts in [*SAMPLES[:2], ("2", {"cls": b"0", "png": 3})]:
            writer.write(key, parts)  # type: ignore[arg-type]


def end_with_error(writer: ShardSetWriter) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_and_fail(writer)


def end_with_bad_part(writer: ShardSetWriter) -> None:
    with pytest.raises(ValueError):
        write_a_bad_part(writer)


def end_with_abort(writer: ShardSetWriter) -> None:
    for key, parts in SAMPLES[:3]:
        writer.write(key, parts)
    writer.abort()


@pytest.mark.parametrize("end", [end_with_error, end_with_bad_part, end_with_abort])
def test_a_stopped_writer_leaves_only_whole_shards(tmp_path: Path, end: Callable[[ShardSetWriter], None]) -> None:
    end(ShardSetWriter(tmp_path, "train", 2))
    (shard,) = tmp_path.iterdir()
    assert shard.name == "train-000000.tar"
    assert contents(index_shard(shard)) == SAMPLES[:2]


def test_a_full_disk_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    close = webdataset.TarWriter.close

    def fail(writer: webdataset.TarWriter) -> None:
        close(writer)
        raise OSError("no space left on device")

    monkeypatch.setattr(webdataset.TarWriter, "close", fail)
    with pytest.raises(OSError, match="no space"), ShardSetWriter(tmp_path, "train", 10) as writer:
        writer.write(*SAMPLES[0])
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_shard_has_a_temporary_name(tmp_path: Path) -> None:
    writer = ShardSetWriter(tmp_path, "train", 2)
    writer.write(*SAMPLES[0])
    assert [path.suffix for path in tmp_path.iterdir()] == [".tmp"]
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["train-000000.tar"]


def test_a_writer_without_samples_writes_no_file(tmp_path: Path) -> None:
    with ShardSetWriter(tmp_path / "train", "train", 2) as writer:
        pass
    assert (writer.shards, writer.count) == ([], 0)
    assert list((tmp_path / "train").iterdir()) == []


@pytest.mark.parametrize("per_shard", [0, -1])
def test_an_impossible_shard_size_is_refused(tmp_path: Path, per_shard: int) -> None:
    with pytest.raises(ValueError) as error:
        ShardSetWriter(tmp_path / "train", "train", per_shard)
    assert_one_line(error, f"samples_per_shard is {per_shard}", "at least 1")
    assert not (tmp_path / "train").exists()


@pytest.mark.parametrize("key", ["", "a.b", "folder.d/a.b", "folder/"])
def test_a_key_that_would_be_read_back_as_another_is_refused(key: str, tmp_path: Path) -> None:
    with ShardSetWriter(tmp_path, "s", 10) as writer, pytest.raises(ValueError, match="cannot be written"):
        writer.write(key, {"cls": b"1"})
    assert list(tmp_path.iterdir()) == []


def test_the_same_samples_make_the_same_file(tmp_path: Path) -> None:
    for name in ("first", "second"):
        with ShardSetWriter(tmp_path / name, "s", 10) as writer:
            writer.write("a", {"cls": b"1"})
    first, second = (next((tmp_path / name).iterdir()) for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
