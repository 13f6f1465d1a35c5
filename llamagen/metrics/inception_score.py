"""Inception Score. B images of H × W pixels, N in all, K classes."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llamagen.metrics.features import Features
from llamagen.metrics.image_metric import FAKE, RowMetric

SORTED_ERRORS, SORTED_SHARE = 6.0, 0.95
"""Images count as sorted if shuffling raises the score by more than so many standard errors, and above this share."""


class SplitStatistics(NamedTuple):
    """A number that was taken several times.

    Attributes:
        mean: over the times.
        std: standard deviation over them (of these themselves: divided by their number).
    """

    mean: Tensor
    std: Tensor


class InceptionScore(RowMetric):
    """How sure a classifier is of each image, and how evenly of all: exp of mean KL(p(y|x) ‖ p(y)).

    (arXiv 1606.03498.) It is taken over splits of the images, in their order, as ADM's evaluation does with 10 splits
    of 5,000. It knows no real images.

    ADM's evaluation takes a random order for granted. Where images are sorted by class, a split knows some of the
    classes alone, and the score is far too low: see :attr:`shuffled`.

    Args:
        features: extractor that gives logits.
        image_size: side of the images in pixels.
        splits: number of equal parts.

    Attributes:
        shuffled: what :meth:`compute` would have given for the same images in a random order, always the same one, if
            they seem to be sorted; None if they do not, and before the first :meth:`compute`.

    Raises:
        ValueError: if the extractor gives no logits, or there is no split.
    """

    symbol = "inception_score"
    part = "logits"
    shuffled: SplitStatistics | None = None

    def __init__(self, features: nn.Module, image_size: int, splits: int = 10) -> None:
        super().__init__(features, image_size, sides=(FAKE,))
        if splits < 1:
            raise ValueError(f"splits is {splits}; it must be at least 1")
        self.splits = splits

    def update(self, images: Tensor | Features, real: bool = False, index: Tensor | None = None) -> None:
        """Take images into account.

        Args:
            images: (B, 3, H, W) uint8, or their features.
            real: these are the images that other metrics of a collection compare with; they are passed over.
            index: (B,) int64, number of each image; see :meth:`~llamagen.metrics.image_metric.RowMetric.keep`.
        """
        if not real:
            self.keep(FAKE, self.rows(images), index)

    def compute(self) -> SplitStatistics:
        """Mean and standard deviation over the splits, float64, from 1 to K.

        Raises:
            ValueError: if there are fewer images than splits.
        """
        logits = self.kept(FAKE)
        count = len(logits)
        if count < self.splits:
            raise ValueError(
                f"{count} images are too few for {self.splits} splits of the Inception Score; give more, or set "
                "splits to less"
            )
        found = self._over_splits(logits)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        shuffled = self._over_splits(logits[order.to(logits.device)])
        least = shuffled.mean - SORTED_ERRORS * shuffled.std / self.splits**0.5
        self.shuffled = shuffled if found.mean < min(least, SORTED_SHARE * shuffled.mean) else None
        return found

    def _over_splits(self, logits: Tensor) -> SplitStatistics:
        count = len(logits)
        ends = [number * count // self.splits for number in range(self.splits + 1)]
        scores = torch.stack([_score(logits[a:b]) for a, b in pairwise(ends)])
        return SplitStatistics(scores.mean(), scores.std(correction=0))


def _score(logits: Tensor) -> Tensor:
    conditional = logits.double().log_softmax(1)
    marginal = conditional.logsumexp(0) - torch.tensor(float(len(logits)), dtype=torch.float64).log()
    return (conditional.exp() * (conditional - marginal)).sum(1).mean().exp()
