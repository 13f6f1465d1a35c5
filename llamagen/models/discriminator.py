"""Discriminators of the tokenizer's adversarial loss. B batch, H × W pixels; logits are positive for real."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from math import ceil
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from llamagen.distributed.sync_batch_norm import SyncBatchNorm2d
from llamagen.models.dino import DINO, HEAD_DIM, WEIGHTS, read_dino
from llamagen.option_checks import check_integer

LEAK = 0.2
STYLEGAN_WIDTHS = {64: 256, 128: 128, 256: 64, 512: 32, 1024: 16}
"""Channels at each resolution; 512 at lower ones."""
GROUPS = 32
HEAD_SIZE = 9
"""Tokens that a head reads for a logit."""
MIN_DINO_SIZE = 16


class Discriminator(nn.Module):
    """Classifies images as real or fake."""

    def fetch(self) -> None:
        """Download the files that :meth:`load` reads; called before training, in one process per machine."""

    def load(self) -> None:
        """Read the weights of networks that are not trained; called before training, in each process."""

    @abstractmethod
    def check_size(self, size: int) -> None:
        """Check the size of the images.

        Args:
            size: side in pixels.

        Raises:
            ValueError: in one line with the supported sizes, if this one is not supported.
        """

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] → logits (B, …)."""


class PatchGAN(Discriminator):
    """Classifies overlapping patches of an image (arXiv 1611.07004), with BatchNorm over the batches of all ranks.

    Args:
        channels: channels of the first convolution; each further one has twice as many, up to eight times the first.
        num_layers: convolutions of stride 2 after the first; use fewer for small images.
    """

    def __init__(self, channels: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        if channels < 1 or num_layers < 1:
            raise ValueError(f"channels {channels} and num_layers {num_layers} must both be at least 1")
        check_integer("channels", channels)
        check_integer("num_layers", num_layers)
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(LEAK)]
        width = channels
        for index in range(1, num_layers + 1):
            wider = channels * min(2**index, 8)
            layers += [
                nn.Conv2d(width, wider, 4, stride=2 if index < num_layers else 1, padding=1, bias=False),
                SyncBatchNorm2d(wider),
                nn.LeakyReLU(LEAK),
            ]
            width = wider
        self.main = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, padding=1))
        self.min_size = 2 ** (num_layers + 1) + 2**num_layers
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise convolutions with normal(0, 0.02), norms with normal(1, 0.02), biases of norms with zero."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)
                nn.init.zeros_(module.bias)

    def check_size(self, size: int) -> None:
        """Raise a ValueError for images smaller than a patch."""
        if size < self.min_size:
            raise ValueError(
                f"images have {size} px, but the discriminator needs at least {self.min_size}, with {self._depth} "
                "layers of stride 2; lower model.init_args.discriminator.init_args.num_layers"
            )

    @property
    def _depth(self) -> int:
        return sum(isinstance(layer, nn.Conv2d) and layer.stride == (2, 2) for layer in self.main)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of patches: (B, 3, H, W) in [-1, 1] → (B, 1, h, w).

        Raises:
            ValueError: if the image is smaller than a patch.
        """
        self.check_size(min(images.shape[2:]))
        return cast(Tensor, self.main(images))


class Blur(nn.Module):
    """Blurs with [1, 2, 1] along both axes, with reflected borders."""

    f: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("f", torch.tensor([1.0, 2.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → same shape."""
        from kornia.filters import filter2d  # imported here because the import is slow

        return filter2d(x, torch.outer(self.f, self.f).to(x.dtype)[None], "reflect", normalized=True)


class StyleGANBlock(nn.Module):
    """Halves the resolution: two convolutions, blur and a strided convolution, plus a 1×1 shortcut."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv_res = nn.Conv2d(in_channels, out_channels, 1, stride=2)
        self.net = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
            nn.LeakyReLU(LEAK),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
            nn.LeakyReLU(LEAK),
        )
        self.downsample = nn.Sequential(Blur(), nn.Conv2d(out_channels, out_channels, 3, padding=1, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) → (B, out, H / 2, W / 2)."""
        return cast(Tensor, (self.downsample(self.net(x)) + self.conv_res(x)) * 0.5**0.5)


