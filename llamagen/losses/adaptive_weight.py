"""Adaptive weight of the adversarial loss (arXiv 2012.09841, equation 7)."""

from collections.abc import Callable

import torch
from torch import Tensor

EPSILON = 1e-4
MAX_WEIGHT = 1e4


def adaptive_weight(
    reconstruction_loss: Tensor,
    generator_loss: Tensor,
    last_weight: Tensor,
    mean_over_ranks: Callable[[Tensor], Tensor] | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Ratio of the gradient norms of reconstruction and adversarial loss at the decoder's last weight.

    Args:
        reconstruction_loss: weighted sum of pixel and perceptual loss, a scalar.
        generator_loss: unweighted adversarial loss of the generator, a scalar.
        last_weight: weight of the decoder's last layer, any shape.
        mean_over_ranks: averages a tensor over the ranks of a distributed run, for the gradients of the global batch.
        scale: loss scale for the two backward passes, against underflow in float16.

    Returns:
        Ratio of the norms, with 1e-4 added to the denominator, in [0, 1e4]; a scalar without gradient. NaN if a norm
        is not finite.
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
    ratio: Tensor = (reconstruction / (generator + EPSILON)).clamp(max=MAX_WEIGHT)
    # footgun: an overflow of the denominator alone would give a weight of 0.
    return torch.where((reconstruction + generator).isfinite(), ratio, torch.nan).detach()
