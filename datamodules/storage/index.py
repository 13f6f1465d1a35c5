"""Where each example lies: columns of numbers, so that millions of examples cost megabytes and no start-up time.

webdataset streams shards, so it has neither a shuffle over a whole set, nor a place inside an epoch to return to.
torchdata's stateful loader returns to a place only on the same number of ranks and workers. So tar shards are read here
by an index of their headers, and an example is a number.
"""

import errno
import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from datamodules.storage.bad_examples import BadExampleError, Skipped
from datamodules.storage.text_files import MARK, decode_text

IMAGES = ("jpg", "jpeg", "png", "webp")
FEATURES, SHORT_FEATURES = "features", "shortfeatures"
"""Of the caption and of its first sentence: the tokens' features alone, (n, W), little-endian."""
TEXT = "txt"
CAPTIONS = (TEXT, "json")
EXTENSIONS = (*IMAGES, "cls", *CAPTIONS, "npy", FEATURES, SHORT_FEATURES)
"""The only members of a shard that are ever read."""

OTHER_IMAGES = ("bmp", "gif", "tif", "tiff", "ppm", "pgm", "pbm", "jp2", "heic", "heif", "avif", "jxl")
"""Images that are not read, but are missed where they are the only ones."""

MISSING = {"npy": "no codes", CAPTIONS[0]: "no caption", FEATURES: "no caption", SHORT_FEATURES: "no caption"}
"""Why an example cannot be used that lacks a member."""

WHOLE = -1
"""The size of a part that is a whole file."""

NO_LABEL = -1
WRONG_LABEL = -2
MAX_CLASSES = 1_000_000
"""A class number from here on is taken for a mistake: a model has weights for each class up to the highest number."""
MAX_TEXT_BYTES = 1 << 20
MAX_OPEN_FILES = 128
TOO_MANY_OPEN = (errno.EMFILE, errno.ENFILE)


