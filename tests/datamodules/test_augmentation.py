"""Augmentation depends on (seed, epoch, example) and on the options; evaluation has none."""

from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from datamodules.digits import DigitsDataModule
from datamodules.images import ImageDataModule, ImageDataset
from datamodules.loading.order import NO_EPOCH
from datamodules.storage.index import ExampleIndex
from datamodules.storage.tar_index import index_shard
from datamodules.transforms.crops import centre_crop, ten_crops
from tests.datamodules.shard_files import encode, use_few_digits, write_shards

pytestmark = pytest.mark.filterwarnings("ignore:.*worker processes in total.*")

SIZE, COUNT = 8, 12
LEVELS = np.linspace(0, 255, 40).astype(np.uint8)
IMAGE = encode(Image.fromarray(np.stack([np.tile(LEVELS, (30, 1)), np.full((30, 40), 9, np.uint8)] * 2, 2)[..., :3]))
"""30 × 40 pixels whose red rises from left to right; in a mirrored crop it falls."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Many copies of the same image."""
    for split, count in (("train", COUNT), ("val", 5)):
        write_shards(tmp_path / split, [(f"{split}{number:02d}", {"png": IMAGE}) for number in range(count)])
    return tmp_path


def image_data(root: Path, **options: Any) -> ImageDataModule:
    data = ImageDataModule(root, **{"image_size": SIZE, "batch_size": 2, "num_workers": 0, "seed": 3, **options})
    data.setup("predict")
    return data


def dataset(root: Path, **options: Any) -> ImageDataset:
    shards = sorted((root / "train").glob("*.tar"))
    return ImageDataset(ExampleIndex.concatenate([index_shard(shard) for shard in shards]), SIZE, **options)


def plain(root: Path) -> Tensor:
    """The image without augmentation."""
    images: Tensor = dataset(root)[0, NO_EPOCH]["images"]
    return images


def by_key(batches: Any) -> dict[str, Tensor]:
    return {key: image for batch in batches for key, image in zip(batch["keys"], batch["images"], strict=True)}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def variants(images: Any) -> int:
    """Number of different images."""
    return len({image.numpy().tobytes() for image in images})


def rising(image: Tensor) -> bool:
    return bool(image[0, 0, 0] < image[0, 0, -1])


@pytest.mark.parametrize("options", [{}, {"random_crop": True, "flip": True}, {"random_crop": True}, {"flip": True}])
def test_without_an_epoch_there_is_no_augmentation(root: Path, options: dict[str, bool]) -> None:
    images = dataset(root, **options)
    for number in range(COUNT):
        assert torch.equal(images[number, NO_EPOCH]["images"], plain(root))


def test_without_augmentation_options_all_epochs_have_the_same_images(root: Path) -> None:
    images = dataset(root)
    assert variants([plain(root), *(images[number, epoch]["images"] for number in range(3) for epoch in range(3))]) == 1


def test_flips_mirror_half_of_the_centre_crops(root: Path) -> None:
    images = dataset(root, flip=True)
    batch = [images[number, epoch]["images"] for number in range(COUNT) for epoch in range(50)]
    kept, mirrored = (
        sum(torch.equal(image, wanted) for image in batch) for wanted in (plain(root), plain(root).flip(2))
    )
    assert kept + mirrored == len(batch) == 600
    assert 240 < mirrored < 360  # 300 ± 12


def test_random_crops_without_flip_are_not_mirrored(root: Path) -> None:
    images = dataset(root, random_crop=True)
    batch = [images[number, epoch]["images"] for number in range(COUNT) for epoch in range(10)]
    assert variants(batch) > 10
    assert all(rising(image) for image in batch)


def test_random_crops_with_flips_mirror_half_of_the_crops(root: Path) -> None:
    images = dataset(root, random_crop=True, flip=True)
    batch = [images[number, epoch]["images"] for number in range(COUNT) for epoch in range(50)]
    assert variants(batch) > 20
    assert 240 < sum(rising(image) for image in batch) < 360


def test_image_is_a_function_of_seed_epoch_and_example(root: Path) -> None:
    def views(seed: int) -> list[list[Tensor]]:
        images = dataset(root, random_crop=True, flip=True, seed=seed)
        return [[images[number, epoch]["images"] for number in range(COUNT)] for epoch in range(3)]

    first, again, other = views(1), views(1), views(2)
    assert all(torch.equal(torch.stack(a), torch.stack(b)) for a, b in zip(first, again, strict=True))
    assert len({torch.stack(epoch).numpy().tobytes() for epoch in [*first, *other]}) == 6
    assert all(variants(epoch) > 3 for epoch in first)  # not the same random numbers for all examples of an epoch
    assert all(variants(example) > 1 for example in list(zip(*first, strict=True))[:4])


