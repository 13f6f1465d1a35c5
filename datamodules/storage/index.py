"""Index of examples: columns of offsets, sizes and labels, so that millions of examples need only megabytes.

webdataset streams shards, so it can neither shuffle a whole dataset nor resume inside an epoch. torchdata's stateful
loader resumes only with the same number of ranks and workers. Here tar shards are read through an index of their
headers, and an example is identified by its number.
"""

import errno
import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from datamodules.storage.bad_examples import BadExampleError, Skipped
from datamodules.storage.text_files import BYTE_ORDER_MARK, decode_text

IMAGES = ("jpg", "jpeg", "png", "webp")
FEATURES, SHORT_FEATURES = "features", "shortfeatures"
"""Members with the features of the caption and of its first sentence: real tokens only, (n, W), little-endian."""
TEXT = "txt"
CAPTIONS = (TEXT, "json")
EXTENSIONS = (*IMAGES, "cls", *CAPTIONS, "npy", FEATURES, SHORT_FEATURES)
"""Extensions of the only members that are ever read from a shard."""

OTHER_IMAGES = ("bmp", "gif", "tif", "tiff", "ppm", "pgm", "pbm", "jp2", "heic", "heif", "avif", "jxl")
"""Image formats that are not supported. An example with only such an image is reported as bad."""

MISSING = {"npy": "no codes", CAPTIONS[0]: "no caption", FEATURES: "no caption", SHORT_FEATURES: "no caption"}
"""Reason for an example without a required member, by extension."""

WHOLE_FILE = -1
"""Size of a member that is a whole file."""

NO_LABEL = -1
WRONG_LABEL = -2
MAX_CLASSES = 1_000_000
"""Class numbers must be less. A model has weights for every class up to the highest, so larger numbers are mistakes."""
MAX_TEXT_BYTES = 1 << 20
MAX_OPEN_FILES = 128
TOO_MANY_OPEN = (errno.EMFILE, errno.ENFILE)