class Strings(Sequence[str]):
    """Strings as one block of bytes: no object for each.

    Args:
        block: all of them in UTF-8, one after the other.
        ends: (N,) int64, where each ends.
    """

    def __init__(self, block: bytes, ends: np.ndarray) -> None:
        self.block, self.ends = block, ends

    @classmethod
    def from_strings(cls, strings: Sequence[str]) -> "Strings":
        """From ordinary strings."""
        encoded = [string.encode("utf-8", "surrogateescape") for string in strings]
        return cls(b"".join(encoded), np.cumsum([len(string) for string in encoded], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: Any) -> Any:
        start = self.ends[number - 1] if number else 0
        return self.block[start : self.ends[number]].decode("utf-8", "surrogateescape")

    def take(self, numbers: np.ndarray) -> "Strings":
        """Some of them, in the given order."""
        ends = self.ends
        starts = np.concatenate([[0], ends[:-1]])
        parts = [self.block[start:end] for start, end in zip(starts[numbers], ends[numbers], strict=True)]
        return Strings(b"".join(parts), np.cumsum(ends[numbers] - starts[numbers], dtype=np.int64))

    @staticmethod
    def concatenate(parts: Sequence["Strings"]) -> "Strings":
        """One after the other."""
        starts = np.cumsum([0, *(len(part.block) for part in parts[:-1])])
        ends = [part.ends + start for part, start in zip(parts, starts, strict=True)]
        return Strings(b"".join(part.block for part in parts), np.concatenate(ends))


class OpenFiles:
    """Files that stay open for reading at a place, the least recently used one closed when they are too many."""

    def __init__(self) -> None:
        self._descriptors: OrderedDict[str, int] = OrderedDict()

    def open(self, path: str) -> int:
        """The descriptor of a file."""
        descriptor = self._descriptors.get(path)
        if descriptor is None:
            descriptor = self._descriptors[path] = self.open_another(path)
            if len(self._descriptors) > MAX_OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
        else:
            self._descriptors.move_to_end(path)
        return descriptor

    def open_another(self, path: str) -> int:
        """A descriptor of its own for a file; where there are too many, after closing those that are kept here.

        Raises:
            OSError: if it cannot be opened.
        """
        try:
            return os.open(path, os.O_RDONLY)
        except OSError as error:
            if error.errno not in TOO_MANY_OPEN:
                raise
            self.close()
        try:
            return os.open(path, os.O_RDONLY)
        except OSError as error:
            if error.errno in TOO_MANY_OPEN:
                raise OSError(error.errno, "too many open files; raise the limit by ulimit -n", path) from error
            raise

    def close(self) -> None:
        """Close all that are kept open; they are opened again when they are needed."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def read(self, path: str, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset``, fewer if the file ends before."""
        return os.pread(self.open(path), size, offset)

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> Any:  # a copy in another process opens files of its own
        return OpenFiles, ()


class Member(NamedTuple):
    """A part of an example: ``size`` bytes from ``offset`` of a file, or all of it if ``size`` is :data:`WHOLE`."""

    path: str
    offset: int
    size: int


class Example(NamedTuple):
    """An example.

    Attributes:
        source: the shard, or the folder of its class.
        key: its name within the set.
        members: its parts by extension, lower case and without the leading dot.
        label: its class, −1 if it has none.
        files: reads them.
    """

    source: str
    key: str
    members: dict[str, Member]
    label: int
    files: OpenFiles

    def read(self, extension: str) -> bytes:
        """The bytes of a part.

        Raises:
            BadExampleError: if it is missing, empty or cut off.
            OSError: if this process may not open more files.
        """
        if extension not in self.members:
            raise BadExampleError(
                MISSING.get(extension, "no image"),
                f"example {self.key} of {self.source} has no .{extension} member, only {sorted(self.members)}",
            )
        path, offset, size = self.members[extension]
        try:
            if size < 0:
                with os.fdopen(self.files.open_another(path), "rb") as file:
                    data = file.read()
            else:
                data = self.files.read(path, offset, size)
        except OSError as error:
            if error.errno in TOO_MANY_OPEN:  # nothing is wrong with the example
                raise
            raise BadExampleError(
                "empty file", f"example {self.key} of {self.source} cannot be read ({error})"
            ) from error
        if len(data) < size:
            raise BadExampleError("truncated shard", f"shard {path} ends inside example {self.key}; write it again")
        if not data:
            raise BadExampleError("empty file", f"the .{extension} of example {self.key} of {self.source} is empty")
        return data

    def read_image(self) -> bytes:
        """The bytes of the image, whichever of :data:`IMAGES` it is.

        Raises:
            BadExampleError: if it is missing, empty or cut off.
        """
        extension = next((extension for extension in IMAGES if extension in self.members), None)
        if extension is None:
            raise BadExampleError(
                "no image",
                f"example {self.key} of {self.source} has no image; it needs one of {', '.join(IMAGES)}",
            )
        return self.read(extension)

    def read_caption(self) -> str:
        """The caption: the txt part, or ``caption`` in the json part, as img2dataset has them; '' for none."""
        if text := self.read_text("txt"):
            return text
        try:
            said = json.loads(self.read_text("json") or "null")
        except (ValueError, RecursionError):
            return ""
        caption = said.get("caption") if isinstance(said, dict) else None
        # JSON can hold half of a character, which no file can.
        if not isinstance(caption, str):
            return ""
        return caption.encode(errors="replace").decode().strip().removeprefix(MARK).strip()

    def read_text(self, extension: str) -> str:
        """A text part, without white space or a byte order mark around it; '' if there is none, it is huge, or
        not UTF-8.
        """
        member = self.members.get(extension)
        if member is None:
            return ""
        try:
            size = os.stat(member.path).st_size if member.size == WHOLE else member.size
            return decode_text(self.read(extension)).strip() if 0 < size <= MAX_TEXT_BYTES else ""
        except (OSError, UnicodeDecodeError):
            return ""

    def caption_fault(self) -> str:
        """What keeps a text part from being read as a caption, for messages; '' if nothing does."""
        for extension in CAPTIONS:
            if extension not in self.members:
                continue
            data = self.read(extension) if self.members[extension].size else b""
            if len(data) > MAX_TEXT_BYTES:
                return f"its .{extension} has {len(data)} bytes, more than {MAX_TEXT_BYTES}"
            try:
                decode_text(data)
            except UnicodeDecodeError as error:
                return f"its .{extension} is not in UTF-8 (byte {error.start}); convert it"
        return ""


class ExampleIndex(Sequence[Example]):
    """All examples of a set, as columns. N examples, F files.

    Args:
        paths: (F,) the files: shards, or images.
        file_of: (N,) int64, in which file each example is.
        keys: (N,) their names.
        members: (N, 2) int64 for each extension: offset and size; an offset of −1 says that it is missing.
        labels: (N,) int64, −1 for none.
        bad: what is known not to be usable, and so not among the N.
        partners: (N,) int64, the number of each example's features in the index of another set, −1 for none; None where
            there is no other set.
    """

    def __init__(
        self,
        paths: Strings,
        file_of: np.ndarray,
        keys: Strings,
        members: dict[str, np.ndarray],
        labels: np.ndarray,
        bad: Sequence[Skipped] = (),
        partners: np.ndarray | None = None,
    ) -> None:
        self.paths, self.file_of, self.keys, self.members, self.labels = paths, file_of, keys, members, labels
        self.bad, self.partners = list(bad), partners
        self.files = OpenFiles()

    def __len__(self) -> int:
        return len(self.file_of)

    def __getitem__(self, number: Any) -> Any:
        """Example ``number``."""
        if not 0 <= number < len(self):
            raise IndexError(f"example {number} of {len(self)}")
        path = self.paths[int(self.file_of[number])]
        members = {}
        for extension in self.members:
            if (member := self.member(number, extension)) is not None:
                members[extension] = member
        source = path if path.endswith(".tar") else os.path.dirname(path)
        return Example(source, self.keys[number], members, int(self.labels[number]), self.files)

    def locate(self, number: int) -> tuple["ExampleIndex", int]:
        """The index that an example is in, and its place there."""
        return self, number

    def member(self, number: int, extension: str) -> Member | None:
        """Where a part of example ``number`` lies; None if it is missing."""
        column = self.members.get(extension)
        offset, size = column[number].tolist() if column is not None else (-1, 0)
        if offset < 0:
            return None
        path = self.paths[self.file_of[number]]
        beside = size == WHOLE and extension not in IMAGES  # of an image, which the path is of
        return Member(f"{path.rpartition('.')[0]}.{extension}" if beside else path, offset, size)

    def another(self, number: int, attempt: int) -> int:
        """An example that can stand in for ``number``."""
        return (number + attempt) % len(self)

    def take_news(self) -> tuple[list[Skipped], int]:
        """Nothing: what is not usable is known from the beginning, under ``bad``."""
        return [], 0

    def select(self, numbers: np.ndarray, bad: Sequence[Skipped] = ()) -> "ExampleIndex":
        """Some of the examples, in the given order, and more that are not usable."""
        files, file_of = np.unique(self.file_of[numbers], return_inverse=True)
        return ExampleIndex(
            self.paths.take(files),
            file_of,
            self.keys.take(numbers),
            {extension: column[numbers] for extension, column in self.members.items()},
            self.labels[numbers],
            [*self.bad, *bad],
            None if self.partners is None else self.partners[numbers],
        )

    def usable(self, extensions: Sequence[str], labels_needed: bool | None = None) -> "ExampleIndex":
        """Without the examples that lack what is needed.

        Args:
            extensions: one of these members is needed.
            labels_needed: whether each needs a class; None if some have one.
        """
        columns = [self.members[extension] for extension in extensions if extension in self.members]
        has_member = np.zeros(len(self), bool)
        empty = has_member.copy()
        for offsets, sizes in (column.T for column in columns):
            has_member |= offsets >= 0
            empty |= (offsets >= 0) & (sizes == 0)
        # What stands beside the examples, like a README.txt, says nothing about them.
        labelled = bool((self.labels[has_member] != NO_LABEL).any()) if labels_needed is None else labels_needed
        missing = MISSING.get(extensions[0], "no image")
        texts = [self.members[extension][:, 0] >= 0 for extension in CAPTIONS if extension in self.members]
        has_text = np.any(texts, axis=0) if texts else np.zeros(len(self), bool)
        faults = [
            (~has_member, missing, f"has none of {', '.join(extensions)}"),
            (has_member & empty & (extensions[0] != CAPTIONS[0]), "empty file", "is empty"),  # one of two may be
            (
                self.labels == WRONG_LABEL,
                "wrong label",
                f"has a class (.cls) that is no number from 0 to {MAX_CLASSES - 1}",
            ),
        ]
        if labelled:
            faults.append((self.labels == NO_LABEL, "no label", "has no class (.cls)"))
        elif has_text[has_member].any() and self.partners is None:
            faults.append((~has_text, "no caption", "has no caption (.txt or .json)"))
        if self.partners is not None:
            faults.append((self.partners < 0, "no caption", "has no features of a caption"))
        good = np.ones(len(self), bool)
        bad = []
        for mask, reason, story in faults:
            for number in np.flatnonzero(mask & good):
                example = self[int(number)]
                bad.append(Skipped(-1, example.key, reason, f"example {example.key} of {example.source} {story}"))
            good &= ~mask
        return self if good.all() else self.select(np.flatnonzero(good), bad)

    @staticmethod
    def concatenate(parts: Sequence["ExampleIndex"]) -> "ExampleIndex":
        """One after the other, before they get partners."""
        starts = np.cumsum([0, *(len(part.paths) for part in parts[:-1])])
        extensions = [extension for extension in EXTENSIONS if any(extension in part.members for part in parts)]
        return ExampleIndex(
            Strings.concatenate([part.paths for part in parts]),
            np.concatenate([part.file_of + start for part, start in zip(parts, starts, strict=True)]),
            Strings.concatenate([part.keys for part in parts]),
            {
                extension: np.concatenate(
                    [part.members.get(extension, np.full((len(part), 2), -1, np.int64)) for part in parts]
                )
                for extension in extensions
            },
            np.concatenate([part.labels for part in parts]),
            [example for part in parts for example in part.bad],
        )
