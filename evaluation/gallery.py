"""Selects the images that a report shows. B images of H × W pixels, F features."""

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
    """An image of a report.

    Attributes:
        image: (H, W, 3) uint8.
        label: its class, -1 if it has none.
        features: (F,) float32.
        original: (H, W, 3) uint8, the original of a reconstruction; else None.
        caption: the prompt that the image was generated from; None if there is none.
    """

    image: np.ndarray
    label: int
    features: np.ndarray
    original: np.ndarray | None = None
    caption: str | None = None


@dataclass
class Gallery:
    """A random selection of at most ``RANDOM + CLASSES · PER_CLASS`` images.

    Hashes of index and class select the images, so the selection does not depend on order, batches or number of ranks.
    """

    chosen: dict[int, Exhibit] = field(default_factory=dict)
    by_class: dict[int, dict[int, Exhibit]] = field(default_factory=dict)

    def add(
        self,
        images: Tensor,
        index: Tensor,
        features: Tensor,
        labels: Tensor | None = None,
        originals: Tensor | None = None,
        captions: Sequence[str] | None = None,
    ) -> None:
        """Add images; the gallery keeps those that belong to the selection.

        Args:
            images: (B, 3, H, W) uint8.
            index: (B,) int64, position of each image in its dataset.
            features: (B, F).
            labels: (B,) int64, -1 for images without a class.
            originals: (B, 3, H, W) uint8, originals of reconstructions.
            captions: B prompts.
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
            for label, exhibits in self.by_class.items():
                self.by_class[label] = {each: exhibits[each] for each in sorted(exhibits)[:PER_CLASS]}

    def merge(self, galleries: "Sequence[Gallery]") -> "Gallery":
        """Add the selections of other ranks; returns self."""
        for gallery in galleries:
            for number, exhibit in gallery.chosen.items():
                self._take(number, exhibit)
            for exhibits in gallery.by_class.values():
                for number, exhibit in exhibits.items():
                    self._take(number, exhibit)
        return self

    def grids(self, reference: Reference | None) -> dict[str, Image.Image]:
        """Grids of images for a report, by name; those that would be empty are left out.

        - ``reconstructions`` below their originals; for generated images instead
        - ``random`` images, with captions if there are any,
        - ``classes``, a row for each class,
        - ``neighbours``: next to each image the images of the reference with the nearest features.
        """
        grids: dict[str, Image.Image] = {}
        exhibits = list(self.chosen.values())
        if exhibits and exhibits[0].original is not None:
            rows = []
            for start in range(0, min(len(exhibits), RECONSTRUCTED), COLUMNS):
                row = exhibits[start : start + COLUMNS]
                rows += [[each.original for each in row], [each.image for each in row]]
            grids["reconstructions"] = grid_image(rows)  # type: ignore[arg-type]
            return grids
        if exhibits:
            shown = [exhibits[start : start + COLUMNS] for start in range(0, len(exhibits), COLUMNS)]
            images = [[each.image for each in row] for row in shown]
            captions = [[each.caption or "" for each in row] for row in shown]
            grids["random"] = captioned_grid(images, captions) if any(map(any, captions)) else grid_image(images)
        if self.by_class:
            grids["classes"] = grid_image(
                [[e.image for e in self.by_class[label].values()] for label in sorted(self.by_class)]
            )
        if reference is not None and reference.features is not None and reference.thumbnails is not None and exhibits:
            grids["neighbours"] = _neighbours(exhibits[:NEIGHBOURED], reference.features, reference.thumbnails)
        return grids


def _neighbours(exhibits: list[Exhibit], features: Tensor, thumbnails: np.ndarray) -> Image.Image:
    rows = []
    reference = features.double()
    for each in exhibits:
        distances = (reference - torch.from_numpy(each.features).double()).square().sum(1)
        nearest = distances.topk(min(NEIGHBOURS, len(reference)), largest=False).indices.tolist()
        rows.append([thumbnail(each.image), *(thumbnails[place] for place in nearest)])
    return grid_image(rows)


def _pixels(image: Tensor) -> np.ndarray:
    # clone: a view would keep the whole batch in memory.
    pixels: np.ndarray = image.permute(1, 2, 0).clone(memory_format=torch.contiguous_format).cpu().numpy()
    return pixels


def _rank(number: int) -> tuple[int, int]:
    return crc32(str(number).encode()), number
