"""The index of a tar file, from its headers; made for files that may be cut off, broken or hostile."""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from webdataset.tariterators import base_plus_ext

from datamodules.bad_samples import Skipped
from datamodules.index import EXTENSIONS, NO_LABEL, OTHER_PICTURES, PICTURES, WRONG_LABEL, SampleIndex, Strings

MOST_LABEL_BYTES = 32
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
"""By the first bytes of a file."""
MOST_MAGIC = 8


class _Rows:
    """Samples as they come: keys, members and labels, and what the last, broken one was called."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.members: list[dict[str, tuple[int, int]]] = []
        self.labels: list[int] = []
        self.half = ""

    def begin(self, key: str) -> None:
        self.keys.append(key)
        self.members.append({})
        self.labels.append(NO_LABEL)

    def drop_last(self) -> None:
        del self.keys[-1], self.members[-1], self.labels[-1]


def index_shard(path: Path) -> SampleIndex:
    """The samples of a tar file in their order, from its headers and labels.

    Members of other types than :data:`~datamodules.index.EXTENSIONS` are passed over, links and folders too; names are
    never used as paths. Of a file that ends too early or has a broken header, the samples before are taken, and the
    loss is put down under ``bad``.

    Raises:
        ValueError: if the file cannot be read.
    """
    rows = _Rows()
    try:
        with path.open("rb") as file:
            start = file.read(MOST_MAGIC)
            file.seek(0)
            fault = _read_headers(file, rows)
    except OSError as error:
        raise ValueError(f"shard {path} cannot be read ({error}); write it again, or leave it out") from error
    if kind := next((kind for magic, kind in COMPRESSIONS.items() if start.startswith(magic)), None):
        raise ValueError(
            f"shard {path} is compressed ({kind}), but samples are read by their place in it; unpack it (images do not "
            "get smaller by compression)"
        )
    bad = []
    if fault:
        lost = rows.half
        parts: set[str] = set().union(*rows.members[:-1])
        # Where no next sample has begun, the last one may be cut off between its parts.
        if rows.keys and (lost == rows.keys[-1] or (not lost and parts - set(rows.members[-1]))):
            lost = rows.keys[-1]
            rows.drop_last()
        bad.append(Skipped(-1, lost, "truncated shard", f"shard {path} {fault}; write it again"))
    members = {}
    for extension in EXTENSIONS:
        if any(extension in row for row in rows.members):
            column = [row.get(extension, (-1, -1)) for row in rows.members]
            members[extension] = np.array(column, np.int64).reshape(-1, 2)
    return SampleIndex(
        Strings.of([str(path)]),
        np.zeros(len(rows.keys), np.int64),
        Strings.of(rows.keys),
        members,
        np.array(rows.labels, np.int64),
        bad,
    )


def _read_headers(file: BinaryIO, rows: _Rows) -> str:
    """Put down the samples; what is wrong with the file, '' if nothing is."""
    end = os.fstat(file.fileno()).st_size
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in _forward(tar):
                key, extension = _name(member)
                if not key:
                    continue
                more, _, kind = extension.rpartition(".")
                if more:  # one more part of its sample, or a key with a dot, which cannot be told from it
                    if kind in PICTURES and (not rows.keys or rows.keys[-1] != key):
                        rows.begin(f"{key}.{more}")
                    continue
                if member.offset_data + member.size > end:
                    rows.half = key
                    return f"ends inside {member.name}"
                if not rows.keys or rows.keys[-1] != key or extension in rows.members[-1]:
                    rows.begin(key)
                if extension not in EXTENSIONS:
                    continue
                rows.members[-1][extension] = (member.offset_data, member.size)
                if extension == "cls":
                    text = os.pread(file.fileno(), min(member.size, MOST_LABEL_BYTES + 1), member.offset_data)
                    rows.labels[-1] = read_label(text)
            # tarfile takes a damaged or missing header for the end; the true end is a block of zeros.
            file.seek(tar.offset)
            return "" if file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE) else "has no end mark"
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError) as error:
        return f"has a broken header ({' '.join(str(error).split())[:200]})"


def _forward(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members, as long as each lies behind the one before: a header can claim a negative size."""
    last = -1
    for member in tar:
        if member.offset <= last or member.size < 0 or member.offset_data < 0:
            raise tarfile.HeaderError(f"{member.name!r} has a size of {member.size}")
        last = member.offset
        yield member


def _name(member: tarfile.TarInfo) -> tuple[str, str]:
    """Key and extension of a member that is a part of a sample; ('', '') if it is none."""
    key, extension = base_plus_ext(member.name)
    if not member.isreg() or not key:
        return "", ""
    extension = extension.lower()
    known = extension.rpartition(".")[2] in (*EXTENSIONS, *OTHER_PICTURES)
    return (key, extension) if known else ("", "")


def read_label(text: bytes) -> int:
    """The class that a .cls member holds, or :data:`~datamodules.index.WRONG_LABEL`."""
    if len(text) > MOST_LABEL_BYTES:
        return WRONG_LABEL
    try:
        label = int(text)
    except ValueError:
        return WRONG_LABEL
    return label if 0 <= label < 2**31 else WRONG_LABEL
