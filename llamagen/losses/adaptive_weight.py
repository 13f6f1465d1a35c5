"""Balance of the adversarial term by gradients (arXiv 2012.09841, equation 7)."""

from collections.abc import Callable

import torch
from torch import Tensor

EPSILON = 1e-4
LARGEST = 1e4


def adaptive_weight(
    reconstruction_loss: Tensor,
    generator_loss: Tensor,
    last_weight: Tensor,
    mean_over_ranks: Callable[[Tensor], Tensor] | None = None,
    scale: float = 1.0,
) -> Tensor:
    """How much larger the gradient of the reconstruction is than the adversarial one, at the decoder's last weight.

    Args:
        reconstruction_loss: scalar, pixels and perceptual term, weighted.
        generator_loss: scalar, the generator's adversarial loss, unweighted.
        last_weight: weight of the decoder's last layer, any shape.
        mean_over_ranks: mean of a tensor over the ranks of a distributed run; the gradients are those of the global
            batch then.
        scale: both losses are multiplied by it for the backward pass, so that gradients survive in float16.

    Returns:
        Ratio of the norms (1e-4 added to the lower one) in [0, 1e4], a scalar without gradient; NaN if one of them is
        not finite.
    """
    gradients = torch.stack(
        [
            torch.autograd.grad(loss * scale, last_weight, retain_graph=True)[0].float() / scale
            for loss in (reconstruction_loss, generator_loss)
        ]
    )
    if mean_over_ranks is not None:
        gradients = mean_over_ranks(gradients)
    reconstruction, generator = gradients.flatten(1).norm(dim=1)
    ratio: Tensor = (reconstruction / (generator + EPSILON)).clamp(max=LARGEST)
    # An infinite norm is an overflow, not a reason for a weight of 0.
    return torch.where((reconstruction + generator).isfinite(), ratio, torch.nan).detach()
