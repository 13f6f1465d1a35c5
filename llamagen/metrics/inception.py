"""Inception-2015, the network of FID and the Inception Score. B images of H × W pixels."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamagen.files import sha256_of
from llamagen.metrics.features import Features
from llamagen.published_weights import PublishedWeights

SIZE = 299
CLASSES = 1008
EPSILON = 1e-3
SPATIAL_CHANNELS = 7
WEIGHTS = PublishedWeights(
    network="Inception of 2015-12-05, the network of FID",
    name="weights-inception-2015-12-05-6726825d.pth",
    address=(
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
    ),
    sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    options=(
        "Inception(weights=…), which is features.init_args.weights in a config, and --features Inception "
        "--features.weights … of python -m evaluation"
    ),
    other_names=("pt_inception-2015-12-05-6726825d.pth",),  # pytorch-fid's
)


class Layer(NamedTuple):
    """A convolution with normalisation and ReLU; ``width`` is the number of output channels."""

    name: str
    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padded: bool = True


Pool = Callable[[Tensor], Tensor]
Step = Layer | Pool | list[Layer]
"""One step of a branch. Layers in a list get the same input, and their outputs are concatenated."""
Branch = list[Step]


def halve(x: Tensor) -> Tensor:
    """3 × 3 max pooling with stride 2 and without padding."""
    return F.max_pool2d(x, 3, stride=2)


def average(x: Tensor) -> Tensor:
    """3 × 3 average pooling. Like TensorFlow, and unlike PyTorch's default, it does not count the padding."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def maximum(x: Tensor) -> Tensor:
    """3 × 3 max pooling with stride 1."""
    return F.max_pool2d(x, 3, stride=1, padding=1)


def _mixed_35(pooled: int) -> list[Branch]:
    """A block at 35 × 35."""
    return [
        [Layer("branch1x1", 64)],
        [Layer("branch5x5_1", 48), Layer("branch5x5_2", 64, (5, 5))],
        [Layer("branch3x3dbl_1", 64), Layer("branch3x3dbl_2", 96, (3, 3)), Layer("branch3x3dbl_3", 96, (3, 3))],
        [average, Layer("branch_pool", pooled)],
    ]


def _mixed_17(narrow: int) -> list[Branch]:
    """A block at 17 × 17, with 7 × 7 convolutions factorised into 1 × 7 and 7 × 1."""
    row, column = (1, 7), (7, 1)
    return [
        [Layer("branch1x1", 192)],
        [Layer("branch7x7_1", narrow), Layer("branch7x7_2", narrow, row), Layer("branch7x7_3", 192, column)],
        [
            Layer("branch7x7dbl_1", narrow),
            Layer("branch7x7dbl_2", narrow, column),
            Layer("branch7x7dbl_3", narrow, row),
            Layer("branch7x7dbl_4", narrow, column),
            Layer("branch7x7dbl_5", 192, row),
        ],
        [average, Layer("branch_pool", 192)],
    ]


def _mixed_8(pool: Pool) -> list[Branch]:
    """A block at 8 × 8, with branches that fork at their ends."""
    row, column = (1, 3), (3, 1)
    return [
        [Layer("branch1x1", 320)],
        [Layer("branch3x3_1", 384), [Layer("branch3x3_2a", 384, row), Layer("branch3x3_2b", 384, column)]],
        [
            Layer("branch3x3dbl_1", 448),
            Layer("branch3x3dbl_2", 384, (3, 3)),
            [Layer("branch3x3dbl_3a", 384, row), Layer("branch3x3dbl_3b", 384, column)],
        ],
        [pool, Layer("branch_pool", 192)],
    ]


