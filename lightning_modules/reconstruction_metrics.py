"""Metrics of reconstructions. B batch, H × W pixels, h × w code grid."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from llamagen.metrics import CodebookStatistics, CodebookUsage

PIXELS = (1, 2, 3)


class ReconstructionMetrics(nn.Module):
    """PSNR, SSIM and codebook usage over a dataset and all ranks.

    PSNR and SSIM are means over images, as in the paper, on pixels in [0, 1] with a data range of 1. (The paper's SSIM
    uses a data range of 2, which gives larger values.)

    Args:
        codebook_size: number of codes.
    """

    def __init__(self, codebook_size: int) -> None:
        super().__init__()
        self.psnr = PeakSignalNoiseRatio(data_range=1.0, dim=PIXELS)
        self.ssim = StructuralSimilarityIndexMeasure(data_range=1.0)
        self.codebook_usage = CodebookUsage(codebook_size)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Move to another device, but keep the dtype: sums over a dataset need its precision."""
        moved: nn.Module = super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).device), recurse)
        return moved

    def update(self, images: Tensor, reconstruction: Tensor, codes: Tensor) -> None:
        """Add a batch.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            reconstruction: (B, 3, H, W), will be clamped to [-1, 1].
            codes: (B, h, w) int64.
        """
        with torch.autocast(images.device.type, enabled=False):
            reconstructed, original = ((x.float().clamp(-1, 1) + 1) / 2 for x in (reconstruction, images))
            self.psnr.update(reconstructed, original)
            self.ssim.update(reconstructed, original)
        self.codebook_usage.update(codes)

    def finish(self) -> tuple[dict[str, Tensor], CodebookStatistics]:
        """Metrics by name, and codebook statistics; then reset. All ranks must call it together."""
        values: dict[str, Tensor] = {"psnr": self.psnr.compute(), "ssim": self.ssim.compute()}  # type: ignore[dict-item]
        usage: CodebookStatistics = self.codebook_usage.compute()
        # footgun: tensors created in inference mode cannot be written by a training that follows.
        with torch.inference_mode(False):
            for metric in (self.psnr, self.ssim, self.codebook_usage):
                metric.reset()
        return values, usage
