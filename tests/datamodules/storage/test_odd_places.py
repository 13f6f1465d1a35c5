"""Unusual paths: names that look like patterns, the home folder, compressed shards, too many open files."""

import errno
import gzip
import os
from pathlib import Path

import pytest

from datamodules.base import ShardDataModule
from datamodules.images import ImageDataModule
from datamodules.requests.classes import ClassRequestDataModule
from datamodules.requests.prompts import PromptDataModule
from datamodules.storage.index import ExampleIndex, OpenFiles
from datamodules.storage.sources import find_sources
from datamodules.storage.tar_index import index_shard
from evaluation.image_sets import open_images
from tests.datamodules.shard_files import assert_one_line, grey_image, write_shards

EXAMPLES = [(str(number), {"png": grey_image(number), "cls": b"0"}) for number in range(4)]
HINT = "give a dataset"


@pytest.mark.parametrize("name", ["brace{0..2}s", "{a,b}", "back\\slash", "br[ack]et", "star*", "100%d", "a=b, c#d"])
def test_existing_shard_is_not_a_pattern(name: str, tmp_path: Path) -> None:
    shard = write_shards(tmp_path / name, EXAMPLES, per_shard=4)[0]
    for root, train in ((None, str(shard)), (str(shard), None), (str(tmp_path / name), None)):
        found, _, _ = find_sources(root, train, None, HINT)
        assert found is not None
        assert found.shards == [str(shard)]


def test_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shard = write_shards(tmp_path / "data", EXAMPLES, per_shard=4)[0]
    (tmp_path / "prompts.txt").write_text("a red house\n")
    (tmp_path / "classes.txt").write_text("7\n")
    for options in ({"root": "~/data"}, {"train": f"~/data/{shard.name}"}, {"train": ["~/data"]}):
        data: ShardDataModule = ImageDataModule(**options, num_workers=0)
        found, _, _ = data.find_splits()
        assert found is not None
        assert found.shards == [str(shard)]
    assert PromptDataModule("~/prompts.txt").prompts == ["a red house"]
    assert ClassRequestDataModule("~/classes.txt").classes == [7]
    assert len(open_images("~/data")) == 4


def test_compressed_shards_are_refused_with_their_format(tmp_path: Path) -> None:
    shard = write_shards(tmp_path / "plain", EXAMPLES, per_shard=4)[0]
    packed = tmp_path / "packed/a.tar.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(shard.read_bytes()))
    with pytest.raises(ValueError) as error:
        find_sources(str(packed.parent), None, None, HINT)
    assert_one_line(error, packed, "is compressed", "unpack it to a.tar")
    with pytest.raises(ValueError) as error:
        index_shard(packed.rename(tmp_path / "named.tar"))
    assert_one_line(error, tmp_path / "named.tar", "is compressed (gzip)", "unpack it")


def few_files(monkeypatch: pytest.MonkeyPatch, files: OpenFiles, most: int) -> None:
    """Limit ``files`` to at most ``most`` open files, like a process at the limit of the system."""
    really_open = os.open

    def limited(path: str, flags: int) -> int:
        if len(files._descriptors) >= most:
            raise OSError(errno.EMFILE, "Too many open files", path)
        return really_open(path, flags)

    monkeypatch.setattr("datamodules.storage.index.os.open", limited)


@pytest.mark.parametrize("most", [2, 0])
def test_too_many_open_files_do_not_make_examples_bad(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = write_shards(tmp_path / "shards", EXAMPLES, per_shard=1)
    index = ExampleIndex.concatenate([index_shard(shard) for shard in shards])
    few_files(monkeypatch, index.files, most)
    if most:
        assert [example.read("png") for example in index] == [parts["png"] for _, parts in EXAMPLES]
    else:
        with pytest.raises(OSError, match="too many open files; increase the limit with ulimit -n"):
            index[0].read("png")
