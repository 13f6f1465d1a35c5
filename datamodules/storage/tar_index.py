"""The index of a tar file, from its headers; made for files that may be cut off, broken or hostile."""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from webdataset.tariterators import base_plus_ext

from datamodules.storage.bad_examples import Skipped
from datamodules.storage.index import (
    EXTENSIONS,
    MAX_CLASSES,
    NO_LABEL,
    OTHER_IMAGES,
    WRONG_LABEL,
    ExampleIndex,
    Strings,
)
from datamodules.storage.tar_examples import TarExamples

MAX_LABEL_BYTES = 32
MARK = b"\xef\xbb\xbf"
"""Byte order mark of UTF-8, which some editors write."""
KNOWN = frozenset({*EXTENSIONS, *OTHER_IMAGES})
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
"""By the first bytes of a file."""
MAX_MAGIC = 8


def index_shard(path: Path) -> ExampleIndex:
    """The examples of a tar file, from its headers and labels, in the order of their first members.

    The parts of an example may lie anywhere in the file, and its key may hold dots, see
    :class:`~datamodules.storage.tar_examples.TarExamples`. Members of types that are not in
    :data:`~datamodules.storage.index.EXTENSIONS`, links and folders are ignored; names are never used as paths. If the
    file ends early or has a broken header, the examples before that point are kept and the loss is recorded under ``bad``.

    Raises:
        ValueError: if the file cannot be read.
    """
    found = TarExamples(str(path))
    try:
        with path.open("rb") as file:
            start = file.read(MAX_MAGIC)
            file.seek(0)
            fault, half = _read_headers(file, found)
    except OSError as error:
        raise ValueError(f"shard {path} cannot be read ({error}); write it again, or leave it out") from error
    if kind := next((kind for magic, kind in COMPRESSIONS.items() if start.startswith(magic)), None):
        raise ValueError(
            f"shard {path} is compressed ({kind}), but examples are read by their place in it; unpack it (images do not "
            "get smaller by compression)"
        )
    bad = []
    if fault:
        bad.append(Skipped(-1, found.lose(half), "truncated shard", f"shard {path} {fault}; write it again"))
    examples, unclear = found.finish()
    members = {}
    for extension in EXTENSIONS:
        if any(extension in row.parts for _, row in examples):
            column = [row.parts.get(extension, (-1, -1)) for _, row in examples]
            members[extension] = np.array(column, np.int64).reshape(-1, 2)
    return ExampleIndex(
        Strings.from_strings([str(path)]),
        np.zeros(len(examples), np.int64),
        Strings.from_strings([key for key, _ in examples]),
        members,
        np.array([row.label for _, row in examples], np.int64),
        [*bad, *unclear],
    )


def _read_headers(file: BinaryIO, found: TarExamples) -> tuple[str, str]:
    """Put down the members; what is wrong with the file, '' if nothing is, and the key of the example it ends in."""
    end = os.fstat(file.fileno()).st_size
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in _forward(tar):
                key, extension = _name(member)
                if not key:
                    continue
                more, _, kind = extension.rpartition(".")
                if member.offset_data + member.size > end:
                    return f"ends inside {member.name}", f"{key}.{more}" if more else key
                label = NO_LABEL
                if kind == "cls":
                    text = os.pread(file.fileno(), min(member.size, MAX_LABEL_BYTES + 1), member.offset_data)
                    label = read_label(text)
                place = (member.offset_data, member.size) if kind in EXTENSIONS else (-1, -1)
                found.add(key, more, kind, place, label)
            # tarfile takes a damaged or missing header for the end; the true end is a block of zeros.
            file.seek(tar.offset)
            return ("" if file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE) else "has no end mark"), ""
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError) as error:
        return f"has a broken header ({' '.join(str(error).split())[:200]})", ""


def _forward(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members, as long as each lies behind the one before: a header can claim a negative size."""
    last = -1
    for member in tar:
        if member.offset <= last or member.size < 0 or member.offset_data < 0:
            raise tarfile.HeaderError(f"{member.name!r} has a size of {member.size}")
        last = member.offset
        yield member


def _name(member: tarfile.TarInfo) -> tuple[str, str]:
    """Key and extension of a member that is a part of an example; ('', '') if it is none."""
    key, extension = base_plus_ext(member.name)
    if not member.isreg() or not key:
        return "", ""
    more, dot, kind = extension.rpartition(".")
    kind = kind.lower()
    return (key, f"{more}{dot}{kind}") if kind in KNOWN else ("", "")


def read_label(text: bytes) -> int:
    """The class that a .cls member holds, or :data:`~datamodules.storage.index.WRONG_LABEL`."""
    if len(text) > MAX_LABEL_BYTES:
        return WRONG_LABEL
    try:
        label = int(text.removeprefix(MARK))
    except ValueError:
        return WRONG_LABEL
    return label if 0 <= label < MAX_CLASSES else WRONG_LABEL
