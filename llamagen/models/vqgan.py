"""The image tokenizer: convolutional encoder, quantiser, convolutional decoder (arXiv 2406.06525, section 2.1).

Shapes: B batch, H × W pixels, h × w = H / f × W / f grid, f = 2 ** (levels − 1), Z channels of the latent,
E channels of the quantised latent, K codes.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from llamagen.models.inputs import CodeInput, ImageInput, batch_of_images, grids_of_codes
from llamagen.models.norm_silu import norm_silu
from llamagen.models.quantizer import (
    Quantized,
    Quantizer,
    build_quantizer,
    check_number_of_codes,
    check_quantizer_spec,
)
from llamagen.models.vector_quantizer import VectorQuantizer
from llamagen.option_checks import check_integer

GROUPS = 32


@dataclass(frozen=True)
class VQGANConfig:
    """Shape of an image tokenizer; the defaults are the published VQ-16.

    Args:
        channels: base number of channels, a multiple of 32.
        channel_multipliers: channels of each level divided by ``channels``, highest resolution first, for encoder and
            decoder. Each level but the first halves the resolution: five levels are VQ-16, ``[1, 2, 2, 4]`` is VQ-8.
        num_res_blocks: residual blocks of an encoder level; a decoder level has one more.
        z_channels: channels of the latent before it is projected to ``codebook_dim``.
        codebook_size: number of codes K. Ignored if ``quantizer`` is given, which then determines it.
        codebook_dim: channels E of the quantised latent. Ignored if ``quantizer`` is given.
        dropout: dropout probability inside the residual blocks.
        quantizer: ``class_path`` and ``init_args`` of another :class:`~llamagen.models.quantizer.Quantizer`; None for
            the vector quantiser of the paper. Stored in checkpoints, so primitives only.
    """

    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    z_channels: int = 256
    codebook_size: int = 16384
    codebook_dim: int = 8
    dropout: float = 0.0
    quantizer: dict[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        """Check all values.

        Raises:
            ValueError: in one line with option and value, if one is out of range.
        """
        object.__setattr__(self, "channel_multipliers", tuple(self.channel_multipliers))
        for name in ("channels", "num_res_blocks", "z_channels", "codebook_size", "codebook_dim"):
            check_integer(name, getattr(self, name))
        check_number_of_codes("codebook_size", self.codebook_size)
        if not self.channel_multipliers or not all(multiplier >= 1 for multiplier in self.channel_multipliers):
            raise ValueError(f"channel_multipliers is {self.channel_multipliers}; give one number ≥ 1 for each level")
        for multiplier in self.channel_multipliers:
            check_integer("each of channel_multipliers", multiplier)
        if self.channels % GROUPS:
            raise ValueError(f"channels is {self.channels}; GroupNorm needs a multiple of {GROUPS}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}; a probability must be at least 0 and below 1")
        if self.quantizer is not None:
            object.__setattr__(self, "quantizer", check_quantizer_spec(self.quantizer))

    @property
    def downsampling(self) -> int:
        """Pixels per code along each side."""
        return 1 << (len(self.channel_multipliers) - 1)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, highest resolution first."""
        return tuple(self.channels * multiplier for multiplier in self.channel_multipliers)


class VQGANOutput(NamedTuple):
    """Images after encoding and decoding.

    Attributes:
        reconstruction: (B, 3, H, W), about [-1, 1], not clamped.
        encoding: codes, quantised latent and the quantiser's losses.
    """

    reconstruction: Tensor
    encoding: Quantized


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with the settings of all blocks."""
    return nn.GroupNorm(GROUPS, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """GroupNorm → SiLU → conv, twice, with dropout before the second conv; a 1×1 shortcut if the width changes."""

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
    """The blocks of one resolution, then ``downsample``, ``upsample`` or neither."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, attention: bool, dropout: float) -> None:
        super().__init__()
        self.res = nn.ModuleList(
            ResidualBlock(in_channels if block == 0 else out_channels, out_channels, dropout) for block in range(blocks)
        )
        self.attn = nn.ModuleList(AttentionBlock(out_channels) for _ in range(blocks if attention else 0))

    def parts(self) -> Iterator[nn.Module]:
        """Yield the blocks in the order in which they are applied: (B, in, H, W) → (B, out, H', W')."""
        for index, block in enumerate(self.res):
            yield block
            if self.attn:
                yield self.attn[index]
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                yield getattr(self, name)


class Blocks(nn.Module):
    """Base of encoder and decoder: runs a list of blocks, with activation checkpointing if it is on."""

    checkpoint_activations = False

    def run(self, x: Tensor, blocks: Iterable[nn.Module]) -> Tensor:
        """Apply the blocks; with ``checkpoint_activations`` each block keeps only its input for the backward pass."""
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
    """Images → latents."""

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
    """Latents → images; its levels are stored lowest resolution first."""

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
        """The weight whose gradients the adaptive adversarial weight compares."""
        return self.conv_out.weight

    def forward(self, latent: Tensor) -> Tensor:
        """(B, Z, h, w) → (B, 3, H, W)."""
        x = self.run(self.conv_in(latent), (*self.mid, *self.conv_blocks))
        return cast(Tensor, self.conv_out(norm_silu(self.norm_out, x)))


