"""Inception Score. B images of H × W pixels, N in total, K classes."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llamagen.metrics.features import Features
from llamagen.metrics.image_metric import FAKE, RowMetric
from llamagen.metrics.result_names import ResultName

SORTED_ERRORS, SORTED_SHARE = 6.0, 0.95
"""Images count as sorted by class if their score is below 95 % of the score after shuffling, and lower than it by more
than 6 standard errors."""


class SplitStatistics(NamedTuple):
    """A value that was measured on each of several parts of the images.

    Attributes:
        mean: mean over the parts.
        std: standard deviation over the parts, divided by their number, not by one less.
    """

    mean: Tensor
    std: Tensor


class InceptionScore(RowMetric):
    """Inception Score (arXiv 1606.03498), exp of mean KL(p(y|x) ‖ p(y)).

    It is high if a classifier is confident about each image and all classes occur. It uses no real images. The score
    is averaged over consecutive splits of the images; ADM's evaluation uses 10 splits of 5,000.

    footgun: images must be in random order. If they are sorted by class, each split contains few classes and the score
    is far too low. :meth:`compute` returns that score, as ADM's evaluation does; :meth:`results` detects the case and
    returns :attr:`shuffled` instead.

    Args:
        features: extractor that provides logits.
        image_size: side of the images in pixels.
        splits: number of equal parts.

    Attributes:
        shuffled: score of the same images in a fixed random order, if the last :meth:`compute` found them sorted by
            class; else None.

    Raises:
        ValueError: if the extractor provides no logits, or ``splits`` is below 1.
    """

    symbol = "inception_score"
    result_names = (
        ResultName("inception_score", has_reference=False),
        ResultName("inception_score_std", has_reference=False),
    )
    part = "logits"
    purposes = ("generation",)
    shuffled: SplitStatistics | None = None

    def __init__(self, features: nn.Module, image_size: int, splits: int = 10) -> None:
        super().__init__(features, image_size, sides=(FAKE,))
        if splits < 1:
            raise ValueError(f"splits is {splits}; it must be at least 1")
        self.splits = splits

    def update(self, images: Tensor | Features, real: bool = False, index: Tensor | None = None) -> None:
        """Add images.

        Args:
            images: (B, 3, H, W) uint8, or their features.
            real: whether these are real images; they are ignored.
            index: (B,) int64, position of each image; see :meth:`~llamagen.metrics.image_metric.RowMetric.keep`.
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
        score = self._over_splits(logits)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        shuffled = self._over_splits(logits[order.to(logits.device)])
        least = shuffled.mean - SORTED_ERRORS * shuffled.std / self.splits**0.5
        self.shuffled = shuffled if score.mean < min(least, SORTED_SHARE * shuffled.mean) else None
        return score

    def results(self) -> dict[str, Tensor]:
        """The score; if images are sorted by class, that of a random order. All ranks must call it together."""
        score = self.compute()
        return self._by_symbol(score if self.shuffled is None else self.shuffled)

    def caveats(self) -> list[str]:
        """A warning if images are sorted by class."""
        if self.shuffled is None:
            return []
        return [
            f"the images seem to be sorted by class: in their order the Inception Score is {self.compute().mean:.4g}, "
            f"because each split contains some classes only; reported is {self.shuffled.mean:.4g}, for a random order"
        ]

    def _over_splits(self, logits: Tensor) -> SplitStatistics:
        count = len(logits)
        ends = [number * count // self.splits for number in range(self.splits + 1)]
        scores = torch.stack([_score(logits[a:b]) for a, b in pairwise(ends)])
        return SplitStatistics(scores.mean(), scores.std(correction=0))


def _score(logits: Tensor) -> Tensor:
    conditional = logits.double().log_softmax(1)
    marginal = conditional.logsumexp(0) - torch.tensor(float(len(logits)), dtype=torch.float64).log()
    return (conditional.exp() * (conditional - marginal)).sum(1).mean().exp()
