"""Improved precision and recall. B images of H × W pixels, N and M in total, F features."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llamagen.metrics.image_metric import ComparingRowMetric
from llamagen.metrics.result_names import ResultName

ROUNDING = 1e-9
"""Bound of the relative error of squared distances computed by a matrix product in float64."""


class PrecisionRecallStatistics(NamedTuple):
    """Fractions of images in [0, 1], float64.

    Attributes:
        precision: fraction of the compared images that are within the manifold of the real ones: fidelity.
        recall: fraction of the real images that are within the manifold of the compared ones: diversity.
    """

    precision: Tensor
    recall: Tensor


class PrecisionRecall(ComparingRowMetric):
    """Improved precision and recall (arXiv 1904.06991).

    A manifold is a union of balls, one around the features of each image. The radius of a ball is the distance of the
    image's k-th nearest neighbour. Distances are computed in blocks, so memory grows with the number of images, not
    with the number of pairs.

    Args:
        features: extractor, see :class:`~llamagen.metrics.image_metric.ImageMetric`.
        image_size: side of the images in pixels.
        reference: features (M, F) of real images; None if real images are passed to ``update``.
        k: number of the neighbour that determines a ball's radius; 3 in ADM's evaluation.
        block: number of images of each side whose distances are computed at a time.

    Raises:
        ValueError: if the module is not an extractor, an option is too small, or the reference has another width.
    """

    symbol = "precision_recall"
    result_names = (ResultName("precision"), ResultName("recall"))

    def __init__(
        self,
        features: nn.Module,
        image_size: int,
        reference: Tensor | None = None,
        k: int = 3,
        block: int = 4096,
    ) -> None:
        super().__init__(features, image_size, reference)
        if k < 1 or block < 1:
            raise ValueError(f"k is {k} and block {block}; both must be at least 1")
        self.k, self.block = k, block

    def compute(self) -> PrecisionRecallStatistics:
        """Precision and recall.

        Raises:
            ValueError: if a side has at most k images.
        """
        fake, real = self.both_sides()
        return precision_recall(real, fake, self.k, self.block)


@torch.no_grad()
def precision_recall(real: Tensor, fake: Tensor, k: int = 3, block: int = 4096) -> PrecisionRecallStatistics:
    """Compute precision and recall of features, with the exact result of float64 distances between all pairs.

    Args:
        real: (M, F), features of the real images.
        fake: (N, F), features of the compared images.
        k: number of the neighbour that determines a ball's radius, without counting the image itself.
        block: number of rows of each side whose distances are computed at a time.

    Raises:
        ValueError: if a side has at most k rows.
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
    radius_blocks = []
    candidates = min(2 * k + 8, len(rows))  # more than k + 1, because rounding may change the order of the nearest
    for _, part in _blocks(rows, block):
        nearest = torch.full((len(part), 0), 0.0, dtype=torch.float64, device=rows.device)
        places = nearest.long()
        for offset, other in _blocks(rows, block):
            other_places = torch.arange(offset, offset + len(other), device=rows.device).expand(len(part), -1)
            distances, slack = _distances(part, other)
            nearest, places = torch.cat([nearest, distances - slack], 1), torch.cat([places, other_places], 1)
            nearest, order = nearest.topk(min(candidates, nearest.shape[1]), largest=False)
            places = places.gather(1, order)
        exact = torch.stack([_exact(part, rows[column]) for column in places.unbind(1)], 1)
        radius = exact.sort(1).values[:, k]  # the nearest is the row itself, or a duplicate
        if candidates < len(rows):  # all other rows are at least as far as the last candidate; check that it suffices
            for place in ((radius > nearest[:, -1]) & (radius > 0)).nonzero().flatten().tolist():
                every = torch.cat([_exact(part[place], other) for _, other in _blocks(rows, block)])
                radius[place] = every.kthvalue(k + 1).values
        radius_blocks.append(radius)
    return torch.cat(radius_blocks)


def _share_within(rows: Tensor, centres: Tensor, squared_radii: Tensor, block: int) -> Tensor:
    """Fraction of rows (N, F) that are within at least one ball around the centres (M, F)."""
    inside = 0
    for _, part in _blocks(rows, block):
        within = torch.zeros(len(part), dtype=torch.bool, device=rows.device)
        for offset, other in _blocks(centres, block):
            reach = squared_radii[offset : offset + len(other)]
            distances, slack = _distances(part, other)
            excess = distances - reach
            within |= (excess < -slack).any(1)
            # Where rounding could decide, compute exactly: duplicates, and rows that are on a ball's border.
            row, column = ((excess.abs() <= slack) & ~within[:, None]).nonzero(as_tuple=True)
            for rows_at, columns_at in zip(row.split(block), column.split(block), strict=True):
                sure = _exact(part[rows_at], other[columns_at]) <= reach[columns_at]
                within[rows_at[sure]] = True
        inside += int(within.sum())
    return torch.tensor(inside / len(rows), dtype=torch.float64, device=rows.device)


def _blocks(rows: Tensor, block: int) -> Iterator[tuple[int, Tensor]]:
    return ((start, rows[start : start + block]) for start in range(0, len(rows), block))


def _distances(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances (B, C) of rows (B, F) and (C, F), in float64, and a bound of their rounding error."""
    x, y = x.double(), y.double()
    norms = x.square().sum(1)[:, None] + y.square().sum(1)
    return torch.addmm(norms, x, y.T, alpha=-2), ROUNDING * norms


def _exact(x: Tensor, y: Tensor) -> Tensor:
    """Squared distance between corresponding rows of two (B, F), float64; exactly 0 for equal rows.

    Squares are added in a fixed order. The order of ``sum``, and so its last digit, depends on shape, layout and
    device. With it, chance would decide whether a row on the border of a ball counts as inside.
    """
    squares = (x.double() - y.double()).square()
    while (width := squares.shape[-1]) > 1:
        half = (width + 1) // 2
        squares = squares[..., :half] + F.pad(squares[..., half:], (0, width % 2))
    return squares.squeeze(-1)
