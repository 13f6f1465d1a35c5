"""Previews of images that are being generated: how often, and as bytes for a browser."""

import io
from collections.abc import Callable, Sequence

from PIL import Image

MAX_SHARE = 0.2
"""Maximum share of the time that goes into previews, after the first one."""
GREY = (128, 128, 128)


class PreviewBudget:
    """Decides after which rows a preview is decoded, from the measured time of earlier ones.

    The first row is always shown. The cost of a later preview is estimated from the last one, in proportion to its
    rows.

    Args:
        clock: seconds.
        share: maximum share of the time since the beginning.
    """

    def __init__(self, clock: Callable[[], float], share: float = MAX_SHARE) -> None:
        self._clock, self._share = clock, share
        self._start, self._spent, self._per_row = clock(), 0.0, 0.0

    def allows(self, rows: int) -> bool:
        """Whether a preview of this many rows fits."""
        cost = self._per_row * rows
        elapsed = self._clock() - self._start
        return self._spent + cost <= self._share * (elapsed + cost)

    def spend(self, rows: int, show: Callable[[], None]) -> None:
        """Make a preview of this many rows, and measure it."""
        start = self._clock()
        show()
        cost = self._clock() - start
        self._spent += cost
        self._per_row = cost / rows


def growing_images(rows: Sequence[Image.Image], side: int) -> list[bytes]:
    """Upper rows of images → JPEG files of whole images, in which the missing rows are grey.

    Args:
        rows: images of at most ``side`` rows of pixels.
        side: side of the images in pixels.
    """
    files = []
    for image in rows:
        canvas = Image.new("RGB", (side, side), GREY)
        canvas.paste(image, (0, 0))
        buffer = io.BytesIO()
        canvas.save(buffer, "JPEG", quality=85)
        files.append(buffer.getvalue())
    return files
