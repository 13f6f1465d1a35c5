"""FID and sFID: Fréchet distances between sets of images. B images of H × W pixels, F features."""

from typing import Any

import torch
from torch import Tensor, nn

from llamagen.finite import is_finite
from llamagen.metrics.features import Features
from llamagen.metrics.image_metric import SIDES, ImageMetric, side_of


class FID(ImageMetric):
    """Fréchet distance between Gaussians that are fitted to the features of real and of other images.

    (arXiv 1706.08500.) Statistics are summed up in float64 and over all ranks. Only with the features of Inception it
    is what people call FID; with others its ``name`` says so.

    Args:
        features: extractor, see :class:`~llamagen.metrics.image_metric.ImageMetric`.
        image_size: side of the images in pixels.
        reference: mean (F,) and covariance (F, F) of the real images, if they are known; else these are shown to
            ``update``.

    Attributes:
        seen: how many images the last :meth:`compute` compared, over all ranks.

    Raises:
        ValueError: if the extractor is none, or the reference has another number of features or is not finite.
    """

    symbol = "fid"
    seen = 0
    real_sum: Tensor
    real_outer: Tensor
    real_count: Tensor
    fake_sum: Tensor
    fake_outer: Tensor
    fake_count: Tensor

    def __init__(
        self, features: nn.Module, image_size: int, reference: tuple[Tensor | Any, Tensor | Any] | None = None
    ) -> None:
        super().__init__(features, image_size)
        self.reference = None
        if reference is not None:
            mean, covariance = (torch.as_tensor(part).double() for part in reference)
            shapes = (self.width,), (self.width, self.width)
            if (mean.shape, covariance.shape) != shapes:
                raise ValueError(
                    f"the reference has a mean of {tuple(mean.shape)} and a covariance of {tuple(covariance.shape)}, "
                    f"but {self.name} has {self.width} features; use the reference of this extractor"
                )
            if not (is_finite(mean) and is_finite(covariance)):
                raise ValueError("mean or covariance of the reference are not finite; get or make it again")
            self.reference = mean, covariance
        for side in SIDES:
            self.add_state(f"{side}_sum", torch.zeros(self.width, dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state(
                f"{side}_outer", torch.zeros(self.width, self.width, dtype=torch.float64), dist_reduce_fx="sum"
            )
            self.add_state(f"{side}_count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, images: Tensor | Features, real: bool = False) -> None:
        """Take images into the statistics of one side.

        Args:
            images: (B, 3, H, W) uint8, or their features.
            real: these are the images to compare with.

        Raises:
            ValueError: if they are no uint8 images of the metric's size, or real ones where a reference is known.
        """
        if real and self.reference is not None:
            raise ValueError("real images were given, but the metric has a reference; leave one of them out")
        rows, side = self.rows(images).double(), side_of(real)
        for name, value in (("sum", rows.sum(0)), ("count", len(rows))):
            setattr(self, f"{side}_{name}", getattr(self, f"{side}_{name}") + value)
        # In place: matrices of 33 MB that come and go with each batch spoil the memory of CPUs.
        outer: Tensor = getattr(self, f"{side}_outer")
        if outer.is_inference() and not torch.is_inference_mode_enabled():
            outer = outer.clone()
        setattr(self, f"{side}_outer", outer.addmm_(rows.T, rows))

    def compute(self) -> Tensor:
        """The distance, a float64 scalar.

        Raises:
            ValueError: if a side has fewer than two images.
        """
        self.seen = int(self.fake_count)
        fake = self.statistics(real=False)
        real = self.statistics(real=True) if self.reference is None else self.reference
        mean, covariance = (part.to(fake[0].device) for part in real)
        return frechet_distance(mean, covariance, *fake)

    def statistics(self, real: bool) -> tuple[Tensor, Tensor]:
        """Mean (F,) and covariance (F, F) of a side, float64; of this rank's images, unless states are in sync.

        Raises:
            ValueError: if it has fewer than two images.
        """
        side = side_of(real)
        total, outer, count = (getattr(self, f"{side}_{name}") for name in ("sum", "outer", "count"))
        if count < 2:
            raise ValueError(f"{int(count)} {side} images are too few for {self.name}; give at least two")
        mean = total / count
        return mean, (outer - count * torch.outer(mean, mean)) / (count - 1)


class SFID(FID):
    """FID over features that know where in an image something is (arXiv 2103.03841, appendix).

    With Inception these are the first 7 channels of ``mixed_6/conv``, 17 × 17 × 7 = 2023 numbers. Arguments and errors
    are those of :class:`FID`.
    """

    symbol = "sfid"
    part = "spatial"


def frechet_distance(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> Tensor:
    """Squared Fréchet (2-Wasserstein) distance between two Gaussians.

    ``|μ − μ'|² + tr(Σ + Σ' − 2 (Σ Σ')^½)``. With Σ = A Aᵀ and Σ' = B Bᵀ the trace of the root is the sum of the
    singular values of Aᵀ B. So no root is taken of what rounding has left of a zero: this is exact also for singular
    covariances, of fewer images than features, where the root of the product is not.

    Args:
        mean: μ, (F,) float64.
        covariance: Σ, (F, F) float64, symmetric.
        other_mean: μ', (F,) float64.
        other_covariance: Σ', (F, F) float64.

    Returns:
        Scalar, float64, at least 0.

    Raises:
        FloatingPointError: if something is not finite.
    """
    for name, value in (("mean", mean + other_mean), ("covariance", covariance + other_covariance)):
        if not value.isfinite().all():
            raise FloatingPointError(f"the {name} of features is not finite (precision float64); see what they are of")
    trace_of_root = torch.linalg.svdvals(_factor(covariance).T @ _factor(other_covariance)).sum()
    distance: Tensor = (
        (mean - other_mean).square().sum() + covariance.trace() + other_covariance.trace() - 2 * trace_of_root
    )
    return distance.clamp(min=0)


def _factor(covariance: Tensor) -> Tensor:
    """A (F, R) with A Aᵀ = Σ of rank R, as far as rounding tells."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    some = values > values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    factor: Tensor = vectors[:, some] * values[some].sqrt()
    return factor
