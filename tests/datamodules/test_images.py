"""Pictures of any mode, size and orientation become (3, H, W) float32 in [-1, 1]."""

import struct
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.images import NO_LABEL, ImageDataModule, ImageDataset, to_tensor
from datamodules.loader import NO_EPOCH
from datamodules.shards import index_shard
from tests.datamodules.shard_files import assert_one_line, encode, write_pictures, write_shards

COLOURS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
PNG = encode(Image.fromarray(COLOURS))


def read_parts(folder: Path, parts: dict[str, bytes], image_size: int = 8) -> dict[str, Any]:
    """The sample that comes out of these files."""
    (shard,) = write_shards(folder / "train", [("folder/key", parts)])
    return ImageDataset(index_shard(shard), image_size)[0, NO_EPOCH]


def levels(images: torch.Tensor) -> np.ndarray:
    """(3, H, W) in [-1, 1] as (H, W, 3) in 0 … 255, float."""
    return ((images + 1) * 127.5).permute(1, 2, 0).numpy()


def test_levels_are_mapped_onto_minus_one_to_one() -> None:
    row = np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, axis=2)
    tensor = to_tensor(Image.fromarray(row))
    assert (tensor.dtype, tensor.shape) == (torch.float32, (3, 1, 256))
    assert (tensor[0, 0, 0], tensor[0, 0, -1]) == (-1.0, 1.0)
    torch.testing.assert_close(tensor[1, 0], torch.linspace(-1, 1, 256), atol=1e-6, rtol=0)


def test_a_picture_comes_with_its_label_and_key(tmp_path: Path) -> None:
    sample = read_parts(tmp_path, {"png": PNG, "cls": b"7\n"})
    assert (sample["labels"], sample["keys"]) == (7, "folder/key")
    assert sample["images"].dtype == torch.float32
    assert np.array_equal(levels(sample["images"]).round(), COLOURS)


def test_a_picture_without_a_class_has_no_label(tmp_path: Path) -> None:
    assert read_parts(tmp_path, {"png": PNG})["labels"] == NO_LABEL == -1


@pytest.mark.parametrize(
    ("extension", "kind", "options"),
    [("png", "png", {}), ("PNG", "png", {}), ("webp", "webp", {"lossless": True})],
)
def test_lossless_pictures_keep_every_pixel(tmp_path: Path, extension: str, kind: str, options: dict[str, Any]) -> None:
    sample = read_parts(tmp_path, {extension: encode(Image.fromarray(COLOURS), kind, **options)})
    assert np.array_equal(levels(sample["images"]).round(), COLOURS)


@pytest.mark.parametrize("extension", ["jpg", "jpeg", "JPEG"])
def test_jpeg_pictures_keep_their_colour(tmp_path: Path, extension: str) -> None:
    sample = read_parts(tmp_path, {extension: encode(Image.new("RGB", (8, 8), (200, 100, 50)), "jpeg")})
    assert abs(levels(sample["images"]) - (200, 100, 50)).max() <= 3


@pytest.mark.parametrize(
    ("mode", "colour", "kind", "expected"),
    [
        ("1", 1, "png", (255, 255, 255)),
        ("L", 90, "png", (90, 90, 90)),
        ("LA", (90, 10), "png", (90, 90, 90)),
        ("P", 3, "png", (30, 40, 50)),
        ("RGBA", (200, 100, 50, 10), "png", (200, 100, 50)),
        ("CMYK", (0, 100, 200, 30), "jpeg", (225, 137, 49)),
        # 16 bits, 40000 / 257: not cut off at 255, as Pillow's own conversion does.
        ("I;16", 40000, "png", (155.6, 155.6, 155.6)),
    ],
)
def test_every_mode_becomes_rgb(
    tmp_path: Path, mode: str, colour: Any, kind: str, expected: tuple[float, float, float]
) -> None:
    picture = Image.new(mode, (8, 8), colour)
    if mode == "P":
        picture.putpalette(
            [channel for entry in range(4) for channel in (entry * 10, entry * 10 + 10, entry * 10 + 20)]
        )
    images = read_parts(tmp_path, {"jpg" if kind == "jpeg" else kind: encode(picture, kind)})["images"]
    assert images.shape == (3, 8, 8)
    assert abs(levels(images) - expected).max() <= 3


def test_sixteen_bit_greys_keep_their_steps(tmp_path: Path) -> None:
    greys = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040
    images = read_parts(tmp_path, {"png": encode(Image.fromarray(greys))})["images"]
    assert abs(levels(images) - greys[..., None] / 257).max() <= 1


