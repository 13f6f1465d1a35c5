"""LPIPS, the perceptual distance of two images (arXiv 1801.03924). B batch, H × W pixels."""

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

from llamagen.published_weights import PublishedWeights

WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of VGG16's convolutions at each resolution."""
MEAN, STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
MIN_SIZE = 16
EPSILON = 1e-10
VGG16 = PublishedWeights(
    network="torchvision's VGG16, which LPIPS needs",
    name="vgg16-397923af.pth",
    address="https://download.pytorch.org/models/vgg16-397923af.pth",
    sha256="397923af",
    options="model.init_args.lpips_weights",
    alternative=", or set model.init_args.loss.perceptual_weight to 0",
)


class LPIPS(nn.Module):
    """Perceptual distance over the features of VGG16, with the linear heads that torchmetrics ships.

    Always frozen and in evaluation mode.

    Args:
        vgg16: weights and biases of VGG16's convolutions, as :func:`read_vgg16` returns them.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, vgg16: dict[str, Tensor]) -> None:
        super().__init__()
        self.features = vgg16_layers()
        self.load_state_dict(vgg16, assign=True)
        for name, value in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(value).view(1, 3, 1, 1), persistent=False)
        for index, head in enumerate(read_heads()):
            self.register_buffer(f"head{index}", head, persistent=False)
        self.requires_grad_(False).eval()

    @staticmethod
    def vgg16_shapes() -> dict[str, torch.Size]:
        """Names and shapes of the weights of VGG16's convolutions."""
        return {f"features.{name}": value.shape for name, value in vgg16_layers().named_parameters()}

    def train(self, mode: bool = True) -> "LPIPS":
        """Stay in evaluation mode when a parent module switches to training."""
        return super().train(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute the distance between each image in ``x`` and the one in ``y``.

        Under autocast only the convolutions run in low precision; everything else is float32.

        Args:
            x: (B, 3, H, W) floats in [-1, 1], at least 16 px; usually the images with a gradient.
            y: images of the same shape and range.

        Returns:
            (B,) float32, 0 for equal images.

        Raises:
            ValueError: if the shapes differ, or the images are too small or not floats.
        """
        if x.shape != y.shape or x.dim() != 4 or x.shape[1] != 3 or min(x.shape[2:]) < MIN_SIZE:
            raise ValueError(
                f"LPIPS needs two batches of one shape, (B, 3, H, W) of at least {MIN_SIZE} px, "
                f"not {tuple(x.shape)} and {tuple(y.shape)}"
            )
        if not (x.is_floating_point() and y.is_floating_point()):
            raise ValueError(
                f"LPIPS needs floats in [-1, 1], not {x.dtype} and {y.dtype}; scale levels 0 to 255 by x / 127.5 - 1"
            )
        x, y = ((each.float() - self.mean) / self.std for each in (x, y))
        distance = x.new_zeros(len(x))
        level = 0
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                distance = distance + self._distance(x, y, level)
                level += 1
            x, y = layer(x), layer(y)
        return distance + self._distance(x, y, level)

    def _distance(self, x: Tensor, y: Tensor, level: int) -> Tensor:
        """Distance of features (B, C, h, w) at one resolution, (B,) float32."""
        head: Tensor = getattr(self, f"head{level}")
        difference: Tensor = (normalise(x) - normalise(y)).square() * head
        return difference.sum(1).mean((1, 2))


def normalise(features: Tensor) -> Tensor:
    """Scale features (B, C, H, W) to unit norm over channels, float32."""
    features = features.float()
    normalised: Tensor = features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + EPSILON)
    return normalised


def vgg16_layers() -> nn.Sequential:
    """VGG16 up to its last ReLU, numbered as in torchvision, on the meta device."""
    layers: list[nn.Module] = []
    previous = 3
    with torch.device("meta"):
        for widths in WIDTHS:
            if layers:
                layers.append(nn.MaxPool2d(2))
            for width in widths:
                layers += [nn.Conv2d(previous, width, 3, padding=1), nn.ReLU()]
                previous = width
    return nn.Sequential(*layers)


def read_heads() -> list[Tensor]:
    """Read the five linear heads (1, C, 1, 1) from the file that torchmetrics contains."""
    package = importlib.util.find_spec("torchmetrics")
    assert package is not None
    assert package.origin is not None
    path = Path(package.origin).parent / "functional/image/lpips_models/vgg.pth"
    heads = torch.load(path, map_location="cpu", weights_only=True)
    return [heads[f"lin{index}.model.1.weight"] for index in range(len(WIDTHS))]


def fetch_vgg16(path: Path | str | None = None) -> Path:
    """Find torchvision's VGG16 file, or download it; its content is not read.

    Args:
        path: the file; None for the one in torch.hub's cache folder, which is downloaded if it is missing.

    Raises:
        ValueError: in one line, if the file does not exist or could not be downloaded.
    """
    return VGG16.fetch(path)


def read_vgg16(path: Path | str | None = None) -> dict[str, Tensor]:
    """Read weights and biases of VGG16's convolutions from torchvision's file.

    Args:
        path: the file, ``.pth`` or ``.safetensors``; None as for :func:`fetch_vgg16`. It need not hold the classifier.

    Returns:
        ``features.<i>.weight`` and ``features.<i>.bias``, float32, on the CPU.

    Raises:
        ValueError: in one line, if the file is not available, damaged, or holds other weights.
    """
    return VGG16.read(fetch_vgg16(path), LPIPS.vgg16_shapes(), ignored_prefix="classifier.")
