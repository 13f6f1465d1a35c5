"""Indexes of shards: examples by number, and damage that affects only the damaged examples."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from datamodules.storage.bad_examples import BadExampleError
from datamodules.storage.index import WRONG_LABEL, Example, ExampleIndex
from datamodules.storage.tar_index import index_shard, read_label
from tests.datamodules.shard_files import assert_one_line, write_shards

EXAMPLES = [
    ("000000", {"png": b"image", "cls": b"3"}),
    ("folder.v1.0/000001", {"png": bytes(range(256)) * 5, "cls": b"17"}),
    ("a b/ü", {"jpg": b"x" * 513, "cls": b"0"}),
]


def contents(examples: ExampleIndex) -> list[tuple[str, dict[str, bytes]]]:
    """Key and members of each example, read from its shard."""
    return [(example.key, {part: example.read(part) for part in example.members}) for example in examples]


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    """Write a tar file with ``tarfile``."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


def reasons(index: ExampleIndex) -> list[tuple[str, str]]:
    """Key and reason of each bad example."""
    return [(example.key, example.reason) for example in index.bad]


def test_tar_file_of_webdataset_is_read(tmp_path: Path) -> None:
    with webdataset.ShardWriter(str(tmp_path / "set-%03d.tar"), maxcount=2, encoder=False, verbose=0) as writer:
        for key, parts in EXAMPLES:
            writer.write({"__key__": key, **parts})
    indexes = [index_shard(shard) for shard in sorted(tmp_path.iterdir())]
    assert [len(index) for index in indexes] == [2, 1]
    assert contents(ExampleIndex.concatenate(indexes)) == EXAMPLES
    assert [index.bad for index in indexes] == [[], []]


def test_plain_tar_file_is_read_without_its_folders_links_and_hidden_files(tmp_path: Path) -> None:
    path = tmp_path / "plain.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("./n0144.jpg", tarfile.DIRTYPE), ("./n0144.jpg/1.cls", tarfile.SYMTYPE)):
            header = tarfile.TarInfo(name)
            header.type = kind
            tar.addfile(header)
        for name in ("./n0144.jpg/0.JPEG", "./n0144.jpg/0.txt", "./._0.JPEG", "./README", f"./{'long' * 60}/2.png"):
            header = tarfile.TarInfo(name)
            header.size = len(name)
            tar.addfile(header, io.BytesIO(name.encode()))
    assert contents(index_shard(path)) == [
        ("./n0144.jpg/0", {"jpeg": b"./n0144.jpg/0.JPEG", "txt": b"./n0144.jpg/0.txt"}),
        (f"./{'long' * 60}/2", {"png": f"./{'long' * 60}/2.png".encode()}),
    ]


def test_unknown_members_are_ignored(tmp_path: Path) -> None:
    members = {"0.mp3": b"a", "0.seg.png": b"b", "0.tar.gz": b"c", "1.png": b"d", "1.mp3": b"e", "2.mp3": b"f"}
    index = index_shard(write_tar(tmp_path / "a.tar", members))
    # Only one member of the first example is known, so its key contains a dot.
    assert contents(index) == [("0.seg", {"png": b"b"}), ("1", {"png": b"d"})]


@pytest.mark.parametrize(
    ("members", "good", "lost"),
    [
        ({"0.jpg": b"a", "1.gif": b"b", "1.cls": b"1", "2.jpg": b"c", "3.BMP": b"d"}, ["0", "2"], ["1", "3"]),
        ({"n.0.gif": b"a", "n.0.cls": b"1", "n.1.jpg": b"b", "n.1.cls": b"1", "m.jpg": b"c"}, ["n.1", "m"], ["n.0"]),
        ({"0.jpg": b"a", "0.mask.png": b"b", "1.jpg": b"c"}, ["0", "1"], []),
    ],
    ids=["other kinds of images", "keys with a dot", "a second image of an example"],
)
def test_unsupported_image_formats_are_reported_if_there_is_no_other_image(
    tmp_path: Path, members: dict[str, bytes], good: list[str], lost: list[str]
) -> None:
    index = index_shard(write_tar(tmp_path / "a.tar", members)).usable(("jpg", "png"), labels_needed=False)
    assert [example.key for example in index] == good
    assert [(example.key, example.reason) for example in index.bad] == [(key, "no image") for key in lost]


