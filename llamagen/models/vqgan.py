"""The image tokenizer: convolutional encoder, vector quantiser, convolutional decoder (arXiv 2406.06525, section 2.1).

Shapes: B batch, H × W pixels, h × w = H / f × W / f grid, f = 2 ** (levels − 1), Z latent width, E codebook width.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from llamagen.models.inputs import CodeInput, ImageInput, batch_of_images, grids_of_codes
from llamagen.models.norm_silu import norm_silu
from llamagen.models.quantizer import VectorQuantizer
from llamagen.option_checks import check_integer

GROUPS = 32


@dataclass(frozen=True)
class VQGANConfig:
    """Shape of an image tokenizer; the defaults are the published VQ-16.

    Args:
        channels: base width, a multiple of 32.
        channel_multipliers: width of each level over ``channels``, highest resolution first, for encoder and decoder.
            Each level but the first halves the resolution: five levels are VQ-16, ``[1, 2, 2, 4]`` is VQ-8.
        num_res_blocks: residual blocks of an encoder level; a decoder level has one more.
        z_channels: width of the latent before it is projected to ``codebook_dim``.
        codebook_size: number of codes.
        codebook_dim: width of a codebook entry.
        dropout: dropout inside the residual blocks.
    """

    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    z_channels: int = 256
    codebook_size: int = 16384
    codebook_dim: int = 8
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Refuse shapes that cannot be built."""
        object.__setattr__(self, "channel_multipliers", tuple(self.channel_multipliers))
        for name in ("channels", "num_res_blocks", "z_channels", "codebook_size", "codebook_dim"):
            check_integer(name, getattr(self, name))
        if not self.channel_multipliers or not all(multiplier >= 1 for multiplier in self.channel_multipliers):
            raise ValueError(f"channel_multipliers is {self.channel_multipliers}; give one number ≥ 1 for each level")
        for multiplier in self.channel_multipliers:
            check_integer("each of channel_multipliers", multiplier)
        if self.channels % GROUPS:
            raise ValueError(f"channels is {self.channels}; GroupNorm needs a multiple of {GROUPS}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}; a probability must be at least 0 and below 1")

    @property
    def downsampling(self) -> int:
        """Pixels to a code, along each side."""
        return 1 << (len(self.channel_multipliers) - 1)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, highest resolution first."""
        return tuple(self.channels * multiplier for multiplier in self.channel_multipliers)


class Encoding(NamedTuple):
    """An image as codes.

    Attributes:
        codes: (B, h, w) int64.
        quantized: (B, E, h, w) float32, chosen entries with straight-through gradient to ``latent``.
        latent: (B, E, h, w) float32, l2-normalised.
        entries: (B, E, h, w) float32, chosen l2-normalised entries with gradient to the codebook.
    """

    codes: Tensor
    quantized: Tensor
    latent: Tensor
    entries: Tensor


class VQGANOutput(NamedTuple):
    """An image that went through the codes.

    Attributes:
        reconstruction: (B, 3, H, W), about [-1, 1], not clamped.
        encoding: its codes and what the losses need.
    """

    reconstruction: Tensor
    encoding: Encoding


def group_norm(channels: int) -> nn.GroupNorm:
    """The normalisation of every block."""
    return nn.GroupNorm(GROUPS, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """GroupNorm → SiLU → conv, twice, with dropout before the second and a 1×1 shortcut where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut: nn.Module = nn.Conv2d(in_channels, out_channels, 1)
        else:
            self.nin_shortcut = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) → (B, out, H, W)."""
        y = self.conv1(norm_silu(self.norm1, x))
        y = self.conv2(self.dropout(norm_silu(self.norm2, y)))
        return cast(Tensor, self.nin_shortcut(x) + y)


class AttentionBlock(nn.Module):
    """Single-head self-attention over the positions of a feature map, with a residual connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        y = self.norm(x)
        q, k, v = (conv(y).flatten(2).transpose(1, 2).unsqueeze(1) for conv in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v)
        return cast(Tensor, x + self.proj_out(attended.squeeze(1).transpose(1, 2).reshape(x.shape)))


class Downsample(nn.Module):
    """Halve the resolution: pad right and bottom by one, 3×3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H / 2, W / 2)."""
        return cast(Tensor, self.conv(F.pad(x, (0, 1, 0, 1))))


