"""A straightforward training step of the tokenizer, which ``benchmarks/tokenizer_step.py`` compares with ours.

Eager, with contiguous tensors, the full matrix of distances, attention with an explicit softmax, two optimizers with
a backward pass each, and the average as a second copy of the model. Weights and loss are the same as ours.
"""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import convert_conv2d_weight_memory_format

from llamagen.losses import hinge_discriminator_loss, hinge_generator_loss
from llamagen.models.discriminator import PatchGAN
from llamagen.models.lpips import LPIPS
from llamagen.models.vqgan import VQGAN, AttentionBlock

Network = TypeVar("Network", bound=nn.Module)


class PlainAttention(AttentionBlock):
    """Attention over positions with the full matrix of weights."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        batch, channels, height, width = x.shape
        y = self.norm(x)
        q, k, v = self.q(y).flatten(2), self.k(y).flatten(2), self.v(y).flatten(2)
        weights = (q.transpose(1, 2) @ k * channels**-0.5).softmax(dim=-1)
        attended = (v @ weights.transpose(1, 2)).view(batch, channels, height, width)
        result: Tensor = x + self.proj_out(attended)
        return result


def quantize(latent: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest entries (B, E, h, w) by the full matrix of squared distances, and the sum of both losses."""
    z, codebook = F.normalize(latent.float(), dim=1), F.normalize(embedding, dim=-1)
    rows = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
    distances = rows.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * rows @ codebook.T
    entries = codebook[distances.argmin(dim=1)].view(z.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
    loss = (entries - z.detach()).square().mean() + 0.25 * (entries.detach() - z).square().mean()
    return z + (entries - z).detach(), loss


def contiguous(network: Network) -> Network:
    """Convert a network to the contiguous memory format."""
    convert_conv2d_weight_memory_format(network, torch.contiguous_format)
    return network


class PlainStep:
    """Both networks, their optimizers, and a step.

    Args:
        vqgan: tokenizer to copy.
        discriminator: discriminator to copy.
        lpips: perceptual distance.
    """

    def __init__(self, vqgan: VQGAN, discriminator: PatchGAN, lpips: LPIPS) -> None:
        self.vqgan = contiguous(copy.deepcopy(vqgan)).train()
        self.discriminator = contiguous(copy.deepcopy(discriminator)).train()
        self.lpips = contiguous(copy.deepcopy(lpips))
        for module in self.vqgan.modules():
            if isinstance(module, AttentionBlock):
                module.__class__ = PlainAttention
        self.average = copy.deepcopy(self.vqgan)
        self.optimizers = [
            torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0)
            for network in (self.vqgan, self.discriminator)
        ]

    def reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstructions and the quantiser's loss."""
        latent = self.vqgan.quant_conv(self.vqgan.encoder(images))
        with torch.autocast(images.device.type, enabled=False):
            quantized, loss = quantize(latent, self.vqgan.quantize.get_parameter("embedding.weight"))
        return self.vqgan.decoder(self.vqgan.post_quant_conv(quantized)), loss

    def __call__(self, images: Tensor, autocast: torch.autocast) -> None:
        """One step of both networks on (B, 3, H, W) in [-1, 1]."""
        generator_optimizer, discriminator_optimizer = self.optimizers
        generator_optimizer.zero_grad()
        with autocast:
            reconstruction, loss = self.reconstruct(images)
            loss = loss + F.mse_loss(reconstruction.float(), images)
            loss = loss + self.lpips(reconstruction, images).mean()
            loss = loss + 0.5 * hinge_generator_loss(self.discriminator(reconstruction).float())
        loss.backward()
        nn.utils.clip_grad_norm_(self.vqgan.parameters(), 1.0)
        generator_optimizer.step()
        with torch.no_grad():
            for average, parameter in zip(self.average.parameters(), self.vqgan.parameters(), strict=True):
                average.mul_(0.9999).add_(parameter, alpha=0.0001)
        discriminator_optimizer.zero_grad()
        with autocast:
            real, fake = self.discriminator(images), self.discriminator(reconstruction.detach())
            loss = hinge_discriminator_loss(real.float(), fake.float())
        loss.backward()
        nn.utils.clip_grad_norm_(self.discriminator.parameters(), 1.0)
        discriminator_optimizer.step()
