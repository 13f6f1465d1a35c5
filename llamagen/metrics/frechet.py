"""FID and sFID: Fréchet distances between image datasets. B images of H × W pixels, F features."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llamagen.finite import is_finite
from llamagen.metrics.features import Features, extractor_name
from llamagen.metrics.image_metric import SIDES, ImageMetric, ReferencePart, side_name
from llamagen.metrics.result_names import ResultName

Statistics = tuple[Tensor | Any, Tensor | Any]
"""Mean (F,) and covariance (F, F), tensors or arrays."""


class FID(ImageMetric):
    """Fréchet Inception Distance (arXiv 1706.08500): distance of Gaussians fitted to the features of two datasets.

    Statistics are summed in float64 over all ranks. With an extractor other than Inception the values differ from
    published FIDs, so the metric's ``name`` then includes the extractor.

    Args:
        features: extractor, see :class:`~llamagen.metrics.image_metric.ImageMetric`.
        image_size: side of the images in pixels.
        reference: mean (F,) and covariance (F, F) of the real images; None if real images are passed to ``update``.

    Attributes:
        count: number of images in the last :meth:`compute`, over all ranks.

    Raises:
        ValueError: if the module is not an extractor, or the reference has another width or is not finite.
    """

    symbol = "fid"
    result_names: ClassVar[tuple[ResultName, ...]] = (ResultName("fid", has_purpose=True),)
    reference_part: ClassVar[ReferencePart | None] = "statistics"
    reference: tuple[Tensor, Tensor] | None
    count = 0
    real_sum: Tensor
    real_outer: Tensor
    real_count: Tensor
    fake_sum: Tensor
    fake_outer: Tensor
    fake_count: Tensor

    def __init__(self, features: nn.Module, image_size: int, reference: Statistics | None = None) -> None:
        super().__init__(features, image_size, reference)
        for side in SIDES:
            self.add_state(f"{side}_sum", torch.zeros(self.width, dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state(
                f"{side}_outer", torch.zeros(self.width, self.width, dtype=torch.float64), dist_reduce_fx="sum"
            )
            self.add_state(f"{side}_count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def checked_reference(self, reference: Statistics) -> tuple[Tensor, Tensor]:
        """The reference's mean and covariance in float64.

        Raises:
            ValueError: if they have another width than the features, or are not finite.
        """
        mean, covariance = (torch.as_tensor(part).double() for part in reference)
        if (mean.shape, covariance.shape) != ((self.width,), (self.width, self.width)):
            raise ValueError(
                f"the reference has a mean of {tuple(mean.shape)} and a covariance of {tuple(covariance.shape)}, "
                f"but {self.name} has {self.width} features; use the reference of this extractor"
            )
        if not (is_finite(mean) and is_finite(covariance)):
            raise ValueError("mean or covariance of the reference are not finite; get or make it again")
        return mean, covariance

    def update(self, images: Tensor | Features, real: bool = False, index: Tensor | None = None) -> None:
        """Add images to the statistics of one side.

        Args:
            images: (B, 3, H, W) uint8, or their features.
            real: whether these are the real images, with which the others are compared.
            index: not used, because the statistics do not depend on the order.

        Raises:
            ValueError: if they are not uint8 images of the metric's size, or are real although there is a reference.
        """
        self._check_side(real)
        rows, side = self.rows(images).double(), side_name(real)
        for name, value in (("sum", rows.sum(0)), ("count", len(rows))):
            setattr(self, f"{side}_{name}", getattr(self, f"{side}_{name}") + value)
        # In place: allocating 33 MB for each batch fragments the heap on CPUs.
        outer: Tensor = getattr(self, f"{side}_outer")
        if outer.is_inference() and not torch.is_inference_mode_enabled():
            outer = outer.clone()
        setattr(self, f"{side}_outer", outer.addmm_(rows.T, rows))

    def compute(self) -> Tensor:
        """The distance, a float64 scalar.

        Raises:
            ValueError: if a side has fewer than two images.
        """
        self.count = int(self.fake_count)
        fake = self.statistics(real=False)
        real = self.statistics(real=True) if self.reference is None else self.reference
        mean, covariance = (part.to(fake[0].device) for part in real)
        return frechet_distance(mean, covariance, *fake)

    def statistics(self, real: bool) -> tuple[Tensor, Tensor]:
        """Mean (F,) and covariance (F, F) of a side, float64; of this rank's images only, unless states are synced.

        Raises:
            ValueError: if the side has fewer than two images.
        """
        side = side_name(real)
        total, outer, count = (getattr(self, f"{side}_{name}") for name in ("sum", "outer", "count"))
        if count < 2:
            raise ValueError(f"{int(count)} {side} images are too few for {self.name}; give at least two")
        mean = total / count
        return mean, (outer - count * torch.outer(mean, mean)) / (count - 1)

    def caveats(self) -> list[str]:
        """A warning if there were fewer images than features, because FID is then far too large."""
        if self.count >= self.width:
            return []
        return [
            f"{self.count} images are fewer than the {self.width} features of {extractor_name(self.extractor)}, which "
            "makes FID far too large; compare it only with an FID of the same number of images, or measure more "
            "(publications use 50,000)"
        ]


class SFID(FID):
    """FID of features that keep the spatial layout (arXiv 2103.03841, appendix).

    With Inception these are the first 7 channels of ``mixed_6/conv``, 17 × 17 × 7 = 2023 features. Arguments and errors
    are those of :class:`FID`.
    """

    symbol = "sfid"
    result_names = (ResultName("sfid", has_purpose=True),)
    part = "spatial"
    reference_part = "spatial_statistics"

    def caveats(self) -> list[str]:
        """None: with too few images FID already warns."""
        return []


def frechet_distance(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> Tensor:
    """Squared Fréchet (2-Wasserstein) distance between two Gaussians.

    ``|μ − μ'|² + tr(Σ + Σ' − 2 (Σ Σ')^½)``. With Σ = A Aᵀ and Σ' = B Bᵀ the trace of the root is the sum of the
    singular values of Aᵀ B. This stays exact for singular covariances, which come from fewer images than features: a
    matrix root would take roots of eigenvalues that are zero up to rounding.

    Args:
        mean: μ, (F,) float64.
        covariance: Σ, (F, F) float64, symmetric.
        other_mean: μ', (F,) float64.
        other_covariance: Σ', (F, F) float64.

    Returns:
        Scalar, float64, at least 0.

    Raises:
        FloatingPointError: if an argument is not finite.
    """
    for name, value in (("mean", mean + other_mean), ("covariance", covariance + other_covariance)):
        if not value.isfinite().all():
            raise FloatingPointError(
                f"the {name} of features is not finite (precision float64); check the images and the extractor"
            )
    trace_of_root = torch.linalg.svdvals(_factor(covariance).T @ _factor(other_covariance)).sum()
    distance: Tensor = (
        (mean - other_mean).square().sum() + covariance.trace() + other_covariance.trace() - 2 * trace_of_root
    )
    return distance.clamp(min=0)


def _factor(covariance: Tensor) -> Tensor:
    """A (F, R) with A Aᵀ = Σ, where R is the numerical rank of Σ."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    positive = values > values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    factor: Tensor = vectors[:, positive] * values[positive].sqrt()
    return factor
