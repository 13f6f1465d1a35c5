"""Extraction of codes shard by shard: resuming after a stop, and skipping broken images."""

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image

from callbacks import CodeWriter
from datamodules import CodeDataModule, ImageDataModule
from datamodules.loading.order import NO_EPOCH
from datamodules.storage.shards import META_FILE, PLAN_FILE, ShardWriter, read_meta
from datamodules.storage.tar_index import index_shard
from lightning_modules import VQGANModule
from llamagen.checkpoints.contents import weights_checksum
from tests.datamodules.shard_files import assert_one_line, encode, grey_image, write_shards
from tests.lightning_modules.runs import evaluator, vqgan_module

COUNTS = {"train": 45, "val": 12}
PER_SHARD = 10
BROKEN = b"no image"
Samples = list[tuple[str, dict[str, bytes]]]


@pytest.fixture(scope="module")
def tokenizer() -> VQGANModule:
    """A tokenizer of digits."""
    return vqgan_module()


def samples_of(split: str, count: int) -> Samples:
    """Grey images with classes."""
    return [(f"{split}/{i}", {"png": grey_image(i * 5 % 256, 8), "cls": str(i % 3).encode()}) for i in range(count)]


def write_set(root: Path, train: Samples, val: Samples) -> Path:
    write_shards(root / "train", train, per_shard=17)
    write_shards(root / "val", val, per_shard=17)
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of whole images."""
    root = tmp_path_factory.mktemp("images")
    return write_set(root, *(samples_of(split, count) for split, count in COUNTS.items()))


def extract(
    tokenizer: VQGANModule, images: Path, out: Path, per_shard: int = PER_SHARD, trainer: Any = None, **data: Any
) -> None:
    """Run ``predict``."""
    options = {"image_size": 8, "batch_size": 4, "num_workers": 0, **data}
    run = evaluator(CodeWriter(per_shard), default_root_dir=out, **(trainer or {}))
    run.predict(tokenizer, ImageDataModule(images, **options), return_predictions=False)


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def times(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


def keys_of(root: Path, split: str) -> list[list[str]]:
    """The keys in each shard."""
    return [list(index_shard(shard).keys) for shard in sorted((root / split).glob("*.tar"))]


class InterruptedRunError(Exception):
    """Stands for a sudden end of the process."""


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Make the tokenizer fail after a number of batches, until the patch is undone."""
    predict_step = VQGANModule.predict_step
    with monkeypatch.context() as patch:

        def stop(batches: int) -> pytest.MonkeyPatch:
            done: list[int] = []

            def step(self: VQGANModule, *args: Any) -> Any:
                if len(done) == batches:
                    raise InterruptedRunError
                done.append(1)
                return predict_step(self, *args)

            patch.setattr(VQGANModule, "predict_step", step)
            return patch

        yield stop


