"""Pictures for the tokenizer: (3, H, W) float32 in [-1, 1], a label and a key. H = W = ``image_size``."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.base import SPLITS, ShardDataModule
from datamodules.crops import centre_crop, random_crop, random_flip
from datamodules.loader import NO_EPOCH, Address
from datamodules.shards import Sample

EXTENSIONS = ("png", "jpg", "jpeg", "webp")
NO_LABEL = -1


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB; 16-bit greys lose their lower byte, where Pillow would cut them off at 255."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB picture as (3, H, W) float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels.permute(2, 0, 1).float() / 127.5 - 1.0


class ImageDataset(Dataset[dict[str, Any]]):
    """Decodes the pictures of shard samples; asked for without an epoch, it gives their centre crop.

    Args:
        samples: with a png, jpg, jpeg or webp member and, if they have a class, a cls member.
        image_size: side of the pictures in pixels.
        random_crop: within an epoch, draw size and place of the crop by (seed, epoch, sample).
        flip: within an epoch, mirror half of the pictures, drawn likewise.
        seed: of the draws.
    """

    def __init__(
        self, samples: list[Sample], image_size: int, random_crop: bool = False, flip: bool = False, seed: int = 0
    ) -> None:
        self.samples, self.image_size = samples, image_size
        self.random_crop, self.flip, self.seed = random_crop, flip, seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, address: Address) -> dict[str, Any]:
        """``images`` (3, H, W), ``labels`` int (−1 without a class) and ``keys`` of a sample.

        Raises:
            ValueError: if the sample has no picture or a broken one.
        """
        number, epoch = address
        sample = self.samples[number]
        extension = next((extension for extension in EXTENSIONS if extension in sample.members), None)
        if extension is None:
            raise ValueError(
                f"sample {sample.key} of {sample.shard} has no picture; it needs one of {', '.join(EXTENSIONS)}"
            )
        data = sample.read(extension)
        try:
            image = to_rgb(ImageOps.exif_transpose(Image.open(BytesIO(data))))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # all of them by Pillow
            raise ValueError(f"the picture of sample {sample.key} in {sample.shard} is broken ({error})") from error
        label = sample.read_label() if "cls" in sample.members else NO_LABEL
        return {"images": to_tensor(self._cut(image, number, epoch)), "labels": label, "keys": sample.key}

    def _cut(self, image: Image.Image, number: int, epoch: int) -> Image.Image:
        if epoch == NO_EPOCH:
            return centre_crop(image, self.image_size)
        generator = np.random.default_rng([self.seed, epoch, number])
        if self.random_crop:
            image = random_crop(image, self.image_size, generator)
        else:
            image = centre_crop(image, self.image_size)
        return random_flip(image, generator) if self.flip else image


class ImageDataModule(ShardDataModule):
    """Pictures from webdataset shards, cropped as in ADM: in the middle, except for training.

    Args:
        root: folder with the shards of each split in ``train`` and ``val``.
        image_size: side of the pictures in pixels.
        batch_size: pictures a rank and batch.
        num_workers: processes a rank that decode pictures; 0 for none.
        seed: decides the order of each training epoch, and its crops and flips.
        random_crop: train on crops of random size and place, of at least 0.8 of the picture's short side.
        flip: train on pictures of which half are mirrored.
    """

    def __init__(
        self,
        root: Path | str,
        image_size: int = 256,
        batch_size: int = 16,
        num_workers: int = 4,
        seed: int = 0,
        random_crop: bool = True,
        flip: bool = True,
    ) -> None:
        super().__init__(root, batch_size, num_workers, seed)
        if image_size < 1:
            raise ValueError(f"image_size is {image_size}; it must be at least 1")
        self.image_size, self.random_crop, self.flip = image_size, random_crop, flip

    def build_dataset(self, split: str, samples: list[Sample]) -> Dataset[Any]:
        """Pictures of a split; those of the training split vary from epoch to epoch."""
        train = split == SPLITS[0]
        return ImageDataset(samples, self.image_size, self.random_crop and train, self.flip and train, self.seed)
