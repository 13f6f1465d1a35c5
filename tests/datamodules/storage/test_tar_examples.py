"""Tar files of other tools: scattered members, keys with dots, repeated members."""

import io
import tarfile
from pathlib import Path

import pytest

from datamodules import ImageDataModule
from datamodules.packing import pack
from datamodules.storage.index import ExampleIndex
from datamodules.storage.index_store import IndexStore
from datamodules.storage.tar_index import index_shard
from tests.datamodules.shard_files import grey_image

Members = list[tuple[str, bytes]]


def write_tar(path: Path, members: Members) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def index_of(tmp_path: Path, members: Members) -> ExampleIndex:
    return index_shard(write_tar(tmp_path / "a.tar", members))


def contents(index: ExampleIndex) -> dict[str, dict[str, bytes]]:
    assert len(set(index.keys)) == len(index)
    return {example.key: {part: example.read(part) for part in example.members} for example in index}


def named(*names: str) -> Members:
    return [(name, name.encode() if not name.endswith("cls") else b"3") for name in names]


def test_members_of_an_example_are_grouped_from_anywhere_in_the_file(tmp_path: Path) -> None:
    members = [(f"d/{n}.{part}", str(n).encode()) for part in ("jpg", "txt", "cls") for n in (2, 0, 1)]
    index = index_of(tmp_path, members)
    assert contents(index) == {f"d/{n}": dict.fromkeys(("jpg", "cls", "txt"), str(n).encode()) for n in range(3)}
    assert (index.labels.tolist(), index.bad) == ([2, 0, 1], [])
    assert list(index.keys) == ["d/2", "d/0", "d/1"], "in the order of their first members"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("22.05.jpg 22.05.cls 22.06.jpg 22.06.cls", {"22.05": "cls jpg", "22.06": "cls jpg"}),
        ("22.05.jpg 22.06.jpg 22.05.cls 22.06.cls", {"22.05": "cls jpg", "22.06": "cls jpg"}),
        ("a.x.jpg a.y.jpg a.x.cls a.y.cls", {"a.x": "cls jpg", "a.y": "cls jpg"}),
        ("22.05.jpg", {"22.05": "jpg"}),
        ("2024.01.02.PNG 2024.01.03.png", {"2024.01.02": "png", "2024.01.03": "png"}),
        ("v1.0/22.5.jpg v1.0/22.5.cls", {"v1.0/22.5": "cls jpg"}),
        ("22.jpg 22.cls 22.05.jpg 22.05.cls", {"22": "cls jpg", "22.05": "cls jpg"}),
        ("22.jpg 22.05.jpg", {"22": "jpg", "22.05": "jpg"}),
        ("a.left.jpg a.right.jpg", {"a.left": "jpg", "a.right": "jpg"}),
        ("22.05.txt 22.06.txt", {"22.05": "txt", "22.06": "txt"}),
        ("s.input.jpg s.target.cls", {"s": "cls jpg"}),
        ("s.input.jpg t.input.jpg s.target.cls t.target.cls", {"s": "cls jpg", "t": "cls jpg"}),
        ("s.input.jpg s.cls s.caption.txt", {"s": "cls jpg txt"}),
        ("s.jpg s.target.cls", {"s": "cls jpg"}),
        ("s.jpg s.cls s.mask.png s.depth.png s.ocr.txt", {"s": "cls jpg"}),
        ("s.mask.png s.jpg s.cls", {"s": "cls jpg"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_keys_may_contain_dots_and_members_may_have_names(tmp_path: Path, names: str, expected: dict[str, str]) -> None:
    index = index_of(tmp_path, named(*names.split()))
    assert {key: " ".join(sorted(parts)) for key, parts in contents(index).items()} == expected
    assert index.bad == []
    assert index.labels.tolist() == [3 if "cls" in expected[key] else -1 for key in index.keys]


@pytest.mark.parametrize(
    ("names", "key", "phrase"),
    [
        ("s.left.jpg s.right.jpg s.cls", "s", "has the members left.jpg, right.jpg, cls"),
        (
            "k.jpg l.jpg k.jpg l.cls k.cls l.txt k.cls k.txt",
            "k",
            "occurs several times, with other examples between its members",
        ),
    ],
)
def test_ambiguous_members_are_bad_with_the_right_reason(tmp_path: Path, names: str, key: str, phrase: str) -> None:
    index = index_of(tmp_path, named(*names.split(), "m.jpg", "m.cls"))
    assert key not in list(index.keys)
    assert {(example.key, example.reason) for example in index.bad} == {(key, "unclear parts")}
    assert f"example {key} of {tmp_path / 'a.tar'} {phrase}" in index.bad[0].message
    assert index[len(index) - 1].key == "m"


def test_appended_member_replaces_the_first_one(tmp_path: Path) -> None:
    members = [("0.jpg", b"old"), ("0.cls", b"1"), ("1.jpg", b"b"), ("1.cls", b"2"), ("0.jpg", b"new"), ("1.cls", b"5")]
    index = index_of(tmp_path, members)
    assert contents(index) == {"0": {"jpg": b"new", "cls": b"1"}, "1": {"jpg": b"b", "cls": b"5"}}
    assert index.labels.tolist() == [1, 5]


def test_complete_examples_with_one_key_stay_separate(tmp_path: Path) -> None:
    members = [(f"{key}.{part}", part.encode()) for _ in range(2) for key in "ab" for part in ("jpg", "txt")]
    index = index_of(tmp_path, members)
    assert (list(index.keys), index.bad) == (["a", "b", "a", "b"], [])


def test_truncated_file_loses_the_example_with_the_truncated_member(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{n}.{part}", b"1") for part in ("jpg", "cls") for n in range(3)])
    path.write_bytes(path.read_bytes()[: 1024 * 4 + 512])  # within 1.cls
    index = index_shard(path).usable(("jpg",), labels_needed=True)
    assert list(index.keys) == ["0"]
    assert [(example.key, example.reason) for example in index.bad] == [("1", "truncated shard"), ("2", "no label")]


def test_files_with_scattered_members_are_read_packed_and_streamed_alike(tmp_path: Path) -> None:
    for shard in range(2):
        names = [f"{n}.{shard}" for n in range(20)]
        members = [(f"{name}.{part}", grey_image(n) if part == "png" else str(n % 5).encode())
                 for part in ("png", "cls") for n, name in enumerate(names)]  # fmt: skip
        write_tar(tmp_path / f"set/{shard}.tar", members)
    data = ImageDataModule(tmp_path / "set", image_size=4, num_workers=0, flip=False)
    stream = ImageDataModule(
        train=str(tmp_path / "set"), val=str(tmp_path / "set"), image_size=4, num_workers=0, flip=False,
        resampled_epoch=32,
    )  # fmt: skip
    pack(str(tmp_path / "set"), tmp_path / "packed", workers=1)
    packed = ImageDataModule(tmp_path / "packed", image_size=4, num_workers=0, flip=False)
    for module in (data, stream, packed):
        module.setup("fit")
        for batch in module.train_dataloader():
            levels = ((batch["images"][:, 0, 0, 0] + 1) * 127.5).round().long()
            assert (levels % 5).tolist() == batch["labels"].tolist()
    keys = [key for split in ("train", "val") for key in packed.datasets[split].examples.keys]  # type: ignore[attr-defined]
    assert sorted(keys) == sorted(f"{n}_{shard}" for shard in range(2) for n in range(20))
    store = IndexStore(tmp_path / "cache")
    for _ in range(2):  # read, and from the cache
        assert contents(store.index(tmp_path / "set/0.tar")).keys() == {f"{n}.0" for n in range(20)}
