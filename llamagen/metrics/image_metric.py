"""What metrics over images share. B images of H × W pixels, N images in all, F features."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from llamagen.finite import is_finite
from llamagen.metrics.features import (
    Features,
    extract,
    extractor_name,
    refuse_not_finite,
    refuse_other_than_images,
)

FAKE, REAL = SIDES = ("fake", "real")
MAX_PIECES = 32
"""Batches whose features are kept one by one, before they are put together. Small pieces that stay, between large ones
that come and go, keep an allocator from using memory again: many times that of the features, on CPUs."""


def side_of(real: bool) -> str:
    """The name of a side in the states of metrics."""
    return REAL if real else FAKE


class ImageMetric(Metric):
    """Base of the metrics that look at images through an extractor of features.

    Args:
        features: extractor, see :func:`~llamagen.metrics.features.extract`. It is put into evaluation mode, frozen, and
            is in no state dict.
        image_size: side of the images in pixels; others are refused, because the size changes every number.

    Raises:
        ValueError: if the module is no extractor, or has not what the metric looks at.
    """

    full_state_update = False
    symbol: ClassVar[str]
    """What the metric is called, in lower case."""
    part: ClassVar[str] = "pool"
    """Which of the features it looks at."""

    def __init__(self, features: nn.Module, image_size: int) -> None:
        super().__init__()
        if image_size < 1:
            raise ValueError(f"image_size is {image_size}; give the side of the images in pixels")
        self._extractor = (features.eval().requires_grad_(False),)  # in a tuple, so that nn.Module does not see it
        self.image_size = image_size
        device = next((value.device for value in features.state_dict().values()), torch.device("cpu"))
        probe = torch.zeros(2, 3, image_size, image_size, dtype=torch.uint8, device=device)
        rows = self._part_of(extract(features, probe))
        self.width, self.row_dtype = rows.shape[1], rows.dtype

    @property
    def extractor(self) -> nn.Module:
        """The module that extracts features."""
        return self._extractor[0]

    @property
    def name(self) -> str:
        """The metric's symbol; where the extractor is not Inception, whose numbers people compare, with its name."""
        extractor = extractor_name(self.extractor)
        return self.symbol if extractor == "inception" else f"{self.symbol}_{extractor}"

    def _part_of(self, features: Features) -> Tensor:
        rows: Tensor | None = getattr(features, self.part)
        if rows is None:
            raise ValueError(
                f"{type(self).__name__} needs {self.part} features, which {extractor_name(self.extractor)} does not "
                "give; use another extractor or leave the metric out"
            )
        return rows

    def rows(self, images: Tensor | Features) -> Tensor:
        """What the metric looks at, (B, F).

        Args:
            images: (B, 3, H, W) uint8, or their features, if these were extracted before.

        Raises:
            ValueError: if they are not images of the metric's size, or have other features.
            FloatingPointError: if features are not finite.
        """
        if isinstance(images, Features):
            rows = self._part_of(images)
            refuse_not_finite(Features(rows), extractor_name(self.extractor))
        else:
            self.check_images(images)
            rows = self._part_of(extract(self.extractor, images))
        if rows.shape[1] != self.width:
            raise ValueError(
                f"{rows.shape[1]} features came for each image, but {self.width} for those of image_size "
                f"{self.image_size}; use one extractor and one size"
            )
        return rows

    def check_images(self, images: Tensor) -> None:
        """See that these are images of the metric's size.

        Raises:
            ValueError: if not.
        """
        refuse_other_than_images(images)
        if images.shape[2:] != (self.image_size, self.image_size):
            size = " × ".join(str(side) for side in images.shape[2:])
            raise ValueError(
                f"images are {size} pixels, but {self.name} is for {self.image_size} × {self.image_size}; set "
                "image_size to theirs, and compare only images of one size"
            )

    # torchmetrics ignores `.half()`, but not the `.to(bfloat16)` by which Lightning turns a whole module to 16 bits.
    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        """Go along to another device, but not to another precision."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).device), exclude_state)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        # torchmetrics would go on in the lists of the state dict itself, and keep the result of before.
        for name in self._defaults:
            state = getattr(self, name)
            here = [part.to(self.device) for part in state] if isinstance(state, list) else state.to(self.device)
            setattr(self, name, here)
        self._computed = None


class RowMetric(ImageMetric):
    """Base of the metrics that need the features of every image, in the images' order, which is that of an index.

    So the result is the same in any batches and on any number of ranks. Features and an index are kept for each
    image, on its rank; when the result is computed, those of all ranks are put together.
    """

    full_state_update = True  # forward() must not begin anew with each batch: without an index, it counts

    def __init__(self, features: nn.Module, image_size: int, sides: Sequence[str] = SIDES) -> None:
        super().__init__(features, image_size)
        for side in sides:
            self.add_state(f"{side}_rows", [], dist_reduce_fx="cat")
            self.add_state(f"{side}_index", [], dist_reduce_fx="cat")

    def keep(self, side: str, rows: Tensor, index: Tensor | None) -> None:
        """Keep the features of a batch.

        Args:
            side: ``real`` or ``fake``.
            rows: (B, F).
            index: (B,) int64, number of each image in its set. None: those of a rank come in order, and rank r of R
                has every R-th image, from the r-th on, as samplers for several ranks share them out.

        Raises:
            ValueError: if the index is not one number for each image.
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
                f"index is {index.dtype} of {tuple(index.shape)} for {len(rows)} images; give one whole number each"
            )
        kept.append(rows.to(self.row_dtype))  # the same on all ranks, as the index is
        indices.append(index.to(rows.device, torch.int64))
        if len(kept) >= MAX_PIECES:
            kept[:], indices[:] = [torch.cat(kept)], [torch.cat(indices)]

    def kept(self, side: str) -> Tensor:
        """The features of a side in the order of their index, (N, F).

        Raises:
            ValueError: if there are fewer than two images.
            FloatingPointError: if features are not finite.
        """
        rows, index = getattr(self, f"{side}_rows"), getattr(self, f"{side}_index")
        count = len(rows) if isinstance(rows, Tensor) else sum(map(len, rows))  # a tensor is that of all ranks
        if count < 2:
            raise ValueError(f"{count} {side} images are too few for {self.name}; give at least two")
        order = torch.argsort(dim_zero_cat(index), stable=True)
        ordered = dim_zero_cat(rows)[order]
        refuse_not_finite(Features(ordered), extractor_name(self.extractor))  # states may be those of a file
        return ordered

    def reset(self) -> None:
        """Forget all images, also if those of all ranks are there because a result was refused."""
        for name in self._defaults:
            setattr(self, name, [])
        super().reset()

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        # torchmetrics would gather a tensor without a second dimension from a rank that has nothing.
        for name in self._reductions:
            if isinstance(kept := getattr(self, name), list) and not kept:
                shape, dtype = ((0,), torch.int64) if name.endswith("_index") else ((0, self.width), self.row_dtype)
                kept.append(torch.empty(shape, dtype=dtype, device=self.device))
        super()._sync_dist(*args, **kwargs)