def test_repeated_member_starts_another_example(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(3):
            for extension in ("jpg", "cls"):
                entry = tarfile.TarInfo(f"same.{extension}")
                entry.size = 1
                tar.addfile(entry, io.BytesIO(str(number).encode()))
    index = index_shard(tmp_path / "a.tar")
    assert [example.read("jpg") for example in index] == [b"0", b"1", b"2"]
    assert index.labels.tolist() == [0, 1, 2]


def header(name: str, size: int) -> bytes:
    """Header of a member with the given size, which may be negative."""
    block = bytearray(tarfile.TarInfo(name).tobuf(format=tarfile.GNU_FORMAT))
    block[124:136] = (b"\xff" + (size + 256**11).to_bytes(11, "big")) if size < 0 else f"{size:011o}\0".encode()
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block)


@pytest.mark.parametrize("size", [-1, -5, -512, -1024, -(2**40)])
@pytest.mark.parametrize("name", ["b.jpg", "b.bin"])
def test_header_with_negative_size_ends_the_shard_without_an_error(tmp_path: Path, name: str, size: int) -> None:
    parts = [header("0.jpg", 0), header("a.jpg", 0), header(name, size), bytes(1024)]
    (tmp_path / "a.tar").write_bytes(b"".join(parts))
    index = index_shard(tmp_path / "a.tar")
    assert {example.key for example in index} <= {"0", "a"}
    assert [example.reason for example in index.bad] == ["truncated shard"]
    assert all(row.tolist() >= [-1, -1] for column in index.members.values() for row in column)


@pytest.mark.parametrize(
    "record", [b"30 GNU.sparse.size=abc\n", b"99999999999999999999 size=1\n", b"20 size=not-a-number\n"]
)
def test_broken_extended_header_loses_only_what_follows(tmp_path: Path, record: bytes) -> None:
    extended = bytearray(header("pax", len(record)))
    extended[156:157] = b"x"
    extended[148:156] = b" " * 8
    extended[148:156] = f"{sum(extended):06o}\0 ".encode()
    parts = [header("0.jpg", 0), bytes(extended), record.ljust(512, b"\0"), header("1.jpg", 0), bytes(1024)]
    (tmp_path / "a.tar").write_bytes(b"".join(parts))
    index = index_shard(tmp_path / "a.tar")
    assert index[0].key == "0"
    assert len(index) + len(index.bad) == 2


def test_tar_file_without_examples_has_none(tmp_path: Path) -> None:
    index = index_shard(write_tar(tmp_path / "none.tar", {}))
    assert (len(index), index.bad) == (0, [])
    assert len(index.usable(("png",))) == 0


def test_example_number_out_of_range_is_an_index_error(tmp_path: Path) -> None:
    index = index_shard(write_tar(tmp_path / "a.tar", {"0.png": b"a"}))
    with pytest.raises(IndexError):
        index[1]


def test_missing_member_is_named_with_the_existing_ones(tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path / "train", EXAMPLES[:1])
    with pytest.raises(BadExampleError) as error:
        index_shard(shard)[0].read("npy")
    assert_one_line(error, shard, "000000", ".npy", "cls", "png")
    assert error.value.reason == "no codes"


def test_empty_member_is_refused(tmp_path: Path) -> None:
    (example,) = index_shard(write_tar(tmp_path / "a.tar", {"0.png": b""}))
    with pytest.raises(BadExampleError, match=r"is empty") as error:
        example.read("png")
    assert error.value.reason == "empty file"


def test_missing_shard_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        index_shard(tmp_path / "a.tar")
    assert_one_line(error, tmp_path / "a.tar", "cannot be read")


# A member is a header of 512 bytes and its data, padded to a multiple of 512.
MEMBERS = {name: data for i in "012" for name, data in ((f"{i}.png", bytes([1]) * 700), (f"{i}.cls", i.encode()))}
EXAMPLE_SIZE = 512 + 1024 + 512 + 512
CUTS = {
    "empty file": (0, 0),
    "inside the first header": (100, 0),
    "inside the first data": (512 + 300, 0),
    "between the first examples": (EXAMPLE_SIZE, 1),
    "inside a later header": (EXAMPLE_SIZE + 200, 1),
    "inside later data": (EXAMPLE_SIZE + 512 + 300, 1),
    "inside padding": (EXAMPLE_SIZE + 512 + 710, 1),
    "between members": (EXAMPLE_SIZE + 1536, 1),
    "inside the header of a later member": (EXAMPLE_SIZE + 1536 + 400, 1),
    "after the header of a later member": (EXAMPLE_SIZE + 2048, 1),
    "inside the padding after an example": (EXAMPLE_SIZE + 2048 + 1, 2),
    "between examples": (2 * EXAMPLE_SIZE, 2),
    "inside the last data": (2 * EXAMPLE_SIZE + 600, 2),
    "before the end mark": (3 * EXAMPLE_SIZE, 3),
}


