"""Packing: every image once and unchanged; a resumed run gives the same dataset."""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules import packing
from datamodules.packing import main, pack
from datamodules.storage.index import Example
from datamodules.storage.shards import META_FILE, PLAN_FILE, ShardDataset, ShardWriter, read_meta
from datamodules.storage.tar_index import index_shard
from tests.datamodules.shard_files import assert_one_line, grey_image, write_shards

CLASSES = ["ant", "cat", "dog"]
SHARD_MB = 0.04


class OneProcess:
    """Replacement for a pool of processes that works in this process."""

    def __init__(self, workers: int, context: Any) -> None:
        assert workers >= 1

    def __enter__(self) -> "OneProcess":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def submit(self, function: Callable[..., None], *args: Any) -> "Future[None]":
        future: Future[None] = Future()
        try:
            future.set_result(function(*args))  # type: ignore[func-returns-value]
        except BaseException as error:
            future.set_exception(error)
        return future

    def shutdown(self, cancel_futures: bool) -> None:
        pass


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Avoid starting processes, which takes seconds."""
    monkeypatch.setattr(packing, "ProcessPoolExecutor", OneProcess)


def write_folder(root: Path) -> Path:
    """60 files of random bytes, 10 to 9000 each."""
    rng = np.random.default_rng(0)
    for number in range(60):
        path = root / CLASSES[number % 3] / f"below.{number % 2}" / f"{number}.v1.{'jpg' if number % 4 else 'PNG'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rng.bytes(int(rng.integers(10, 9000))))
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of class folders."""
    return write_folder(tmp_path_factory.mktemp("folder") / "images")


@pytest.fixture(scope="module")
def packed(folder: Path) -> Path:
    """The same images as a dataset of shards, written by the command."""
    out = folder.parent / "packed"
    main([str(folder), str(out), f"--shard_mb={SHARD_MB}", "--val_share=0.2", "--workers=1"])
    return out


def shards_of(root: Path, split: str) -> list[Path]:
    return sorted((root / split).glob("*.tar"))


def examples_of(root: Path, split: str) -> list[Example]:
    return [example for shard in shards_of(root, split) for example in index_shard(shard)]


def contents(root: Path) -> dict[str, tuple[int, bytes]]:
    """Label and image of each key of both splits."""
    found = {}
    for example in examples_of(root, "train") + examples_of(root, "val"):
        assert example.key not in found
        (image,) = set(example.members) - {"cls"}
        found[example.key] = (example.label, example.read(image))
    return found


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_every_image_is_packed_once_with_its_key_class_and_bytes(folder: Path, packed: Path) -> None:
    expected = {
        f"{path.parent.relative_to(folder)}/{path.stem.replace('.', '_')}": (
            CLASSES.index(path.relative_to(folder).parts[0]),
            path.read_bytes(),
        )
        for path in folder.rglob("*.*")
        if path.is_file()
    }
    assert len(expected) == 60
    assert contents(packed) == expected


def test_some_images_are_held_out_for_validation(packed: Path) -> None:
    assert 4 <= len(examples_of(packed, "val")) <= 24


def test_shards_are_full_but_not_larger_than_the_maximum(packed: Path) -> None:
    for split in ("train", "val"):
        sizes = [shard.stat().st_size for shard in shards_of(packed, split)]
        assert max(sizes) <= SHARD_MB * 1e6
        assert min(sizes[:-1], default=SHARD_MB * 1e6) > SHARD_MB * 1e6 - 10_240 - 9000 - 4 * 512 - 10_240
    assert len(shards_of(packed, "train")) > 3


