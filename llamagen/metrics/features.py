"""What metrics see of images. B images of H × W pixels, F and S features, K classes."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llamagen.finite import FiniteCheck, find_source, not_finite, not_finite_error


class Features(NamedTuple):
    """What an extractor makes of images.

    Attributes:
        pool: (B, F) features of whole images: FID, KID, precision and recall.
        spatial: (B, S) features that know where something is: sFID. None if the extractor has none.
        logits: (B, K) of the classes whose probabilities are the softmax: Inception Score. None if it has none.
        biased_logits: (B, K) with the bias of the last layer, as its training had them. The Inception Score that is
            usually quoted is taken without.
    """

    pool: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None
    biased_logits: Tensor | None = None


@torch.no_grad()
def extract(extractor: nn.Module, images: Tensor) -> Features:
    """Features of images, in float32 also under autocast (or in float64, if the extractor likes to).

    Args:
        extractor: turns images (B, 3, H, W), float32 with the whole numbers 0 … 255 of their files, into
            :class:`Features`, or into a tensor that flattens to ``pool`` (B, F). It is moved to the images' device.
        images: (B, 3, H, W) uint8.

    Raises:
        ValueError: if these are no such images, or the extractor does not give a row for each of them.
        FloatingPointError: if features are not finite.
    """
    refuse_other_than_images(images)

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
    refuse_not_finite(flat, extractor_name(extractor), lambda: find_source(extractor, run))
    return flat


def refuse_not_finite(features: Features, name: str, blame: Callable[[], str] = str) -> None:
    """See that features are finite; waits for their device.

    Args:
        features: of a batch.
        name: of their extractor.
        blame: says what they come from; asked only if they are not.

    Raises:
        FloatingPointError: if not, in one line.
    """
    given: dict[str, Tensor | None] = features._asdict()
    parts = {part: rows for part, rows in given.items() if rows is not None}
    broken = torch.stack([not_finite(rows) for rows in parts.values()])

    def explain(rows: list[int]) -> FloatingPointError:
        part, dtype = next((part, value.dtype) for part, value in parts.items() if not_finite(value).any())
        precision = str(dtype).removeprefix("torch.")
        return not_finite_error(
            f"the {part} features of the extractor {name} are", precision, blame(), rows, broken.shape[1]
        )

    FiniteCheck(broken.any(0), explain)()


@contextmanager
def without_tf32() -> Iterator[None]:
    """TF32 rounds what is multiplied to 10 bits, on some GPUs and not on others, whatever training may like."""
    convolution: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    product = torch.backends.cuda.matmul
    before = convolution.fp32_precision, product.fp32_precision
    convolution.fp32_precision = product.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolution.fp32_precision, product.fp32_precision = before


def refuse_other_than_images(images: Tensor) -> None:
    """See that these are images (B, 3, H, W) uint8.

    Raises:
        ValueError: if they are not.
    """
    if not isinstance(images, Tensor):
        raise ValueError(
            f"images must be one tensor, uint8 of shape (B, 3, H, W), not a {type(images).__name__}; of a list make "
            "one with torch.stack, of an array with torch.from_numpy"
        )
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(
            f"images must be uint8 of shape (B, 3, H, W), not {images.dtype} of {tuple(images.shape)}{_advice(images)}"
        )


def _advice(images: Tensor) -> str:
    """What to do about images that are no (B, 3, H, W) uint8; waits for the device, but these are refused anyway."""
    if images.dtype is torch.uint8:
        return "; use permute(0, 3, 1, 2)" if images.dim() == 4 and images.shape[3] == 3 else ""
    if not images.numel() or images.is_complex():
        return ""
    low, high = float(images.min()), float(images.max())
    if images.is_floating_point() and low < -0.25 and low >= -2 and high <= 2:
        return "; of floats in [-1, 1] take ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)"
    if low >= 0 and 2 < high <= 255.5:
        return "; of levels 0 to 255 take x.round().to(torch.uint8)"
    return "; multiply floats in [0, 1] by 255, round, and convert them"


def _flat(rows: Tensor) -> Tensor:
    return (rows if rows.dtype is torch.float64 else rows.float()).flatten(1)


def extractor_name(extractor: nn.Module) -> str:
    """What an extractor is called in the names of metrics: its ``name``, or else its class."""
    return str(getattr(extractor, "name", type(extractor).__name__))


def extractor_checksum(extractor: nn.Module) -> str:
    """SHA-256 over names and values of an extractor's parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(extractor.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
