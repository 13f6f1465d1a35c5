"""Images of folders and shards: order, size, and what is skipped or rejected."""

from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image

from callbacks.writers.images import write_archive
from callbacks.writers.sample_folder import SampleFolder
from evaluation.image_sets import ImageBatch, ImageSet, Split, join_checksums, open_images
from llamagen.centre_crop import centre_crop
from llamagen.grids import save_png
from tests.datamodules.shard_files import assert_one_line, encode, write_images, write_shards


def flat_image(number: int, size: int = 4, width: int | None = None) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (size, width or size, 3), np.uint8)


def write(root: Path, *names: str, size: int = 4) -> None:
    """Image i under the i-th name."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(flat_image(number, size)).save(root / name, lossless=True)


def read(found: ImageSet, batch_size: int = 3, rank: int = 0, world_size: int = 1, num_workers: int = 0) -> ImageBatch:
    """A dataset, or a rank's share, as one batch."""
    parts = zip(*found.batches(batch_size, rank, world_size, num_workers), strict=True)
    return ImageBatch(*(torch.cat(part) for part in parts))


def pixels(batch: ImageBatch) -> list[bytes]:
    return [image.tobytes() for image in batch.images.permute(0, 2, 3, 1).numpy()]


def test_reads_a_flat_folder_in_the_order_of_names(tmp_path: Path) -> None:
    write(tmp_path, "c.png", "000010_class3.png", "b.webp", "000009_class7.png")
    (tmp_path / "notes.txt").write_text("none")
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "logs").mkdir()
    found = open_images(tmp_path)
    batch = read(found)
    assert pixels(batch) == [flat_image(number).tobytes() for number in (3, 1, 2, 0)]
    assert batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous()
    assert batch.index.tolist() == [0, 1, 2, 3]
    assert batch.labels.tolist() == [-1] * 4
    assert (found.name, found.size, found.crop, len(found), found.skipped) == (str(tmp_path), 4, "none", 4, {})


def test_reads_class_folders_in_the_order_of_paths(tmp_path: Path) -> None:
    write(tmp_path, "dog/0.png", "cat/1.png", "cat/0.png", "ant/b/5.png")
    (tmp_path / "._0.png").write_bytes(b"")  # of a Macintosh
    batch = read(open_images(tmp_path))
    assert pixels(batch) == [flat_image(number).tobytes() for number in (3, 2, 1, 0)]
    assert batch.labels.tolist() == [0, 1, 1, 2]


def test_a_sampled_folder_and_its_archive_hold_the_same_images(tmp_path: Path) -> None:
    folder = SampleFolder(tmp_path, np.array([0, 0, 1, 1, 10]))
    for index in range(5):
        save_png(Image.fromarray(flat_image(index)), folder.path(index))
    write_archive(folder)
    files, archive = open_images(tmp_path / "images"), open_images(tmp_path / "samples.npz")
    read_files, read_archive = read(files), read(archive)
    assert torch.equal(read_files.images, read_archive.images)
    assert read_files.labels.tolist() == read_archive.labels.tolist() == [0, 0, 1, 1, 10]
    assert files.checksum() == archive.checksum() != "0" * 64
    save_png(Image.fromarray(flat_image(0)), tmp_path / "grid.png")
    with pytest.raises(ValueError) as error:
        open_images(tmp_path)
    assert_one_line(error, tmp_path, "grid.png", "images)", "give one of the folders")


def test_reads_shards_without_labels_and_captions(tmp_path: Path) -> None:
    parts: list[dict[str, bytes]] = [{"png": encode(Image.fromarray(flat_image(number)))} for number in range(5)]
    parts[1]["cls"], parts[2]["cls"], parts[3]["txt"] = b"7", b"seven", b"a dog"
    write_shards(tmp_path / "set", [(f"{number}", part) for number, part in enumerate(parts)])
    for name in (tmp_path / "set", f"{tmp_path}/set/set-{{000000..000001}}.tar"):
        batch = read(open_images(name))
        assert pixels(batch) == [flat_image(number).tobytes() for number in range(5)]
        assert batch.labels.tolist() == [-1, 7, -1, -1, -1]


def test_reads_one_split(tmp_path: Path) -> None:
    write(tmp_path / "classes", "train/a/0.png", "train/b/1.png", "val/b/2.png", "val/b/3.png", "val/a/4.png")
    write(tmp_path / "flat", "train/0.png", "train/1.png", "val/2.png", "val/3.png", "val/4.png")
    write(tmp_path / "mixed", "train/a/0.png", "train/b/1.png", "val/2.png", "val/3.png", "val/4.png")
    write_images(tmp_path / "shards", 2, 3)
    for name in ("classes", "flat", "mixed", "shards"):
        for split, count in (("train", 2), ("val", 3)):
            assert len(open_images(tmp_path / name, split=cast(Split, split))) == count
        with pytest.raises(ValueError) as error:
            open_images(tmp_path / name)
        assert_one_line(error, tmp_path / name, "splits train and val", "set split")
    assert read(open_images(tmp_path / "classes", split="val")).labels.tolist() == [0, 1, 1]


