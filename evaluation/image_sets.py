"""Image datasets to evaluate: a folder, shards, or an array like ADM's. B batch, H = W = ``size``."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from datamodules.datasets.base import ExampleDataset
from datamodules.datasets.images import to_planes
from datamodules.loading.loader import EvaluationLoader
from datamodules.loading.order import shared_batches
from datamodules.storage.bad_examples import BadExampleError, Skipped, Tally
from datamodules.storage.folders import class_folders, flat_images, index_flat, index_folder
from datamodules.storage.index import IMAGES, NO_LABEL, Example, ExampleIndex
from datamodules.storage.layout import split_of
from datamodules.storage.remote import ShardCache
from datamodules.storage.shards import CODES_FORMAT, META_FILE
from datamodules.storage.sources import SPLITS, find_sources
from datamodules.transforms.decode import read_image
from evaluation.image_content import ImageContent
from evaluation.npz_images import ENDING, MIN_IMAGES, ImageArchive
from llamagen.centre_crop import centre_crop
from llamagen.option_checks import check_integer

Split = Literal["train", "val"]
Crop = Literal["none", "adm-centre"]

MAX_BAD = 0.05
"""Largest tolerated share of broken images."""

OTHER_SIZE = "other size"
"""A reason for which the run stops instead of skipping the image. Worker processes report it like other reasons."""

HINT = f"give a folder of images ({', '.join(IMAGES)}), of class folders or of shards, or an .npz"


class ImageBatch(NamedTuple):
    """A batch of images.

    Attributes:
        images: (B, 3, H, W) uint8, RGB, contiguous.
        index: (B,) int64, position of each image in the dataset, ascending; broken images leave gaps.
        labels: (B,) int64, class of each image, −1 if it has none.
    """

    images: Tensor
    index: Tensor  # type: ignore[assignment]  # shadows tuple.index, which is not needed
    labels: Tensor


class ImageSet(ABC):
    """Square images of one size, in a fixed order.

    Args:
        name: path, as given by the user.
        size: side of the images in pixels.
        known: images that are known in advance to be unreadable.

    Attributes:
        cropped: number of images that the last :meth:`batches` resized and cropped.
        content: facts about the images that the last :meth:`batches` returned.
    """

    def __init__(self, name: str, size: int, known: Iterable[Skipped] = ()) -> None:
        self.name, self.size, self.cropped = name, size, 0
        self._known, self._digests, self.content = list(known), 0, ImageContent()
        self._tally = _ImageTally(self._known)

    @abstractmethod
    def __len__(self) -> int:
        """Number of images, including broken ones that were not detected yet."""

    def batches(
        self, batch_size: int, rank: int = 0, world_size: int = 1, num_workers: int = 0
    ) -> Iterator[ImageBatch]:
        """Iterate over the images in order; rank r gets images r, r + world_size, ….

        Memory holds at most two batches, and two more per worker. Only one iteration may run at a time.

        Args:
            batch_size: maximum number of images per batch; the last batch and those with broken images are smaller.
            rank: rank of this process.
            world_size: number of ranks.
            num_workers: processes that decode files; arrays do not use them.

        Raises:
            ValueError: if a file is damaged, or has another size and ``image_size`` is not set, or if too many images
                are broken. The latter is checked with one rank only: several ranks must sum :attr:`skipped` and call
                :meth:`check_skipped`.
        """
        check_loading(batch_size, num_workers)
        assert 0 <= rank < world_size
        self.cropped, self._digests, self.content = 0, 0, ImageContent()
        self._tally = _ImageTally(self._known if rank == 0 else ())
        return self._read(batch_size, rank, world_size, num_workers)

    @abstractmethod
    def _read(self, batch_size: int, rank: int, world_size: int, num_workers: int) -> Iterator[ImageBatch]:
        """See :meth:`batches`; implementations count :attr:`cropped` and pass each batch to :meth:`_record`."""

    def _record(self, images: Tensor, digests: list[int]) -> None:
        self._digests = (self._digests + sum(digests)) % 2**256
        self.content.add(images, digests)

    @property
    def crop(self) -> Crop:
        """``adm-centre`` if the last call of :meth:`batches` resized and cropped some images, else ``none``."""
        return "adm-centre" if self.cropped else "none"

    def checksum(self) -> str:
        """Checksum of the pixels that the last call of :meth:`batches` returned, without a second pass.

        It is the sum modulo 2^256 of the SHA-256 of each image, (H, W, 3) uint8, as 64 hexadecimal digits. So it does
        not depend on order or lossless file format, and :func:`join_checksums` combines those of several ranks. It is 0
        if nothing was read.
        """
        return f"{self._digests:064x}"

    @property
    def skipped(self) -> Counter[str]:
        """Unreadable images by reason: those known in advance, and those found by the last call of :meth:`batches`.

        Only the first rank counts those known in advance, so that the counts of ranks can be summed.
        """
        return self._tally.by_reason()

    def check_skipped(self, skipped: Mapping[str, int]) -> None:
        """Check the sum of :attr:`skipped` over all ranks.

        Raises:
            ValueError: if more than 5 % of the images cannot be read.
        """
        bad, total = sum(skipped.values()), len(self) + len(self._known)
        if bad > MAX_BAD * total:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(skipped.items()))
            examples = [example.message for example in (*self._tally.skipped, *self._known)][:1]
            raise ValueError(
                f"{bad} of {total} images of {self.name} cannot be read, more than {MAX_BAD:.0%} "
                f"({'; e.g. '.join([reasons, *examples])}); fix or remove them"
            )


def check_loading(batch_size: int, num_workers: int) -> None:
    """Raise a ValueError if ``batch_size`` is below 1 or ``num_workers`` below 0."""
    check_integer("batch_size", batch_size)
    check_integer("num_workers", num_workers, minimum=0)


def join_checksums(checksums: Iterable[str]) -> str:
    """Combine the checksums of parts of a dataset, for example of all ranks, see :meth:`ImageSet.checksum`."""
    return f"{sum(int(checksum, 16) for checksum in checksums) % 2**256:064x}"


def open_images(name: str | Path, image_size: int | None = None, split: Split | None = None) -> ImageSet:
    """Find images to evaluate without reading them yet.

    Args:
        name: one of these:

            - an ``.npz`` with ``arr_0`` uint8 (N, H, W, 3) and optionally labels ``arr_1``, or an ``.npy``;
            - a folder of images, which are sorted by name;
            - a folder of class folders or shards, read as in training. Labels are the folders' names if these are
              integers, else the positions of the sorted names;
            - a folder with ``train`` and ``val`` in one of these forms.
        image_size: side in pixels to which images of another size are resized and cropped by ADM's rule. If None, all
            must have the size of the first image. Images of an array are never resized.
        split: the split to use, if the folder has several.

    Raises:
        ValueError: if there are fewer than two images, or they have none of these forms; see also
            :class:`~evaluation.npz_images.ImageArchive`.
    """
    if image_size is not None:
        check_integer("image_size", image_size)
    if not str(name):
        raise ValueError(f"the name of the images is empty; {HINT}")
    name = os.path.expanduser(name)
    path = Path(name)
    array = path.suffix in (".npz", ENDING) or (path.is_file() and path.suffix != ".tar")
    if not array or path.is_dir():
        return _Files(str(name), _find(str(name), split), image_size)
    if split is not None:
        raise ValueError(f"{name} has no splits; leave split {split} out")
    archive = ImageArchive(path)
    if image_size not in (None, archive.size):
        raise ValueError(
            f"the images of {name} are {archive.size} × {archive.size}, not image_size {image_size}, and an array is "
            f"never resized; sample with --model.init_args.image_size {image_size}, or give a folder of images"
        )
    return _Array(str(name), archive)


class _Array(ImageSet):
    def __init__(self, name: str, archive: ImageArchive) -> None:
        super().__init__(name, archive.size)
        self._archive = archive

    def __len__(self) -> int:
        return self._archive.count

    def _read(self, batch_size: int, rank: int, world_size: int, num_workers: int) -> Iterator[ImageBatch]:
        numbers, place = range(rank, len(self), world_size), 0
        for block in self._archive.blocks(numbers, batch_size):
            index = np.array(numbers[place : place + len(block)])
            place += len(block)
            # footgun: a variable that still holds block or batch would keep it in memory while the next one is read.
            batch = [self._batch(block, index)]
            del block
            yield batch.pop()

    def _batch(self, block: np.ndarray, index: np.ndarray) -> ImageBatch:
        images = torch.from_numpy(to_planes(block))
        self._record(images, list(map(_digest, block)))
        labels = self._archive.labels
        classes = np.full(len(index), NO_LABEL) if labels is None else labels[index]
        return ImageBatch(images, torch.from_numpy(index), torch.from_numpy(classes))


class _Files(ImageSet):
    def __init__(self, name: str, found: ExampleIndex, image_size: int | None) -> None:
        # Images without a label or caption are used, too.
        members = {extension: column for extension, column in found.members.items() if extension in IMAGES}
        labels = np.maximum(found.labels, NO_LABEL)
        images = ExampleIndex(found.paths, found.file_of, found.keys, members, labels, found.bad)
        self._examples = images.usable(IMAGES, labels_needed=False)
        super().__init__(name, 0, self._examples.bad)
        if len(self) < MIN_IMAGES:
            readable = f" that can be read ({self._tally.describe()})" if self._known else ""
            raise ValueError(f"{name} holds {len(self)} images{readable}; at least {MIN_IMAGES} are needed; {HINT}")
        self.check_skipped(self.skipped)
        self.size = image_size or self._size_of_first()
        self._dataset = _Squares(self._examples, self.size, resize=image_size is not None)

    def __len__(self) -> int:
        return len(self._examples)

    def _size_of_first(self) -> int:
        """Side of the first readable image."""
        for example in self._examples:
            place = _place_of(example)
            try:
                height, width = read_image(example.read_image(), place).shape[:2]
            except BadExampleError as error:
                self._tally.add([Skipped(-1, example.key, error.reason, str(error))])
                self.check_skipped(self.skipped)
                continue
            if height != width:
                raise ValueError(
                    f"{place} is {width} × {height} and not square; set image_size, which crops by ADM's rule"
                )
            self._tally = _ImageTally(self._known)  # broken images before it are counted when the images are read
            return int(height)
        raise AssertionError("check_skipped accepted a set without readable images")

    def _read(self, batch_size: int, rank: int, world_size: int, num_workers: int) -> Iterator[ImageBatch]:
        addresses = shared_batches(len(self), batch_size, rank, world_size)
        for batch in EvaluationLoader(self._dataset, addresses, num_workers, tally=self._tally):
            if world_size == 1:
                self.check_skipped(self.skipped)
            self._record(batch["images"], batch["digests"])
            self.cropped += batch["cropped"]
            yield ImageBatch(batch["images"], batch["numbers"], batch["labels"])
        if world_size == 1:  # the loader drops batches without readable images
            self.check_skipped(self.skipped)


class _ImageTally(Tally):
    """Counts broken images, and stops at one of another size. :class:`ImageSet` limits their number.

    Args:
        known: images that are known in advance to be broken.
    """

    def __init__(self, known: Iterable[Skipped]) -> None:
        super().__init__("images", 0, known, max_share=1.0, alone=False)

    def add(self, skipped: Iterable[Skipped], opened: int = 0) -> None:
        """See :class:`~datamodules.storage.bad_examples.Tally`.

        Raises:
            ValueError: if an image has another size.
        """
        skipped = list(skipped)
        for example in skipped:
            if example.reason == OTHER_SIZE:
                raise ValueError(example.message)
        super().add(skipped, opened)


class _Squares(ExampleDataset):
    """Decodes images of one size.

    Args:
        examples: the images.
        size: side in pixels.
        resize: whether to resize and crop images of another size; else they are errors.
    """

    def __init__(self, examples: ExampleIndex, size: int, resize: bool) -> None:
        super().__init__(examples)
        self.size, self.resize = size, resize

    def read(self, number: int, epoch: int) -> dict[str, Any]:
        example = self.examples[number]
        place = _place_of(example)
        pixels = read_image(example.read_image(), place)
        height, width = pixels.shape[:2]
        crop = (height, width) != (self.size, self.size)
        if crop and not self.resize:
            raise BadExampleError(
                OTHER_SIZE,
                f"{place} is {width} × {height}, and the first image {self.size} × {self.size}; set image_size, "
                "which crops by ADM's rule",
            )
        if crop:
            pixels = centre_crop(pixels, self.size)
        return {"planes": to_planes(pixels), "label": example.label, "digest": _digest(pixels), "cropped": crop}

    def collate(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "images": torch.from_numpy(np.stack([example["planes"] for example in examples])),
            "labels": torch.tensor([example["label"] for example in examples]),
            "digests": [example["digest"] for example in examples],
            "cropped": sum(example["cropped"] for example in examples),
        }


def _digest(pixels: np.ndarray) -> int:
    return int.from_bytes(hashlib.sha256(np.ascontiguousarray(pixels).data).digest(), "big")


def _place_of(example: Example) -> str:
    """Where an image is, for messages: its file, or its key in a shard."""
    path, _, size = next(iter(example.members.values()))
    return path if size < 0 else f"example {example.key} of {path}"


def _find(name: str, split: Split | None) -> ExampleIndex:
    """The images of a folder or of shards.

    Raises:
        ValueError: if there are none, or the choice is ambiguous.
    """
    folder = Path(name)
    if folder.is_dir() and not (folder / META_FILE).is_file() and not any(folder.glob("*.tar")):
        subfolders = class_folders(folder)
        named = {split_of(part): part for part in subfolders}
        present = [part for part in SPLITS if part in named]
        # The data layer reads images only from class folders and shards.
        if flat_images(folder) and split not in present:
            return _find_flat(folder, split)
        flat = any(flat_images(folder / named[part]) for part in present)
        if flat and None not in named and len(named) == len(subfolders):
            return _find(str(folder / named[_chosen(name, present, split)]), None)
    train, val, meta = find_sources(name, None, None, HINT)
    if meta.get("format") == CODES_FORMAT:
        raise ValueError(f"{name} holds codes and no images; {HINT}")
    sources = {part: source for part, source in zip(SPLITS, (train, val), strict=True) if source is not None}
    if train is not None and train.name == str(folder if folder.is_dir() else name):
        _check_unsplit(name, split)
        return train.index(ShardCache())
    source = sources[_chosen(name, list(sources), split)]
    return source.index(ShardCache())


def _find_flat(folder: Path, split: Split | None) -> ExampleIndex:
    _check_unsplit(str(folder), split)
    if (subfolders := class_folders(folder)) and len(index_folder(folder, subfolders)):
        raise ValueError(
            f"{folder} holds both images ({flat_images(folder)[0]}) and folders of images "
            f"({', '.join(subfolders[:3])}); give one of the folders, or move the images"
        )
    return index_flat(folder)


def _check_unsplit(name: str, split: Split | None) -> None:
    if split is not None:
        raise ValueError(f"{name} has no {' and '.join(SPLITS)} folders; leave split {split} out")


def _chosen(name: str, present: list[str], split: Split | None) -> str:
    """The given split, or the only one."""
    if split is None and len(present) == 1:
        return present[0]
    if split is None:
        raise ValueError(f"{name} has the splits {' and '.join(present)}; set split to one of them")
    if split not in present:
        raise ValueError(
            f"{name} has no split {split}, only {' and '.join(present)}; set split to that, or leave it out"
        )
    return split
