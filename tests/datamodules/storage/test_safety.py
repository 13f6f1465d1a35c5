"""Nothing in a shard can run code, read or write other files, or exhaust the memory."""

import io
import os
import pickle
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules import CodeDataModule, ImageDataModule
from datamodules.inspection import inspect
from datamodules.packing import pack
from tests.datamodules.code_datasets import codes_of, npy, write_codes
from tests.datamodules.shard_files import grey_image


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


def write_tar(path: Path, members: dict[str, bytes], links: dict[str, str] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
        for name, target in (links or {}).items():
            for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE):
                entry = tarfile.TarInfo(name)
                entry.type, entry.linkname = kind, target
                tar.addfile(entry)


def hostile_parts(target: Path, key: str) -> dict[str, bytes]:
    """Members that run code in a reader that decodes them."""
    pickled = pickle.dumps(Payload(target))
    buffer, objects = io.BytesIO(), io.BytesIO()
    torch.save(Payload(target), buffer)
    np.save(objects, np.array([Payload(target)], dtype=object), allow_pickle=True)
    source = f"import os; os.mkdir({str(target)!r})".encode()
    return {
        f"{key}.pyd": pickled,
        f"{key}.pkl": pickled,
        f"{key}.pickle": pickled,
        f"{key}.pth": buffer.getvalue(),
        f"{key}.pt": buffer.getvalue(),
        f"{key}.npy": objects.getvalue(),
        f"{key}.npz": objects.getvalue(),
        f"{key}.py": source,
        f"{key}.yaml": f"!!python/object/apply:os.mkdir [{str(target)!r}]".encode(),
        f"{key}.json": b"[" * 100_000,
    }


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Folder that appears if code in a shard runs; verified with a reader that allows it."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "proof")))
    assert (tmp_path / "proof").exists()
    return tmp_path / "ran"


def test_hostile_members_next_to_images_are_never_decoded(tmp_path: Path, target: Path) -> None:
    members = {}
    for number in range(20):
        members |= {f"{number}.png": grey_image(number), f"{number}.cls": b"1"}
        members |= hostile_parts(target, str(number))
    for split in ("train", "val"):
        write_tar(tmp_path / "set" / split / "a.tar", members)
    data = ImageDataModule(str(tmp_path / "set"), image_size=4, num_workers=0)
    for stage in ("fit", "predict"):
        data.setup(stage)
        loaders = [data.train_dataloader()] if stage == "fit" else data.predict_dataloader()
        for loader in loaders:
            assert sum(len(batch["keys"]) for batch in loader) == 20
    inspect(str(tmp_path / "set"), tmp_path / "sheet.png", num_workers=0)
    pack(str(tmp_path / "set"), tmp_path / "packed", workers=1)
    with tarfile.open(tmp_path / "packed/train/train-000000.tar") as tar:
        assert {name.rpartition(".")[2] for name in tar.getnames()} == {"png", "cls", "json"}
    assert not target.exists()


def test_pickled_codes_are_bad_examples_and_run_no_code(tmp_path: Path, target: Path) -> None:
    write_codes(tmp_path, train=50, val=3, per_shard=50)
    objects = io.BytesIO()
    np.save(objects, np.array([Payload(target)], dtype=object), allow_pickle=True)
    # Also one with the size and header of real codes.
    real = npy(codes_of(0))
    members = {}
    for number in range(50):
        members |= {f"train/{number}.npy": npy(codes_of(number)), f"train/{number}.cls": b"1"}
    members["train/7.npy"] = objects.getvalue()
    members["train/9.npy"] = pickle.dumps(Payload(target)).ljust(len(real), b"\0")
    write_tar(tmp_path / "train/train-000000.tar", members)
    data = CodeDataModule(tmp_path, 8, num_workers=0)
    data.setup("fit")
    keys = [key for batch in data.train_dataloader() for key in batch["keys"]]
    assert sorted(keys) == sorted(f"train/{number}" for number in range(50) if number not in (7, 9))
    assert data.tallies["train"].counts == {"broken codes": 2}
    assert not target.exists()


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<u2', 'fortran_order': False, 'shape': (1000000000000000,), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
        "__import__('os').mkdir('ran')",
        "{'descr': [('a', '<u2')], 'fortran_order': False, 'shape': (1, 2, 2), }",
        "(" * 5000,
    ],
    ids=["huge", "objects", "code", "structure", "deep"],
)
def test_npy_header_is_compared_and_never_trusted(tmp_path: Path, header: str) -> None:
    write_codes(tmp_path, train=40, val=3, per_shard=40)
    text = header.encode().ljust(8 * 1024 - 11) + b"\n"
    hostile = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(8)
    members = {f"train/{number}.npy": npy(codes_of(number)) for number in range(40)}
    members |= {f"train/{number}.cls": b"1" for number in range(40)}
    members["train/3.npy"] = hostile
    ordered = {name: members[name] for number in range(40) for name in (f"train/{number}.npy", f"train/{number}.cls")}
    write_tar(tmp_path / "train/train-000000.tar", ordered)
    data = CodeDataModule(tmp_path, 8, num_workers=0)
    data.setup("fit")
    assert sum(len(batch["keys"]) for batch in data.train_dataloader()) == 39
    assert data.tallies["train"].counts == {"broken codes": 1}


def test_names_with_parent_folders_are_harmless(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(grey_image(200))
    names = ["../../secret", f"{tmp_path}/secret", "/etc/passwd", "..", "a/../../b", "C:\\b", "a\0b", "ä/日本"]
    members = {f"{name}.png": grey_image(place) for place, name in enumerate(names)}
    write_tar(tmp_path / "set/train/a.tar", members, links={"link.png": "../../secret.png", "dir.png": str(tmp_path)})
    write_tar(tmp_path / "set/val/a.tar", {"0.png": grey_image(0)})
    before = sorted(tmp_path.rglob("*"))
    data = ImageDataModule(str(tmp_path / "set"), image_size=4, num_workers=0, flip=False)
    data.setup("fit")
    levels = torch.cat([batch["images"][:, 0, 0, 0] for batch in data.train_dataloader()])
    assert ((levels + 1) * 127.5).round().max() < len(names)  # the images of the shard, not the secret one
    assert sorted(tmp_path.rglob("*")) == before


def bomb(width: int, height: int) -> bytes:
    """A small PNG that claims this size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100_000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


@pytest.mark.parametrize("size", [(10_000, 10_000), (60_000, 60_000), (100_000_000, 1)], ids=str)
def test_decompression_bombs_are_refused_before_they_are_decoded(tmp_path: Path, size: tuple[int, int]) -> None:
    members = {f"{number}.png": grey_image(number) for number in range(30)}
    members["30.png"] = bomb(*size)
    for split in ("train", "val"):
        write_tar(tmp_path / split / "a.tar", members)
    data = ImageDataModule(str(tmp_path), image_size=4, num_workers=0)
    data.setup("fit")
    assert sum(len(batch["keys"]) for batch in data.train_dataloader()) == 30
    assert data.tallies["train"].counts == {"too many pixels": 1}


def test_shard_names_in_meta_json_must_not_be_paths(tmp_path: Path) -> None:
    write_codes(tmp_path / "set", train=3, val=3)
    meta = tmp_path / "set/meta.json"
    meta.write_text(meta.read_text().replace("train-000000.tar", "../../train-000000.tar"))
    with pytest.raises(ValueError, match=r"names the shard .*not a file name"):
        CodeDataModule(tmp_path / "set").setup("fit")