def test_training_is_augmented_unless_disabled(root: Path) -> None:
    def epoch(**options: Any) -> list[Tensor]:
        return list(by_key(image_data(root, **options).train_dataloader()).values())

    assert variants(epoch()) > 3
    assert not all(rising(image) for image in epoch())
    crops = epoch(flip=False)
    assert variants(crops) > 3
    assert all(rising(image) for image in crops)
    assert variants(epoch(random_crop=False)) == 2
    assert variants([*epoch(random_crop=False, flip=False), plain(root)]) == 1


def test_evaluation_is_never_augmented(root: Path) -> None:
    data = image_data(root)
    by_key(data.train_dataloader())  # that training went before changes nothing
    loaders = [data.val_dataloader(), data.test_dataloader(), *data.predict_dataloader()]
    found = [by_key(loader) for loader in loaders]
    assert [len(images) for images in found] == [5, 5, COUNT, 5]
    assert all(torch.equal(image, plain(root)) for images in found for image in images.values())


def test_validation_split_has_no_augmentation_in_any_epoch(root: Path) -> None:
    validation = image_data(root).datasets["val"]
    assert all(torch.equal(validation[0, epoch]["images"], plain(root)) for epoch in (NO_EPOCH, 0, 1, 2, 3))


def epochs(data: ImageDataModule, count: int = 2) -> list[dict[str, Tensor]]:
    loader = data.train_dataloader()
    return [by_key(loader) for _ in range(count)]


@pytest.mark.parametrize("options", [{"num_workers": 2}, {"batch_size": 5}])
def test_workers_and_batch_size_change_no_image(root: Path, options: dict[str, int]) -> None:
    expected, found = epochs(image_data(root)), epochs(image_data(root, **options))
    assert all(equal(a, b) for a, b in zip(expected, found, strict=True))
    assert not equal(*expected)


def test_ranks_change_no_image(root: Path) -> None:
    together: list[dict[str, Tensor]] = [{}, {}]
    for rank in range(2):
        data = image_data(root)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2, current_epoch=0)  # type: ignore[assignment]
        for seen, share in zip(together, epochs(data), strict=True):
            seen |= share
    assert all(equal(a, b) for a, b in zip(epochs(image_data(root)), together, strict=True))


def test_resumed_epoch_has_the_same_images(root: Path) -> None:
    expected = epochs(image_data(root))
    stopped = image_data(root)
    loader = stopped.train_dataloader()
    by_key(loader)
    batches = iter(loader)
    before = by_key(next(batches) for _ in range(2))
    resumed = image_data(root, batch_size=3)
    resumed.load_state_dict(stopped.state_dict())
    rest = by_key(resumed.train_dataloader())
    assert len(rest) == COUNT - 4
    assert equal(before | rest, expected[1])


def test_digits_are_neither_cropped_nor_mirrored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_few_digits(monkeypatch)
    data = DigitsDataModule(tmp_path / "digits", image_size=SIZE, batch_size=500)
    data.prepare_data()
    data.setup("predict")
    assert equal(by_key(data.train_dataloader()), by_key(data.predict_dataloader()[0]))


def test_image_does_not_depend_on_its_batch(root: Path) -> None:
    images = dataset(root, random_crop=True, flip=True)
    together = images.__getitems__([(number, 1) for number in (7, 3, 0, 11)])
    assert together["numbers"].tolist() == [7, 3, 0, 11]
    for number, image in zip((7, 3, 0, 11), together["images"], strict=True):
        assert torch.equal(image, images[number, 1]["images"])


def pixels(image: Tensor) -> np.ndarray:
    """Convert (…, 3, H, W) in [-1, 1] to levels (…, H, W, 3)."""
    levels: np.ndarray = ((image + 1) * 127.5).round().movedim(-3, -1).numpy().astype(np.uint8)
    return levels


def test_views_match_their_names(root: Path) -> None:
    source = np.asarray(Image.open(BytesIO(IMAGE)))
    centre = centre_crop(source, SIZE)
    for views, expected in (
        ("flip", [centre, centre[:, ::-1]]),
        ("ten_crop", ten_crops(source, SIZE, [1.5, 1.25])),
    ):
        data = image_data(root, views=views, crop_ranges=[1.5, 1.25])
        assert len(data.view_names) == len(expected)
        for loader in data.predict_dataloader():
            batch = next(iter(loader))
            assert batch["images"].shape == (2, len(expected), 3, SIZE, SIZE)
            assert batch["images"].dtype == torch.float32
            assert np.array_equal(pixels(batch["images"]), np.stack([expected, expected]))


def test_only_predict_makes_several_views(root: Path) -> None:
    data = image_data(root, views="ten_crop")
    data.setup("fit")
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert next(iter(loader))["images"].shape == (2, 3, SIZE, SIZE)


def test_by_default_the_crops_are_those_of_llamagen(tmp_path: Path) -> None:
    data = ImageDataModule(tmp_path, views="ten_crop")
    assert (len(data.view_names), data.view_names[0], data.view_names[10]) == (20, "1.1 centre", "1.05 centre")
    assert ImageDataModule(tmp_path).view_names == ["centre"]
