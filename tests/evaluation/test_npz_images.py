"""Arrays of images: what is read, what is rejected, and how much memory is used."""

import io
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evaluation.image_sets import _Array, open_images
from evaluation.npz_images import PIECE, ImageArchive
from tests.datamodules.shard_files import assert_one_line


def random_images(count: int = 7, size: int = 4) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


def npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def write_array(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version)
    return buffer.getvalue()


def read(
    path: Path, batch_size: int = 3, rank: int = 0, world_size: int = 1
) -> tuple[np.ndarray, list[int], list[int]]:
    """Images (N, H, W, 3), positions and labels."""
    batches = list(open_images(path).batches(batch_size, rank, world_size))
    assert all(len(batch.images) <= batch_size for batch in batches)
    images = np.concatenate([batch.images.permute(0, 2, 3, 1).numpy() for batch in batches])
    index, labels = (torch.cat([getattr(batch, name) for batch in batches]).tolist() for name in ("index", "labels"))
    return images, index, labels


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_reads_an_archive_in_order(tmp_path: Path, save: Callable[..., None], batch_size: int) -> None:
    expected = random_images()
    save(tmp_path / "a.npz", expected, np.arange(7, dtype=np.int32)[::-1])
    batch, index, labels = read(tmp_path / "a.npz", batch_size)
    assert np.array_equal(batch, expected)
    assert index == list(range(7))
    assert labels == [6, 5, 4, 3, 2, 1, 0]
    found = open_images(tmp_path / "a.npz")
    assert (found.name, found.size, found.crop, len(found)) == (str(tmp_path / "a.npz"), 4, "none", 7)


def test_batches_have_the_documented_types(tmp_path: Path) -> None:
    batch = next(open_images(npz(tmp_path / "a.npz", arr_0=random_images())).batches(2))
    assert [str(part.dtype) for part in batch] == ["torch.uint8", "torch.int64", "torch.int64"]
    assert batch.images.shape == (2, 3, 4, 4)
    assert batch.images.is_contiguous()
    assert batch.labels.tolist() == [-1, -1]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("size", [4, 400])  # to pass over an image of 400 pixels takes a seek
@pytest.mark.parametrize("world_size", [2, 5, 8])
def test_ranks_share_an_archive(tmp_path: Path, save: Callable[..., None], size: int, world_size: int) -> None:
    expected = np.zeros((7, size, size, 3), np.uint8) + np.arange(7, dtype=np.uint8)[:, None, None, None]
    expected[:, 0] = random_images(7, size)[:, 0]
    save(tmp_path / "a.npz", expected, np.arange(7))
    for rank in range(min(world_size, 7)):
        batch, index, labels = read(tmp_path / "a.npz", 2, rank, world_size)
        assert index == labels == list(range(7))[rank::world_size]
        assert np.array_equal(batch, expected[rank::world_size])
    if world_size > 7:
        assert list(open_images(tmp_path / "a.npz").batches(2, 7, 8)) == []


