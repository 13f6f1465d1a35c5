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
from datamodules.storage.class_order import far_label
from datamodules.storage.index import IMAGES, ExampleIndex
from datamodules.storage.rank_zero_warning import warn_on_rank_zero
from datamodules.transforms.crops import view_names
from datamodules.transforms.decode import MAX_PIXELS
from llamagen.option_checks import check_choice, check_integer

__all__ = ["ImageDataModule", "ImageDataset", "Views", "scale", "to_planes"]

MAX_SIDE = isqrt(MAX_PIXELS)
"""The largest square that could come out of an image that is read."""
MAX_RANGE = 4
"""The largest crop, by the size of the result."""


class ImageDataModule(ShardDataModule):
    """Images, cropped as in ADM: in the middle, except for training.

    Args:
        image_size: side of the images in pixels.
        batch_size: images a rank and batch.
        random_crop: train on crops of random size and place, of at least 0.8 of the image's short side.
        flip: train on images of which half are mirrored.
        views: of which views ``predict`` makes codes: ``centre``, ``flip`` (that and its mirror image), or ``ten_crop``
            (the middle and the corners of two larger centre crops, and their mirror images: 20 views).
        crop_ranges: sizes of these larger crops, as shares of ``image_size``.
    """

    extensions = IMAGES
    hint = "give a folder of class folders, or one with webdataset shards, for training as train within it"

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
        if not crop_ranges or not all(1 <= share <= MAX_RANGE for share in crop_ranges):
            raise ValueError(f"crop_ranges is {list(crop_ranges)}; give numbers that are at least 1, up to {MAX_RANGE}")
        self.image_size, self.random_crop, self.flip = image_size, random_crop, flip
        self.views, self.crop_ranges = views, list(crop_ranges)

    @property
    def view_names(self) -> list[str]:
        """Names of the views of which ``predict`` makes codes."""
        return view_names(self.views, self.crop_ranges)

    def build_dataset(self, split: str, examples: ExampleIndex | StreamIndex, stage: str) -> ImageDataset:
        """Images of a split; those of the training split vary from epoch to epoch."""
        train, predict = split == SPLITS[0], stage == "predict"
        if train and isinstance(examples, ExampleIndex) and not self.class_names:
            _warn_of_far_label(examples)
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


def _warn_of_far_label(examples: ExampleIndex) -> None:
    if (label := far_label(examples.labels)) is not None:
        example = examples[int(np.flatnonzero(examples.labels == label)[0])]
        warn_on_rank_zero(
            f"the highest class is {label}, of example {example.key} of {example.source}, but only "
            f"{len(np.unique(examples.labels))} different classes come; a mistyped label would make the number of "
            f"classes {label + 1}"
        )
