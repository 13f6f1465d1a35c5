"""Refuses images that cannot be measured, before an extractor spends minutes on them, and warns of odd ones."""

from lightning_utilities.core.rank_zero import rank_zero_warn

from evaluation.image_sets import ImageSet

LOOK = 16
"""Images read at a time; ordinary ones are settled by these."""


def check_content(images: ImageSet, num_workers: int = 0) -> None:
    """See that images are not all the same, and no floats that were cast to bytes without scaling.

    Images that look like that are read to the end, without an extractor, to be sure.

    Args:
        images: those to measure, or to measure against.
        num_workers: processes that read image files.

    Raises:
        ValueError: if they are, or images cannot be read.
    """
    for _ in images.batches(LOOK, num_workers=num_workers):
        if images.content.is_settled:
            break
    if fault := images.content.fault():
        raise ValueError(f"{images.name} cannot be measured: {fault}")


def warn_of_content(images: ImageSet) -> None:
    """Warn of what is unusual about images that have been read to the end."""
    for doubt in images.content.doubts():
        rank_zero_warn(f"{images.name}: {doubt}")
