"""The tokenizer's loss without the adversarial term. B batch, H × W pixels."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.adversarial import Terms
from lightning_modules.vqgan_config import VQGANLossConfig
from llamagen.models.lpips import LPIPS
from llamagen.models.quantizer import Quantizer
from llamagen.models.vqgan import VQGANOutput

QUANTIZER_WEIGHTS = ("codebook", "commitment", "entropy")
"""Losses of quantisers whose weights are options of the configuration."""
WEIGHTED = ("reconstruction", "perceptual", *QUANTIZER_WEIGHTS)
RESERVED = (
    *("reconstruction", "perceptual", "lpips", "adversarial", "generator", "discriminator", "lecam"),
    *("adaptive_weight", "logits_real", "logits_fake", "loss", "psnr", "ssim", "codebook_usage", "codebook_perplexity"),
    *("lr", "revived_codes", "grad_norm_vqgan", "grad_norm_discriminator"),
)
"""Names of logged values that a quantiser's loss must not use."""


def configure_quantizer_losses(quantizer: Quantizer, config: VQGANLossConfig) -> None:
    """Pass the weights of the losses to the quantiser, and check the names of its losses.

    Raises:
        ValueError: in one line, if a name is taken, or the entropy loss has a weight but the quantiser has no such
            loss.
    """
    quantizer.set_loss_weights({name: getattr(config, f"{name}_weight") for name in QUANTIZER_WEIGHTS})
    kind, names = type(quantizer).__name__, quantizer.loss_names
    if taken := [name for name in names if name in RESERVED]:
        raise ValueError(f"{kind}.loss_names has {taken[0]!r}, the name of another logged value; rename the loss")
    if config.entropy_weight > 0 and "entropy" not in names:
        raise ValueError(f"loss.entropy_weight is {config.entropy_weight}, but {kind} has no entropy loss; set it to 0")


def generator_loss(
    config: VQGANLossConfig, images: Tensor, output: VQGANOutput, lpips: LPIPS | None
) -> tuple[Tensor, Terms]:
    """Sum the weighted terms: pixels, the quantiser's losses and, with ``lpips``, the perceptual distance.

    Args:
        config: terms and weights. Losses of the quantiser without a weight in it have the weight 1.
        images: (B, 3, H, W) in [-1, 1].
        output: their reconstruction.
        lpips: None to leave the perceptual term out.

    Returns:
        The loss, a scalar, and its unweighted terms.
    """
    difference = F.mse_loss if config.reconstruction == "l2" else F.l1_loss
    terms = {"reconstruction": difference(output.reconstruction.float(), images.float()), **output.encoding.losses}
    if lpips is not None:
        terms["perceptual"] = lpips.to(images.device)(output.reconstruction, images).mean()
    weights = {name: getattr(config, f"{name}_weight") if name in WEIGHTED else 1.0 for name in terms}
    loss = sum((weights[name] * value for name, value in terms.items()), torch.zeros(()))
    return loss, terms