def test_reads_an_npy(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", random_images())
    batch, index, labels = read(tmp_path / "a.npy")
    assert np.array_equal(batch, random_images())
    assert (index, labels) == (list(range(7)), [-1] * 7)
    assert np.array_equal(read(tmp_path / "a.npy", 2, 1, 3)[0], random_images()[1::3])


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_reads_all_versions_of_the_header(tmp_path: Path, version: tuple[int, int]) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("arr_0.npy", write_array(random_images(), version))
    assert np.array_equal(read(tmp_path / "a.npz")[0], random_images())


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("world_size", [1, 2])
def test_memory_holds_a_batch_and_not_the_archive(tmp_path: Path, save: Callable[..., None], world_size: int) -> None:
    size = 64 * 128 * 128 * 3
    save(tmp_path / "a.npz", np.zeros((512, 128, 128, 3), np.uint8))  # 25 MB
    found = open_images(tmp_path / "a.npz")
    assert isinstance(found, _Array)
    tracemalloc.start()
    try:
        blocks = found._archive.blocks(range(0, 512, world_size), 64)
        while next(blocks, None) is not None:
            pass
        assert tracemalloc.get_traced_memory()[1] < size + 2.5 * PIECE
        tracemalloc.reset_peak()
        for batch in found.batches(64, 0, world_size):
            assert tracemalloc.get_traced_memory()[0] < 1.5 * size
            del batch
        assert tracemalloc.get_traced_memory()[1] < 2 * size + 2 * PIECE
    finally:
        tracemalloc.stop()


def save_zip(path: Path, **entries: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(f"{name}.npy", data)


FOUR = random_images(4)
BAD_ARRAYS: list[tuple[Any, tuple[str, ...]]] = [
    (FOUR / 255, ("float64", "uint8 0…255", "looks like [0, 1]: multiply floats by 255 and round")),
    (FOUR / 250 - 0.01, ("float64", "looks like [0, 1]: multiply floats by 255 and round")),
    (
        (FOUR / 127.5 - 1).astype(np.float16),
        ("float16", "looks like [-1, 1]: use ((x + 1) * 127.5).round().clip(0, 255).astype"),
    ),
    (FOUR / 100 - 1.2, ("float64", "looks like [-1, 1]: use ((x + 1) * 127.5).round().clip(0, 255).astype")),
    (FOUR.astype(np.float32), ("float32", "0 to 2", "x.round().astype(np.uint8)")),
    (FOUR * 1e6 - 5.0, ("float64", "scale them to 0…255")),
    (np.where(FOUR > 240, np.nan, 0.5), ("float64", "not finite (NaN or infinity)")),
    (FOUR.astype(np.int64), ("int64", "uint8 0…255", "use x.astype(np.uint8)")),
    (FOUR.astype(np.int32) // 200, ("int32", "0 to 1", "(x * 255).astype")),
    (FOUR.astype(np.uint16) * 257, ("uint16", "16 bits: use (x // 257)")),
    ((FOUR - 128.0).astype(np.int8), ("int8", "(x.astype(np.int16) + 128)")),
    (FOUR > 127, ("bool", "x.astype(np.uint8) * 255")),
    (FOUR.astype(str), ("<U", "convert it")),
    (np.arange(7), ("(7,)", "looks like labels")),
    (FOUR[None], ("(1, 4, 4, 4, 3)", "x.reshape(-1, *x.shape[-3:])")),
    (FOUR[..., 0], ("(4, 4, 4)", "grey", "three times")),
    (FOUR[..., :1], ("(4, 4, 4, 1)", "grey")),
    (np.zeros((4, 3, 5, 5), np.uint8), ("(4, 3, 5, 5)", "channels come first", "transpose(0, 2, 3, 1)")),
    (np.zeros((4, 5, 5, 4), np.uint8), ("(4, 5, 5, 4)", "transparency")),
    (np.zeros((4, 5, 5, 2), np.uint8), ("(4, 5, 5, 2)", "three channels")),
    (np.zeros((4, 5), np.uint8), ("(4, 5)", "four axes")),
    (np.zeros((4, 5, 6, 3), np.uint8), ("5 × 6", "square")),
    (np.zeros((4, 0, 0, 3), np.uint8), ("0 × 0", "square")),
    (np.asfortranarray(FOUR), ("Fortran order", "np.ascontiguousarray")),
    (FOUR[:0], ("0 images", "at least 2")),
    (FOUR[:1], ("1 images", "at least 2")),
]


@pytest.mark.parametrize(("array", "phrases"), BAD_ARRAYS)
def test_rejects_arrays_that_are_not_images(tmp_path: Path, array: np.ndarray, phrases: tuple[str, ...]) -> None:
    npz(tmp_path / "a.npz", arr_0=array)
    np.save(tmp_path / "a.npy", array)
    for name in ("a.npz", "a.npy"):
        with pytest.raises(ValueError) as error:
            open_images(tmp_path / name)
        assert_one_line(error, tmp_path / name, "arr_0" if "square" not in phrases else "images", *phrases)


def test_never_unpickles(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return pytest.fail, ("the array was unpickled",)

    trap = np.array([Trap(), Trap()], object)
    np.savez(tmp_path / "a.npz", trap, allow_pickle=True)
    np.savez(tmp_path / "b.npz", random_images(2), trap, allow_pickle=True)
    for name, said in (("a.npz", "arr_0"), ("b.npz", "arr_1")):
        with pytest.raises(ValueError) as error:
            open_images(tmp_path / name)
        assert_one_line(error, said, "object")


@pytest.mark.parametrize(
    ("labels", "phrases"),
    [
        (np.arange(3), ("(3,)", "each of the 7 images")),
        (np.zeros((7, 10), int), ("(7, 10)", "each of the 7 images")),
        (np.zeros(7), ("float64", "integers")),
        (np.array(["a"] * 7), ("<U1", "integers")),
    ],
)
def test_rejects_wrong_labels(tmp_path: Path, labels: np.ndarray, phrases: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:
        open_images(npz(tmp_path / "a.npz", arr_0=random_images(), arr_1=labels))
    assert_one_line(error, tmp_path / "a.npz", "arr_1", *phrases)


def test_an_archive_without_images_lists_its_keys(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], tuple[str, ...]]] = [
        ({"samples": random_images(), "y": np.arange(7)}, ("no arr_0 but samples, y;", "np.savez")),
        ({"mu": np.zeros(3), "sigma": np.zeros((3, 3))}, ("holds only statistics (mu, sigma)",)),
        ({f"image{i}": np.zeros(1) for i in range(50)}, ("image9, …",)),
        ({}, ("no arr_0 but nothing",)),
    ]
    for arrays, phrases in cases:
        with pytest.raises(ValueError) as error:
            open_images(npz(tmp_path / "a.npz", **arrays))
        assert_one_line(error, tmp_path / "a.npz", *phrases)


def test_reads_the_images_of_a_file_that_also_has_statistics(tmp_path: Path) -> None:
    npz(tmp_path / "a.npz", mu=np.zeros(3), sigma=np.zeros((3, 3)), arr_0=random_images())
    assert np.array_equal(read(tmp_path / "a.npz")[0], random_images())


@pytest.mark.parametrize("name", ["a.npz", "a.npy"])
def test_names_a_missing_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError) as error:
        open_images(tmp_path / name)
    assert_one_line(error, tmp_path / name, "does not exist", "give")


def test_rejects_damaged_files_when_opening_them(tmp_path: Path) -> None:
    whole = npz(tmp_path / "whole.npz", arr_0=random_images(100)).read_bytes()
    header = write_array(random_images())
    files = {
        "empty.npz": (b"", "not an .npz"),
        "text.npz": (b"<html>not found</html>", "not an .npz"),
        "half.npz": (whole[: len(whole) // 2], "cut off"),
        "empty.npy": (b"", "not a NumPy array"),
        "text.npy": (b"<html>not found</html>", "not a NumPy array"),
        "half.npy": (header[:-1], "arr_0 of"),
        "magic.npy": (header.replace(b"NUMPY\x01", b"NUMPY\x09"), "version (9, 0)"),
        "code.npy": (header.replace(b"{'descr'", b"(((((((("), "not a NumPy array"),
        "image": (b"\x89PNG", "not an .npz"),
    }
    for name, (data, said) in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError) as error:
            open_images(tmp_path / name)
        assert_one_line(error, tmp_path / name, said)


def test_rejects_an_array_shorter_than_its_header_says(tmp_path: Path) -> None:
    save_zip(tmp_path / "a.npz", arr_0=write_array(random_images())[:-1])
    with pytest.raises(ValueError) as error:
        open_images(tmp_path / "a.npz")
    assert_one_line(error, "arr_0", "cut off", "(7, 4, 4, 3)", "needs 336 bytes", "but it has 335")
    save_zip(tmp_path / "b.npz", arr_0=write_array(random_images()), arr_1=write_array(np.arange(7))[:-1])
    with pytest.raises(ValueError) as error:
        open_images(tmp_path / "b.npz")
    assert_one_line(error, "arr_1", "cut off")


def test_a_header_with_many_images_allocates_no_memory(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    shape = (10**12, 256, 256, 3)
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
    save_zip(tmp_path / "a.npz", arr_0=buffer.getvalue())
    with pytest.raises(ValueError) as error:
        open_images(tmp_path / "a.npz")
    assert_one_line(error, "cut off", "but it has 0")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_finds_damage_within_an_array_while_reading(tmp_path: Path, save: Callable[..., None]) -> None:
    save(tmp_path / "a.npz", random_images(100))
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[len(data) // 2] ^= 255
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(ValueError) as error:
        read(tmp_path / "a.npz", batch_size=9)
    assert_one_line(error, "arr_0", tmp_path / "a.npz", "damaged", "get or write it again")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_verifies_the_crc_of_an_archive(tmp_path: Path, save: Callable[..., None]) -> None:
    save(tmp_path / "a.npz", np.zeros((100, 32, 32, 3), np.uint8))
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[data.rindex(b"PK\1\2") + 16] ^= 255  # in the directory at the end
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(ValueError) as error:
        read(tmp_path / "a.npz", batch_size=1)
    assert_one_line(error, tmp_path / "a.npz", "damaged", "CRC")


def test_reads_an_entry_without_a_suffix(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("arr_0", write_array(random_images()))
    assert np.array_equal(read(tmp_path / "a.npz")[0], random_images())


def test_images_of_an_array_are_never_resized(tmp_path: Path) -> None:
    path = npz(tmp_path / "a.npz", arr_0=random_images())
    assert open_images(path, image_size=4).size == 4
    with pytest.raises(ValueError) as error:
        open_images(path, image_size=8)
    assert_one_line(error, path, "4 × 4", "image_size 8", "--model.init_args.image_size 8", "a folder")


def test_an_array_has_no_splits(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        open_images(npz(tmp_path / "a.npz", arr_0=random_images()), split="val")
    assert_one_line(error, "no splits", "val")


def test_blocks_hold_the_requested_images(tmp_path: Path) -> None:
    archive = ImageArchive(npz(tmp_path / "a.npz", arr_0=random_images()))
    blocks = list(archive.blocks(range(2, 7, 2), 2))
    assert [len(block) for block in blocks] == [2, 1]
    assert np.array_equal(np.concatenate(blocks), random_images()[2:7:2])
