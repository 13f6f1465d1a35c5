"""The few images that a report shows, out of many. B images of H × W pixels, F features."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from zlib import crc32

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from evaluation.reference import Reference, thumbnail
from llamagen.grids import captioned_grid, grid_image

RANDOM = 64
PER_CLASS, CLASSES = 8, 10
NEIGHBOURS, NEIGHBOURED = 6, 10
RECONSTRUCTED = 16
COLUMNS = 8


@dataclass
class Exhibit:
    """An image with what is shown of it.

    Attributes:
        image: (H, W, 3) uint8.
        label: its class, -1 where it has none.
        features: (F,) float32.
        original: (H, W, 3) uint8, of which it is a reconstruction; None where it is none.
        caption: what it was drawn of; None where it is not known.
    """

    image: np.ndarray
    label: int
    features: np.ndarray
    original: np.ndarray | None = None
    caption: str | None = None


@dataclass
class Gallery:
    """Keeps some of the images that it is shown, always the same ones, in any order, batches and number of ranks.

    Which ones is drawn by hashing their index, and their classes by hashing these. At most
    ``RANDOM + CLASSES · PER_CLASS`` are held.
    """

    chosen: dict[int, Exhibit] = field(default_factory=dict)
    by_class: dict[int, dict[int, Exhibit]] = field(default_factory=dict)

    def show(
        self,
        images: Tensor,
        index: Tensor,
        features: Tensor,
        labels: Tensor | None = None,
        originals: Tensor | None = None,
        captions: Sequence[str] | None = None,
    ) -> None:
        """Show it images.

        Args:
            images: (B, 3, H, W) uint8.
            index: (B,) int64, number of each in its set.
            features: (B, F).
            labels: (B,) int64, -1 where there is none.
            originals: (B, 3, H, W) uint8, what they are reconstructions of.
            captions: B texts that they were drawn of.
        """
        classes = [-1] * len(index) if labels is None else labels.tolist()
        for row, (number, label) in enumerate(zip(index.tolist(), classes, strict=True)):
            if not (_rank(number) < self._last_chosen or self._wants(number, label)):
                continue
            exhibit = Exhibit(
                _pixels(images[row]),
                label,
                features[row].float().clone().cpu().numpy(),
                None if originals is None else _pixels(originals[row]),
                None if captions is None else captions[row],
            )
            self._take(number, exhibit)

    @property
    def _last_chosen(self) -> tuple[int, int]:
        return max(map(_rank, self.chosen)) if len(self.chosen) >= RANDOM else (2**32, 0)

    def _wants(self, number: int, label: int) -> bool:
        if label < 0:
            return False
        if label in self.by_class:
            return len(self.by_class[label]) < PER_CLASS or number < max(self.by_class[label])
        return len(self.by_class) < CLASSES or _rank(label) < max(map(_rank, self.by_class))

    def _take(self, number: int, exhibit: Exhibit) -> None:
        self.chosen[number] = exhibit
        self.chosen = {each: self.chosen[each] for each in sorted(self.chosen, key=_rank)[:RANDOM]}
        if exhibit.label >= 0:
            self.by_class.setdefault(exhibit.label, {})[number] = exhibit
            for label in sorted(self.by_class, key=_rank)[CLASSES:]:
                del self.by_class[label]
            for label, some in self.by_class.items():
                self.by_class[label] = {each: some[each] for each in sorted(some)[:PER_CLASS]}

    def together(self, galleries: "Sequence[Gallery]") -> "Gallery":
        """Take what others, of other ranks, have kept."""
        for gallery in galleries:
            for number, exhibit in gallery.chosen.items():
                self._take(number, exhibit)
            for some in gallery.by_class.values():
                for number, exhibit in some.items():
                    self._take(number, exhibit)
        return self

    def grids(self, reference: Reference | None) -> dict[str, Image.Image]:
        """Images for a report by name, as far as there is something to show.

        ``random``, above their captions if these are known, and ``classes`` (a row for each), or ``reconstructions``
        below their originals; ``neighbours``: beside each image those of the reference that are nearest to it by
        their features.
        """
        grids: dict[str, Image.Image] = {}
        drawn = list(self.chosen.values())
        if drawn and drawn[0].original is not None:
            rows = []
            for start in range(0, min(len(drawn), RECONSTRUCTED), COLUMNS):
                some = drawn[start : start + COLUMNS]
                rows += [[each.original for each in some], [each.image for each in some]]
            grids["reconstructions"] = grid_image(rows)  # type: ignore[arg-type]
            return grids
        if drawn:
            shown = [drawn[start : start + COLUMNS] for start in range(0, len(drawn), COLUMNS)]
            images = [[each.image for each in row] for row in shown]
            captions = [[each.caption or "" for each in row] for row in shown]
            grids["random"] = captioned_grid(images, captions) if any(map(any, captions)) else grid_image(images)
        if self.by_class:
            grids["classes"] = grid_image(
                [[e.image for e in self.by_class[label].values()] for label in sorted(self.by_class)]
            )
        if reference is not None and reference.features is not None and reference.thumbnails is not None and drawn:
            grids["neighbours"] = _neighbours(drawn[:NEIGHBOURED], reference.features, reference.thumbnails)
        return grids


def _neighbours(exhibits: list[Exhibit], features: Tensor, thumbnails: np.ndarray) -> Image.Image:
    rows = []
    known = features.double()
    for each in exhibits:
        distances = (known - torch.from_numpy(each.features).double()).square().sum(1)
        nearest = distances.topk(min(NEIGHBOURS, len(known)), largest=False).indices.tolist()
        rows.append([thumbnail(each.image), *(thumbnails[place] for place in nearest)])
    return grid_image(rows)


def _pixels(image: Tensor) -> np.ndarray:
    # A copy: a view would keep the whole batch in memory.
    pixels: np.ndarray = image.permute(1, 2, 0).clone(memory_format=torch.contiguous_format).cpu().numpy()
    return pixels


def _rank(number: int) -> tuple[int, int]:
    return crc32(str(number).encode()), number
