"""Discriminators of the tokenizer's adversarial loss. B batch, H × W pixels; logits are positive for real."""

from abc import abstractmethod
from typing import cast

import torch
from torch import Tensor, nn

from llamagen.distributed.sync_batch_norm import SyncBatchNorm2d
from llamagen.option_checks import check_integer

LEAK = 0.2
STYLEGAN_WIDTHS = {64: 256, 128: 128, 256: 64, 512: 32, 1024: 16}
"""Channels at each resolution; 512 at lower ones."""


class Discriminator(nn.Module):
    """Classifies images as real or fake."""

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
