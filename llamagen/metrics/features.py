"""Features of images, the input of the metrics. B images of H × W pixels, F and S features, K classes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llamagen.finite import FiniteCheck, find_source, not_finite, not_finite_error
from llamagen.state_dicts import tensors_checksum


class Features(NamedTuple):
    """Output of an extractor. Fields that an extractor does not provide are None.

    Attributes:
        pool: (B, F) features of whole images, for FID, KID, precision and recall.
        spatial: (B, S) features that keep the spatial layout, for sFID.
        logits: (B, K) class logits, for the Inception Score.
        biased_logits: (B, K) logits with the bias of the last layer, as in training. Published Inception Scores
            usually leave the bias out.
    """

    pool: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None
    biased_logits: Tensor | None = None


PARTS = {"pool": "pool features", "spatial": "spatial features", "logits": "logits", "biased_logits": "biased logits"}
"""Descriptions of the fields of :class:`Features`, for messages."""


@torch.no_grad()
def extract(extractor: nn.Module, images: Tensor) -> Features:
    """Extract features in float32, even under autocast (or in float64, if the extractor returns float64).

    Args:
        extractor: maps images (B, 3, H, W), float32 with the levels 0 … 255, to :class:`Features`, or to a tensor that
            flattens to ``pool`` (B, F). It is moved to the images' device.
        images: (B, 3, H, W) uint8.

    Raises:
        ValueError: if the images have another type or shape, or the extractor does not return one row per image.
        FloatingPointError: if features are not finite.
    """
    check_uint8_images(images)

    def run() -> Any:
        with torch.autocast(images.device.type, enabled=False), without_tf32():
            return extractor.to(images.device)(images.float())

    found = run()
    features = found if isinstance(found, Features) else Features(found)
    parts: dict[str, Tensor | None] = features._asdict()
    for name, rows in parts.items():
        if rows is None and name != "pool":
            continue
        if not isinstance(rows, Tensor) or rows.dim() < 2 or len(rows) != len(images):
            shape = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise ValueError(
                f"{type(extractor).__name__} gives {shape} as {name} of {len(images)} images; it must give one row "
                "of features for each"
            )
    flat = Features(**{name: None if rows is None else _flat(rows) for name, rows in parts.items()})  # type: ignore[arg-type]
    check_finite_features(flat, extractor_name(extractor), lambda: find_source(extractor, run))
    return flat


def probe(extractor: nn.Module, image_size: int) -> Features:
    """Extract features of two black images, to learn which features an extractor provides and their widths.

    Args:
        extractor: the extractor, in evaluation mode. It stays on its device.
        image_size: side of the images in pixels.
    """
    device = next((value.device for value in extractor.state_dict().values()), torch.device("cpu"))
    return extract(extractor, torch.zeros(2, 3, image_size, image_size, dtype=torch.uint8, device=device))


def check_finite_features(features: Features, name: str, blame: Callable[[], str] = str) -> None:
    """Check that features are finite. This synchronises with their device.

    Args:
        features: features of a batch.
        name: name of their extractor.
        blame: names the layer or weight at fault; called only if features are not finite.

    Raises:
        FloatingPointError: in one line, if features are not finite.
    """
    given: dict[str, Tensor | None] = features._asdict()
    parts = {part: rows for part, rows in given.items() if rows is not None}
    broken = torch.stack([not_finite(rows) for rows in parts.values()])

    def explain(rows: list[int]) -> FloatingPointError:
        part, dtype = next((part, value.dtype) for part, value in parts.items() if not_finite(value).any())
        precision = str(dtype).removeprefix("torch.")
        return not_finite_error(
            f"the {PARTS[part]} of the extractor {name} are", precision, blame(), rows, broken.shape[1]
        )

    FiniteCheck(broken.any(0), explain)()


@contextmanager
def without_tf32() -> Iterator[None]:
    """Turn TF32 off: it rounds factors to 10 bits on some GPUs only, so metrics would depend on the GPU."""
    convolution: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    product = torch.backends.cuda.matmul
    before = convolution.fp32_precision, product.fp32_precision
    convolution.fp32_precision = product.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolution.fp32_precision, product.fp32_precision = before


def check_uint8_images(images: Tensor) -> None:
    """Check that images are (B, 3, H, W) uint8.

    Raises:
        ValueError: in one line that says how to convert them, if they are not.
    """
    if not isinstance(images, Tensor):
        raise ValueError(
            f"images must be one tensor, uint8 of shape (B, 3, H, W), not a {type(images).__name__}; convert a list "
            "with torch.stack, an array with torch.from_numpy"
        )
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(
            f"images must be uint8 of shape (B, 3, H, W), not {images.dtype} of {tuple(images.shape)}{_advice(images)}"
        )


def _advice(images: Tensor) -> str:
    """How to convert images to (B, 3, H, W) uint8. Synchronises with the device, which is no problem for an error."""
    if images.dtype is torch.uint8:
        return "; use permute(0, 3, 1, 2)" if images.dim() == 4 and images.shape[3] == 3 else ""
    if not images.numel() or images.is_complex():
        return ""
    low, high = float(images.min()), float(images.max())
    if images.is_floating_point() and low < -0.25 and low >= -2 and high <= 2:
        return "; convert floats in [-1, 1] with ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)"
    if low >= 0 and 2 < high <= 255.5:
        return "; convert levels 0 to 255 with x.round().to(torch.uint8)"
    return "; multiply floats in [0, 1] by 255, round, and convert them"


def _flat(rows: Tensor) -> Tensor:
    return (rows if rows.dtype is torch.float64 else rows.float()).flatten(1)


def extractor_name(extractor: nn.Module) -> str:
    """Name of an extractor in result names: its attribute ``name``, or else the name of its class."""
    return str(getattr(extractor, "name", type(extractor).__name__))


def extractor_checksum(extractor: nn.Module) -> str:
    """SHA-256 over names and values of an extractor's parameters and buffers."""
    return tensors_checksum(extractor.state_dict())
