"""LeCAM regularisation of the discriminator, for small datasets (arXiv 2104.03310)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DECAY = 0.99


class LeCAM(nn.Module):
    """Pulls logits of real images to the average logit of fake images, and vice versa.

    The averages are exponential moving averages (decay 0.99) of the mean logits, initialised with the first batch. They
    are buffers, so they are saved and restored with the run.
    """

    real: Tensor
    fake: Tensor
    started: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("real", "fake", "started"):
            self.register_buffer(name, torch.zeros(()))

    @torch.no_grad()
    def update(self, real: Tensor, fake: Tensor) -> None:
        """Update the averages with the mean logits of a batch over all ranks, scalars."""
        weight = torch.where(self.started > 0, 1.0 - DECAY, 1.0)
        self.real.lerp_(real.float(), weight)
        self.fake.lerp_(fake.float(), weight)
        self.started.fill_(1.0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Move to another device, but stay in float32: in 16 bits, small updates of the averages would round to 0."""
        moved: nn.Module = super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).device), recurse)
        return moved

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """``mean(relu(real − average fake)²) + mean(relu(average real − fake)²)`` of logits of any shape, a scalar."""
        above = F.relu(real.float() - self.fake).square().mean()
        below = F.relu(self.real - fake.float()).square().mean()
        return above + below