class VQGAN(nn.Module):
    """The image tokenizer; with the default quantiser its state dict has the published names and shapes.

    Args:
        config: shape of the model; VQ-16 by default.

    Attributes:
        config: the given configuration, with ``codebook_size`` and ``codebook_dim`` of the quantiser.
        quantize: the quantiser.
        codes_of: the tokenizer whose codes this one writes, if its decoder alone has been fine-tuned, as read from a
            file; see :mod:`llamagen.checkpoints.lineage`, which verifies it.

    Raises:
        ValueError: in one line, if the configured quantiser cannot be built.
    """

    def __init__(self, config: VQGANConfig | None = None) -> None:
        super().__init__()
        config = config or VQGANConfig()
        self.codes_of: dict[str, str] | None = None
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize: Quantizer = (
            VectorQuantizer(config.codebook_size, config.codebook_dim)
            if config.quantizer is None
            else build_quantizer(config.quantizer)
        )
        self.quant_conv = nn.Conv2d(config.z_channels, self.quantize.dim, 1)
        self.post_quant_conv = nn.Conv2d(self.quantize.dim, config.z_channels, 1)
        self.config = replace(config, codebook_size=self.quantize.size, codebook_dim=self.quantize.dim)

    def checkpoint_activations(self, enabled: bool) -> None:
        """Turn activation checkpointing on or off: blocks recompute their activations in the backward pass."""
        self.encoder.checkpoint_activations = self.decoder.checkpoint_activations = enabled

    def encode(self, images: ImageInput) -> Quantized:
        """Encode images to codes.

        Args:
            images: (B, 3, H, W) floats in [-1, 1]; H and W multiples of the downsampling factor. uint8 levels 0 to 255
                are scaled. Also accepted: channels last (B, H, W, 3), one image without B, numpy arrays, a Pillow
                image, and a list of images of one size. Images are moved to the model's device and dtype.

        Returns:
            Codes (B, h, w) int64, the quantised latent (B, E, h, w), the latent (B, E, h, w), and the quantiser's
            losses.

        Raises:
            ValueError: in one line, if type, shape or range are wrong.
        """
        images = batch_of_images(images, self.config.downsampling, self.encoder.conv_in.weight)
        encoding: Quantized = self.quantize(self.quant_conv(self.encoder(images)))
        if encoding.losses.keys() != set(names := self.quantize.loss_names):
            raise ValueError(
                f"{type(self.quantize).__name__}.forward returned the losses {', '.join(encoding.losses) or 'none'}, "
                f"but loss_names is {names}; they must agree"
            )
        return encoding

    def decode(self, quantized: Tensor) -> Tensor:
        """Decode quantised latents to images.

        Args:
            quantized: (B, E, h, w), floats.

        Returns:
            (B, 3, H, W), about [-1, 1], not clamped.

        Raises:
            ValueError: if type or shape are wrong, for example because these are codes.
        """
        width = self.quantize.dim
        if quantized.dim() != 4 or quantized.shape[1] != width or not quantized.is_floating_point():
            raise ValueError(
                f"quantised latents must be floats of shape (B, {width}, h, w), not {quantized.dtype} of "
                f"{tuple(quantized.shape)}; give codes to decode_codes"
            )
        quantized = quantized.to(self.post_quant_conv.weight.dtype)
        return cast(Tensor, self.decoder(self.post_quant_conv(quantized)))

    def decode_codes(self, codes: CodeInput) -> Tensor:
        """Decode codes to images.

        Args:
            codes: integers in [0, K), (B, h, w), or (h, w) for one image. A tensor on any device, a numpy array or
                nested lists, of any integer dtype: shards hold uint16 or uint32.

        Returns:
            (B, 3, H, W), about [-1, 1], not clamped.

        Raises:
            ValueError: in one line, if type, shape or codes are wrong.
        """
        codes = grids_of_codes(codes, self.quantize.size, self.post_quant_conv.weight.device)
        return self.decode(self.quantize.lookup(codes))

    def forward(self, images: ImageInput) -> VQGANOutput:
        """Encode and decode images (B, 3, H, W) in [-1, 1]; accepts all that :meth:`encode` accepts."""
        encoding = self.encode(images)
        return VQGANOutput(self.decode(encoding.quantized), encoding)


def to_uint8(images: Tensor) -> Tensor:
    """Convert images in [-1, 1] to uint8 in [0, 255] like the published code: ``clamp(127.5 x + 128)``, truncated.

    Args:
        images: floats of any shape.

    Raises:
        ValueError: if the images are not floats.
    """
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}; to_uint8 takes floats in [-1, 1]")
    return (127.5 * images.float() + 128.0).clamp(0, 255).to(torch.uint8)
