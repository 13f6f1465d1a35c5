"""Images for the tokenizer: float32 in [-1, 1], a label and a key. B batch, A views, H = W = ``image_size``."""

from collections.abc import Sequence
from math import isqrt
from pathlib import Path
from typing import Any, get_args

import numpy as np

from datamodules.base import SPLITS, ShardDataModule
from datamodules.datasets.images import ImageDataset, Views, scale, to_planes
from datamodules.loading.loader import ranks_wait
from datamodules.loading.stream import StreamIndex
from datamodules.storage.class_order import outlying_label
from datamodules.storage.index import IMAGES, ExampleIndex
from datamodules.transforms.crops import view_names
from datamodules.transforms.decode import MAX_PIXELS
from llamagen.option_checks import check_choice, check_integer
from llamagen.rank_zero import warn_on_rank_zero

__all__ = ["ImageDataModule", "ImageDataset", "Views", "scale", "to_planes"]

MAX_SIDE = isqrt(MAX_PIXELS)
"""Side of the largest square image that the decoder accepts."""
MAX_CROP_RANGE = 4
"""Maximum of ``crop_ranges``."""


class ImageDataModule(ShardDataModule):
    """Images, cropped as in ADM (arXiv 2105.05233): random crops for training, centre crops otherwise.

    Args:
        root: folder or address of the dataset, see :class:`~datamodules.base.ShardDataModule`.
        image_size: side of the images in pixels.
        batch_size: images per batch and rank.
        random_crop: train on crops of random size and position, at least 0.8 of the image's short side.
        flip: mirror half of the training images.
        views: views of each image that ``predict`` encodes: ``centre``, ``flip`` (the centre crop and its mirror
            image), or ``ten_crop`` (centre and corners of two larger centre crops, and their mirror images: 20 views).
        crop_ranges: sizes of these larger crops, as multiples of ``image_size``.
    """

    extensions = IMAGES
    hint = "give a folder of class folders or webdataset shards, or one that holds such folders as train and val"

    def __init__(
        self,
        root: Path | str | None = None,
        image_size: int = 256,
        batch_size: int = 16,
        random_crop: bool = True,
        flip: bool = True,
        views: Views = "centre",
        crop_ranges: Sequence[float] = (1.1, 1.05),
        **data: Any,
    ) -> None:
        super().__init__(root, batch_size, **data)
        check_integer("image_size", image_size, 1, MAX_SIDE)
        check_choice("views", views, get_args(Views))
        if not crop_ranges or not all(1 <= factor <= MAX_CROP_RANGE for factor in crop_ranges):
            raise ValueError(
                f"crop_ranges is {list(crop_ranges)}; give at least one number, each from 1 to {MAX_CROP_RANGE}"
            )
        self.image_size, self.random_crop, self.flip = image_size, random_crop, flip
        self.views, self.crop_ranges = views, list(crop_ranges)

    @property
    def view_names(self) -> list[str]:
        """Names of the views that ``predict`` encodes."""
        return view_names(self.views, self.crop_ranges)

    def build_dataset(self, split: str, examples: ExampleIndex | StreamIndex, stage: str) -> ImageDataset:
        """Build the dataset of a split. Training images are augmented differently in each epoch."""
        train, predict = split == SPLITS[0], stage == "predict"
        if train and isinstance(examples, ExampleIndex) and not self.class_names:
            _warn_about_outlying_label(examples)
        return ImageDataset(
            examples,
            self.image_size,
            self.random_crop and train,
            self.flip and train,
            self.seed,
            self.views if predict else "centre",
            self.crop_ranges,
            captions=predict and self.captioned,
            never_empty=(train and stage == "fit") or ranks_wait(self.trainer),
        )


def _warn_about_outlying_label(examples: ExampleIndex) -> None:
    if (label := outlying_label(examples.labels)) is not None:
        example = examples[int(np.flatnonzero(examples.labels == label)[0])]
        warn_on_rank_zero(
            f"the highest class is {label} (example {example.key} of {example.source}), but there are only "
            f"{len(np.unique(examples.labels))} different classes; if the label is a typo, the model gets "
            f"{label + 1} classes by mistake"
        )
