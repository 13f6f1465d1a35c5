"""Index of a tar file from its headers. The file may be truncated, broken or malicious."""

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
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""In UTF-8; some editors write it."""
KNOWN_EXTENSIONS = frozenset({*EXTENSIONS, *OTHER_IMAGES})
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
"""Compression formats by the first bytes of a file."""
MAX_MAGIC = 8


def index_shard(path: Path) -> ExampleIndex:
    """Index a tar file from its headers and labels. Examples are in the order of their first members.

    The members of an example may be anywhere in the file, and its key may contain dots, see
    :class:`~datamodules.storage.tar_examples.TarExamples`. Members of types that are not in
    :data:`~datamodules.storage.index.EXTENSIONS`, links and folders are ignored. Names are never used as paths. If the
    file is truncated or has a broken header, the examples before that point are kept and the loss is recorded in
    ``bad``.

    Raises:
        ValueError: if the file cannot be read.
    """
    tar_examples = TarExamples(str(path))
    try:
        with path.open("rb") as file:
            start = file.read(MAX_MAGIC)
            file.seek(0)
            fault, truncated_key = _read_headers(file, tar_examples)
    except OSError as error:
        raise ValueError(f"shard {path} cannot be read ({error}); write it again, or leave it out") from error
    if kind := next((kind for magic, kind in COMPRESSIONS.items() if start.startswith(magic)), None):
        raise ValueError(
            f"shard {path} is compressed ({kind}), but examples are read at offsets in the file; unpack it "
            "(compression does not make images smaller)"
        )
    bad = []
    if fault:
        key = tar_examples.drop_truncated(truncated_key)
        bad.append(Skipped(-1, key, "truncated shard", f"shard {path} {fault}; write it again"))
    examples, ambiguous = tar_examples.finish()
    members = {}
    for extension in EXTENSIONS:
        if any(extension in row.members for _, row in examples):
            column = [row.members.get(extension, (-1, -1)) for _, row in examples]
            members[extension] = np.array(column, np.int64).reshape(-1, 2)
    return ExampleIndex(
        Strings.from_strings([str(path)]),
        np.zeros(len(examples), np.int64),
        Strings.from_strings([key for key, _ in examples]),
        members,
        np.array([row.label for _, row in examples], np.int64),
        [*bad, *ambiguous],
    )


def _read_headers(file: BinaryIO, tar_examples: TarExamples) -> tuple[str, str]:
    """Record the members. Returns the fault of the file, '' for none, and the key of the example in which it ends."""
    end = os.fstat(file.fileno()).st_size
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in _checked_members(tar):
                key, extension = _split_name(member)
                if not key:
                    continue
                infix, _, kind = extension.rpartition(".")
                if member.offset_data + member.size > end:
                    return f"ends inside {member.name}", f"{key}.{infix}" if infix else key
                label = NO_LABEL
                if kind == "cls":
                    text = os.pread(file.fileno(), min(member.size, MAX_LABEL_BYTES + 1), member.offset_data)
                    label = read_label(text)
                location = (member.offset_data, member.size) if kind in EXTENSIONS else (-1, -1)
                tar_examples.add(key, infix, kind, location, label)
            # footgun: tarfile treats a damaged or missing header as the end. The real end is a block of zeros.
            file.seek(tar.offset)
            return ("" if file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE) else "has no end mark"), ""
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError) as error:
        return f"has a broken header ({' '.join(str(error).split())[:200]})", ""


def _checked_members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Iterate over the members, each at a larger offset than the last. A malicious header can claim a negative size."""
    last = -1
    for member in tar:
        if member.offset <= last or member.size < 0 or member.offset_data < 0:
            raise tarfile.HeaderError(f"{member.name!r} has a size of {member.size}")
        last = member.offset
        yield member


def _split_name(member: tarfile.TarInfo) -> tuple[str, str]:
    """Key and extension of a member of an example; ('', '') for other members."""
    key, extension = base_plus_ext(member.name)
    if not member.isreg() or not key:
        return "", ""
    infix, dot, kind = extension.rpartition(".")
    kind = kind.lower()
    return (key, f"{infix}{dot}{kind}") if kind in KNOWN_EXTENSIONS else ("", "")


def read_label(text: bytes) -> int:
    """Parse the class in a .cls member; :data:`~datamodules.storage.index.WRONG_LABEL` if it is invalid."""
    if len(text) > MAX_LABEL_BYTES:
        return WRONG_LABEL
    try:
        label = int(text.removeprefix(BYTE_ORDER_MARK))
    except ValueError:
        return WRONG_LABEL
    return label if 0 <= label < MAX_CLASSES else WRONG_LABEL
