"""BatchNorm over the images of all ranks, on any device."""

import torch
from torch import Tensor, nn

from llamagen.distributed.across_ranks import sum_over_ranks, world_size


class SyncBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` with the statistics of the global batch in training; same state-dict entries.

    ``nn.SyncBatchNorm`` does this on GPUs only. With one process this equals ``nn.BatchNorm2d``.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, H, W) over B, H and W of all ranks; all of them must call it together."""
        if not self.training or world_size() == 1:
            return super().forward(x)
        assert self.momentum is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        with torch.autocast(x.device.type, enabled=False):
            # footgun: E[x²] − E[x]² cancels badly if the mean is large. Subtracting the running mean first, which all
            # ranks share, avoids it with a single reduction.
            shift = self.running_mean.float()
            values = x.float() - shift.view(1, -1, 1, 1)
            count = torch.full_like(shift[:1], x.numel() / x.shape[1])
            sums = sum_over_ranks(torch.cat([values.sum((0, 2, 3)), values.square().sum((0, 2, 3)), count]))
            first, second, total = sums.split([len(shift), len(shift), 1])
            mean = first / total
            variance = (second / total - mean.square()).clamp(min=0)
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                self.running_mean.copy_(shift + self.momentum * mean)
                self.running_var.copy_(
                    torch.lerp(self.running_var.float(), variance * total / (total - 1), self.momentum)
                )
            scale = (variance + self.eps).rsqrt() * self.weight
            normalised = (values - mean.view(1, -1, 1, 1)) * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)
        result: Tensor = normalised.to(x.dtype)
        return result
