"""Fréchet distance between two sets of pictures (arXiv 1706.08500). B pictures of H × W pixels, F features."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

SIDES = ("real", "fake")


class FrechetDistance(Metric):
    """Fréchet distance between Gaussians that are fitted to the features of real and of other pictures.

    Statistics are summed up in float64 and over all ranks. It is FID only with the features of Inception: with others
    say so.

    Args:
        features: turns pictures (B, 3, H, W), float32 with the whole numbers 0 … 255 of their files, into (B, F), or
            something that flattens to it. It is put into evaluation mode, frozen, and is in no state dict.
        image_size: side of a picture, to find out F.

    Raises:
        ValueError: if the module does not give a row of features for each picture.
    """

    full_state_update = False
    real_sum: Tensor
    real_outer: Tensor
    real_count: Tensor
    fake_sum: Tensor
    fake_outer: Tensor
    fake_count: Tensor

    def __init__(self, features: nn.Module, image_size: int) -> None:
        super().__init__()
        self._features = (features.eval().requires_grad_(False),)  # in a tuple, so that nn.Module does not see it
        width = self._extract(torch.zeros(2, 3, image_size, image_size, dtype=torch.float32)).shape[1]
        for side in SIDES:
            self.add_state(f"{side}_sum", torch.zeros(width, dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state(f"{side}_outer", torch.zeros(width, width, dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state(f"{side}_count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    # torchmetrics ignores `.half()`, but not the `.to(bfloat16)` by which Lightning turns a whole module to 16 bits.
    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        """Go along to another device, but not to another precision."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).device), exclude_state)

    @property
    def features(self) -> nn.Module:
        """The module that extracts features."""
        return self._features[0]

    @torch.no_grad()
    def _extract(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            features: Any = self.features.to(images.device)(images)
        if not isinstance(features, Tensor) or features.dim() < 2 or len(features) != len(images):
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f"{type(self.features).__name__} gives {shape} for {len(images)} pictures; it must give one row of "
                "features for each"
            )
        return features.flatten(1).double()

    def update(self, images: Tensor, real: bool) -> None:
        """Take pictures into the statistics of one side.

        Args:
            images: (B, 3, H, W) uint8.
            real: these are the pictures to compare with.

        Raises:
            ValueError: if they are not uint8 pictures, or have another number of features than those of
                ``image_size``.
        """
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(
                f"pictures must be uint8 of shape (B, 3, H, W), not {images.dtype} of {tuple(images.shape)}"
            )
        features = self._extract(images.float())
        if features.shape[1] != len(self.real_sum):
            raise ValueError(
                f"{type(self.features).__name__} gives {features.shape[1]} features for pictures of "
                f"{tuple(images.shape[2:])}, not {len(self.real_sum)} as for those of image_size"
            )
        side = SIDES[0] if real else SIDES[1]
        for name, value in (("sum", features.sum(0)), ("outer", features.T @ features), ("count", len(features))):
            setattr(self, f"{side}_{name}", getattr(self, f"{side}_{name}") + value)

    def compute(self) -> Tensor:
        """The distance, a float64 scalar.

        Raises:
            ValueError: if a side has fewer than two pictures.
        """
        (mean, covariance), (other_mean, other_covariance) = (self._statistics(side) for side in SIDES)
        return frechet_distance(mean, covariance, other_mean, other_covariance)

    def _statistics(self, side: str) -> tuple[Tensor, Tensor]:
        total, outer, count = (getattr(self, f"{side}_{name}") for name in ("sum", "outer", "count"))
        if count < 2:
            raise ValueError(f"{int(count)} {side} pictures are too few for a Fréchet distance; give at least two")
        mean = total / count
        return mean, (outer - count * torch.outer(mean, mean)) / (count - 1)


def frechet_distance(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> Tensor:
    """Squared Fréchet (2-Wasserstein) distance between two Gaussians.

    ``|μ − μ'|² + tr(Σ + Σ' − 2 (Σ Σ')^½)``. The trace of the root is the sum of the roots of the eigenvalues of
    ``Σ^½ Σ' Σ^½``, which is symmetric: exact also for singular covariances, of fewer pictures than features.

    Args:
        mean: μ, (F,) float64.
        covariance: Σ, (F, F) float64.
        other_mean: μ', (F,) float64.
        other_covariance: Σ', (F, F) float64.

    Returns:
        Scalar, float64, at least 0.
    """
    values, vectors = torch.linalg.eigh(covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ other_covariance @ root
    trace_of_root = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance: Tensor = (
        (mean - other_mean).square().sum() + covariance.trace() + other_covariance.trace() - 2 * trace_of_root
    )
    return distance.clamp(min=0)