def test_meta_json_describes_the_shards(packed: Path) -> None:
    meta = read_meta(packed, "")
    assert (meta["format"], meta["classes"], meta["num_classes"]) == ("llamagen-images", CLASSES, 3)
    for split in ("train", "val"):
        entry = meta["splits"][split]
        assert entry["count"] == len(examples_of(packed, split))
        assert entry["skipped"] == {}
        assert [tuple(shard[name] for name in ("name", "count", "bytes", "sha256")) for shard in entry["shards"]] == [
            (path.name, len(index_shard(path)), path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
            for path in shards_of(packed, split)
        ]
    there = {f"{split}/{shard['name']}" for split in ("train", "val") for shard in meta["splits"][split]["shards"]}
    assert set(files(packed)) == {META_FILE, *there}


def test_images_are_shuffled_by_the_seed(folder: Path, packed: Path, tmp_path: Path) -> None:
    pack(str(folder), tmp_path / "again", SHARD_MB, val_share=0.2, workers=1)
    assert files(tmp_path / "again") == files(packed)
    pack(str(folder), tmp_path / "other", SHARD_MB, val_share=0.2, seed=1, workers=1)
    assert contents(tmp_path / "other") == contents(packed)
    for split in ("train", "val"):
        first, second = ([s.key for s in examples_of(root, split)] for root in (packed, tmp_path / "other"))
        assert sorted(first) == sorted(second)
        assert first != second
    labels = [example.label for example in examples_of(packed, "train")]
    assert sum(one != other for one, other in pairwise(labels)) > len(labels) // 3


@pytest.mark.parametrize("stop", [0, 13, 37])
def test_resumed_packing_gives_the_same_dataset(
    folder: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    write = ShardWriter.write
    written: list[str] = []

    def interrupted(writer: ShardWriter, key: str, parts: Mapping[str, bytes], label: int = -1) -> None:
        if len(written) == stop:
            raise KeyboardInterrupt
        written.append(key)
        write(writer, key, parts, label)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pack(str(folder), tmp_path / "out", SHARD_MB, val_share=0.2, workers=1)
    assert not (tmp_path / "out" / META_FILE).exists()
    whole = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.tar")}
    assert bool(whole) == (stop > 0)
    for path in whole:
        assert path.read_bytes() == (packed / path.relative_to(tmp_path / "out")).read_bytes()
    # A leftover of a killed process.
    (tmp_path / "out/train/.train-000002.tar-4711.tmp").write_bytes(b"half")
    pack(str(folder), tmp_path / "out", SHARD_MB, val_share=0.2, workers=1)
    assert {path: path.stat().st_mtime_ns for path in whole} == whole
    assert files(tmp_path / "out") == files(packed)


def test_dataset_without_meta_json_is_completed(folder: Path, packed: Path, tmp_path: Path) -> None:
    def stopped(*args: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardDataset, "finish", stopped)
        with pytest.raises(KeyboardInterrupt):
            pack(str(folder), tmp_path, SHARD_MB, val_share=0.2, workers=1)
    assert (tmp_path / PLAN_FILE).exists()
    pack(str(folder), tmp_path, SHARD_MB, val_share=0.2, workers=1)
    assert files(tmp_path) == files(packed)


@pytest.fixture
def begun(folder: Path, tmp_path: Path) -> Iterator[Path]:
    """A dataset with some of its shards, which must not change."""

    def stopped(*args: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardDataset, "finish", stopped)
        with pytest.raises(KeyboardInterrupt):
            pack(str(folder), tmp_path / "out", SHARD_MB, val_share=0.2, workers=1)
    before = files(tmp_path / "out")
    yield tmp_path / "out"
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ({"seed": 1}, "another seed"),
        ({"shard_mb": 0.05}, "another shard_mb"),
        ({"val_share": 0.4}, "another samples"),
    ],
    ids=str,
)
def test_packing_does_not_resume_with_other_options(
    folder: Path, begun: Path, options: dict[str, Any], phrase: str
) -> None:
    with pytest.raises(ValueError) as error:
        pack(str(folder), begun, **{"shard_mb": SHARD_MB, "val_share": 0.2, **options}, workers=1)
    assert_one_line(error, begun, phrase, "delete it or choose another folder")


def test_packing_does_not_resume_after_files_have_changed(folder: Path, begun: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(folder, tmp_path / "changed"))
    next(path for path in changed.rglob("*.jpg")).write_bytes(bytes(12_345))
    with pytest.raises(ValueError) as error:
        pack(str(changed), begun, SHARD_MB, val_share=0.2, workers=1)
    assert_one_line(error, begun, "another sizes", "delete it or choose another folder")


def test_complete_dataset_is_refused(folder: Path, packed: Path) -> None:
    before = files(packed)
    with pytest.raises(ValueError) as error:
        pack(str(folder), packed, SHARD_MB, val_share=0.2, workers=1)
    assert_one_line(error, packed, "already holds a complete dataset")
    assert files(packed) == before


def test_empty_files_are_left_out_and_listed(folder: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(folder, tmp_path / "source"))
    empty = [source / "ant/below.0/0.v1.PNG", source / "cat/below.1/1.v1.jpg"]
    for path in empty:
        path.write_bytes(b"")
    with pytest.raises(ValueError) as error:
        pack(str(source), tmp_path / "refused", SHARD_MB, val_share=0.2, workers=1, max_bad_share=0.0)
    assert_one_line(error, "empty file", "max_bad_share 0")
    pack(str(source), tmp_path / "out", SHARD_MB, val_share=0.2, workers=1, max_bad_share=0.2)
    assert len(contents(tmp_path / "out")) == 58
    header, *lines = (tmp_path / "out/skipped.tsv").read_text().splitlines()
    assert header == "split\tkey\treason\tmessage"
    assert sorted(tuple(line.split("\t")[1:3]) for line in lines) == [
        ("ant/below.0/0_v1", "empty file"),
        ("cat/below.1/1_v1", "empty file"),
    ]
    splits = read_meta(tmp_path / "out", "")["splits"]
    assert sum(entry["skipped"].get("empty file", 0) for entry in splits.values()) == 2


