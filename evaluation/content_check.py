"""Rejects images with implausible content before features are extracted, and warns about unusual content."""

from evaluation.image_sets import ImageSet
from llamagen.rank_zero import warn_on_rank_zero

FIRST_IMAGES = 16
"""Images per batch of the check. Ordinary images pass with the first batch."""


def check_content(images: ImageSet, num_workers: int = 0) -> None:
    """Check that images are not all the same, nor floats that were cast to bytes without scaling.

    The check stops as soon as the images are plausible, usually after the first batch.

    Args:
        images: the images to measure or to compare with.
        num_workers: processes that read image files.

    Raises:
        ValueError: if the check fails, or if images cannot be read.
    """
    for _ in images.batches(FIRST_IMAGES, num_workers=num_workers):
        if images.content.is_settled:
            break
    if fault := images.content.fault():
        raise ValueError(f"{images.name} cannot be measured: {fault}")


def warn_of_content(images: ImageSet) -> None:
    """Warn about unusual content of images that were read to the end."""
    for doubt in images.content.doubts():
        warn_on_rank_zero(f"{images.name}: {doubt}")