class Strings(Sequence[str]):
    """Strings in one block of bytes, without an object for each string.

    Args:
        block: all strings in UTF-8, concatenated.
        ends: (N,) int64, end of each string in the block.
    """

    def __init__(self, block: bytes, ends: np.ndarray) -> None:
        self.block, self.ends = block, ends

    @classmethod
    def from_strings(cls, strings: Sequence[str]) -> "Strings":
        """Convert ordinary strings."""
        encoded = [string.encode("utf-8", "surrogateescape") for string in strings]
        return cls(b"".join(encoded), np.cumsum([len(string) for string in encoded], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: Any) -> Any:
        start = self.ends[number - 1] if number else 0
        return self.block[start : self.ends[number]].decode("utf-8", "surrogateescape")

    def take(self, numbers: np.ndarray) -> "Strings":
        """Select strings by number, in the given order."""
        ends = self.ends
        starts = np.concatenate([[0], ends[:-1]])
        parts = [self.block[start:end] for start, end in zip(starts[numbers], ends[numbers], strict=True)]
        return Strings(b"".join(parts), np.cumsum(ends[numbers] - starts[numbers], dtype=np.int64))

    @staticmethod
    def concatenate(parts: Sequence["Strings"]) -> "Strings":
        """Concatenate several sequences of strings."""
        starts = np.cumsum([0, *(len(part.block) for part in parts[:-1])])
        ends = [part.ends + start for part, start in zip(parts, starts, strict=True)]
        return Strings(b"".join(part.block for part in parts), np.concatenate(ends))


class OpenFiles:
    """Files kept open for reading at any offset; the least recently used file is closed when there are too many."""

    def __init__(self) -> None:
        self._descriptors: OrderedDict[str, int] = OrderedDict()

    def open(self, path: str) -> int:
        """Descriptor of a file, which stays open."""
        descriptor = self._descriptors.get(path)
        if descriptor is None:
            descriptor = self._descriptors[path] = self.open_new(path)
            if len(self._descriptors) > MAX_OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
        else:
            self._descriptors.move_to_end(path)
        return descriptor

    def open_new(self, path: str) -> int:
        """Open a new descriptor, which the caller closes. If the limit is reached, first close the files kept open.

        Raises:
            OSError: if the file cannot be opened.
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
                raise OSError(error.errno, "too many open files; increase the limit with ulimit -n", path) from error
            raise

    def close(self) -> None:
        """Close all files. They are opened again when needed."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Read ``size`` bytes from ``offset``, fewer if the file ends earlier."""
        return os.pread(self.open(path), size, offset)

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> Any:  # a copy in another process opens files of its own
        return OpenFiles, ()


class Member(NamedTuple):
    """Location of a member: ``size`` bytes from ``offset`` of a file, or the whole file for :data:`WHOLE_FILE`."""

    path: str
    offset: int
    size: int


class Example(NamedTuple):
    """An example of a dataset.

    Attributes:
        source: its shard, or the folder that contains it.
        key: its name within the dataset.
        members: locations of its members by extension, in lower case and without the leading dot.
        label: its class, −1 if it has none.
        files: open files to read the members from.
    """

    source: str
    key: str
    members: dict[str, Member]
    label: int
    files: OpenFiles

    def read(self, extension: str) -> bytes:
        """Read the bytes of a member.

        Raises:
            BadExampleError: if it is missing, empty or truncated.
            OSError: if this process cannot open more files.
        """
        if extension not in self.members:
            raise BadExampleError(
                MISSING.get(extension, "no image"),
                f"example {self.key} of {self.source} has no .{extension} member, only {sorted(self.members)}",
            )
        path, offset, size = self.members[extension]
        try:
            if size < 0:
                with os.fdopen(self.files.open_new(path), "rb") as file:
                    data = file.read()
            else:
                data = self.files.read(path, offset, size)
        except OSError as error:
            if error.errno in TOO_MANY_OPEN:  # the example itself is good
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
        """Read the bytes of the image, in any format of :data:`IMAGES`.

        Raises:
            BadExampleError: if it is missing, empty or truncated.
        """
        extension = next((extension for extension in IMAGES if extension in self.members), None)
        if extension is None:
            raise BadExampleError(
                "no image",
                f"example {self.key} of {self.source} has no image; it needs one of {', '.join(IMAGES)}",
            )
        return self.read(extension)

    def read_caption(self) -> str:
        """Read the caption: the txt member, or ``caption`` in the json member, as img2dataset writes it; '' for
        none.
        """
        if text := self.read_text("txt"):
            return text
        try:
            content = json.loads(self.read_text("json") or "null")
        except (ValueError, RecursionError):
            return ""
        caption = content.get("caption") if isinstance(content, dict) else None
        if not isinstance(caption, str):
            return ""
        # JSON can encode half of a surrogate pair, which UTF-8 cannot.
        return caption.encode(errors="replace").decode().strip().removeprefix(BYTE_ORDER_MARK).strip()

    def read_text(self, extension: str) -> str:
        """Read a text member, without surrounding white space and byte order mark; '' if it is missing, larger than
        :data:`MAX_TEXT_BYTES`, or not UTF-8.
        """
        member = self.members.get(extension)
        if member is None:
            return ""
        try:
            size = os.stat(member.path).st_size if member.size == WHOLE_FILE else member.size
            return decode_text(self.read(extension)).strip() if 0 < size <= MAX_TEXT_BYTES else ""
        except (OSError, UnicodeDecodeError):
            return ""

    def caption_fault(self) -> str:
        """Reason why the text members give no caption, for messages; '' if they are readable."""
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
    """Index of a dataset in columns. N: examples, F: files.

    Args:
        paths: (F,) paths of the files: shards or images.
        file_of: (N,) int64, number of each example's file.
        keys: (N,) keys of the examples.
        members: (N, 2) int64 by extension, offset and size; an offset of −1 means that the member is missing.
        labels: (N,) int64, −1 for none.
        bad: bad examples found while indexing; they are not among the N.
        partners: (N,) int64, number of each example's features in the index of another dataset, −1 for none; None
            without another dataset.
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
        """Index that holds an example, and its position in that index."""
        return self, number

    def member(self, number: int, extension: str) -> Member | None:
        """Location of a member of example ``number``; None if it is missing."""
        column = self.members.get(extension)
        offset, size = column[number].tolist() if column is not None else (-1, 0)
        if offset < 0:
            return None
        path = self.paths[self.file_of[number]]
        if size == WHOLE_FILE and extension not in IMAGES:  # the path is that of the image
            path = f"{path.rpartition('.')[0]}.{extension}"
        return Member(path, offset, size)

    def substitute(self, number: int, attempt: int) -> int:
        """Number of an example to use instead of the bad example ``number``."""
        return (number + attempt) % len(self)

    def pop_skipped(self) -> tuple[list[Skipped], int]:
        """No new bad examples: all are in ``bad`` from the start. Only a stream finds more later."""
        return [], 0

    def select(self, numbers: np.ndarray, bad: Sequence[Skipped] = ()) -> "ExampleIndex":
        """Select examples by number, in the given order, and add bad ones."""
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
        """Move examples without the required members or label to ``bad``.

        Args:
            extensions: each example needs at least one of these members.
            labels_needed: whether each example needs a class. None: all need one if any has one.
        """
        columns = [self.members[extension] for extension in extensions if extension in self.members]
        has_member = np.zeros(len(self), bool)
        empty = has_member.copy()
        for offsets, sizes in (column.T for column in columns):
            has_member |= offsets >= 0
            empty |= (offsets >= 0) & (sizes == 0)
        # Files next to the examples, like a README.txt, do not count.
        labelled = bool((self.labels[has_member] != NO_LABEL).any()) if labels_needed is None else labels_needed
        missing = MISSING.get(extensions[0], "no image")
        texts = [self.members[extension][:, 0] >= 0 for extension in CAPTIONS if extension in self.members]
        has_text = np.any(texts, axis=0) if texts else np.zeros(len(self), bool)
        faults = [
            (~has_member, missing, f"has none of {', '.join(extensions)}"),
            # An example may have two members with captions (txt and json), and one of them may be empty.
            (has_member & empty & (extensions[0] != CAPTIONS[0]), "empty file", "is empty"),
            (
                self.labels == WRONG_LABEL,
                "wrong label",
                f"has a class (.cls) that is not an integer from 0 to {MAX_CLASSES - 1}",
            ),
        ]
        if labelled:
            faults.append((self.labels == NO_LABEL, "no label", "has no class (.cls)"))
        elif has_text[has_member].any() and self.partners is None:
            faults.append((~has_text, "no caption", "has no caption (.txt or .json)"))
        if self.partners is not None:
            faults.append((self.partners < 0, "no caption", "has no caption features"))
        good = np.ones(len(self), bool)
        bad = []
        for mask, reason, problem in faults:
            for number in np.flatnonzero(mask & good):
                example = self[int(number)]
                bad.append(Skipped(-1, example.key, reason, f"example {example.key} of {example.source} {problem}"))
            good &= ~mask
        return self if good.all() else self.select(np.flatnonzero(good), bad)

    @staticmethod
    def concatenate(parts: Sequence["ExampleIndex"]) -> "ExampleIndex":
        """Concatenate indexes. They must not have partners yet."""
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
