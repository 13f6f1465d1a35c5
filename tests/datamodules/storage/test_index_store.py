"""The cache of indexes: headers are read once, and again after the shard or the cache has changed."""

import os
from pathlib import Path

import pytest

from datamodules.storage import index_store
from datamodules.storage.index import ExampleIndex
from datamodules.storage.index_store import IndexStore
from tests.datamodules.shard_files import assert_one_line, write_shards

EXAMPLES = [(f"a b/{number}", {"png": bytes([number]) * 9, "cls": str(number).encode()}) for number in range(4)]
EXAMPLES.append(("ü", {"jpg": b"image"}))


class Counted:
    """Counts how often the headers of shards are read."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.paths: list[Path] = []
        self._read = index_store.index_shard
        patch.setattr(index_store, "index_shard", self)

    def __call__(self, path: Path) -> ExampleIndex:
        self.paths.append(path)
        return self._read(path)


def contents(index: ExampleIndex) -> list[object]:
    """Everything in an index."""
    examples = [(s.source, s.key, s.label, {part: s.read(part) for part in s.members}) for s in index]
    return [*examples, index.bad]


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """A shard of :data:`EXAMPLES`."""
    return write_shards(tmp_path / "train", EXAMPLES, per_shard=10)[0]


def test_index_is_read_once_and_then_cached(tmp_path: Path, shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch)
    first = contents(IndexStore(tmp_path / "cache").index(shard))
    assert counted.paths == [shard]
    assert [example[1] for example in first[:-1]] == [key for key, _ in EXAMPLES]  # type: ignore[index]
    assert contents(IndexStore(tmp_path / "cache").index(shard)) == first
    assert counted.paths == [shard]
    assert contents(IndexStore(tmp_path / "other cache").index(shard)) == first
    assert counted.paths == [shard, shard]


def test_bad_examples_are_cached(tmp_path: Path, shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard.write_bytes(shard.read_bytes()[:2600])
    counted = Counted(monkeypatch)
    first, second = (contents(IndexStore(tmp_path / "cache").index(shard)) for _ in range(2))
    assert first == second
    assert first[-1]
    assert counted.paths == [shard]


def test_relative_path_of_a_shard_uses_the_same_cache_entry(
    tmp_path: Path, shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)
    IndexStore(tmp_path / "cache").index(shard)
    monkeypatch.chdir(shard.parent)
    index = IndexStore(tmp_path / "cache").index(Path(shard.name))
    assert index[0].source == shard.name
    assert len(counted.paths) == 1


@pytest.mark.parametrize("change", ["size", "modification time"])
def test_index_is_rebuilt_when_the_shard_changes(
    tmp_path: Path, shard: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    counted = Counted(monkeypatch)
    store = IndexStore(tmp_path / "cache")
    store.index(shard)
    before = shard.stat()
    renamed = [(key.replace("a b", "b a"), parts) for key, parts in EXAMPLES]
    write_shards(shard.parent, EXAMPLES * 6 if change == "size" else renamed, per_shard=99)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns + (change == "modification time")))
    assert (shard.stat().st_size == before.st_size) == (change == "modification time")
    index = store.index(shard)
    assert (len(index), index[0].key) == ((30, "a b/0") if change == "size" else (5, "b a/0"))
    assert len(counted.paths) == 2


def test_unwritable_cache_is_ignored(tmp_path: Path, shard: Path) -> None:
    expected = contents(IndexStore(tmp_path / "cache").index(shard))
    (tmp_path / "file").write_text("in the way")
    blocked = IndexStore(tmp_path / "file")
    assert contents(blocked.index(shard)) == expected
    assert contents(blocked.index_all([shard])) == expected
    assert (tmp_path / "file").read_text() == "in the way"


def test_full_disk_leaves_no_half_written_entry(tmp_path: Path, shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: object, **columns: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(index_store.np, "savez", fail)
    assert len(IndexStore(tmp_path / "cache").index(shard)) == len(EXAMPLES)
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_damaged_cache_entry_is_rewritten(tmp_path: Path, shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = IndexStore(tmp_path / "cache")
    expected = contents(store.index(shard))
    (entry,) = (path for path in (tmp_path / "cache").rglob("*") if path.is_file())
    whole = entry.read_bytes()
    damaged = {
        "empty": b"",
        "text": b"not an index",
        "another array file": b"\x93NUMPY\x01\x00v\x00{'descr': '<i8', 'fortran_order': False, 'shape': (0,), }"
        + b" " * 61
        + b"\n",
        "zeros": bytes(len(whole)),
        **{f"cut at {size}": whole[:size] for size in range(1, len(whole), 97)},
        **{
            f"bit of byte {place} turned": whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :]
            for place in range(0, len(whole) // 2, 7)
        },
    }
    for story, data in damaged.items():
        entry.write_bytes(data)
        assert contents(store.index(shard)) == expected, story
    entry.write_bytes(b"not an index")
    counted = Counted(monkeypatch)
    for _ in range(2):
        assert contents(store.index(shard)) == expected
    assert counted.paths == [shard]


@pytest.mark.parametrize("count", [3, 6])
def test_complete_shard_with_another_number_of_examples_is_refused(tmp_path: Path, shard: Path, count: int) -> None:
    with pytest.raises(ValueError) as error:
        IndexStore(tmp_path / "cache").index_all([shard], [count])
    assert_one_line(error, shard, "holds 5 examples", f"says {count}", "write the dataset again")
    assert len(IndexStore(tmp_path / "cache").index_all([shard], [None])) == 5


@pytest.mark.parametrize(
    ("size", "whole"), [(0, 0), (512, 0), (2048, 1), (2 * 2048 + 600, 2), (3 * 2048, 3), (4 * 2048, 4)], ids=str
)
def test_examples_lost_by_a_truncated_shard_are_counted(tmp_path: Path, size: int, whole: int) -> None:
    shard, other = (write_shards(tmp_path / name, EXAMPLES[:4], per_shard=10)[0] for name in ("train", "other"))
    shard.write_bytes(shard.read_bytes()[:size])
    index = IndexStore(tmp_path / "cache").index_all([shard, other], [4, 4])
    assert [example.source for example in index] == whole * [str(shard)] + 4 * [str(other)]
    assert [example.reason for example in index.bad] == (4 - whole) * ["truncated shard"]
    for bad in index.bad:
        assert str(shard) in bad.message


def test_missing_shard_is_named(tmp_path: Path, shard: Path) -> None:
    with pytest.raises(ValueError) as error:
        IndexStore(tmp_path / "cache").index_all([shard, tmp_path / "nowhere.tar"])
    assert_one_line(error, tmp_path / "nowhere.tar", "cannot be read")


def test_many_new_shards_are_indexed_by_several_processes_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = write_shards(tmp_path / "train", EXAMPLES, per_shard=1)
    expected = contents(IndexStore(tmp_path / "cache").index_all(shards))
    monkeypatch.setattr(index_store, "MIN_PARALLEL", len(shards))
    monkeypatch.setattr(index_store.os, "cpu_count", lambda: 1)
    counted = Counted(monkeypatch)
    assert contents(IndexStore(tmp_path / "other cache").index_all(shards)) == expected
    assert counted.paths == []