@pytest.mark.parametrize(("size", "whole"), CUTS.values(), ids=CUTS)
def test_truncated_shard_loses_the_examples_after_the_cut(tmp_path: Path, size: int, whole: int) -> None:
    shard = write_tar(tmp_path / "train.tar", MEMBERS)
    expected = contents(index_shard(shard))
    shard.write_bytes(shard.read_bytes()[:size])
    index = index_shard(shard)
    assert contents(index) == expected[:whole]
    assert index.labels.tolist() == list(range(whole))
    (bad,) = index.bad
    assert bad.reason == "truncated shard"
    assert bad.key in ("", "0", "1", "2")
    assert bad.key not in [example.key for example in index]
    assert str(shard) in bad.message
    assert "write it again" in bad.message
    assert "\n" not in bad.message


def test_first_example_truncated_between_members_lacks_its_class(tmp_path: Path) -> None:
    shard, other = (write_tar(tmp_path / name, MEMBERS) for name in ("train.tar", "other.tar"))
    shard.write_bytes(shard.read_bytes()[:1536])
    index = ExampleIndex.concatenate([index_shard(shard), index_shard(other)]).usable(("png",))
    assert [example.source for example in index] == 3 * [str(other)]
    assert reasons(index) == [("", "truncated shard"), ("0", "no label")]


def test_truncated_shard_names_the_example_in_which_it_ends(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "train.tar", MEMBERS)
    shard.write_bytes(shard.read_bytes()[: EXAMPLE_SIZE + 600])
    (bad,) = index_shard(shard).bad
    assert bad.key == "1"
    assert "ends inside 1.png" in bad.message


def test_truncated_example_is_detected_if_the_first_one_has_fewer_members(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", {"0.png": b"a", "1.png": b"b", "1.txt": b"c", "2.png": b"d", "2.txt": b"e"})
    shard.write_bytes(shard.read_bytes()[: 4 * 1024])
    assert contents(index_shard(shard)) == [("0", {"png": b"a"}), ("1", {"png": b"b", "txt": b"c"})]


@pytest.mark.parametrize("whole", [0, 1, 2])
def test_shard_with_a_damaged_header_is_read_up_to_it(tmp_path: Path, whole: int) -> None:
    shard = write_tar(tmp_path / "train.tar", MEMBERS)
    data = shard.read_bytes()
    offset = whole * EXAMPLE_SIZE
    shard.write_bytes(data[:offset] + b"\x55" * 512 + data[offset + 512 :])
    index = index_shard(shard)
    assert [example.key for example in index] == ["0", "1", "2"][:whole]
    assert [example.reason for example in index.bad] == ["truncated shard"]


def test_shard_that_shrinks_after_indexing_is_detected_on_reading(tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path / "train", [("0", {"png": bytes(700)})])
    (example,) = index_shard(shard)
    shard.write_bytes(shard.read_bytes()[: example.members["png"].offset + 600])
    with pytest.raises(BadExampleError) as error:
        example.read("png")
    assert_one_line(error, shard, "example 0", "write it again")
    assert error.value.reason == "truncated shard"


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (b"0", 0),
        (b" 17\n", 17),
        (b"\xef\xbb\xbf7\r\n", 7),
        (b"999999", 999_999),
        (b"1000000", WRONG_LABEL),
        (b"2000000000", WRONG_LABEL),
        (b"-1", WRONG_LABEL),
        (b"dog", WRONG_LABEL),
        (b"", WRONG_LABEL),
        (b"1.0", WRONG_LABEL),
        (b"\xff\xfe1", WRONG_LABEL),
        (b"9" * 5000, WRONG_LABEL),
    ],
    ids=lambda value: str(value)[:20],
)
def test_label_is_a_non_negative_integer(tmp_path: Path, text: bytes, label: int) -> None:
    assert read_label(text[:33]) == label
    index = index_shard(write_tar(tmp_path / "a.tar", {"0.png": b"a", "0.cls": text, "1.png": b"b", "1.cls": b"1"}))
    assert index.labels.tolist() == [label, 1]
    assert reasons(index.usable(("png",))) == ([("0", "wrong label")] if label == WRONG_LABEL else [])