ORIENTATIONS = {
    1: COLOURS,
    2: COLOURS[:, ::-1],
    3: COLOURS[::-1, ::-1],
    4: COLOURS[::-1],
    5: COLOURS.transpose(1, 0, 2),
    6: np.rot90(COLOURS, -1),
    7: COLOURS[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(COLOURS, 1),
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_picture_is_turned_as_its_exif_orientation_says(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    images = read_parts(tmp_path, {"png": encode(Image.fromarray(COLOURS), exif=exif)})["images"]
    assert np.array_equal(levels(images).round(), ORIENTATIONS[orientation])


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


NOISE = encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)))
BROKEN = {
    "no bytes": b"",
    "no picture": b"this is not a picture",
    "half a file": PNG[: len(PNG) // 2],
    "damaged data": NOISE[:2000] + bytes(5000) + NOISE[7000:],
    "chunk of a wrong length": NOISE.replace(struct.pack(">I", NOISE.index(b"IEND") - NOISE.index(b"IDAT") - 12),
    b"\0\0\5\0", 1), "header too short": PNG[:8] + png_chunk(b"IHDR", b"\0\0\0\1"),
    "too many pixels": PNG[:8] + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)) +
    PNG[33:], "damaged EXIF": PNG[:33] + png_chunk(b"eXIf", b"this is no TIFF header") + PNG[33:],
}  # fmt: skip


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_a_broken_picture_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(ValueError) as error:
        read_parts(tmp_path, {"png": data, "cls": b"1"})
    assert_one_line(error, tmp_path / "train", "sample folder/key", "is broken")


def test_a_sample_without_a_picture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        read_parts(tmp_path, {"gif": b"GIF89a", "cls": b"1"})
    assert_one_line(error, tmp_path / "train", "sample folder/key", "has no picture", "png, jpg, jpeg, webp")


@pytest.mark.parametrize("label", [b"dog", b"", b"1.5", b"\xff"], ids=str)
def test_a_class_that_is_no_number_is_refused_with_its_sample(tmp_path: Path, label: bytes) -> None:
    with pytest.raises(ValueError) as error:
        read_parts(tmp_path, {"png": PNG, "cls": label})
    assert_one_line(error, tmp_path / "train", "folder/key")


def image_data(root: Path, **options: Any) -> ImageDataModule:
    return ImageDataModule(root, **{"image_size": 4, "batch_size": 3, "num_workers": 0, **options})


def test_batches_hold_pictures_labels_and_keys_that_belong_together(tmp_path: Path) -> None:
    write_pictures(tmp_path, train=10, val=4)
    data = image_data(tmp_path)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert [tuple(batch["images"].shape) for batch in batches] == [(3, 3, 4, 4)] * 3 + [(1, 3, 4, 4)]
    keys = [key for batch in batches for key in batch["keys"]]
    assert sorted(keys) == [f"train/{i}" for i in range(10)]
    assert keys != sorted(keys)
    for batch in batches:
        numbers = [int(key.split("/")[1]) for key in batch["keys"]]
        assert batch["labels"].tolist() == [number % 5 for number in numbers]
        images = (batch["images"] + 1) * 127.5
        assert images.amin((1, 2, 3)).round().tolist() == images.amax((1, 2, 3)).round().tolist() == numbers


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluation_reads_the_validation_split_alone(tmp_path: Path, stage: str) -> None:
    write_pictures(tmp_path, train=0, val=4)
    data = image_data(tmp_path)
    data.setup(stage)
    loader = data.val_dataloader() if stage == "validate" else data.test_dataloader()
    assert [key for batch in loader for key in batch["keys"]] == [f"val/{i}" for i in range(4)]


def test_prediction_reads_both_splits_in_order(tmp_path: Path) -> None:
    write_pictures(tmp_path, train=7, val=4)
    data = image_data(tmp_path)
    data.setup("predict")
    keys = [[key for batch in loader for key in batch["keys"]] for loader in data.predict_dataloader()]
    assert data.predict_splits == ("train", "val")
    assert keys == [[f"train/{i}" for i in range(7)], [f"val/{i}" for i in range(4)]]


def test_the_trainer_says_which_share_a_rank_gets(tmp_path: Path) -> None:
    write_pictures(tmp_path, train=8, val=5)
    keys: dict[str, list[str]] = {"train": [], "val": []}
    for rank in range(2):
        data = image_data(tmp_path)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2)  # type: ignore[assignment]
        data.setup("fit")
        keys["train"] += [key for batch in data.train_dataloader() for key in batch["keys"]]
        keys["val"] += [key for batch in data.val_dataloader() for key in batch["keys"]]
    assert sorted(keys["train"]) == [f"train/{i}" for i in range(8)]
    assert keys["val"] == [f"val/{i}" for i in (0, 2, 4, 1, 3)]


@pytest.mark.parametrize(("stage", "missing"), [("fit", "train"), ("predict", "train"), ("validate", "val")])
def test_a_missing_split_is_refused(tmp_path: Path, stage: str, missing: str) -> None:
    write_pictures(tmp_path, train=0 if missing == "train" else 3, val=0 if missing == "val" else 3)
    with pytest.raises(ValueError) as error:
        image_data(tmp_path).setup(stage)
    assert_one_line(error, tmp_path / missing, "no .tar file", ImageDataModule.hint)


def test_shards_without_samples_are_refused(tmp_path: Path) -> None:
    write_pictures(tmp_path, train=3, val=3)
    empty = (tmp_path / "val").glob("*.tar")
    for shard in empty:
        shard.write_bytes(bytes(10240))
    with pytest.raises(ValueError) as error:
        image_data(tmp_path).setup("validate")
    assert_one_line(error, tmp_path / "val", "no samples", ImageDataModule.hint)


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ({"image_size": 0}, "image_size is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"seed": -1}, "seed is -1"),
    ],
    ids=str,
)
def test_an_impossible_option_is_refused_by_name_and_value(options: dict[str, int], phrase: str) -> None:
    with pytest.raises(ValueError) as error:
        image_data(Path("nowhere"), **options)
    assert_one_line(error, phrase, "at least")