def test_shards_are_packed_again_with_captions_and_json(tmp_path: Path) -> None:
    examples = {
        f"{number:09d}": {"jpg": bytes([number]) * 99, "txt": b"words %d" % number, "json": b'{"caption": "words"}'}
        for number in range(20)
    }
    write_shards(tmp_path / "source", list(examples.items()), per_shard=4)
    pack(str(tmp_path / "source"), tmp_path / "out", val_share=0.2, workers=1)
    found = examples_of(tmp_path / "out", "train") + examples_of(tmp_path / "out", "val")
    assert {s.key: {part: s.read(part) for part in s.members} for s in found} == examples
    assert {example.label for example in found} == {-1}
    assert read_meta(tmp_path / "out", "")["num_classes"] == 0


def test_captions_next_to_images_are_packed_and_count_towards_the_shard_size(tmp_path: Path) -> None:
    source = tmp_path / "source/pairs"
    source.mkdir(parents=True)
    for number in range(12):
        (source / f"{number}.png").write_bytes(grey_image(number))
        (source / f"{number}.txt").write_text("word " * 300 if number else " ")
    pack(str(source.parent), tmp_path / "out", shard_mb=0.02, workers=1, max_bad_share=0.1)
    shards = sorted((tmp_path / "out").glob("*/*.tar"))
    assert all(path.stat().st_size <= 20_000 for path in shards)
    examples = [example for path in shards for example in index_shard(path)]
    assert {example.key: example.read_caption() for example in examples} == {
        f"pairs/{number}": ("word " * 300).strip() if number else "" for number in range(12)
    }


def test_packed_dataset_can_be_packed_again(packed: Path, tmp_path: Path) -> None:
    pack(str(packed), tmp_path, shard_mb=0.09, seed=3, workers=1)
    assert contents(tmp_path) == contents(packed)
    assert {s.key for s in examples_of(tmp_path, "val")} == {s.key for s in examples_of(packed, "val")}
    assert 1 < len(shards_of(tmp_path, "train")) < len(shards_of(packed, "train"))
    assert read_meta(tmp_path, "")["classes"] == CLASSES


def test_examples_with_the_same_key_in_several_shards_stay_separate(tmp_path: Path) -> None:
    for shard in range(8):
        examples = [(str(number), {"png": bytes([shard, number]), "cls": b"1"}) for number in range(4)]
        write_shards(tmp_path / f"part{shard}", examples, per_shard=4)
        (tmp_path / "source").mkdir(exist_ok=True)
        (tmp_path / f"part{shard}/part{shard}-000000.tar").rename(tmp_path / f"source/{shard}.tar")
    pack(str(tmp_path / "source"), tmp_path / "out", val_share=0.2, workers=1)
    found = examples_of(tmp_path / "out", "train") + examples_of(tmp_path / "out", "val")
    assert sorted(example.read("png") for example in found) == [bytes([i, j]) for i in range(8) for j in range(4)]
    assert read_meta(tmp_path / "out", "")["splits"]["train"]["count"] == len(examples_of(tmp_path / "out", "train"))


@pytest.mark.parametrize("folder", ["ü", "long name " * 12, "langer Name ü " * 12], ids=["foreign", "long", "both"])
def test_long_and_non_ascii_names_count_towards_the_shard_size(tmp_path: Path, folder: str) -> None:
    for number in range(200):
        path = tmp_path / "source/a" / folder / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"image")
    pack(str(tmp_path / "source"), tmp_path / "out", shard_mb=0.1, val_share=0.01, workers=1)
    sizes = [shard.stat().st_size for shard in shards_of(tmp_path / "out", "train")]
    assert max(sizes) <= 100_000
    assert min(sizes[:-1]) > 70_000


def test_image_larger_than_a_shard_gets_its_own_shard(folder: Path, packed: Path, tmp_path: Path) -> None:
    pack(str(folder), tmp_path, shard_mb=0.001, val_share=0.2, workers=1)
    assert contents(tmp_path) == contents(packed)
    assert {len(index_shard(shard)) for shard in shards_of(tmp_path, "train")} == {1}


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        (["nowhere", "out"], "folder nowhere does not exist"),
        (["{folder}", "out", "--shard_mb=0"], "shard_mb is 0.0"),
        (["{folder}", "out", "--workers=0"], "workers is 0"),
        (["{folder}", "out", "--seed=-1"], "seed is -1"),
        (["{folder}", "out", "--val_share=1"], "val_share is 1.0"),
        (["{folder}", "out", "--max_bad_share=2"], "max_bad_share is 2.0"),
        (["{folder}", "out", "--shard=3"], "unrecognized arguments: --shard=3"),
        (["{folder}"], "out"),
        (["pipe:cat a.tar", "out"], "would run a command"),
        (["ftp://example.org/a.tar", "out"], "unknown scheme"),
    ],
    ids=str,
)
def test_usage_error_ends_the_command_in_one_line_and_writes_nothing(
    arguments: list[str],
    phrase: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main([argument.format(folder=folder) for argument in arguments])
    assert stop.value.code == 2
    said = capsys.readouterr().err.splitlines()
    assert phrase in said[-1]
    assert "error: " in said[-1]
    assert list(tmp_path.iterdir()) == []
