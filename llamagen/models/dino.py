"""Features of a frozen vision transformer that was trained with DINO (arXiv 2104.14294).

timm has this network, but needs torchvision; transformers renames the weights of DINO's files. So the forward pass is
here, with the names of those files.

B batch, H × W pixels, h × w patches, N = 1 + h · w tokens (the class token is the first), D features.
"""

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from math import isqrt
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llamagen.published_weights import PublishedWeights

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HEAD_DIM = 64  # of all ViTs of DINO
WEIGHTS = PublishedWeights(
    network="a ViT of DINO",
    name="dino_deitsmall16_pretrain.pth",
    address="https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth",
    sha256="",  # its authors publish none; names and shapes of the weights are checked when the file is read
    options="model.init_args.discriminator.init_args.weights",
    alternative=", or choose another model.init_args.discriminator",
)


class Attention(nn.Module):
    """Attention of all tokens to all tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) → same shape."""
        queries, keys, values = self.qkv(x).unflatten(2, (3, -1, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(queries, keys, values)  # (B, heads, N, HEAD_DIM)
        return cast(Tensor, self.proj(attended.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """Pre-norm block of a vision transformer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attn = Attention(width)
        layers = {"fc1": nn.Linear(width, 4 * width), "act": nn.GELU(), "fc2": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) → same shape."""
        x = x + self.attn(self.norm1(x))
        return cast(Tensor, x + self.mlp(self.norm2(x)))


class DINO(nn.Module):
    """A vision transformer of DINO without its last norm: always frozen, and on the meta device until it is loaded.

    Args:
        width: features of a token, a multiple of 64.
        depth: blocks.
        patch_size: side of a patch in pixels.
        grid: patches along a side of the images that it was trained on.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, width: int = 384, depth: int = 12, patch_size: int = 16, grid: int = 14) -> None:
        super().__init__()
        self.width, self.patch_size, self.grid = width, patch_size, grid
        with torch.device("meta"):
            self.cls_token = nn.Parameter(torch.empty(1, 1, width))
            self.pos_embed = nn.Parameter(torch.empty(1, 1 + grid**2, width))
            self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, width, patch_size, stride=patch_size)))
            self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        for name, value in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(value).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Compute the tokens after some of the blocks.

        Args:
            images: (B, 3, H, W) in [-1, 1]; sides are multiples of the patch size.
            blocks: indices of blocks from 0, in ascending order.

        Returns:
            For each of these blocks, its output for the patches in raster order, (B, D, h · w).
        """
        x = ((images.to(self.mean.dtype) + 1) / 2 - self.mean) / self.std
        x = self.patch_embed(x)  # (B, D, h, w)
        positions = self.position_embeddings(*x.shape[2:])
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1) + positions
        outputs = []
        for index in range(max(blocks) + 1):
            x = self.blocks[index](x)
            if index in blocks:
                outputs.append(x[:, 1:].transpose(1, 2))
        return outputs

    def position_embeddings(self, height: int, width: int) -> Tensor:
        """Position embeddings of ``height`` × ``width`` patches, interpolated from those of training: (1, N, D)."""
        if (height, width) == (self.grid, self.grid):
            return self.pos_embed
        trained = self.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (self.grid, self.grid))
        resized = F.interpolate(trained.float(), (height, width), mode="bicubic", align_corners=False)
        return torch.cat([self.pos_embed[:, :1], resized.flatten(2).transpose(1, 2).to(trained.dtype)], dim=1)


def read_dino(path: Path | str | None = None) -> DINO:
    """Read a ViT of DINO of any width, depth and patch size, from a file with the names of DINO's files.

    Args:
        path: the file, ``.pth`` or ``.safetensors``, or ``hf://owner/repository/file[@revision]``; None for ViT-S/16
            in torch.hub's cache folder, which is downloaded if it is missing.

    Returns:
        The network, float32, on the CPU.

    Raises:
        ValueError: in one line, if the file is not available, damaged, or holds other weights.
    """
    file = WEIGHTS.fetch(path)
    weights = WEIGHTS.read(file, lambda loaded: dict(dino_for(loaded).named_parameters()), ignored_prefix="norm.")
    dino = dino_for(weights)
    if dino.width % HEAD_DIM:
        raise ValueError(f"{file} is not {WEIGHTS.network}: it has {dino.width} features; get {WEIGHTS.address}")
    dino.load_state_dict(weights, assign=True)
    return dino.requires_grad_(False)


def dino_for(weights: Mapping[str, Tensor]) -> DINO:
    """Build the network that fits the weights of a file, as ViT-S/16 where the file lacks an entry."""
    shape, none = {}, torch.empty(0)
    if numbers := [int(match[1]) for name in weights if (match := re.match(r"blocks\.(\d+)\.", name))]:
        shape["depth"] = max(numbers) + 1
    if (patches := weights.get("patch_embed.proj.weight", none)).dim() == 4:
        shape["patch_size"] = patches.shape[-1]
    if (positions := weights.get("pos_embed", none)).dim() == 3:
        shape |= {"width": positions.shape[2], "grid": isqrt(max(positions.shape[1] - 1, 1))}
    return DINO(**shape)
