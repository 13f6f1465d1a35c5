"""Reads arrays of images like ADM's (``.npz``) in batches. N images of H × W pixels.

``np.load`` would load the whole array: 9.8 GB for 50,000 images of 256 × 256 pixels.
"""

import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

IMAGES, LABELS = "arr_0", "arr_1"
STATISTICS = {"mu", "sigma"}
ENDING = ".npy"
MIN_IMAGES = 2
"""Statistics need at least two images."""

PIECE = 1 << 20
"""Bytes to read at once; the decompressor's output is held in addition to the batch."""

FIRST_VALUES = 1 << 22
"""Number of values that are read for the advice on converting an array."""

VERSIONS = ((1, 0), (2, 0), (3, 0))
MAX_KEYS = 10
DAMAGES = (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError)
"""Exceptions of zipfile for files that are cut off, damaged, encrypted or compressed in an unusual way."""


class _Header(NamedTuple):
    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype[Any]


class ImageArchive:
    """Images of an ``.npz`` or ``.npy``. Nothing is ever unpickled.

    An ``.npz``, stored or deflated, holds ``arr_0`` uint8 (N, H, W, 3) and optionally labels ``arr_1`` (N,). An
    ``.npy`` holds the images.

    Args:
        path: the file.

    Attributes:
        count: number of images.
        size: side of the images in pixels.
        labels: (N,) int64, or None.

    Raises:
        ValueError: if the file is missing, damaged, cut off, or of another kind.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = path = Path(path)
        if not path.is_file():
            raise ValueError(f"{path} does not exist; give an .npz of images, or a folder of them")
        self._zipped, self._deflated = path.suffix != ENDING, False
        keys = self._keys() if self._zipped else [IMAGES]
        if IMAGES not in keys:
            raise ValueError(_lacking(path, keys))
        with self._member(IMAGES) as (member, length):
            header = self._header(member, IMAGES)
            self._start = member.tell()
            self._check_images(header, length - self._start, member)
        self.count, self.size = header.shape[:2]
        self.labels = self._read_labels() if LABELS in keys else None

    def _keys(self) -> list[str]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                return [name.removesuffix(ENDING) for name in archive.namelist()]
        except (*DAMAGES, ValueError) as error:
            raise ValueError(
                f"{self.path} is not an .npz, or damaged or cut off ({_line(error)}); get or write it again"
            ) from error

    @contextmanager
    def _member(self, key: str) -> Iterator[tuple[IO[bytes], int]]:
        """An open array of the file, and its length in bytes."""
        if not self._zipped:
            with open(self.path, "rb") as file:
                yield file, os.stat(self.path).st_size
            return
        try:
            with zipfile.ZipFile(self.path) as archive:
                name = key if key in archive.namelist() else key + ENDING
                entry = archive.getinfo(name)
                self._deflated = entry.compress_type != zipfile.ZIP_STORED
                with archive.open(entry) as member:
                    yield member, entry.file_size
        except DAMAGES as error:
            raise ValueError(f"{key} of {self.path} is damaged ({_line(error)}); get or write it again") from error

    def _header(self, member: IO[bytes], key: str) -> _Header:
        try:
            version = np.lib.format.read_magic(member)
            if version not in VERSIONS:
                raise ValueError(f"version {version}")
            # Version 3 differs from 2 only in the encoding of field names, which arrays of images do not have.
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            return _Header(*read(member))
        except Exception as error:  # the header is a Python literal, which can be wrong in many ways
            raise ValueError(
                f"{key} of {self.path} is not a NumPy array ({_line(error)}); write it with np.savez"
            ) from error

    def _check_images(self, header: _Header, length: int, member: IO[bytes]) -> None:
        shape, dtype, where = header.shape, header.dtype, f"{IMAGES} of {self.path}"
        advice = _layout_advice(shape)
        if advice and len(shape) not in (3, 4) and dtype.kind != "O":
            raise ValueError(f"{where} is {_shown(shape)}; it must be (N, H, W, 3) uint8; {advice}")
        if dtype != np.uint8:
            remedy = advice_on_values(dtype, self._first_values(header, member))
            raise ValueError(f"{where} is {dtype}; it must be uint8 0…255; {remedy}")
        if advice:
            raise ValueError(f"{where} is {_shown(shape)}; it must be (N, H, W, 3); {advice}")
        if shape[0] < MIN_IMAGES:
            raise ValueError(f"{where} holds {shape[0]} images; at least {MIN_IMAGES} are needed")
        if shape[1] != shape[2] or shape[1] < 1:
            raise ValueError(f"images of {self.path} are {shape[1]} × {shape[2]} (H × W); they must be square")
        if header.fortran_order:
            raise ValueError(
                f"{where} is in Fortran order, which spreads each image over the file; write it with "
                "np.ascontiguousarray"
            )
        if length < prod(shape):
            raise ValueError(
                f"{where} is cut off: {_shown(shape)} needs {prod(shape):,} bytes, but it has {max(length, 0):,}; "
                "get or write it again"
            )

    def _first_values(self, header: _Header, member: IO[bytes]) -> np.ndarray:
        """The first values of a numeric array, (n,); empty for other types."""
        if header.dtype.kind not in "fiu":
            return np.empty(0)
        width = header.dtype.itemsize
        data = member.read(min(FIRST_VALUES, prod(header.shape)) * width)
        return np.frombuffer(data[: len(data) // width * width], header.dtype)

    def _read_labels(self) -> np.ndarray:
        with self._member(LABELS) as (member, _):
            header = self._header(member, LABELS)
            if header.shape != (self.count,):
                raise ValueError(
                    f"{LABELS} of {self.path} is {_shown(header.shape)}; it must hold a label for each of the "
                    f"{self.count} images; fix it, or leave it out"
                )
            if header.dtype.kind not in "iu":
                raise ValueError(
                    f"{LABELS} of {self.path} is {header.dtype}; labels must be integers; fix it, or leave it out"
                )
            block = np.empty(self.count, header.dtype)
            self._fill(member, block, LABELS)
        labels: np.ndarray = block.astype(np.int64)
        return labels

    def blocks(self, numbers: range, batch_size: int) -> Iterator[np.ndarray]:
        """Iterate over images in blocks. Memory holds one block and a piece of the file.

        Args:
            numbers: positions of the images, ascending. A seek skips the others; in a compressed file they are read.
            batch_size: maximum number of images in a block.

        Yields:
            (B, H, W, 3) uint8.

        Raises:
            ValueError: if the file is damaged.
        """
        with self._member(IMAGES) as (member, _):
            for first in range(0, len(numbers), batch_size):
                # footgun: a variable for the block would keep it in memory after the caller has freed it.
                yield self._block(member, numbers[first : first + batch_size])

    def _block(self, member: IO[bytes], numbers: range) -> np.ndarray:
        block = np.empty((len(numbers), self.size, self.size, 3), np.uint8)
        # Consecutive images are read at once.
        parts = [(numbers[0], block)] if numbers.step == 1 else zip(numbers, block, strict=True)
        for number, part in parts:
            self._skip_to(member, self._start + number * self.size * self.size * 3)
            self._fill(member, part, IMAGES)
        return block

    def _skip_to(self, member: IO[bytes], place: int) -> None:
        # A seek in a zip file disables the CRC check. In deflated data zipfile seeks by reading 16 MB at a time,
        # assembled from pieces of 4 kB. Reading and discarding is faster.
        if not self._deflated and place - member.tell() > PIECE:
            member.seek(place)
        while (rest := place - member.tell()) > 0:
            if not member.read1(min(rest, PIECE)):  # type: ignore[attr-defined]
                raise EOFError("unexpected end of file")

    def _fill(self, member: IO[bytes], array: np.ndarray, key: str) -> None:
        """Read into a contiguous array."""
        view = array.reshape(-1).view(np.uint8).data
        place = 0
        while place < len(view):
            got = member.readinto1(view[place : place + PIECE])  # type: ignore[attr-defined]
            if not got:
                raise ValueError(f"{key} of {self.path} is cut off; get or write it again")
            place += got


def _lacking(path: Path, keys: list[str]) -> str:
    if STATISTICS.issubset(keys):
        return f"{path} holds only statistics ({', '.join(keys[:MAX_KEYS])}) and no images; give an .npz with {IMAGES}"
    present = ", ".join(keys[:MAX_KEYS]) + (", …" if len(keys) > MAX_KEYS else "") if keys else "nothing"
    return f"{path} has no {IMAGES} but {present}; write the images, uint8 (N, H, W, 3), by np.savez(path, images)"


def advice_on_values(dtype: np.dtype[Any], values: np.ndarray) -> str:
    """How to convert an array x that is not uint8 to levels 0…255.

    Args:
        dtype: dtype of the array.
        values: some of its values, (n,).
    """
    if dtype.kind == "b":
        return "use x.astype(np.uint8) * 255"
    if dtype.kind == "O":
        return "objects are never unpickled: stack the images into one array, np.stack(images)"
    if not values.size:
        return "convert it"
    if not np.isfinite(values).all():
        return "some of its values are not finite (NaN or infinity): find out why before anything else"
    low, high = float(values.min()), float(values.max())
    span = f"its values are {low:.4g} to {high:.4g}"
    if dtype.kind == "f":
        # The output of a decoder is not clamped, so it may exceed its nominal range.
        if -2 <= low < -0.25 and high <= 2:
            return f"{span}, which looks like [-1, 1]: use ((x + 1) * 127.5).round().clip(0, 255).astype(np.uint8)"
        if low >= -0.25 and high <= 2:
            return (
                f"{span}, which looks like [0, 1]: multiply floats by 255 and round, "
                "(x * 255).round().clip(0, 255).astype(np.uint8)"
            )
        if low >= 0 and high <= 255.5:
            return f"{span}: use x.round().astype(np.uint8)"
    elif low == 0 and high == 1:
        return f"{span}: use (x * 255).astype(np.uint8)"
    elif low >= 0 and high <= 255:
        return f"{span}: use x.astype(np.uint8)"
    elif dtype == np.uint16:
        return f"{span}, which looks like 16 bits: use (x // 257).astype(np.uint8)"
    elif dtype == np.int8:
        return f"{span}: use (x.astype(np.int16) + 128).astype(np.uint8)"
    return f"{span}: scale them to 0…255, round, and convert them"


def _layout_advice(shape: tuple[int, ...]) -> str:
    """How to convert an array of this shape to (N, H, W, 3); empty if it has that shape."""
    if len(shape) == 3 or (len(shape) == 4 and shape[3] == 1):
        return "these are grey images: repeat each level three times along a last axis"
    if len(shape) == 1:
        return "this looks like labels: give the images four axes, and pass them first"
    if len(shape) == 5:
        return "reshape it to four axes, x.reshape(-1, *x.shape[-3:])"
    if len(shape) != 4:
        return "give it four axes"
    if shape[3] == 3:
        return ""
    if shape[1] == 3:
        return "channels come first: use transpose(0, 2, 3, 1)"
    if shape[3] == 4:
        return "the fourth channel is transparency: leave it out"
    return "images have three channels"


def _shown(shape: tuple[int, ...]) -> str:
    """A shape in one line, even if a file claims thousands of axes."""
    return str(shape) if len(shape) <= 8 else f"of {len(shape)} axes"


def _line(error: BaseException) -> str:
    """An error's message in one line of limited length."""
    return " ".join((str(error) or type(error).__name__).split())[:200]