class ComparingRowMetric(RowMetric):
    """Base of the metrics that compare the features of every image with those of real ones: KID, precision, recall.

    Attributes:
        reference: features (M, F) of real images, if they are known; else these are shown to ``update``.
    """

    reference: Tensor | None = None

    def checked_reference(self, reference: Tensor | None) -> Tensor | None:
        """A reference, in the precision of the features.

        Raises:
            ValueError: if it has another number of features, fewer than two rows, or some that are not finite.
        """
        if reference is None:
            return None
        if not is_finite(reference, self.row_dtype):
            raise ValueError("the reference has features that are not finite; get or make it again")
        if reference.dim() != 2 or reference.shape[1] != self.width or len(reference) < 2:
            raise ValueError(
                f"the reference has features of {tuple(reference.shape)}, but {self.name} needs at least two rows of "
                f"{self.width}; use the reference of this extractor"
            )
        return reference.to(self.row_dtype)

    def update(self, images: Tensor | Features, real: bool = False, index: Tensor | None = None) -> None:
        """Keep the features of images.

        Args:
            images: (B, 3, H, W) uint8, or their features.
            real: these are the images to compare with.
            index: (B,) int64, number of each image; see :meth:`RowMetric.keep`.

        Raises:
            ValueError: if they are no uint8 images of the metric's size, or real ones where a reference is known.
        """
        if real and self.reference is not None:
            raise ValueError("real images were given, but the metric has a reference; leave one of them out")
        self.keep(side_of(real), self.rows(images), index)

    def both_sides(self) -> tuple[Tensor, Tensor]:
        """Features of the images (N, F) and of the real ones (M, F), those of the reference or kept, on one device.

        Raises:
            ValueError: if a side has fewer than two images.
            FloatingPointError: if features are not finite.
        """
        fake = self.kept(FAKE)
        return fake, self.kept(REAL) if self.reference is None else self.reference.to(fake.device)