STEM: Branch = [
    Layer("Conv2d_1a_3x3", 32, (3, 3), stride=2, padded=False),
    Layer("Conv2d_2a_3x3", 32, (3, 3), padded=False),
    Layer("Conv2d_2b_3x3", 64, (3, 3)),
    halve,
    Layer("Conv2d_3b_1x1", 80),
    Layer("Conv2d_4a_3x3", 192, (3, 3), padded=False),
    halve,
]
BLOCKS: dict[str, list[Branch]] = {
    "Mixed_5b": _mixed_35(pooled=32),
    "Mixed_5c": _mixed_35(pooled=64),
    "Mixed_5d": _mixed_35(pooled=64),
    "Mixed_6a": [
        [Layer("branch3x3", 384, (3, 3), stride=2, padded=False)],
        [
            Layer("branch3x3dbl_1", 64),
            Layer("branch3x3dbl_2", 96, (3, 3)),
            Layer("branch3x3dbl_3", 96, (3, 3), stride=2, padded=False),
        ],
        [halve],
    ],
    "Mixed_6b": _mixed_17(narrow=128),
    "Mixed_6c": _mixed_17(narrow=160),
    "Mixed_6d": _mixed_17(narrow=160),
    "Mixed_6e": _mixed_17(narrow=192),
    "Mixed_7a": [
        [Layer("branch3x3_1", 192), Layer("branch3x3_2", 320, (3, 3), stride=2, padded=False)],
        [
            Layer("branch7x7x3_1", 192),
            Layer("branch7x7x3_2", 192, (1, 7)),
            Layer("branch7x7x3_3", 192, (7, 1)),
            Layer("branch7x7x3_4", 192, (3, 3), stride=2, padded=False),
        ],
        [halve],
    ],
    "Mixed_7b": _mixed_8(average),
    "Mixed_7c": _mixed_8(maximum),  # as in the graph of 2015, although the paper uses an average
}


class Normalisation(nn.Module):
    """Batch normalisation with fixed statistics. PyTorch's module also has a step counter, which some files lack."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → same shape."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=EPSILON)


class Convolution(nn.Module):
    """The module of a :class:`Layer`, with random weights that preserve the scale of activations."""

    def __init__(self, previous: int, layer: Layer) -> None:
        super().__init__()
        height, width = layer.kernel
        padding = (height // 2, width // 2) if layer.padded else (0, 0)
        self.conv = nn.Conv2d(previous, layer.width, layer.kernel, layer.stride, padding, bias=False)
        self.bn = Normalisation(layer.width)
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, width, H', W')."""
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Chain(nn.Module):
    """A module that holds layers by name and runs steps in sequence."""

    def add(self, previous: int, steps: Branch) -> int:
        """Add the layers of some steps after ``previous`` channels. Returns the number of output channels."""
        for step in steps:
            if callable(step):
                continue
            layers = step if isinstance(step, list) else [step]
            for layer in layers:
                self.add_module(layer.name, Convolution(previous, layer))
            previous = sum(layer.width for layer in layers)
        return previous

    def follow(self, steps: Branch, x: Tensor) -> Tensor:
        """Run the steps on (B, C, H, W)."""
        for step in steps:
            if callable(step):
                x = step(x)
            elif isinstance(step, list):
                x = torch.cat([self.get_submodule(layer.name)(x) for layer in step], dim=1)
            else:
                x = self.get_submodule(step.name)(x)
        return x


