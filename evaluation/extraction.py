"""Extracts the features of an image dataset, batch by batch."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from evaluation.content_check import check_content, warn_of_content
from evaluation.image_sets import ImageSet
from llamagen.metrics import Features, extract
from llamagen.rank_zero import warn_on_rank_zero


class FeatureBatch(NamedTuple):
    """Images with their features.

    Attributes:
        images: (B, 3, H, W) uint8, on the CPU.
        index: (B,) int64, position of each image in its dataset.
        features: features of the images, on the extractor's device.
        labels: (B,) int64, class of each image, −1 if it has none.
    """

    images: Tensor
    index: Tensor  # type: ignore[assignment]  # shadows tuple.index, which is not needed
    features: Features
    labels: Tensor


def feature_batches(
    images: ImageSet,
    extractor: nn.Module,
    batch_size: int,
    num_workers: int,
    device: str | torch.device,
    task: str,
    show_progress: bool = True,
) -> Iterator[FeatureBatch]:
    """Extract features of all images in order, with a progress bar.

    At the end, warnings report images that could not be read and unusual content.

    Args:
        images: the images.
        extractor: the extractor; it is put into evaluation mode.
        batch_size: images per batch.
        num_workers: processes that read image files.
        device: device on which the extractor runs.
        task: label of the progress bar.
        show_progress: whether to show the bar.

    Raises:
        ValueError: if the images' content is implausible, see :func:`~evaluation.content_check.check_content`.
    """
    check_content(images, num_workers)
    extractor.eval()
    batches = images.batches(batch_size, num_workers=num_workers)
    with tqdm(total=len(images), desc=task, unit="image", disable=not show_progress) as bar:
        for batch in batches:
            features = extract(extractor, batch.images.to(device))
            yield FeatureBatch(batch.images, batch.index, features, batch.labels)
            bar.update(len(batch.images))
    if bad := images.skipped:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(bad.items()))
        warn_on_rank_zero(f"{sum(bad.values())} images of {images.name} cannot be read and are skipped ({reasons})")
    warn_of_content(images)
