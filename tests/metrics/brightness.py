"""An image metric outside of the project, like a user's own metric."""

import torch
from torch import Tensor, nn

from llamagen.metrics import Features
from llamagen.metrics.image_metric import ImageMetric
from llamagen.metrics.result_names import ResultName


class Brightness(ImageMetric):
    """Mean and maximum absolute difference between the mean features of two datasets."""

    symbol = "brightness"
    result_names = (ResultName("brightness", has_purpose=True), ResultName("brightness_max", has_reference=False))
    reference_part = "features"
    sums: Tensor
    count: Tensor

    def __init__(self, features: nn.Module, image_size: int, reference: Tensor | None = None) -> None:
        super().__init__(features, image_size, reference)
        self.add_state("sums", torch.zeros(self.width, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")

    def checked_reference(self, reference: Tensor) -> Tensor:
        return reference.double().mean(0)

    def update(self, images: Tensor | Features, real: bool = False, index: Tensor | None = None) -> None:
        if not real:
            rows = self.rows(images).double()
            self.sums += rows.sum(0)
            self.count += len(rows)

    def compute(self) -> tuple[Tensor, Tensor]:
        differences = (self.sums / self.count - self.reference.to(self.sums)).abs()
        return differences.mean(), differences.max()

    def caveats(self) -> list[str]:
        return [f"brightness of {int(self.count)} images"]
