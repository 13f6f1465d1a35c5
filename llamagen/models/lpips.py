"""LPIPS: how different two images look to a network (arXiv 1801.03924). B batch, H × W pixels."""

import importlib.util
import zipfile
from http.client import HTTPException
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.hub import download_url_to_file, get_dir

from llamagen.files import atomic_file
from llamagen.full_disk import DiskFullError

WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of VGG16's convolutions, by resolution."""
MEAN, STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
MIN_SIZE = 16
EPSILON = 1e-10
VGG16_FILE = "vgg16-397923af.pth"
VGG16_ADDRESS = f"https://download.pytorch.org/models/{VGG16_FILE}"
CHECKSUM = "397923af"
"""Start of the SHA-256 of the file, which also is in its name."""
OPTION = "model.init_args.lpips_weights"
MAX_LISTED = 20


class LPIPS(nn.Module):
    """Perceptual distance over the features of VGG16, with the linear heads that torchmetrics ships.

    It is a fixed function: always in evaluation mode, frozen.

    Args:
        vgg16: weights and biases of VGG16's convolutions, as :func:`read_vgg16` gives them.
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
        """Names and shapes of the weights that are needed."""
        return {f"features.{name}": value.shape for name, value in vgg16_layers().named_parameters()}

    def train(self, mode: bool = True) -> "LPIPS":
        """Stay in evaluation mode, whatever a parent does."""
        return super().train(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance of each image in ``x`` from the one in ``y``; all but the convolutions is float32 under autocast.

        Args:
            x: (B, 3, H, W) in [-1, 1], at least 16 px; usually the one with a gradient.
            y: the same shape.

        Returns:
            (B,) float32, 0 for equal images.

        Raises:
            ValueError: if the shapes differ or are too small, or the images are no floats.
        """
        if x.shape != y.shape or x.dim() != 4 or x.shape[1] != 3 or min(x.shape[2:]) < MIN_SIZE:
            raise ValueError(
                f"LPIPS needs two batches of one shape, (B, 3, H, W) of at least {MIN_SIZE} px, "
                f"not {tuple(x.shape)} and {tuple(y.shape)}"
            )
        if not (x.is_floating_point() and y.is_floating_point()):
            raise ValueError(
                f"LPIPS needs floats in [-1, 1], not {x.dtype} and {y.dtype}; of levels 0 to 255 take x / 127.5 - 1"
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
        """(B,) float32 of features (B, C, h, w)."""
        head: Tensor = getattr(self, f"head{level}")
        difference: Tensor = (normalise(x) - normalise(y)).square() * head
        return difference.sum(1).mean((1, 2))


def normalise(features: Tensor) -> Tensor:
    """(B, C, H, W) with unit vectors over channels, float32."""
    features = features.float()
    normalised: Tensor = features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + EPSILON)
    return normalised


def vgg16_layers() -> nn.Sequential:
    """VGG16 up to its last ReLU, numbered as in torchvision, on the meta device: no memory, no random numbers."""
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
    """The five linear heads (1, C, 1, 1), from the file inside torchmetrics."""
    package = importlib.util.find_spec("torchmetrics")
    assert package is not None
    assert package.origin is not None
    path = Path(package.origin).parent / "functional/image/lpips_models/vgg.pth"
    heads = torch.load(path, map_location="cpu", weights_only=True)
    return [heads[f"lin{index}.model.1.weight"] for index in range(len(WIDTHS))]


def fetch_vgg16(path: Path | str | None = None) -> Path:
    """The file that torchvision publishes of VGG16, downloaded if need be; it is not read.

    Args:
        path: the file; None looks into torch.hub's cache folder, and downloads it if it is not there.

    Raises:
        ValueError: in one line, if it cannot be had.
    """
    file = Path(path) if path is not None else Path(get_dir()) / "checkpoints" / VGG16_FILE
    if not file.is_file():
        if path is not None:
            raise ValueError(f"{OPTION} {file} does not exist; get {VGG16_ADDRESS}")
        _download(file)
    return file


def read_vgg16(path: Path | str | None = None) -> dict[str, Tensor]:
    """Weights and biases of VGG16's convolutions, from a file that torchvision publishes.

    Args:
        path: the file (its classifier is not read), a ``.pth`` or ``.safetensors``; as for :func:`fetch_vgg16`.

    Returns:
        ``features.<i>.weight`` and ``features.<i>.bias``, float32, on the CPU.

    Raises:
        ValueError: in one line, if the file cannot be had, is damaged or is something else.
    """
    file = fetch_vgg16(path)
    try:
        found = {name: value.float() for name, value in _load(file).items() if not name.startswith("classifier.")}
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(f"{file} cannot be read as VGG16 ({type(error).__name__}); get {VGG16_ADDRESS}") from error
    wanted = LPIPS.vgg16_shapes()
    faults = [
        *(f"{name} is missing" for name in wanted if name not in found),
        *(f"{name} is unexpected" for name in found if name not in wanted),
        *(
            f"{name} is {tuple(found[name].shape)}, not {tuple(shape)}"
            for name, shape in wanted.items()
            if name in found and found[name].shape != shape
        ),
    ]
    if faults:
        listed = "; ".join(faults[:MAX_LISTED]) + (f"; {more} more" if (more := len(faults) - MAX_LISTED) > 0 else "")
        raise ValueError(f"{file} is not torchvision's VGG16: {listed}; get {VGG16_ADDRESS}")
    return found


def _download(file: Path) -> None:
    try:  # under a temporary name until it is whole and its checksum is right
        with atomic_file(file) as temporary:
            download_url_to_file(VGG16_ADDRESS, str(temporary), hash_prefix=CHECKSUM)
    except DiskFullError:
        raise
    except (OSError, RuntimeError, HTTPException) as error:
        raise ValueError(
            f"LPIPS needs torchvision's VGG16, {VGG16_FILE}, which is not in {file.parent} and could not be had from "
            f"{VGG16_ADDRESS} ({error}); put it there, or give its path as {OPTION}, or set "
            "model.init_args.loss.perceptual_weight to 0"
        ) from None  # what urllib was led to it by is three pages


def _load(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file  # imported here because few need it

        return load_file(file)
    # torchvision's own file is older than the zip format, the only one that can be mapped.
    content: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    return content