class Mixed(Chain):
    """Branches with the same input, whose outputs are concatenated along channels."""

    def __init__(self, previous: int, branches: list[Branch]) -> None:
        super().__init__()
        self.branches = branches
        self.width = sum(self.add(previous, branch) for branch in branches)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, width, H', W')."""
        return torch.cat([self.follow(branch, x) for branch in self.branches], dim=1)


class InceptionNet(Chain):
    """Inception of the TensorFlow graph of 2015-12-05 (arXiv 1512.00567 section 6), with random weights.

    Outputs and parameter names are those of torch-fidelity's network, which itself would need torchvision. Always
    frozen and in evaluation mode.
    """

    def __init__(self) -> None:
        super().__init__()
        width = self.add(3, STEM)
        for name, branches in BLOCKS.items():
            block = Mixed(width, branches)
            self.add_module(name, block)
            width = block.width
        self.fc = nn.Linear(width, CLASSES)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "InceptionNet":
        """Stay in evaluation mode, even if a parent is set to training."""
        return super().train(False)

    def forward(self, images: Tensor) -> Features:
        """All features in one pass.

        Args:
            images: (B, 3, H, W) float32 with levels 0 … 255, of any size.

        Returns:
            ``pool`` (B, 2048), averages of the last block. ``spatial`` (B, 17 · 17 · 7) for sFID (arXiv 2103.03841),
            the first 7 channels of TensorFlow's ``mixed_6/conv`` in its order (row, column, channel), as in ADM's
            files. ``logits`` (B, 1008) without the bias of the last layer, from which ADM and torch-fidelity compute
            the Inception Score. ``biased_logits`` (B, 1008) with the bias.

        Raises:
            ValueError: if the images have another type or shape.
        """
        if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"Inception needs floats with levels 0 … 255 of shape (B, 3, H, W), not {images.dtype} of "
                f"{tuple(images.shape)}"
            )
        x = (resize_tf1(images, (SIZE, SIZE)) - 128) / 128
        x = self.follow(STEM, x.contiguous(memory_format=torch.channels_last))  # faster on CPUs
        for name in BLOCKS:
            x = self.get_submodule(name)(x)
            if name == "Mixed_6d":  # its first branch is the 1 × 1 convolution
                spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        pool = x.mean((2, 3))
        logits = F.linear(pool, self.fc.weight)
        return Features(pool, spatial, logits, logits + self.fc.bias)


class Inception(InceptionNet):
    """The network with the weights that define FID (arXiv 1706.08500).

    Args:
        weights: the file, or None, as for :func:`read_inception`.

    Raises:
        ValueError: in one line, if the file is not available, damaged, or holds other weights.
    """

    name = "inception"

    def __init__(self, weights: Path | str | None = None) -> None:
        with torch.device("meta"):  # no memory, no random numbers
            super().__init__()
        self.load_state_dict(read_inception(weights), assign=True)


def resize_tf1(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear interpolation of TensorFlow 1, without ``align_corners`` and ``half_pixel_centers``.

    Output pixel i of n samples the input at i · (input size / n), without antialiasing; positions beyond the last pixel
    are clamped to it. footgun: PyTorch's ``interpolate`` shifts by half a pixel, which changes FIDs.

    Args:
        images: (B, C, H, W), floats.
        size: output height and width.

    Returns:
        (B, C, height, width) of the same dtype.
    """
    for axis, count in ((3, size[1]), (2, size[0])):  # columns first: rounded as TensorFlow does
        old = images.shape[axis]
        source = torch.arange(count, dtype=torch.float32, device=images.device) * (old / count)
        first = source.long()
        share = (source - first).to(images.dtype)
        start = images.index_select(axis, first)
        end = images.index_select(axis, (first + 1).clamp_max(old - 1))
        images = start + (end - start) * (share if axis == 3 else share[:, None])
    return images


def inception_shapes() -> dict[str, torch.Size]:
    """Names and shapes of the network's weights."""
    with torch.device("meta"):
        return {name: value.shape for name, value in InceptionNet().state_dict().items()}


def fetch_inception(weights: Path | str | None = None) -> Path:
    """Find the file of the weights, or download it; its content is not read.

    Args:
        weights: the file; None for the one in torch.hub's cache folder, with its own name or that of pytorch-fid. It is
            downloaded if it is missing.

    Raises:
        ValueError: in one line, if the file does not exist or could not be downloaded.
    """
    return WEIGHTS.fetch(weights)


def read_inception(weights: Path | str | None = None) -> dict[str, Tensor]:
    """Read the weights of the graph of 2015-12-05, as published by torch-fidelity and pytorch-fid.

    Args:
        weights: the file, ``.pth`` or ``.safetensors``; None as for :func:`fetch_inception`. A file with the name of
            the published one must also have its checksum. ``num_batches_tracked`` is optional.

    Returns:
        Weights by their published names, float32, on the CPU.

    Raises:
        ValueError: in one line, if the file is not available, damaged, or holds other weights.
    """
    file = fetch_inception(weights)
    if file.name in (WEIGHTS.name, *WEIGHTS.other_names) and (digest := sha256_of(file)) != WEIGHTS.sha256:
        raise ValueError(
            f"{file} has the SHA-256 {digest}, not {WEIGHTS.sha256} as published; remove it and get {WEIGHTS.address}, "
            "or rename it if other weights are intended"
        )
    return WEIGHTS.read(file, inception_shapes(), ignored_suffix="num_batches_tracked")