def test_reads_the_only_split(tmp_path: Path) -> None:
    write(tmp_path / "classes", "val/a/0.png", "val/b/1.png")
    write(tmp_path / "flat", "val/0.png", "val/1.png")
    for name in ("classes", "flat"):
        assert len(open_images(tmp_path / name)) == len(open_images(tmp_path / name, split="val")) == 2
        with pytest.raises(ValueError) as error:
            open_images(tmp_path / name, split="train")
        assert_one_line(error, tmp_path / name, "no split train, only val")


def test_rejects_a_split_if_there_are_none(tmp_path: Path) -> None:
    write(tmp_path / "flat", "0.png", "1.png")
    write(tmp_path / "classes", "a/0.png", "a/1.png")
    for name in ("flat", "classes"):
        with pytest.raises(ValueError) as error:
            open_images(tmp_path / name, split="train")
        assert_one_line(error, tmp_path / name, "no train and val folders", "leave split train out")


def test_converts_all_modes_to_rgb(tmp_path: Path) -> None:
    rgb = Image.fromarray(flat_image(0) // 64 * 64)
    rgb.save(tmp_path / "0.png")
    transparent = rgb.copy()
    transparent.putalpha(7)
    transparent.save(tmp_path / "1.png")
    rgb.quantize(16).save(tmp_path / "2.png")
    rgb.convert("L").save(tmp_path / "3.png")
    rgb.convert("CMYK").save(tmp_path / "4.jpg")
    batch = read(open_images(tmp_path))
    plain, alpha, palette, grey, cmyk = batch.images
    assert torch.equal(plain, alpha)
    assert torch.equal(palette, torch.from_numpy(np.array(rgb.quantize(16).convert("RGB"))).permute(2, 0, 1))
    assert torch.equal(grey, torch.from_numpy(np.array(rgb.convert("L"))).expand(3, 4, 4))
    assert cmyk.shape == (3, 4, 4)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_rejects_an_image_of_another_size(tmp_path: Path, num_workers: int) -> None:
    write(tmp_path, "a.png", "b.png")
    Image.fromarray(flat_image(0, 6, 5)).save(tmp_path / "c.png")
    with pytest.raises(ValueError) as error:
        read(open_images(tmp_path), num_workers=num_workers)
    assert_one_line(error, tmp_path / "c.png", "5 × 6", "4 × 4", "image_size")
    assert str(error.value).startswith(str(tmp_path / "c.png")), "it is not counted as broken"


def test_rejects_a_first_image_that_is_not_square(tmp_path: Path) -> None:
    write(tmp_path, "b.png")
    Image.fromarray(flat_image(0, 6, 5)).save(tmp_path / "a.png")
    with pytest.raises(ValueError) as error:
        open_images(tmp_path)
    assert_one_line(error, tmp_path / "a.png", "5 × 6", "not square", "image_size")


def test_crops_images_of_another_size_to_image_size(tmp_path: Path) -> None:
    write(tmp_path, "a.png", size=4)
    Image.fromarray(flat_image(7, 11, 9)).save(tmp_path / "b.png")
    Image.fromarray(flat_image(8, 3)).save(tmp_path / "c.png")
    found = open_images(tmp_path, image_size=4)
    batch = read(found)
    expected = [flat_image(0), centre_crop(flat_image(7, 11, 9), 4), centre_crop(flat_image(8, 3), 4)]
    assert pixels(batch) == [part.tobytes() for part in expected]
    assert (found.size, found.crop, found.cropped) == (4, "adm-centre", 2)


def test_keeps_images_of_image_size(tmp_path: Path) -> None:
    write(tmp_path, "a.png", "b.png")
    found = open_images(tmp_path, image_size=4)
    assert pixels(read(found)) == [flat_image(0).tobytes(), flat_image(1).tobytes()]
    assert found.crop == "none"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_ranks_share_a_folder(tmp_path: Path, num_workers: int) -> None:
    write(tmp_path, *(f"{number}.png" for number in range(7)))
    whole = open_images(tmp_path)
    expected = pixels(read(whole))
    found = open_images(tmp_path)
    checksums = []
    for rank in range(2):
        batch = read(found, 3, rank, 2, num_workers)
        assert batch.index.tolist() == list(range(7))[rank::2]
        assert pixels(batch) == expected[rank::2]
        checksums.append(found.checksum())
    assert join_checksums(checksums) == whole.checksum()
    assert join_checksums(["f" * 64, f"{2:064x}"]) == f"{1:064x}"


def test_the_checksum_depends_on_pixels_only(tmp_path: Path) -> None:
    write(tmp_path / "a", "0.png", "1.png")
    write(tmp_path / "b", "1.png", "0.png")
    sets = [open_images(tmp_path / name) for name in "ab"]
    assert sets[0].checksum() == "0" * 64
    for found in sets:
        read(found)
    assert sets[0].checksum() == sets[1].checksum()
    read(sets[0])
    assert sets[0].checksum() == sets[1].checksum(), "a second pass adds to the first"
    changed = flat_image(0)
    changed[3, 3, 2] ^= 1
    Image.fromarray(changed).save(tmp_path / "a/0.png")
    read(sets[0])
    assert sets[0].checksum() != sets[1].checksum()
    Image.fromarray(flat_image(1)).save(tmp_path / "a/0.png")
    read(sets[0])
    assert int(sets[0].checksum(), 16) != 0, "equal images must not cancel"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_skips_and_counts_broken_images(tmp_path: Path, num_workers: int) -> None:
    write(tmp_path, *(f"{number:02d}.png" for number in range(40)))
    (tmp_path / "00.png").write_bytes(b"no image")
    (tmp_path / "30.png").write_bytes(b"")
    found = open_images(tmp_path)
    assert len(found) == 40
    assert found.skipped == {}
    for _ in range(2):
        batch = read(found, 1, num_workers=num_workers)
        assert batch.index.tolist() == [number for number in range(40) if number not in (0, 30)]
        assert found.skipped == {"broken image": 1, "empty file": 1}
    (tmp_path / "31.png").write_bytes(b"")
    with pytest.raises(ValueError) as error:
        read(found, 1, num_workers=num_workers)
    assert_one_line(
        error, "3 of 40 images", tmp_path, "more than 5%", "empty file: 2", tmp_path / "00.png", "fix or remove"
    )


def test_rejects_a_dataset_with_many_broken_images_at_the_end(tmp_path: Path) -> None:
    write(tmp_path, *(f"{number}.png" for number in range(5)))
    (tmp_path / "4.png").write_bytes(b"")
    with pytest.raises(ValueError) as error:
        read(open_images(tmp_path), 1)
    assert_one_line(error, "1 of 5 images", "4")


def test_rejects_a_dataset_with_many_broken_images_at_the_start(tmp_path: Path) -> None:
    write(tmp_path, *(f"{number}.png" for number in range(5)))
    (tmp_path / "0.png").write_bytes(b"GIF89a")
    with pytest.raises(ValueError) as error:
        open_images(tmp_path)
    assert_one_line(error, "1 of 5 images", tmp_path / "0.png")


def test_several_ranks_check_the_sum(tmp_path: Path) -> None:
    write(tmp_path, *(f"{number:02d}.png" for number in range(39)))
    (tmp_path / "39.bmp").write_bytes(b"")
    (tmp_path / "05.png").write_bytes(b"")
    found = open_images(tmp_path)
    assert found.skipped == {"no image": 1}
    counts = []
    for rank in range(2):
        read(found, 4, rank, 2)
        counts.append(found.skipped)
    assert counts == [{"no image": 1}, {"empty file": 1}]
    found.check_skipped(counts[0] + counts[1])
    for name in ("07.png", "09.png"):
        (tmp_path / name).write_bytes(b"")
    assert len(read(found, 4, 1, 2).index) == 16, "a rank among others does not judge"
    with pytest.raises(ValueError) as error:
        found.check_skipped({"no image": 1, "empty file": 2})
    assert_one_line(error, "3 of 40", "empty file: 2, no image: 1")


def test_rejects_folders_without_images(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "classes/a").mkdir(parents=True)
    write(tmp_path / "one", "0.png")
    (tmp_path / "bmp").mkdir()
    for number in range(3):
        (tmp_path / f"bmp/{number}.bmp").write_bytes(b"BM")
    cases = {
        "none": "does not exist",
        "empty": "holds neither",
        "classes": "hold no examples: no image is in a",
        "one": "1 images; at least 2",
        "bmp": "convert or remove it",
    }
    for name, said in cases.items():
        with pytest.raises(ValueError) as error:
            open_images(tmp_path / name)
        assert_one_line(error, tmp_path / name, said, "give a folder of images")


def test_rejects_codes(tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text('{"format": "llamagen-codes", "splits": {}}')
    with pytest.raises(ValueError) as error:
        open_images(tmp_path)
    assert_one_line(error, tmp_path, "holds codes")


@pytest.mark.parametrize("image_size", [0, -1])
def test_rejects_an_image_size_below_one(tmp_path: Path, image_size: int) -> None:
    with pytest.raises(ValueError) as error:
        open_images(tmp_path, image_size)
    assert_one_line(error, f"image_size is {image_size}")


def test_rejects_a_batch_size_below_one(tmp_path: Path) -> None:
    write(tmp_path, "0.png", "1.png")
    with pytest.raises(ValueError) as error:
        open_images(tmp_path).batches(0)
    assert_one_line(error, "batch_size is 0; it must be at least 1")
