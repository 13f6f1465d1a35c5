"""Images for the tokenizer: (3, H, W) float32 in [-1, 1] with label and key, from the splits of each stage."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.images import ImageDataModule, ImageDataset, scale, to_planes
from datamodules.loading.order import NO_EPOCH
from datamodules.storage.bad_examples import BadExampleError
from datamodules.storage.index import NO_LABEL
from datamodules.storage.tar_index import index_shard
from datamodules.transforms.crops import centre_crop
from tests.datamodules.shard_files import assert_one_line, encode, grey_image, write_images, write_shards

COLOURS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
PNG = encode(Image.fromarray(COLOURS))


def read_parts(folder: Path, parts: dict[str, bytes], image_size: int = 8, **options: Any) -> dict[str, Any]:
    """The example made of these members."""
    (shard,) = write_shards(folder / "train", [("folder/key", parts)])
    return ImageDataset(index_shard(shard), image_size, **options)[0, NO_EPOCH]


def levels(images: torch.Tensor) -> np.ndarray:
    """Convert (3, H, W) in [-1, 1] to (H, W, 3) in [0, 255], float."""
    return ((images + 1) * 127.5).permute(1, 2, 0).numpy()


def test_levels_are_mapped_onto_minus_one_to_one() -> None:
    row = np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, axis=2)
    tensor = scale(torch.from_numpy(to_planes(row)))
    assert (tensor.dtype, tensor.shape) == (torch.float32, (3, 1, 256))
    assert (tensor[0, 0, 0], tensor[0, 0, -1]) == (-1.0, 1.0)
    torch.testing.assert_close(tensor[1, 0], torch.linspace(-1, 1, 256), atol=1e-6, rtol=0)


def test_to_planes_moves_the_channels_of_any_number_of_dimensions() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 6, 3), dtype=np.uint8)
    tensor = scale(torch.from_numpy(to_planes(pixels)))
    assert tensor.shape == (2, 5, 3, 4, 6)
    assert torch.equal(tensor[1, 3], scale(torch.from_numpy(to_planes(pixels[1, 3]))))
    assert tensor.is_contiguous()
    assert pixels.dtype == np.uint8


def test_image_comes_with_its_label_and_key(tmp_path: Path) -> None:
    example = read_parts(tmp_path, {"png": PNG, "cls": b"7\n"})
    assert (example["labels"], example["keys"]) == (7, "folder/key")
    assert example["images"].dtype == torch.float32
    assert np.array_equal(levels(example["images"]).round(), COLOURS)


def test_image_without_a_class_has_no_label(tmp_path: Path) -> None:
    assert read_parts(tmp_path, {"png": PNG})["labels"] == NO_LABEL == -1


@pytest.mark.parametrize(
    ("extension", "kind"), [("png", "png"), ("PNG", "png"), ("webp", "webp"), ("jpg", "jpeg"), ("JPEG", "jpeg")]
)
def test_images_of_four_extensions_are_read(tmp_path: Path, extension: str, kind: str) -> None:
    example = read_parts(tmp_path, {extension: encode(Image.new("RGB", (8, 8), (200, 100, 50)), kind)})
    assert abs(levels(example["images"]) - (200, 100, 50)).max() <= 4


def test_format_of_an_image_does_not_depend_on_its_suffix(tmp_path: Path) -> None:
    assert np.array_equal(levels(read_parts(tmp_path, {"jpg": PNG})["images"]).round(), COLOURS)


def test_image_is_cropped_in_the_middle_to_its_size(tmp_path: Path) -> None:
    source = np.random.default_rng(1).integers(0, 256, (20, 31, 3), dtype=np.uint8)
    found = levels(read_parts(tmp_path, {"png": encode(Image.fromarray(source))}, image_size=12)["images"])
    assert np.array_equal(found.round(), centre_crop(source, 12))


@pytest.mark.parametrize(
    ("parts", "caption"),
    [
        ({"txt": b" a dog\n"}, "a dog"),
        ({"json": b'{"caption": "a cat"}'}, "a cat"),
        ({"txt": b"a dog", "json": b'{"caption": "a cat"}'}, "a dog"),
        ({"json": b'{"caption": 3}'}, ""),
        ({"json": b"no json"}, ""),
        ({"json": b"[1]"}, ""),
        ({"txt": b"\xff"}, ""),
        ({}, ""),
    ],
    ids=str,
)
def test_captions_are_read_on_request(tmp_path: Path, parts: dict[str, bytes], caption: str) -> None:
    labelled = {"png": PNG, "cls": b"1", **parts}
    assert read_parts(tmp_path, labelled, captions=True)["captions"] == caption
    assert "captions" not in read_parts(tmp_path / "again", labelled)
    if caption:
        assert read_parts(tmp_path / "unlabelled", {"png": PNG, **parts}, captions=True)["captions"] == caption
    else:
        with pytest.raises(BadExampleError, match=r"folder/key of .* has neither class nor caption") as error:
            read_parts(tmp_path / "unlabelled", {"png": PNG, **parts}, captions=True)
        assert error.value.reason == "no caption"
        read_parts(tmp_path / "not asked", {"png": PNG, **parts})


def test_caption_in_another_encoding_is_reported(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"unreadable captions are left out, e.g. of example folder/key .* not in UTF-8"
    ):
        read_parts(tmp_path / "labelled", {"png": PNG, "cls": b"1", "txt": b"\xff"}, captions=True)
    with pytest.raises(BadExampleError, match=r"neither class nor caption: its .txt is not in UTF-8"):
        read_parts(tmp_path / "unlabelled", {"png": PNG, "txt": b"\xff"}, captions=True)


@pytest.mark.parametrize(
    ("parts", "reason", "phrase"),
    [
        ({"png": b"this is not an image"}, "broken image", "is broken"),
        ({"png": PNG[: len(PNG) // 2]}, "broken image", "is broken"),
        ({"png": b""}, "empty file", "is empty"),
        ({"cls": b"1"}, "no image", "has no image; it needs one of jpg, jpeg, png, webp"),
    ],
    ids=str,
)
def test_example_without_a_usable_image_is_refused(
    tmp_path: Path, parts: dict[str, bytes], reason: str, phrase: str
) -> None:
    with pytest.raises(BadExampleError) as error:
        read_parts(tmp_path, parts)
    assert error.value.reason == reason
    assert_one_line(error, tmp_path / "train", "example folder/key", phrase)


def image_data(root: Path | None, **options: Any) -> ImageDataModule:
    return ImageDataModule(root, **{"image_size": 4, "batch_size": 3, "num_workers": 0, **options})


def test_batches_hold_images_labels_and_keys_that_belong_together(tmp_path: Path) -> None:
    write_images(tmp_path, train=10, val=4)
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
def test_evaluation_reads_only_the_validation_split(tmp_path: Path, stage: str) -> None:
    write_images(tmp_path, train=0, val=4)
    data = image_data(tmp_path)
    data.setup(stage)
    loader = data.val_dataloader() if stage == "validate" else data.test_dataloader()
    assert [key for batch in loader for key in batch["keys"]] == [f"val/{i}" for i in range(4)]


def test_prediction_reads_both_splits_in_order(tmp_path: Path) -> None:
    write_images(tmp_path, train=7, val=4)
    data = image_data(tmp_path)
    data.setup("predict")
    keys = [[key for batch in loader for key in batch["keys"]] for loader in data.predict_dataloader()]
    assert data.predict_splits == ("train", "val")
    assert keys == [[f"train/{i}" for i in range(7)], [f"val/{i}" for i in range(4)]]


def test_share_of_a_rank_follows_the_trainer(tmp_path: Path) -> None:
    write_images(tmp_path, train=8, val=5)
    keys: dict[str, list[str]] = {"train": [], "val": []}
    for rank in range(2):
        data = image_data(tmp_path)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2)  # type: ignore[assignment]
        data.setup("fit")
        keys["train"] += [key for batch in data.train_dataloader() for key in batch["keys"]]
        keys["val"] += [key for batch in data.val_dataloader() for key in batch["keys"]]
    assert sorted(keys["train"]) == [f"train/{i}" for i in range(8)]
    assert keys["val"] == [f"val/{i}" for i in (0, 2, 4, 1, 3)]


@pytest.mark.parametrize("stage", ["fit", "predict"])
def test_data_without_a_training_split_are_refused(tmp_path: Path, stage: str) -> None:
    write_images(tmp_path, train=0, val=3)
    with pytest.raises(ValueError) as error:
        image_data(tmp_path).setup(stage)
    assert_one_line(error, "no train data", ImageDataModule.hint)


def test_missing_or_empty_folder_is_refused(tmp_path: Path) -> None:
    for root, phrase in ((tmp_path / "nowhere", "does not exist"), (tmp_path, "holds neither .tar files nor folders")):
        with pytest.raises(ValueError) as error:
            image_data(root).setup("fit")
        assert_one_line(error, root, phrase, ImageDataModule.hint)


def all_keys(data: ImageDataModule) -> dict[str, list[str]]:
    """The keys of each split in their order."""
    data.setup("predict")
    return {
        split: [key for batch in loader for key in batch["keys"]]
        for split, loader in zip(data.predict_splits, data.predict_dataloader(), strict=True)
    }


def test_without_a_validation_split_a_share_is_held_out(tmp_path: Path) -> None:
    write_images(tmp_path, train=140, val=0, per_shard=40)
    whole = [f"train/{number}" for number in range(140)]
    keys = all_keys(image_data(tmp_path, val_share=0.2))
    assert sorted(keys["train"] + keys["val"]) == sorted(whole)
    assert 14 < len(keys["val"]) < 42  # 28 ± 5
    assert all(part == [key for key in whole if key in part] for part in keys.values())  # in their order
    assert keys["val"] != whole[: len(keys["val"])]
    # It depends only on the keys, not on seed, stage or other examples, and a larger share contains a smaller one.
    assert all_keys(image_data(tmp_path, val_share=0.2, seed=7)) == keys
    validation = image_data(tmp_path, val_share=0.2)
    validation.setup("validate")
    assert [key for batch in validation.val_dataloader() for key in batch["keys"]] == keys["val"]
    assert set(keys["val"]) < set(all_keys(image_data(tmp_path, val_share=0.4))["val"])
    write_images(tmp_path / "more", train=180, val=0, per_shard=40)
    more = all_keys(image_data(tmp_path / "more", val_share=0.2))
    assert [key for key in more["val"] if int(key.split("/")[1]) < 140] == keys["val"]


def test_at_least_one_example_is_held_out(tmp_path: Path) -> None:
    write_images(tmp_path, train=5, val=0)
    keys = all_keys(image_data(tmp_path, val_share=1e-6))
    assert (len(keys["train"]), len(keys["val"])) == (4, 1)


def test_validation_split_is_not_mixed_with_a_held_out_share(tmp_path: Path) -> None:
    write_images(tmp_path, train=20, val=3)
    keys = all_keys(image_data(tmp_path, val_share=0.5))
    assert (len(keys["train"]), len(keys["val"])) == (20, 3)


def test_folder_of_shards_without_splits_is_the_training_source(tmp_path: Path) -> None:
    write_shards(tmp_path, [(f"{number:02d}", {"png": grey_image(number)}) for number in range(40)])
    keys = all_keys(image_data(tmp_path, val_share=0.2))
    assert sorted(keys["train"] + keys["val"]) == [f"{number:02d}" for number in range(40)]
    assert keys["val"]


def test_folder_of_class_folders_without_splits_is_the_training_source(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / ("dog", "cat")[number % 2]).mkdir(exist_ok=True)
        (tmp_path / ("dog", "cat")[number % 2] / f"{number:02d}.png").write_bytes(grey_image(number))
    data = image_data(tmp_path, val_share=0.2)
    keys = all_keys(data)
    assert sorted(keys["train"] + keys["val"]) == sorted(f"{('dog', 'cat')[n % 2]}/{n:02d}" for n in range(40))
    assert keys["val"]
    assert data.class_names == ["cat", "dog"]
    for loader in data.predict_dataloader():
        for batch in loader:
            assert batch["labels"].tolist() == [int(key.startswith("dog")) for key in batch["keys"]]
            assert levels(batch["images"][0]).round().max() == int(batch["keys"][0].split("/")[1])


def test_train_and_val_can_be_named_one_by_one(tmp_path: Path) -> None:
    write_images(tmp_path, train=7, val=4)
    patterns = {
        split: f"{tmp_path}/{split}/{split}-{{000000..00000{n}}}.tar" for split, n in (("train", 2), ("val", 1))
    }
    keys = all_keys(image_data(None, **patterns))
    assert keys == {split: [f"{split}/{i}" for i in range(n)] for split, n in (("train", 7), ("val", 4))}
    swapped = image_data(tmp_path, val=patterns["train"])
    assert all_keys(swapped)["val"] == keys["train"]


def test_shards_without_examples_are_refused(tmp_path: Path) -> None:
    write_images(tmp_path, train=3, val=3)
    empty = (tmp_path / "val").glob("*.tar")
    for shard in empty:
        shard.write_bytes(bytes(10240))
    with pytest.raises(ValueError) as error:
        image_data(tmp_path).setup("validate")
    assert_one_line(error, tmp_path / "val", "no usable examples", ImageDataModule.hint)


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ({"image_size": 0}, "image_size is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"resampled_epoch": 0}, "resampled_epoch is 0"),
        ({"crop_ranges": [1.1, 0.9]}, "crop_ranges is [1.1, 0.9]"),
        ({"crop_ranges": []}, "crop_ranges is []"),
    ],
    ids=str,
)
def test_invalid_option_is_refused_with_name_and_value(options: dict[str, Any], phrase: str) -> None:
    with pytest.raises(ValueError) as error:
        image_data(Path("nowhere"), **options)
    assert_one_line(error, phrase, "at least")


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ({"val_share": 0.0}, "val_share is 0.0"),
        ({"val_share": 1.0}, "val_share is 1.0"),
        ({"max_bad_share": -0.1}, "max_bad_share is -0.1"),
        ({"max_bad_share": 1.1}, "max_bad_share is 1.1"),
        ({"cache_gb": 0.0}, "cache_gb is 0.0"),
    ],
    ids=str,
)
def test_share_or_size_out_of_range_is_refused(options: dict[str, float], phrase: str) -> None:
    with pytest.raises(ValueError) as error:
        image_data(Path("nowhere"), **options)
    assert_one_line(error, phrase, "must")


def test_train_is_read_instead_of_all_of_root(tmp_path: Path) -> None:
    write_images(tmp_path / "other", train=20, val=5)
    write_images(tmp_path, train=8, val=4)
    keys = all_keys(image_data(tmp_path / "other", train=str(tmp_path / "train"), val_share=0.3))
    assert sorted(keys["train"] + keys["val"]) == [f"train/{i}" for i in range(8)]


def test_root_or_train_is_required() -> None:
    with pytest.raises(ValueError, match=r"neither root nor train is given; give a folder"):
        image_data(None).setup("fit")
