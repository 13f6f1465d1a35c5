"""KID: kernel distance between image datasets. B images of H × W pixels, N and M in total, F features."""

import torch
from torch import Tensor, nn

from llamagen.metrics.image_metric import ComparingRowMetric
from llamagen.metrics.inception_score import SplitStatistics
from llamagen.metrics.result_names import ResultName


class KID(ComparingRowMetric):
    """Kernel Inception Distance (arXiv 1801.01401): squared MMD with the kernel ``(x·y / F + 1)³``.

    The estimate is unbiased, so it also suits few images. It is averaged over random subsets, which depend only on the
    seed and the number of images.

    Args:
        features: extractor, see :class:`~llamagen.metrics.image_metric.ImageMetric`.
        image_size: side of the images in pixels.
        reference: features (M, F) of real images; None if real images are passed to ``update``.
        subsets: number of subsets.
        subset_size: images of each side in a subset; all images if there are fewer.
        seed: seed of the subsets.

    Raises:
        ValueError: if the module is not an extractor, an option is too small, or the reference has another width.
    """

    symbol = "kid"
    result_names = (ResultName("kid", has_purpose=True), ResultName("kid_std", has_purpose=True))

    def __init__(
        self,
        features: nn.Module,
        image_size: int,
        reference: Tensor | None = None,
        subsets: int = 100,
        subset_size: int = 1000,
        seed: int = 0,
    ) -> None:
        super().__init__(features, image_size, reference)
        if subsets < 1 or subset_size < 2:
            raise ValueError(
                f"subsets is {subsets} and subset_size {subset_size}; they must be at least 1 and at least 2"
            )
        self.subsets, self.subset_size, self.seed = subsets, subset_size, seed

    def compute(self) -> SplitStatistics:
        """Mean and standard deviation over the subsets, float64. Around 0 for equal distributions; may be negative.

        Raises:
            ValueError: if a side has fewer than two images.
        """
        fake, real = self.both_sides()
        generator = torch.Generator().manual_seed(self.seed)
        discrepancies = []
        for _ in range(self.subsets):
            parts = [
                rows[torch.randperm(len(rows), generator=generator)[: self.subset_size].to(rows.device)].double()
                for rows in (real, fake)
            ]
            discrepancies.append(squared_discrepancy(*parts))
        distances = torch.stack(discrepancies)
        return SplitStatistics(distances.mean(), distances.std(correction=0))


def squared_discrepancy(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased squared maximum mean discrepancy of features (N, F) and (M, F), with the kernel of KID."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def mean_of_others(a: Tensor) -> Tensor:
        pairs = kernel(a, a)
        return (pairs.sum() - pairs.trace()) / (len(a) * (len(a) - 1))

    return mean_of_others(x) + mean_of_others(y) - 2 * kernel(x, y).mean()
