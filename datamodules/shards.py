"""The shard format: webdataset tar files, written whole or not at all, and read by index.

A sample is a run of tar members with one key: ``000017.png``, ``000017.cls``. A set of shards is a folder for each
split (``train``, ``val``) beside a ``meta.json``, which is written last: without it the set is not complete.

webdataset writes the files and splits the names. Reading goes through an index of our own: webdataset streams, so it
has neither a global shuffle nor a place inside an epoch to return to.
"""

import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import webdataset
from webdataset.tariterators import base_plus_ext

META_FILE = "meta.json"
IMAGES_FORMAT = "llamagen-images"
CODES_FORMAT = "llamagen-codes"


class Member(NamedTuple):
    """Where the bytes of a sample's part lie: ``size`` bytes from ``offset`` of its shard."""

    offset: int
    size: int


class Sample(NamedTuple):
    """A sample of a shard.

    Attributes:
        shard: its tar file.
        key: its name within the set.
        members: its parts by extension, lower case and without the leading dot.
    """

    shard: str
    key: str
    members: dict[str, Member]

    def read(self, extension: str) -> bytes:
        """The bytes of a part.

        Raises:
            ValueError: if the sample has no such part, or the file ends before it.
        """
        if extension not in self.members:
            raise ValueError(
                f"sample {self.key} of {self.shard} has no .{extension} member, only {sorted(self.members)}"
            )
        offset, size = self.members[extension]
        with open(self.shard, "rb") as file:
            data = os.pread(file.fileno(), size, offset)
        if len(data) != size:
            raise ValueError(f"shard {self.shard} ends inside sample {self.key}; write it again")
        return data

    def read_label(self) -> int:
        """The class, from the cls part.

        Raises:
            ValueError: if the sample has no such part, or it is not a whole number.
        """
        text = self.read("cls")
        try:
            return int(text)
        except ValueError as error:
            raise ValueError(f"the class (.cls) of sample {self.key} of {self.shard} is {text!r}, no number") from error


def find_shards(folder: Path, hint: str) -> list[Path]:
    """The tar files of a folder, sorted by name.

    Args:
        folder: where to look.
        hint: what to do if there are none; ends the message.

    Raises:
        ValueError: if the folder is missing or holds no tar file.
    """
    if not folder.is_dir():
        raise ValueError(f"shard folder {folder} does not exist; {hint}")
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise ValueError(f"shard folder {folder} holds no .tar file; {hint}")
    return shards


def index_shard(path: Path) -> list[Sample]:
    """The samples of a tar file in their order, from its headers alone.

    Raises:
        ValueError: if the file is not a whole tar file.
    """
    samples: list[Sample] = []
    end = path.stat().st_size
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                key, extension = base_plus_ext(member.name)
                if not key:
                    continue
                if member.offset_data + member.size > end:
                    raise ValueError(f"shard {path} ends inside {member.name}; write it again")
                if not samples or samples[-1].key != key:
                    samples.append(Sample(str(path), key, {}))
                samples[-1].members[extension.lower()] = Member(member.offset_data, member.size)
            # tarfile takes a damaged or missing header for the end; the true end is marked by a block of zeros.
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise ValueError(f"shard {path} is not a whole tar file (no end mark); write it again")
    except tarfile.TarError as error:
        raise ValueError(f"shard {path} is not a whole tar file ({error}); write it again") from error
    return samples


def read_meta(root: Path, hint: str) -> dict[str, Any]:
    """The description of a set of shards.

    Raises:
        ValueError: if the set is missing or was not completed.
    """
    path = root / META_FILE
    if not root.is_dir():
        raise ValueError(f"shard folder {root} does not exist; {hint}")
    if not path.is_file():
        raise ValueError(f"shard folder {root} has no {META_FILE}, so it was not written to its end; {hint}")
    try:
        meta = json.loads(path.read_text())
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(f"{path} is not valid JSON ({error}); {hint}") from error
    if not isinstance(meta, dict):
        raise ValueError(f"{path} must hold a JSON object; {hint}")
    return meta


def write_meta(root: Path, meta: Mapping[str, Any]) -> None:
    """Complete a set of shards: write its description under a temporary name, then rename it."""
    temporary = root / f".{META_FILE}.tmp"
    temporary.write_text(json.dumps(meta, indent=2) + "\n")
    temporary.replace(root / META_FILE)


class ShardSetWriter:
    """Writes samples into numbered tar files; each gets its name when it is whole. A context manager.

    Args:
        folder: where the files go; made if it does not exist.
        prefix: start of the file names, before ``-000000.tar``.
        samples_per_shard: when to begin the next file.
    """

    def __init__(self, folder: Path, prefix: str, samples_per_shard: int) -> None:
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard is {samples_per_shard}; it must be at least 1")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.prefix, self.samples_per_shard = folder, prefix, samples_per_shard
        self.shards: list[Path] = []
        self.count = 0
        self._writer: webdataset.TarWriter | None = None
        self._in_shard = 0

    @property
    def _temporary(self) -> Path:
        return self.folder / f".{self.prefix}-{len(self.shards):06d}.tar.tmp"

    def write(self, key: str, parts: Mapping[str, bytes]) -> None:
        """Add a sample: its key and the bytes of each part by extension.

        Raises:
            ValueError: if the key would be read back as another one.
        """
        name = key.rpartition("/")[2]
        if not name or "." in name:
            raise ValueError(f"key {key!r} cannot be written; the last part of a key must not be empty or hold a dot")
        if self._writer is None:
            self._writer = webdataset.TarWriter(str(self._temporary), encoder=False, mtime=0)
            self._in_shard = 0
        self._writer.write({"__key__": key, **parts})
        self.count += 1
        self._in_shard += 1
        if self._in_shard == self.samples_per_shard:
            self.close()

    def close(self) -> None:
        """Give the last file its name."""
        if self._writer is None:
            return
        self._writer.close()  # on an error, __exit__ and abort remove the file
        self._writer = None
        shard = self.folder / f"{self.prefix}-{len(self.shards):06d}.tar"
        self._temporary.replace(shard)
        self.shards.append(shard)

    def abort(self) -> None:
        """Drop the file that is being written."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            try:
                writer.close()
            finally:
                self._temporary.unlink()

    def __enter__(self) -> "ShardSetWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self.abort()


def describe_split(shards: Sequence[Path], count: int) -> dict[str, Any]:
    """A split's entry in ``meta.json``."""
    return {"count": count, "shards": [shard.name for shard in shards]}
