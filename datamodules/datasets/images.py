"""Dataset of images. A: views of an image, B: images in a batch.

Separate from the DataModule, so that worker processes import it without Lightning.
"""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from datamodules.datasets.base import ExampleDataset
from datamodules.loading.order import NO_EPOCH
from datamodules.storage.bad_examples import BadExampleError
from datamodules.storage.index import NO_LABEL, ExampleIndex
from datamodules.transforms.crops import random_crop, random_flip, ten_crops
from datamodules.transforms.decode import read_image
from llamagen.centre_crop import centre_crop

if TYPE_CHECKING:
    from datamodules.loading.stream import StreamIndex

Views = Literal["centre", "flip", "ten_crop"]


def to_planes(pixels: np.ndarray) -> np.ndarray:
    """Convert pixels (…, H, W, 3) to contiguous planes (…, 3, H, W), the layout of the resizing kernel."""
    return np.ascontiguousarray(np.moveaxis(pixels, -1, -3))


def scale(levels: Tensor) -> Tensor:
    """Convert uint8 levels in [0, 255] to float32 in [-1, 1]."""
    return levels.float().div_(127.5).sub_(1.0)


class ImageDataset(ExampleDataset):
    """Dataset of decoded images: augmented if the address has an epoch, otherwise all views (default: centre crop).

    Args:
        examples: examples with a png, jpg, jpeg or webp member.
        image_size: side of the images in pixels.
        random_crop: in training, choose size and position of the crop by (seed, epoch, example).
        flip: in training, mirror half of the images, chosen in the same way.
        seed: seed of the random choices.
        views: see :func:`~datamodules.transforms.crops.view_names`; with several views, images are (A, 3, H, W).
        crop_ranges: see :func:`~datamodules.transforms.crops.ten_crops`.
        captions: also read captions.
        never_empty: see :class:`~datamodules.datasets.base.ExampleDataset`.
    """

    def __init__(
        self,
        examples: "ExampleIndex | StreamIndex",
        image_size: int,
        random_crop: bool = False,
        flip: bool = False,
        seed: int = 0,
        views: Views = "centre",
        crop_ranges: Sequence[float] = (),
        captions: bool = False,
        never_empty: bool = False,
    ) -> None:
        super().__init__(examples, never_empty)
        self.image_size, self.random_crop, self.flip, self.seed = image_size, random_crop, flip, seed
        self.views, self.crop_ranges, self.captions = views, crop_ranges, captions
        self._warned = False

    def read(self, number: int, epoch: int) -> dict[str, Any]:
        """Read planes, label and key of an example.

        Raises:
            BadExampleError: if it has no image or a broken one.
        """
        example = self.examples[number]
        pixels = read_image(example.read_image(), f"example {example.key} of {example.source}")
        # to_planes copies the crop. A view would keep the whole image in memory until the batch is full.
        parts = {
            "planes": to_planes(self._crop(pixels, number, epoch)),
            "labels": example.label,
            "keys": example.key,
        }
        if not self.captions:
            return parts
        caption = example.read_caption()
        fault = "" if caption else example.caption_fault()
        details = f": {fault}" if fault else ""
        if not caption and example.label == NO_LABEL:
            message = f"example {example.key} of {example.source} has neither class nor caption{details}"
            raise BadExampleError("no caption", message)
        if fault and not self._warned:
            self._warned = True  # once per worker process
            warnings.warn(
                f"unreadable captions are left out, e.g. of example {example.key} of {example.source}{details}",
                stacklevel=2,
            )
        return {**parts, "captions": caption}

    def _crop(self, pixels: np.ndarray, number: int, epoch: int) -> np.ndarray:
        if epoch == NO_EPOCH:
            if self.views == "ten_crop":
                return np.stack(ten_crops(pixels, self.image_size, self.crop_ranges))
            centre = centre_crop(pixels, self.image_size)
            return centre if self.views == "centre" else np.stack([centre, centre[:, ::-1]])
        generator = np.random.default_rng([self.seed, epoch, number])
        if self.random_crop:
            pixels = random_crop(pixels, self.image_size, generator)
        else:
            pixels = centre_crop(pixels, self.image_size)
        return random_flip(pixels, generator) if self.flip else pixels

    def collate(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """``images`` (B, 3, H, W) or (B, A, 3, H, W), ``labels`` (B,) int64, −1 for none, ``keys``, ``captions``."""
        batch = {name: [example[name] for example in examples] for name in examples[0]}
        images = scale(torch.from_numpy(np.stack(batch.pop("planes"))))
        return {"images": images, **batch, "labels": torch.tensor(batch["labels"])}
