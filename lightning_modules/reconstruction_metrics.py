"""How much of pictures is left after encoding and decoding. B batch, H × W pixels, h × w code grid."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from llamagen.metrics import CodebookStatistics, CodebookUsage, FrechetDistance
from llamagen.models.vqgan import to_uint8

PIXELS = (1, 2, 3)


class ReconstructionMetrics(nn.Module):
    """PSNR, SSIM, codebook usage and, if asked for, rFID over a whole set of pictures and all ranks.

    PSNR and SSIM are means over pictures, as the paper's are, on pixels in [0, 1], so with a data range of 1. (The
    paper's SSIM was taken with a data range of 2, which makes it larger.)

    Args:
        codebook_size: number of codes.
        rfid_features: module that turns pictures (B, 3, H, W), float32 in 0 … 255, into features (B, F) whose
            Fréchet distance is measured; None for no rFID.
    """

    def __init__(self, codebook_size: int, rfid_features: nn.Module | None = None) -> None:
        super().__init__()
        self.psnr = PeakSignalNoiseRatio(data_range=1.0, dim=PIXELS)
        self.ssim = StructuralSimilarityIndexMeasure(data_range=1.0)
        self.codebook_usage = CodebookUsage(codebook_size)
        # In tuples, so that nn.Module does not see them: they are in no state dict.
        self._rfid_features = () if rfid_features is None else (rfid_features,)
        self._rfid: tuple[FrechetDistance, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Go along to another device, but not to another precision: sums over a set need theirs."""
        moved: nn.Module = super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).device), recurse)
        return moved

    def prepare(self, image_size: int | None) -> None:
        """Get rFID ready for pictures of this side in pixels.

        Raises:
            ValueError: if rFID is asked for and the size is not known.
        """
        if not self._rfid_features:
            return
        if image_size is None:
            raise ValueError("rfid_features needs a DataModule with an image_size")
        self._rfid = (FrechetDistance(self._rfid_features[0], image_size),)

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
        for rfid in self._rfid:
            rfid.to(images.device)
            rfid.update(to_uint8(images), real=True)
            rfid.update(to_uint8(reconstruction), real=False)

    def finish(self) -> tuple[dict[str, Tensor], CodebookStatistics]:
        """Numbers by name, and what became of the codes; all is forgotten then. All ranks must call it together.

        The name of rFID says over which features it is.
        """
        numbers: dict[str, Tensor] = {"psnr": self.psnr.compute(), "ssim": self.ssim.compute()}  # type: ignore[dict-item]
        for rfid in self._rfid:
            numbers[f"rfid_{type(rfid.features).__name__}"] = rfid.compute().float()
        usage: CodebookStatistics = self.codebook_usage.compute()
        with torch.inference_mode(
            False
        ):  # an evaluation may be followed by a training, which cannot write to its tensors
            for metric in (self.psnr, self.ssim, self.codebook_usage, *self._rfid):
                metric.reset()
        return numbers, usage
