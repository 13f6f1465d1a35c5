"""Bases of the metrics over images. B images of H × W pixels per batch, N images in total, F features."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from llamagen.finite import is_finite
from llamagen.metrics.features import (
    PARTS,
    Features,
    check_finite_features,
    check_uint8_images,
    extract,
    extractor_name,
    probe,
)
from llamagen.metrics.result_names import PURPOSES, Purpose, ResultName, with_extractor

FAKE, REAL = SIDES = ("fake", "real")
MAX_PIECES = 32
"""Maximum number of batches of features that are kept before they are concatenated. On CPUs, small tensors that are
kept between large temporary ones fragment the heap, which then grows to many times the size of the features."""

ReferencePart = Literal["statistics", "spatial_statistics", "features"]
"""Fields of a reference: mean and covariance of pool features, the same of spatial features, pool features (M, F)."""


def side_name(real: bool) -> str:
    """Prefix of a metric's states for real or for compared images."""
    return REAL if real else FAKE


class ImageMetric(Metric):
    """Base of the image metrics that use a feature extractor.

    Subclasses implement ``update(images, real=False, index=None)`` and ``compute()``, and declare the class attributes
    below. ``evaluation.measurement`` needs nothing else to measure, name and report them.

    Args:
        features: extractor, see :func:`~llamagen.metrics.features.extract`. It is put into evaluation mode and frozen,
            and is not part of the state dict.
        image_size: side of the images in pixels. Other sizes are rejected, because the size changes every result.
        reference: the :attr:`reference_part` of a reference; None if real images are passed to ``update``.

    Raises:
        ValueError: if the module is not an extractor or lacks the features that the metric needs, or the reference does
            not fit.
    """

    full_state_update = False
    symbol: ClassVar[str]
    """The metric's name in messages, in lower case."""
    result_names: ClassVar[tuple[ResultName, ...]]
    """Names of the values that ``compute`` returns, in order."""
    part: ClassVar[str] = "pool"
    """The field of :class:`Features` that the metric uses."""
    reference_part: ClassVar[ReferencePart | None] = None
    """The field of a reference that the metric needs; None for metrics without real images."""
    purposes: ClassVar[tuple[Purpose, ...]] = PURPOSES
    """Which images the metric is for: generated ones, reconstructions, or both."""
    reference: Any

    def __init__(self, features: nn.Module, image_size: int, reference: Any = None) -> None:
        super().__init__()
        if image_size < 1:
            raise ValueError(f"image_size is {image_size}; give the side of the images in pixels")
        self._extractor = (features.eval().requires_grad_(False),)  # in a tuple, so that nn.Module does not see it
        self.image_size = image_size
        rows = self._part_of(probe(features, image_size))
        self.width, self.row_dtype = rows.shape[1], rows.dtype
        self.reference = None if reference is None else self.checked_reference(reference)

    @property
    def extractor(self) -> nn.Module:
        """The module that extracts features."""
        return self._extractor[0]

    @property
    def name(self) -> str:
        """The metric's symbol, followed by the extractor's name unless that is Inception."""
        return with_extractor(self.symbol, extractor_name(self.extractor))

    def checked_reference(self, reference: Any) -> Any:
        """Check the part of a reference, and convert it to the form that the metric keeps.

        Raises:
            ValueError: if it does not fit the metric.
        """
        raise ValueError(f"{self.name} compares with nothing; leave the reference out")

    def results(self) -> dict[str, Tensor]:
        """Values of ``compute`` by the symbols of :attr:`result_names`. All ranks must call it together."""
        return self._by_symbol(self.compute())

    def _by_symbol(self, values: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
        values = [values] if isinstance(values, Tensor) else values
        return {name.symbol: value for name, value in zip(self.result_names, values, strict=True)}

    def caveats(self) -> list[str]:
        """Warnings about the last results, for example because of too few images; call it after :meth:`results`."""
        return []

    def _part_of(self, features: Features) -> Tensor:
        rows: Tensor | None = getattr(features, self.part)
        if rows is None:
            raise ValueError(
                f"{type(self).__name__} needs {PARTS[self.part]}, which {extractor_name(self.extractor)} does not "
                "give; use another extractor or leave the metric out"
            )
        return rows

    def _check_side(self, real: bool) -> None:
        if real and self.reference is not None:
            raise ValueError("real images were given, but the metric has a reference; leave one of them out")

    def rows(self, images: Tensor | Features) -> Tensor:
        """The features that the metric uses, (B, F).

        Args:
            images: (B, 3, H, W) uint8, or their features if already extracted.

        Raises:
            ValueError: if they are not images of the metric's size, or have another number of features.
            FloatingPointError: if features are not finite.
        """
        if isinstance(images, Features):
            rows = self._part_of(images)
            check_finite_features(Features(rows), extractor_name(self.extractor))
        else:
            self.check_images(images)
            rows = self._part_of(extract(self.extractor, images))
        if rows.shape[1] != self.width:
            raise ValueError(
                f"got {rows.shape[1]} features for each image, but {self.width} for images of image_size "
                f"{self.image_size}; use one extractor and one size"
            )
        return rows

    def check_images(self, images: Tensor) -> None:
        """Check the images' type and size.

        Raises:
            ValueError: if they are not uint8 images of the metric's size.
        """
        check_uint8_images(images)
        if images.shape[2:] != (self.image_size, self.image_size):
            size = " × ".join(str(side) for side in images.shape[2:])
            raise ValueError(
                f"images are {size} pixels, but {self.name} is for {self.image_size} × {self.image_size}; set "
                "image_size to their size, and compare only images of one size"
            )

    # torchmetrics ignores `.half()`, but not the `.to(bfloat16)` with which Lightning casts a whole module.
    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        """Move to another device, but never change the precision."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).device), exclude_state)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        # footgun: torchmetrics would append to the lists of the state dict itself, and return the cached old result.
        for name in self._defaults:
            state = getattr(self, name)
            own = [part.to(self.device) for part in state] if isinstance(state, list) else state.to(self.device)
            setattr(self, name, own)
        self._computed = None


class RowMetric(ImageMetric):
    """Base of the metrics that need the features of every image, sorted by the images' index.

    Each rank keeps the features and the index of its images. ``compute`` gathers them from all ranks and sorts them, so
    the result does not depend on batches or on the number of ranks.

    Args:
        features: extractor, see :class:`ImageMetric`.
        image_size: side of the images in pixels.
        reference: see :class:`ImageMetric`.
        sides: which sides to keep: ``real``, ``fake`` or both.
    """

    full_state_update = True  # forward() must not reset the states: without an index, the metric counts its images

    def __init__(
        self, features: nn.Module, image_size: int, reference: Any = None, sides: Sequence[str] = SIDES
    ) -> None:
        super().__init__(features, image_size, reference)
        for side in sides:
            self.add_state(f"{side}_rows", [], dist_reduce_fx="cat")
            self.add_state(f"{side}_index", [], dist_reduce_fx="cat")

    def keep(self, side: str, rows: Tensor, index: Tensor | None) -> None:
        """Keep the features of a batch.

        Args:
            side: ``real`` or ``fake``.
            rows: (B, F).
            index: (B,) int64, position of each image in its dataset. If None, images are counted, and rank r of R is
                assumed to get images r, r + R, r + 2R, …, as from a distributed sampler.

        Raises:
            ValueError: if the index does not hold one integer for each image.
        """
        kept: list[Tensor] = getattr(self, f"{side}_rows")
        indices: list[Tensor] = getattr(self, f"{side}_index")
        if index is None:
            shared = torch.distributed.is_available() and torch.distributed.is_initialized()
            rank, ranks = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if shared else (0, 1)
            before = sum(map(len, kept))
            index = rank + ranks * torch.arange(before, before + len(rows), device=rows.device)
        if index.shape != (len(rows),) or index.is_floating_point() or index.dtype is torch.bool:
            raise ValueError(
                f"index is {index.dtype} of {tuple(index.shape)} for {len(rows)} images; give one integer for each"
            )
        kept.append(rows.to(self.row_dtype))  # all ranks must gather the same dtype
        indices.append(index.to(rows.device, torch.int64))
        if len(kept) >= MAX_PIECES:
            kept[:], indices[:] = [torch.cat(kept)], [torch.cat(indices)]

    def kept(self, side: str) -> Tensor:
        """The features of a side, sorted by index, (N, F).

        Raises:
            ValueError: if there are fewer than two images.
            FloatingPointError: if features are not finite.
        """
        rows, index = getattr(self, f"{side}_rows"), getattr(self, f"{side}_index")
        count = len(rows) if isinstance(rows, Tensor) else sum(map(len, rows))  # a tensor: gathered from all ranks
        if count < 2:
            raise ValueError(f"{count} {side} images are too few for {self.name}; give at least two")
        order = torch.argsort(dim_zero_cat(index), stable=True)
        ordered = dim_zero_cat(rows)[order]
        check_finite_features(Features(ordered), extractor_name(self.extractor))  # states may come from a file
        return ordered

    def reset(self) -> None:
        """Forget all images, also the gathered ones that remain if ``compute`` raised."""
        for name in self._defaults:
            setattr(self, name, [])
        super().reset()

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        # footgun: torchmetrics gathers a tensor of shape (0,) from a rank without images, which cannot be concatenated.
        for name in self._reductions:
            if isinstance(kept := getattr(self, name), list) and not kept:
                shape, dtype = ((0,), torch.int64) if name.endswith("_index") else ((0, self.width), self.row_dtype)
                kept.append(torch.empty(shape, dtype=dtype, device=self.device))
        super()._sync_dist(*args, **kwargs)


class ComparingRowMetric(RowMetric):
    """Base of the metrics that compare the features of all images with those of real images: KID, precision, recall.

    Args:
        features: extractor, see :class:`ImageMetric`.
        image_size: side of the images in pixels.
        reference: features (M, F) of real images; None if real images are passed to ``update``.
    """

    reference_part = "features"
    reference: Tensor | None

    def checked_reference(self, reference: Tensor) -> Tensor:
        """Check the reference's features (M, F), and convert them to the dtype of the extractor's features.

        Raises:
            ValueError: if they have another width, fewer than two rows, or values that are not finite.
        """
        if not is_finite(reference, self.row_dtype):
            raise ValueError("the reference has features that are not finite; get or make it again")
        if reference.dim() != 2 or reference.shape[1] != self.width or len(reference) < 2:
            raise ValueError(
                f"the reference has features of {tuple(reference.shape)}, but {self.name} needs at least two rows of "
                f"{self.width}; use the reference of this extractor"
            )
        return reference.to(self.row_dtype)

    def update(self, images: Tensor | Features, real: bool = False, index: Tensor | None = None) -> None:
        """Add images.

        Args:
            images: (B, 3, H, W) uint8, or their features.
            real: whether these are the real images, with which the others are compared.
            index: (B,) int64, position of each image in its dataset; see :meth:`RowMetric.keep`.

        Raises:
            ValueError: if they are not uint8 images of the metric's size, or are real although there is a reference.
        """
        self._check_side(real)
        self.keep(side_name(real), self.rows(images), index)

    def both_sides(self) -> tuple[Tensor, Tensor]:
        """Features of the compared images (N, F) and of the real ones (M, F), on one device.

        Raises:
            ValueError: if a side has fewer than two images.
            FloatingPointError: if features are not finite.
        """
        fake = self.kept(FAKE)
        return fake, self.kept(REAL) if self.reference is None else self.reference.to(fake.device)