class Upsample(nn.Module):
    """Double the resolution: nearest neighbour, 3×3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, 2 H, 2 W)."""
        return cast(Tensor, self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")))


class Level(nn.Module):
    """The blocks of one resolution, then the step to the next: ``downsample``, ``upsample`` or none."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, attention: bool, dropout: float) -> None:
        super().__init__()
        self.res = nn.ModuleList(
            ResidualBlock(in_channels if block == 0 else out_channels, out_channels, dropout) for block in range(blocks)
        )
        self.attn = nn.ModuleList(AttentionBlock(out_channels) for _ in range(blocks if attention else 0))

    def parts(self) -> Iterator[nn.Module]:
        """Its blocks in the order in which they are applied: (B, in, H, W) → (B, out, H', W')."""
        for index, block in enumerate(self.res):
            yield block
            if self.attn:
                yield self.attn[index]
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                yield getattr(self, name)


class Blocks(nn.Module):
    """What encoder and decoder share: running a list of blocks, whose activations may be recomputed."""

    checkpoint_activations = False

    def run(self, x: Tensor, blocks: Iterable[nn.Module]) -> Tensor:
        """Apply blocks in turn; with ``checkpoint_activations`` each keeps its input only, for the backward pass."""
        for block in blocks:
            if isinstance(block, Level):
                x = self.run(x, block.parts())
            elif self.checkpoint_activations and torch.is_grad_enabled():
                x = cast(Tensor, checkpoint(block, x, use_reentrant=False))
            else:
                x = block(x)
        return x


def middle(channels: int, dropout: float) -> nn.ModuleList:
    """Residual block, attention, residual block, at the lowest resolution."""
    return nn.ModuleList(
        [
            ResidualBlock(channels, channels, dropout),
            AttentionBlock(channels),
            ResidualBlock(channels, channels, dropout),
        ]
    )


class Encoder(Blocks):
    """Images to latents."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        previous = config.channels
        for width in widths:
            lowest = len(self.conv_blocks) == len(widths) - 1
            level = Level(previous, width, config.num_res_blocks, lowest, config.dropout)
            if not lowest:
                level.downsample = Downsample(width)
            self.conv_blocks.append(level)
            previous = width
        self.mid = middle(previous, config.dropout)
        self.norm_out = group_norm(previous)
        self.conv_out = nn.Conv2d(previous, config.z_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, Z, h, w)."""
        x = self.run(self.conv_in(images), (*self.conv_blocks, *self.mid))
        return cast(Tensor, self.conv_out(norm_silu(self.norm_out, x)))


class Decoder(Blocks):
    """Latents to images; its levels are stored lowest resolution first."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = config.widths[::-1]
        previous = widths[0]
        self.conv_in = nn.Conv2d(config.z_channels, previous, 3, padding=1)
        self.mid = middle(previous, config.dropout)
        self.conv_blocks = nn.ModuleList()
        for index, width in enumerate(widths):
            level = Level(previous, width, config.num_res_blocks + 1, index == 0, config.dropout)
            if index < len(widths) - 1:
                level.upsample = Upsample(width)
            self.conv_blocks.append(level)
            previous = width
        self.norm_out = group_norm(previous)
        self.conv_out = nn.Conv2d(previous, 3, 3, padding=1)

    @property
    def last_weight(self) -> Tensor:
        """The weight at which the adaptive adversarial weight compares gradients."""
        return self.conv_out.weight

    def forward(self, latent: Tensor) -> Tensor:
        """(B, Z, h, w) → (B, 3, H, W)."""
        x = self.run(self.conv_in(latent), (*self.mid, *self.conv_blocks))
        return cast(Tensor, self.conv_out(norm_silu(self.norm_out, x)))


class VQGAN(nn.Module):
    """The image tokenizer; state-dict names and shapes are those of the published checkpoints.

    Args:
        config: shape of the model; VQ-16 by default.
    """

    def __init__(self, config: VQGANConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or VQGANConfig()
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = VectorQuantizer(config.codebook_size, config.codebook_dim)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.z_channels, 1)

    def checkpoint_activations(self, enabled: bool) -> None:
        """Recompute the blocks' activations in the backward pass instead of keeping them: less memory, more work."""
        self.encoder.checkpoint_activations = self.decoder.checkpoint_activations = enabled

    def encode(self, images: ImageInput) -> Encoding:
        """Images to codes.

        Args:
            images: (B, 3, H, W) floats in [-1, 1]; H and W multiples of the downsampling factor. Levels 0 to 255 are
                taken as uint8 and scaled, also those of one image without B. (B, H, W, 3), arrays of numpy, a Pillow
                image and a list of images of one size are taken, too. All go to the model's device and dtype.

        Returns:
            Codes (B, h, w) and the vectors behind them.

        Raises:
            ValueError: in one line, if type, shape or range do not fit.
        """
        images = batch_of_images(images, self.config.downsampling, self.encoder.conv_in.weight)
        quantized, codes, latent, entries = self.quantize(self.quant_conv(self.encoder(images)))
        return Encoding(codes, quantized, latent, entries)

    def decode(self, quantized: Tensor) -> Tensor:
        """Quantised latents to images.

        Args:
            quantized: (B, E, h, w), floats.

        Returns:
            (B, 3, H, W), about [-1, 1], not clamped.

        Raises:
            ValueError: if these are no latents, but codes, for example.
        """
        width = self.config.codebook_dim
        if quantized.dim() != 4 or quantized.shape[1] != width or not quantized.is_floating_point():
            raise ValueError(
                f"quantised latents must be floats of shape (B, {width}, h, w), not {quantized.dtype} of "
                f"{tuple(quantized.shape)}; give codes to decode_codes"
            )
        quantized = quantized.to(self.post_quant_conv.weight.dtype)
        return cast(Tensor, self.decoder(self.post_quant_conv(quantized)))

    def decode_codes(self, codes: CodeInput) -> Tensor:
        """Codes to images.

        Args:
            codes: whole numbers in [0, codebook_size), (B, h, w), or (h, w) of one image; of any width, as the uint16
                of shards, in a tensor, an array of numpy or nested lists, on any device.

        Returns:
            (B, 3, H, W), about [-1, 1], not clamped.

        Raises:
            ValueError: in one line, if type, shape or codes do not fit.
        """
        codes = grids_of_codes(codes, self.config.codebook_size, self.quantize.embedding.weight.device)
        return self.decode(self.quantize.lookup(codes))

    def forward(self, images: ImageInput) -> VQGANOutput:
        """Reconstruct images (B, 3, H, W) in [-1, 1] through their codes; takes what :meth:`encode` takes."""
        encoding = self.encode(images)
        return VQGANOutput(self.decode(encoding.quantized), encoding)


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] (clamped) to uint8 in [0, 255], as published: ``clamp(127.5 x + 128)``, truncated.

    Args:
        images: floats of any shape.

    Raises:
        ValueError: if they are no floats, as levels are.
    """
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}; to_uint8 takes floats in [-1, 1]")
    return (127.5 * images.float() + 128.0).clamp(0, 255).to(torch.uint8)
