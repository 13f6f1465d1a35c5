"""Improved precision and recall. B images of H × W pixels, N and M in all, F features."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llamagen.metrics.image_metric import ComparingRowMetric

UNSURE = 1e-9
"""Relative error that squared distances by way of a product of matrices surely do not have in float64."""


class PrecisionRecallStatistics(NamedTuple):
    """Shares of images, in [0, 1], float64.

    Attributes:
        precision: of the other images that lie within the manifold of the real ones: fidelity.
        recall: of the real images that lie within the manifold of the others: diversity.
    """

    precision: Tensor
    recall: Tensor


class PrecisionRecall(ComparingRowMetric):
    """Precision and recall over manifolds of balls, around each image as far as its k-th nearest neighbour.

    (arXiv 1904.06991.) Distances are taken in blocks, so memory grows with the images and not with their pairs.

    Args:
        features: extractor, see :class:`~llamagen.metrics.image_metric.ImageMetric`.
        image_size: side of the images in pixels.
        reference: features (M, F) of real images, if they are known; else these are shown to ``update``.
        k: which neighbour the radius goes to; 3 in ADM's evaluation.
        block: images of each side whose distances are taken at a time.

    Raises:
        ValueError: if the extractor is none, a number is too small, or the reference has another number of features.
    """

    symbol = "precision_recall"

    def __init__(
        self,
        features: nn.Module,
        image_size: int,
        reference: Tensor | None = None,
        k: int = 3,
        block: int = 4096,
    ) -> None:
        super().__init__(features, image_size)
        if k < 1 or block < 1:
            raise ValueError(f"k is {k} and block {block}; both must be at least 1")
        self.k, self.block = k, block
        self.reference = self.checked_reference(reference)

    def compute(self) -> PrecisionRecallStatistics:
        """The two shares.

        Raises:
            ValueError: if a side has not more than k images.
        """
        fake, real = self.both_sides()
        return precision_recall(real, fake, self.k, self.block)


@torch.no_grad()
def precision_recall(real: Tensor, fake: Tensor, k: int = 3, block: int = 4096) -> PrecisionRecallStatistics:
    """Precision and recall of features, exactly those of float64 distances between all pairs.

    Args:
        real: (M, F).
        fake: (N, F).
        k: which neighbour, not counting the image itself, the radius of a ball goes to.
        block: rows of each side whose distances are taken at a time.

    Raises:
        ValueError: if a side has not more than k rows.
    """
    for name, rows in (("real", real), ("other", fake)):
        if len(rows) <= k:
            raise ValueError(f"{len(rows)} {name} images have no {k}-th neighbour; give at least {k + 1}")
    return PrecisionRecallStatistics(
        _share_within(fake, real, radii(real, k, block), block),
        _share_within(real, fake, radii(fake, k, block), block),
    )


@torch.no_grad()
def radii(rows: Tensor, k: int, block: int = 4096) -> Tensor:
    """Squared distance of each row (N, F) from its k-th nearest neighbour among the others, (N,) float64."""
    found = []
    most = min(2 * k + 8, len(rows))  # more than k + 1, because rounding may change the order of the nearest
    for _, part in _blocks(rows, block):
        nearest = torch.full((len(part), 0), 0.0, dtype=torch.float64, device=rows.device)
        places = nearest.long()
        for offset, other in _blocks(rows, block):
            here = torch.arange(offset, offset + len(other), device=rows.device).expand(len(part), -1)
            distances, slack = _distances(part, other)
            nearest, places = torch.cat([nearest, distances - slack], 1), torch.cat([places, here], 1)
            nearest, order = nearest.topk(min(most, nearest.shape[1]), largest=False)
            places = places.gather(1, order)
        exact = torch.stack([_exact(part, rows[column]) for column in places.unbind(1)], 1)
        radius = exact.sort(1).values[:, k]  # the nearest is the row itself, or its double
        if most < len(rows):  # others are at least as far as the last of these may be; is the k-th nearer?
            for place in ((radius > nearest[:, -1]) & (radius > 0)).nonzero().flatten().tolist():
                every = torch.cat([_exact(part[place], other) for _, other in _blocks(rows, block)])
                radius[place] = every.kthvalue(k + 1).values
        found.append(radius)
    return torch.cat(found)


def _share_within(rows: Tensor, centres: Tensor, squared_radii: Tensor, block: int) -> Tensor:
    inside = 0
    for _, part in _blocks(rows, block):
        within = torch.zeros(len(part), dtype=torch.bool, device=rows.device)
        for offset, some in _blocks(centres, block):
            reach = squared_radii[offset : offset + len(some)]
            distances, slack = _distances(part, some)
            excess = distances - reach
            within |= (excess < -slack).any(1)
            # What rounding could decide is computed exactly: doubles, and borders that are images themselves.
            row, column = ((excess.abs() <= slack) & ~within[:, None]).nonzero(as_tuple=True)
            for rows_at, columns_at in zip(row.split(block), column.split(block), strict=True):
                sure = _exact(part[rows_at], some[columns_at]) <= reach[columns_at]
                within[rows_at[sure]] = True
        inside += int(within.sum())
    return torch.tensor(inside / len(rows), dtype=torch.float64, device=rows.device)


def _blocks(rows: Tensor, block: int) -> Iterator[tuple[int, Tensor]]:
    return ((start, rows[start : start + block]) for start in range(0, len(rows), block))


def _distances(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances (B, C) of rows (B, F) and (C, F), in float64, and how far rounding puts them off at most."""
    x, y = x.double(), y.double()
    norms = x.square().sum(1)[:, None] + y.square().sum(1)
    return torch.addmm(norms, x, y.T, alpha=-2), UNSURE * norms


def _exact(x: Tensor, y: Tensor) -> Tensor:
    """Squared distance of each row of (B, F) from the same row of another (B, F), float64; 0 for equal ones.

    Squares are added in an order of its own. That of ``sum`` depends on shape, layout and device, and so would its last
    digit: images that are as far as a border would lie within it or not by chance.
    """
    squares = (x.double() - y.double()).square()
    while (width := squares.shape[-1]) > 1:
        half = (width + 1) // 2
        squares = squares[..., :half] + F.pad(squares[..., half:], (0, width % 2))
    return squares.squeeze(-1)