def caption(tmp_path: Path, parts: dict[str, bytes]) -> str:
    (example,) = index_shard(write_tar(tmp_path / "a.tar", {f"0.{part}": data for part, data in parts.items()}))
    assert isinstance(example, Example)
    return example.read_caption()


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({"txt": " ein Hund für dich\n".encode()}, "ein Hund für dich"),
        ({"json": b'{"caption": "a dog", "width": 3}'}, "a dog"),
        ({"txt": b"from txt", "json": b'{"caption": "from json"}'}, "from txt"),
        ({"txt": b" \n", "json": b'{"caption": "from json"}'}, "from json"),
        ({"txt": b"", "json": b'{"caption": "from json"}'}, "from json"),
        ({"txt": b"\xef\xbb\xbf a dog\r\n"}, "a dog"),
        ({"json": b'\xef\xbb\xbf{"caption": "a dog"}'}, "a dog"),
        ({"json": b'{"caption": "\\ufeff a dog"}'}, "a dog"),
        ({"txt": b"\xef\xbb\xbf", "json": b'{"caption": "from json"}'}, "from json"),
        ({"txt": b"\xff\xfe"}, ""),
        ({"json": b'{"caption": null}'}, ""),
        ({"json": b'{"width": 3}'}, ""),
        ({"json": b'["caption"]'}, ""),
        ({"json": b"{"}, ""),
        ({"json": b"[" * 100_000}, ""),
        ({"txt": b"x" * ((1 << 20) + 1)}, ""),
        ({"png": b"a"}, ""),
    ],
    ids=lambda value: str(value)[:40],
)
def test_caption_is_read_from_txt_or_from_json_of_img2dataset(
    tmp_path: Path, parts: dict[str, bytes], expected: str
) -> None:
    assert caption(tmp_path, parts) == expected


FAULTY = {
    **{"0.png": b"a", "0.cls": b"0"},
    **{"1.cls": b"1"},
    **{"2.png": b"", "2.cls": b"2"},
    **{"3.png": b"b"},
    **{"4.jpg": b"c", "4.cls": b"4"},
    **{"5.webp": b"d", "5.cls": b"five"},
    **{"6.txt": b"words"},
}


def test_examples_without_required_members_are_recorded_by_reason(tmp_path: Path) -> None:
    index = index_shard(write_tar(tmp_path / "a.tar", FAULTY))
    usable = index.usable(("png", "jpg", "webp"))
    assert [(example.key, example.label) for example in usable] == [("0", 0), ("4", 4)]
    assert sorted(reasons(usable)) == [
        ("1", "no image"),
        ("2", "empty file"),
        ("3", "no label"),
        ("5", "wrong label"),
        ("6", "no image"),
    ]
    for example in usable.bad:
        assert f"example {example.key} of {tmp_path / 'a.tar'}" in example.message
        assert example.number == -1


def test_all_examples_of_a_shard_may_be_bad(tmp_path: Path) -> None:
    usable = index_shard(write_tar(tmp_path / "a.tar", {"0.txt": b"a", "1.json": b"{}"})).usable(("npy",))
    assert (len(usable), reasons(usable)) == (0, [("0", "no codes"), ("1", "no codes")])


@pytest.mark.parametrize(
    ("needed", "usable"), [(None, ["0", "1"]), (False, ["0", "1"]), (True, [])], ids=["if any", "no", "yes"]
)
def test_images_without_classes_are_usable_unless_classes_are_needed(
    tmp_path: Path, needed: bool | None, usable: list[str]
) -> None:
    index = index_shard(write_tar(tmp_path / "a.tar", {"0.png": b"a", "1.png": b"b"}))
    assert [example.key for example in index.usable(("png",), needed)] == usable


def test_image_without_a_caption_is_bad_if_others_have_one(tmp_path: Path) -> None:
    index = index_shard(write_tar(tmp_path / "a.tar", {"0.png": b"a", "0.txt": b"words", "1.png": b"b"}))
    assert reasons(index.usable(("png",))) == [("1", "no caption")]


def test_select_and_concatenate_keep_all_columns(tmp_path: Path) -> None:
    first = index_shard(write_tar(tmp_path / "1.tar", {"0.png": b"a", "0.cls": b"1", "1.png": b"b", "1.cls": b"2"}))
    second = index_shard(write_tar(tmp_path / "2.tar", {"2.jpg": b"c", "2.cls": b"x", "ü.jpg": b"d", "ü.cls": b"4"}))
    third = index_shard(write_tar(tmp_path / "3.tar", {}))
    whole = ExampleIndex.concatenate([first, third, second.usable(("jpg",))])
    assert contents(whole) == [
        ("0", {"png": b"a", "cls": b"1"}),
        ("1", {"png": b"b", "cls": b"2"}),
        ("ü", {"jpg": b"d", "cls": b"4"}),
    ]
    assert whole.labels.tolist() == [1, 2, 4]
    assert reasons(whole) == [("2", "wrong label")]
    some = whole.select(np.array([2, 0]))
    assert contents(some) == [("ü", {"jpg": b"d", "cls": b"4"}), ("0", {"png": b"a", "cls": b"1"})]
    assert [example.source for example in some] == [str(tmp_path / "2.tar"), str(tmp_path / "1.tar")]
    assert some.labels.tolist() == [4, 1]
    assert reasons(some) == [("2", "wrong label")]
    assert some.member(0, "png") is None
    assert contents(some.select(np.array([], np.int64))) == []
