"""Pictures for the tokenizer: (3, H, W) float32 in [-1, 1], a label and a key. H = W = ``image_size``."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.base import ShardDataModule
from datamodules.loader import Address
from datamodules.shards import Sample

EXTENSIONS = ("png", "jpg", "jpeg", "webp")
NO_LABEL = -1


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The ADM centre crop (arXiv 2105.05233): shrink the short side to ``size``, cut out the middle.

    Large pictures are first halved with a box filter while the short side is at least twice the target, then resized
    bicubically; small pictures are enlarged the same way.

    Args:
        image: any mode, any size.
        size: side of the result in pixels.

    Returns:
        ``size`` × ``size``, same mode.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


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
    """Decodes the pictures of shard samples.

    Args:
        samples: with a png, jpg, jpeg or webp member and, if they have a class, a cls member.
        image_size: side of the pictures in pixels.
    """

    def __init__(self, samples: list[Sample], image_size: int) -> None:
        self.samples, self.image_size = samples, image_size

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, address: Address) -> dict[str, Any]:
        """``images`` (3, H, W), ``labels`` int (−1 without a class) and ``keys`` of a sample.

        Raises:
            ValueError: if the sample has no picture or a broken one.
        """
        sample = self.samples[address[0]]
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
        return {"images": to_tensor(centre_crop(image, self.image_size)), "labels": label, "keys": sample.key}


class ImageDataModule(ShardDataModule):
    """Pictures from webdataset shards, centre-cropped as in ADM.

    Args:
        root: folder with the shards of each split in ``train`` and ``val``.
        image_size: side of the pictures in pixels.
        batch_size: pictures a rank and batch.
        num_workers: processes a rank that decode pictures; 0 for none.
        seed: decides the order of each training epoch.
    """

    def __init__(
        self, root: Path | str, image_size: int = 256, batch_size: int = 16, num_workers: int = 4, seed: int = 0
    ) -> None:
        super().__init__(root, batch_size, num_workers, seed)
        if image_size < 1:
            raise ValueError(f"image_size is {image_size}; it must be at least 1")
        self.image_size = image_size

    def build_dataset(self, split: str, samples: list[Sample]) -> Dataset[Any]:
        """Pictures of a split."""
        return ImageDataset(samples, self.image_size)
