"""KID: kernel distance between sets of images. B images of H × W pixels, N and M in all, F features."""

import torch
from torch import Tensor, nn

from llamagen.metrics.image_metric import ComparingRowMetric
from llamagen.metrics.inception_score import SplitStatistics


class KID(ComparingRowMetric):
    """Squared maximum mean discrepancy with the kernel ``(x·y / F + 1)³``, unbiased, so also for few images.

    (arXiv 1801.01401.) It is taken over random subsets, always the same ones for one seed and number of images.

    Args:
        features: extractor, see :class:`~llamagen.metrics.image_metric.ImageMetric`.
        image_size: side of the images in pixels.
        reference: features (M, F) of real images, if they are known; else these are shown to ``update``.
        subsets: how many.
        subset_size: images of each side in a subset; all, where there are fewer.
        seed: of the choice.

    Raises:
        ValueError: if the extractor is none, a number is too small, or the reference has another number of features.
    """

    symbol = "kid"

    def __init__(
        self,
        features: nn.Module,
        image_size: int,
        reference: Tensor | None = None,
        subsets: int = 100,
        subset_size: int = 1000,
        seed: int = 0,
    ) -> None:
        super().__init__(features, image_size)
        if subsets < 1 or subset_size < 2:
            raise ValueError(
                f"subsets is {subsets} and subset_size {subset_size}; they must be at least 1 and at least 2"
            )
        self.subsets, self.subset_size, self.seed = subsets, subset_size, seed
        self.reference = self.checked_reference(reference)

    def compute(self) -> SplitStatistics:
        """Mean and standard deviation over the subsets, float64; about 0 for images of one kind, also below.

        Raises:
            ValueError: if a side has fewer than two images.
        """
        fake, real = self.both_sides()
        generator = torch.Generator().manual_seed(self.seed)
        found = []
        for _ in range(self.subsets):
            parts = [
                rows[torch.randperm(len(rows), generator=generator)[: self.subset_size].to(rows.device)].double()
                for rows in (real, fake)
            ]
            found.append(squared_discrepancy(*parts))
        distances = torch.stack(found)
        return SplitStatistics(distances.mean(), distances.std(correction=0))


def squared_discrepancy(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased squared maximum mean discrepancy of features (N, F) and (M, F), with the kernel of KID."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def mean_of_others(a: Tensor) -> Tensor:
        among = kernel(a, a)
        return (among.sum() - among.trace()) / (len(a) * (len(a) - 1))

    return mean_of_others(x) + mean_of_others(y) - 2 * kernel(x, y).mean()
