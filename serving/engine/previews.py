"""Previews of images that are being generated: how often, and as bytes for a browser."""

import io
from collections.abc import Callable, Sequence
from functools import partial

from PIL import Image
from torch import Tensor

from llamagen import LlamaGen

MAX_SHARE = 0.25
"""Maximum share of the time that goes into previews, after the first one."""
CONTEXT = 2
"""Rows of codes above new ones that are decoded with them: one whose pixels change, and one that only it sees."""
GREY = (128, 128, 128)


class PreviewBudget:
    """Decides after which rows a preview is decoded, from the measured time of earlier ones.

    The first one is always made. The time of a later one is estimated from the last one, in proportion to the rows that
    it decodes.

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


class GrowingImages:
    """Images of a batch, of which more and more rows are known. An update decodes little more than the new rows.

    On a CPU, decoding a row of all images can take as long as generating it. So an update covers as many images as the
    budget allows; the first image comes first.

    Args:
        model: decodes the codes.
        images: for each of B images, the one that it completes, (S, S) pixels; None for a whole image.
        kept: rows of codes that are kept of them. They are shown as they are.
    """

    def __init__(self, model: LlamaGen, images: Sequence[Image.Image | None], kept: int = 0) -> None:
        assert model.resolution is not None
        side, height = model.resolution, kept * model.tokenizer.config.downsampling
        self._model, self._shown = model, [kept] * len(images)
        self._images = [Image.new("RGB", (side, side), GREY) for _ in images]
        for start, image in zip(self._images, images, strict=True):
            if image is not None:
                start.paste(image.crop((0, 0, side, height)))

    def update(self, codes: Tensor, rows: int, budget: PreviewBudget) -> list[bytes]:
        """Show more rows, of as many images as the budget allows.

        Args:
            codes: (B, L) int64.
            rows: number of rows of the grid whose codes are valid.
            budget: time for previews.

        Returns:
            JPEG files of whole images, in which the missing rows are grey; empty if the budget allows no image.
        """
        if rows <= min(self._shown):
            return [_jpeg(image) for image in self._images]
        for count in range(len(codes), 0, -1):
            first = max(min(self._shown[:count]) - CONTEXT, 0)
            if budget.allows(cost := count * (rows - first)):
                budget.spend(cost, partial(self._decode, codes[:count], first, rows))
                return [_jpeg(image) for image in self._images]
        return []

    def _decode(self, codes: Tensor, first: int, rows: int) -> None:
        """Decode the rows from ``first`` to ``rows`` of the first images."""
        grid, factor = round(codes.shape[1] ** 0.5), self._model.tokenizer.config.downsampling
        decoded = self._model.preview(codes.roll(-first * grid, 1), rows - first)
        for number, part in enumerate(decoded):
            changed = max(self._shown[number] - CONTEXT + 1, 0)  # the row before the new ones was decoded without them
            top = (changed - first) * factor
            self._images[number].paste(part.crop((0, top, part.width, part.height)), (0, changed * factor))
            self._shown[number] = rows


class MaskedImages:
    """Images of a batch that are inpainted. A preview shows, once, the known part: nothing is decoded for it.

    Args:
        images: for each of B images, the one that is inpainted, (S, S) pixels.
        masks: for each of them, numbers of the codes that are generated again.
        grid: rows and columns of codes.
    """

    def __init__(self, images: Sequence[Image.Image | None], masks: Sequence[tuple[int, ...]], grid: int) -> None:
        self._images = [image.copy() for image in images if image is not None]
        for image, mask in zip(self._images, masks, strict=True):
            size = image.width // grid
            for code in mask:
                top, left = code // grid * size, code % grid * size
                image.paste(GREY, (left, top, left + size, top + size))

    def update(self, codes: Tensor, rows: int, budget: PreviewBudget) -> list[bytes]:
        """JPEG files of the images, in which the missing part is grey, in the first call; then none."""
        found, self._images = [_jpeg(image) for image in self._images], []
        return found


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