@pytest.fixture(scope="module")
def whole(tokenizer: VQGANModule, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The codes of an uninterrupted extraction."""
    out = tmp_path_factory.mktemp("whole") / "codes"
    extract(tokenizer, images, out)
    return out


def test_each_shard_holds_a_fixed_range_of_the_images(whole: Path) -> None:
    for split, count in COUNTS.items():
        keys = [f"{split}/{i}" for i in range(count)]
        assert keys_of(whole, split) == [keys[first : first + PER_SHARD] for first in range(0, count, PER_SHARD)]
    assert len(files(whole)) == 1 + 5 + 2


def test_meta_describes_the_codes_and_is_read(tokenizer: VQGANModule, whole: Path) -> None:
    meta = read_meta(whole, "")
    expected = {
        "format": "llamagen-codes",
        "vocabulary": 32,
        "grid": [4, 4],
        "views": 1,
        "view_names": meta["view_names"],
        "image_size": 8,
        "num_classes": 3,
        "classes": [],
        "tokenizer": weights_checksum(tokenizer.vqgan),
        "count": sum(COUNTS.values()),
        "splits": meta["splits"],
    }
    assert meta == expected
    assert len(meta["view_names"]) == 1
    for split, count in COUNTS.items():
        entry = meta["splits"][split]
        assert (entry["count"], entry["skipped"]) == (count, {})
        assert [shard["count"] for shard in entry["shards"]] == [len(keys) for keys in keys_of(whole, split)]
    codes = CodeDataModule(whole, num_workers=0)
    codes.setup("fit")
    assert [len(codes.datasets[split]) for split in COUNTS] == list(COUNTS.values())  # type: ignore[arg-type]


@pytest.mark.parametrize(("batches", "finished"), [(0, 0), (2, 0), (7, 2), (13, 4), (17, 5)])
def test_a_stopped_extraction_resumes_with_the_remaining_shards(
    tokenizer: VQGANModule, images: Path, whole: Path, tmp_path: Path, stop_after: Any, batches: int, finished: int
) -> None:
    patch = stop_after(batches)
    with pytest.raises(InterruptedRunError):
        extract(tokenizer, images, tmp_path)
    shards = {path: moment for path, moment in times(tmp_path).items() if path.suffix == ".tar"}
    assert len(shards) == finished
    assert list(tmp_path.rglob("*.tmp")) == []
    assert not (tmp_path / META_FILE).exists()
    patch.undo()
    (tmp_path / "train/.train-000004.tar-4711.tmp").write_bytes(b"of a killed process")
    extract(tokenizer, images, tmp_path)
    assert files(tmp_path) == files(whole)
    assert {path: moment for path, moment in times(tmp_path).items() if path in shards} == shards


def test_a_dataset_without_meta_is_completed_without_reading_images(
    tokenizer: VQGANModule, images: Path, whole: Path, tmp_path: Path, stop_after: Any
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CodeWriter, "on_predict_end", lambda *args: args[0]._close(args[1].datamodule))
        extract(tokenizer, images, tmp_path)
    assert (tmp_path / PLAN_FILE).exists()
    stop_after(0)
    extract(tokenizer, images, tmp_path)
    assert files(tmp_path) == files(whole)


def test_the_batch_size_may_change_after_a_stop(
    tokenizer: VQGANModule, images: Path, whole: Path, tmp_path: Path, stop_after: Any
) -> None:
    patch = stop_after(7)
    with pytest.raises(InterruptedRunError):
        extract(tokenizer, images, tmp_path)
    patch.undo()
    extract(tokenizer, images, tmp_path, batch_size=7)
    for split in COUNTS:
        assert keys_of(tmp_path, split) == keys_of(whole, split)


def test_a_limited_extraction_is_not_complete(
    tokenizer: VQGANModule, images: Path, whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError) as error:
        extract(tokenizer, images, tmp_path, trainer={"limit_predict_batches": 5})
    assert_one_line(error, "train-000001.tar", "is incomplete", "repeat the command to resume")
    assert [path.name for path in tmp_path.rglob("*.tar")] != []
    assert not (tmp_path / META_FILE).exists()
    extract(tokenizer, images, tmp_path)
    assert files(tmp_path) == files(whole)


def test_rejects_to_resume_with_other_settings(
    tokenizer: VQGANModule, images: Path, tmp_path: Path, stop_after: Any
) -> None:
    patch, out = stop_after(7), tmp_path / "out"
    with pytest.raises(InterruptedRunError):
        extract(tokenizer, images, out)
    patch.undo()
    before = files(out)
    others = write_set(tmp_path / "other", samples_of("new", 45), samples_of("val", 12))
    changes: dict[str, dict[str, Any]] = {
        "another samples_per_shard": {"per_shard": 11},
        "another view_names": {"views": "flip"},
        "another image_size": {"image_size": 16},
        "another tokenizer": {"tokenizer": vqgan_module(seed=1)},
        "another images": {"images": others},
    }
    for phrase, change in changes.items():
        with pytest.raises(ValueError) as error:
            extract(**{"tokenizer": tokenizer, "images": images, "out": out, **change})
        assert_one_line(error, out, f"started with {phrase};", "delete it or choose another folder")
        assert files(out) == before, phrase


def test_rejects_a_complete_dataset(tokenizer: VQGANModule, images: Path, whole: Path) -> None:
    before = times(whole)
    with pytest.raises(ValueError) as error:
        extract(tokenizer, images, whole)
    assert_one_line(error, whole, "already holds a complete dataset", "delete it or choose another folder")
    assert times(whole) == before


# All images of the second shard, of the last batch of the third and fourth, and one in the middle.
BAD = {*range(10, 20), 28, 29, *range(36, 40), 3}


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """The images, some of them broken, and one without a class."""
    train, val = samples_of("train", COUNTS["train"]), samples_of("val", COUNTS["val"])
    for number in BAD:
        train[number][1]["png"] = BROKEN
    train.append(("train/no-class", {"png": grey_image(0, 8)}))
    val[11][1]["png"] = b""
    return write_set(tmp_path / "images", train, val)


def check_broken(root: Path) -> None:
    """Exactly the broken images are skipped and listed."""
    good = [number for number in range(COUNTS["train"]) if number not in BAD]
    assert keys_of(root, "train") == [
        [f"train/{number}" for number in good if number // PER_SHARD == shard] for shard in range(5)
    ]
    assert keys_of(root, "val") == [[f"val/{number}" for number in range(10)], ["val/10"]]
    header, *lines = (root / "skipped.tsv").read_text().splitlines()
    assert header == "split\tkey\treason\tmessage"
    listed = [tuple(line.split("\t")[:3]) for line in lines]
    assert sorted(listed) == sorted(
        [
            ("train", "train/no-class", "no label"),
            *(("train", f"train/{number}", "broken image") for number in BAD),
            ("val", "val/11", "empty file"),
        ]
    )
    splits = read_meta(root, "")["splits"]
    assert splits["train"]["skipped"] == {"broken image": len(BAD), "no label": 1}
    assert splits["val"]["skipped"] == {"empty file": 1}
    assert [shard["count"] for shard in splits["train"]["shards"]] == [len(keys) for keys in keys_of(root, "train")]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_broken_images_are_skipped_and_listed(
    tokenizer: VQGANModule, broken: Path, tmp_path: Path, num_workers: int
) -> None:
    extract(tokenizer, broken, tmp_path / "out", max_bad_share=0.4, num_workers=num_workers)
    check_broken(tmp_path / "out")
    codes = CodeDataModule(tmp_path / "out", num_workers=0)
    codes.setup("fit")
    assert [len(codes.datasets[split]) for split in COUNTS] == [45 - len(BAD), 11]  # type: ignore[arg-type]


@pytest.mark.parametrize("batches", [3, 5, 7])
def test_broken_images_are_listed_once_after_a_stop(
    tokenizer: VQGANModule, broken: Path, tmp_path: Path, stop_after: Any, batches: int
) -> None:
    patch = stop_after(batches)
    with pytest.raises(InterruptedRunError):
        extract(tokenizer, broken, tmp_path / "out", max_bad_share=0.4)
    patch.undo()
    extract(tokenizer, broken, tmp_path / "out", max_bad_share=0.4)
    check_broken(tmp_path / "out")


def test_rejects_too_many_broken_images(tokenizer: VQGANModule, broken: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        extract(tokenizer, broken, tmp_path / "out", max_bad_share=0.2)
    assert_one_line(error, "of 46 examples of train are bad", "broken image", "max_bad_share 0.2")
    assert not (tmp_path / "out" / META_FILE).exists()
    extract(tokenizer, broken, tmp_path / "out", max_bad_share=0.4)
    check_broken(tmp_path / "out")


def test_captions_are_written_with_the_codes(tokenizer: VQGANModule, tmp_path: Path) -> None:
    def captioned(split: str) -> Samples:
        texts: Samples = [(f"{split}{i}", {"png": grey_image(i, 8), "txt": f"wörd {i}".encode()}) for i in range(3)]
        return [*texts, (f"{split}3", {"png": grey_image(3, 8), "txt": b"", "json": b'{"caption": "of json"}'})]

    write_set(tmp_path / "images", captioned("train"), captioned("val"))
    extract(tokenizer, tmp_path / "images", tmp_path / "out")
    (shard,) = (tmp_path / "out/train").glob("*.tar")
    index = index_shard(shard)
    assert [sample.read("txt").decode() for sample in index] == ["wörd 0", "wörd 1", "wörd 2", "of json"]
    assert [sorted(sample.members) for sample in index] == [["npy", "txt"]] * 4
    assert read_meta(tmp_path / "out", "")["num_classes"] == 0


def test_skips_an_image_without_class_and_caption_among_others(tokenizer: VQGANModule, tmp_path: Path) -> None:
    def captioned(split: str) -> Samples:
        said = [b'{"caption": "words"}', b'{"caption": null}', b'{"caption": "more"}']
        return [(f"{split}{i}", {"png": grey_image(i, 8), "json": text}) for i, text in enumerate(said)]

    write_set(tmp_path / "images", captioned("train"), captioned("val"))
    extract(tokenizer, tmp_path / "images", tmp_path / "out", max_bad_share=0.4)
    assert keys_of(tmp_path / "out", "train") == [["train0", "train2"]]
    assert read_meta(tmp_path / "out", "")["splits"]["train"]["skipped"] == {"no caption": 1}


def test_rejects_images_without_classes_and_captions(tokenizer: VQGANModule, tmp_path: Path) -> None:
    bare: Samples = [("0", {"png": grey_image(0, 8)}), ("1", {"png": grey_image(1, 8)})]
    write_set(tmp_path / "images", bare, bare)
    with pytest.raises(ValueError) as error:
        extract(tokenizer, tmp_path / "images", tmp_path / "out")
    assert_one_line(error, "example 0", ".cls", ".txt")
    assert list((tmp_path / "out").rglob("*.tar")) == []


def test_each_view_has_its_codes(tokenizer: VQGANModule, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    samples: Samples = [
        (str(i), {"png": encode(Image.fromarray(rng.integers(0, 256, (12, 10, 3), np.uint8))), "cls": b"0"})
        for i in range(4)
    ]
    write_set(tmp_path / "images", samples, samples)
    for views, count in (("centre", 1), ("flip", 2), ("ten_crop", 20)):
        extract(tokenizer, tmp_path / "images", tmp_path / views, views=views)
        meta = read_meta(tmp_path / views, "")
        assert (meta["views"], len(meta["view_names"])) == (count, count)
        codes = CodeDataModule(tmp_path / views, num_workers=0)
        codes.setup("validate")
        assert len(next(iter(codes.val_dataloader()))["codes"]) == 4
        (shard,) = (tmp_path / views / "val").glob("*.tar")
        written = [np.load(BytesIO(sample.read("npy"))) for sample in index_shard(shard)]
        images = ImageDataModule(tmp_path / "images", image_size=8, num_workers=0, views=views)
        images.setup("predict")
        for number, stored in enumerate(written):
            batch = images.datasets["val"][number, NO_EPOCH]["images"].reshape(-1, 3, 8, 8)  # one view at a time
            with torch.no_grad():
                expected = [tokenizer.vqgan.eval().encode(view[None]).codes[0].numpy() for view in batch]
            assert np.array_equal(stored, np.stack(expected)), (views, number)


def test_the_highest_codes_are_stored(tokenizer: VQGANModule, tmp_path: Path) -> None:
    codes = torch.tensor([[[[0, 255], [256, 65535]]]])
    with ShardWriter(tmp_path / "shard.tar") as writer:
        CodeWriter().write(writer, codes, {"keys": ["a"], "labels": torch.tensor([0])})
    (sample,) = index_shard(tmp_path / "shard.tar")
    stored = np.load(BytesIO(sample.read("npy")))
    assert (stored.dtype, stored.tolist()) == (np.uint16, codes[0].tolist())


@pytest.mark.parametrize("per_shard", [0, -1])
def test_rejects_an_invalid_shard_size(per_shard: int) -> None:
    with pytest.raises(ValueError) as error:
        CodeWriter(per_shard)
    assert_one_line(error, f"samples_per_shard is {per_shard}", "at least 1")


def test_a_full_disk_keeps_complete_shards(
    tokenizer: VQGANModule, images: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close = ShardWriter.close

    def full(writer: ShardWriter) -> None:
        if writer.path.name == "train-000001.tar":
            writer.abort()
            raise OSError("no space left on device")
        close(writer)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "close", full)
        with pytest.raises(OSError, match=r"no space"):
            extract(tokenizer, images, tmp_path)
    assert [path.name for path in tmp_path.rglob("*.tar")] == ["train-000000.tar"]
    assert list(tmp_path.rglob("*.tmp")) == []
    extract(tokenizer, images, tmp_path)
    assert files(tmp_path) == files(whole)


def test_other_stages_write_nothing(tmp_path: Path) -> None:
    writer, trainer = CodeWriter(), pl.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    writer.setup(trainer, vqgan_module(), "fit")
    assert list(tmp_path.iterdir()) == []
