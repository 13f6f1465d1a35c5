"""How much of images is left after encoding and decoding. B batch, H × W pixels, h × w code grid."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from llamagen.metrics import CodebookStatistics, CodebookUsage

PIXELS = (1, 2, 3)


class ReconstructionMetrics(nn.Module):
    """PSNR, SSIM and codebook usage over a whole set of images and all ranks.

    PSNR and SSIM are means over images, as the paper's are, on pixels in [0, 1], so with a data range of 1. (The
    paper's SSIM was taken with a data range of 2, which makes it larger.)

    Args:
        codebook_size: number of codes.
    """

    def __init__(self, codebook_size: int) -> None:
        super().__init__()
        self.psnr = PeakSignalNoiseRatio(data_range=1.0, dim=PIXELS)
        self.ssim = StructuralSimilarityIndexMeasure(data_range=1.0)
        self.codebook_usage = CodebookUsage(codebook_size)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Go along to another device, but not to another precision: sums over a set need theirs."""
        moved: nn.Module = super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).device), recurse)
        return moved

    def update(self, images: Tensor, reconstruction: Tensor, codes: Tensor) -> None:
        """Take a batch into account.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            reconstruction: (B, 3, H, W), clamped to [-1, 1] here.
            codes: (B, h, w) int64.
        """
        with torch.autocast(images.device.type, enabled=False):
            found, wanted = ((x.float().clamp(-1, 1) + 1) / 2 for x in (reconstruction, images))
            self.psnr.update(found, wanted)
            self.ssim.update(found, wanted)
        self.codebook_usage.update(codes)

    def finish(self) -> tuple[dict[str, Tensor], CodebookStatistics]:
        """Numbers by name, and what became of the codes; all is forgotten then. All ranks must call it together."""
        numbers: dict[str, Tensor] = {"psnr": self.psnr.compute(), "ssim": self.ssim.compute()}  # type: ignore[dict-item]
        usage: CodebookStatistics = self.codebook_usage.compute()
        with torch.inference_mode(
            False
        ):  # an evaluation may be followed by a training, which cannot write to its tensors
            for metric in (self.psnr, self.ssim, self.codebook_usage):
                metric.reset()
        return numbers, usage