class StyleGAN(Discriminator):
    """The discriminator of StyleGAN (arXiv 1912.04958), which classifies full images of one size.

    Args:
        image_size: side of the images in pixels, a power of two from 8 to 1024.
    """

    def __init__(self, image_size: int = 256) -> None:
        super().__init__()
        if image_size not in (1 << power for power in range(3, 11)):
            raise ValueError(f"image_size is {image_size}; StyleGAN needs a power of two from 8 to 1024")
        self.image_size = image_size
        width = STYLEGAN_WIDTHS.get(image_size, 512)
        blocks: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.LeakyReLU(LEAK)]
        size = image_size
        while size > 4:
            size //= 2
            wider = STYLEGAN_WIDTHS.get(size, 512)
            blocks.append(StyleGANBlock(width, wider))
            width = wider
        self.blocks = nn.ModuleList(blocks)
        self.final_conv = nn.Sequential(nn.Conv2d(width, 512, 3, padding=1), nn.LeakyReLU(LEAK))
        self.final_linear = nn.Sequential(nn.Linear(512 * size * size, 512), nn.LeakyReLU(LEAK), nn.Linear(512, 1))

    def check_size(self, size: int) -> None:
        """Raise a ValueError for images of another size than ``image_size``."""
        if size != self.image_size:
            raise ValueError(
                f"images have {size} px, but the discriminator is built for {self.image_size}; set "
                f"model.init_args.discriminator.init_args.image_size to {size}"
            )

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] → logits (B, 1).

        Raises:
            ValueError: if the images have another size.
        """
        for size in images.shape[2:]:
            self.check_size(size)
        x = images
        for block in self.blocks:
            x = block(x)
        return cast(Tensor, self.final_linear(self.final_conv(x).flatten(1)))


class SpectralConv1d(nn.Conv1d):
    """A convolution for :func:`spectral_norm`, whose power iteration stays in float32 under autocast (of GPUs)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, L) → (B, out, L)."""
        with torch.autocast(x.device.type, enabled=False):
            weight = self.weight  # footgun: in training mode, each access is a step of the power iteration
        return cast(Tensor, self._conv_forward(x, weight, self.bias))


def spectral_convolution(in_channels: int, out_channels: int, size: int = 1) -> nn.Module:
    """A convolution over a sequence, with its largest singular value near 1, on a circle of the same length."""
    convolution = SpectralConv1d(in_channels, out_channels, size, padding=size // 2, padding_mode="circular")
    return spectral_norm(convolution)


class TokenHead(nn.Module):
    """Classifies each token of an image, and reads its neighbours in raster order.

    GroupNorm normalises each image alone, so the logits of an image do not depend on the batch.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project, self.mix = (
            nn.Sequential(spectral_convolution(width, width, size), nn.GroupNorm(GROUPS, width), nn.LeakyReLU(LEAK))
            for size in (1, HEAD_SIZE)
        )
        self.classify = spectral_convolution(width, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, D, L) → logits (B, L)."""
        x = self.project(tokens)
        x = (x + self.mix(x)) * 0.5**0.5
        return cast(Tensor, self.classify(x)).squeeze(1)


class DINODiscriminator(Discriminator):
    """Heads on the features of a frozen ViT that was trained with DINO (arXiv 2104.14294), as in StyleGAN-T.

    StyleGAN-T (arXiv 2301.09515, section 3.2) has such heads on several blocks, and normalises over small batches. Here
    each image is normalised alone, so any number of ranks gives the same result. StyleGAN-T crops images above 224 px;
    here position embeddings are interpolated instead.

    The ViT is no part of the state dict, and is neither trained nor averaged. It is read by :meth:`load`, so validation
    and extraction need no weights of it.

    Args:
        weights: file of a ViT of DINO with the names of its authors or timm, ``.pth`` or ``.safetensors``, or
            ``hf://owner/repository/file[@revision]``; None takes ViT-S/16 from torch.hub's cache, or downloads it.
        blocks: blocks with a head on their output, from 0.
        width: features of the ViT: 384 for ViT-S, 768 for ViT-B.
        min_size: side in pixels to which smaller images are enlarged. DINO was trained on 224 px and crops of 96 px.

    Raises:
        ValueError: in one line, if an option is wrong.
    """

    def __init__(
        self,
        weights: Path | str | None = None,
        blocks: Sequence[int] = (2, 5, 8, 11),
        width: int = 384,
        min_size: int = 224,
    ) -> None:
        super().__init__()
        check_integer("width", width, HEAD_DIM)
        if width % HEAD_DIM:
            raise ValueError(f"width is {width}; it must be a multiple of {HEAD_DIM}: 384 for ViT-S, 768 for ViT-B")
        check_integer("min_size", min_size)
        if not isinstance(blocks, Sequence) or isinstance(blocks, str):
            raise ValueError(f"blocks is {blocks!r}; give a list, such as [2, 5, 8, 11]")
        for block in blocks:
            check_integer("an index in blocks", block, 0)
        if not blocks or len(set(blocks)) < len(blocks):
            raise ValueError(f"blocks are {list(blocks)}; give at least one, and each once")
        self.weights, self.blocks, self.width, self.min_size = weights, sorted(blocks), width, min_size
        self.heads = nn.ModuleList(TokenHead(width) for _ in self.blocks)
        # footgun: in a tuple, so that nn.Module does not register it. It must not be in a state dict, an optimizer or
        # DDP, and `requires_grad_` of the discriminator must not reach it.
        self._dino: tuple[DINO, ...] = ()

    def fetch(self) -> None:
        """Download the weights of the ViT if needed.

        Raises:
            ValueError: in one line, if they are not available.
        """
        WEIGHTS.fetch(self.weights)

    def load(self) -> None:
        """Read the weights of the ViT, unless it has been done.

        Raises:
            ValueError: in one line, if they are not available, or do not fit the options.
        """
        if self._dino:
            return
        dino, options = read_dino(self.weights), "model.init_args.discriminator.init_args"
        name = self.weights or WEIGHTS.name
        if dino.width != self.width:
            raise ValueError(f"{name} has {dino.width} features, not {self.width}; set {options}.width to {dino.width}")
        if self.blocks[-1] >= len(dino.blocks):
            raise ValueError(
                f"{name} has {len(dino.blocks)} blocks, from 0, and no block {self.blocks[-1]}; change {options}.blocks"
            )
        if self.min_size < 2 * dino.patch_size:
            raise ValueError(
                f"min_size is {self.min_size}, but {name} has patches of {dino.patch_size} px; set {options}.min_size "
                f"to at least {2 * dino.patch_size}"
            )
        self._dino = (dino.to(next(self.parameters())),)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Move the ViT with the heads to another device or dtype."""
        for dino in self._dino:
            dino._apply(fn, recurse)
        moved: nn.Module = super()._apply(fn, recurse)
        return moved

    def check_size(self, size: int) -> None:
        """Raise a ValueError for images that are smaller than a patch of ViT-S/16."""
        if size < MIN_DINO_SIZE:
            raise ValueError(
                f"images have {size} px, but the discriminator on DINO's features needs at least {MIN_DINO_SIZE}; set "
                "model.init_args.discriminator to PatchGAN"
            )

    def forward(self, images: Tensor) -> Tensor:
        """Logits of tokens: (B, 3, H, W) in [-1, 1] → (B, heads · tokens), head by head.

        Raises:
            ValueError: if the images are too small.
        """
        self.check_size(min(images.shape[2:]))
        assert self._dino, "load() comes first"
        (dino,) = self._dino
        features = dino(self._resized(images, dino.patch_size), self.blocks)
        return torch.cat([head(tokens) for head, tokens in zip(self.heads, features, strict=True)], dim=1)

    def _resized(self, images: Tensor, patch_size: int) -> Tensor:
        """Images with sides of at least ``min_size`` that are multiples of the patch size."""
        height, width = images.shape[2:]
        scale = max(1.0, self.min_size / min(height, width))
        height, width = (ceil(round(side * scale) / patch_size) * patch_size for side in (height, width))
        if (height, width) == images.shape[2:]:
            return images
        return F.interpolate(images.float(), (height, width), mode="bilinear", align_corners=False)
