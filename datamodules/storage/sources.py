"""Finds the data that a user names: folders of class folders, and shards by path, pattern or address."""

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from webdataset.shardlists import expand_urls

from datamodules.storage.class_order import ClassOrder, number_classes
from datamodules.storage.folder_walk import FolderWalk
from datamodules.storage.folders import class_folders, flat_images, index_folder
from datamodules.storage.index import ExampleIndex
from datamodules.storage.index_store import IndexStore
from datamodules.storage.layout import SPLITS, check_classes, split_folders, split_shards
from datamodules.storage.remote import PIPE, ShardCache, check_address, check_presence, is_remote
from datamodules.storage.shards import (
    CAPTIONS_FORMAT,
    CODES_FORMAT,
    IMAGES_FORMAT,
    META_FILE,
    ShardEntry,
    read_meta,
    shard_entries,
)
from llamagen.rank_zero import warn_on_rank_zero

PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass
class Source:
    """A split of a dataset.

    Attributes:
        name: name that the user gave.
        shards: paths or addresses of its shards; empty for a folder of images.
        folder: folder of class folders; None for shards.
        classes: names of the classes, if known.
        entries: entries of the shards in ``meta.json`` by address, if known.
        numbering: how class folders were numbered, for messages.
        warnings: possible mistakes in this numbering.
        run_folder: folder that the current run writes to, which is not part of the data.
    """

    name: str
    shards: list[str] = field(default_factory=list)
    folder: Path | None = None
    classes: list[str] = field(default_factory=list)
    entries: dict[str, ShardEntry] = field(default_factory=dict)
    numbering: str = ""
    warnings: list[str] = field(default_factory=list)
    run_folder: Path | None = None

    def index(self, cache: ShardCache) -> ExampleIndex:
        """Index its examples, after downloading remote shards.

        Raises:
            ValueError: if data are missing.
        """
        if self.folder is not None:
            return index_folder(self.folder, self.classes, self.run_folder)
        check_presence(address for address in self.shards if not is_remote(address))
        checksums = {address: entry.sha256 for address, entry in self.entries.items()}
        counts = [self.entries[address].examples if address in self.entries else None for address in self.shards]
        return IndexStore(cache.folder).index_all(cache.fetch_all(self.shards, checksums), counts)


@dataclass(frozen=True)
class Finder:
    """Finds the data that a user names.

    Args:
        hint: remedy that ends the error messages about missing data.
        allow_pipe: let ``pipe:`` addresses run their command.
        class_order: how class folders are numbered, see :func:`~datamodules.storage.class_order.number_classes`.
        run_folder: folder that the current run writes to, which is not part of the data.
    """

    hint: str
    allow_pipe: bool = False
    class_order: ClassOrder = "auto"
    run_folder: Path | None = None

    def source(self, name: str | Sequence[str]) -> Source:
        """Find one split, see :func:`find_source`."""
        if not isinstance(name, str):
            parts = [self.source(part) for part in name]
            if not parts or (len(parts) > 1 and any(part.folder is not None for part in parts)):
                raise ValueError(f"{list(name)} must be shards, or one folder of class folders; {self.hint}")
            if len(parts) == 1:
                return parts[0]
            return Source(f"{parts[0].name}, …", [shard for part in parts for shard in part.shards])
        if not name.strip():
            raise ValueError(f"the name of the data is empty; {self.hint}")
        if not is_remote(name):
            name = os.path.expanduser(name)
            if not name.endswith(".tar"):
                return self.folder(Path(name))
        # Braces and backslashes in a command or in an existing path are literal and not a pattern.
        shards = [name] if name.startswith(PIPE) or os.path.isfile(name) else list(expand_urls(name))
        for address in shards:
            check_address(address, self.allow_pipe)
        return Source(name, shards)

    def folder(self, folder: Path) -> Source:
        """Find the data of a folder of shards or of class folders."""
        if not folder.is_dir():
            raise ValueError(f"folder {folder} {_missing(folder)}; {self.hint}")
        if shards := sorted(str(path) for path in folder.glob("*.tar")):
            return Source(str(folder), shards)
        if names := class_folders(folder, self.run_folder):
            check_classes(folder, names, self.run_folder)
            classes, rule, warnings = number_classes(names, self.class_order, str(folder))
            numbering = f"{len(classes)} {'class' if len(classes) == 1 else 'classes'}, {rule}"
            return Source(str(folder), [], folder, classes, {}, numbering, warnings, self.run_folder)
        if images := flat_images(folder):
            raise ValueError(
                f"folder {folder} holds images ({images[0]}) but no class folders; move them into one, for example "
                f"{folder / 'all'}"
            )
        if names := FolderWalk(folder, self.run_folder).folders():
            raise ValueError(f"the folders in {folder} hold no examples: no image is in {names[0]}; {self.hint}")
        if packed := sorted(path for path in folder.iterdir() if path.name.endswith(PACKED)):
            raise ValueError(
                f"{packed[0]} is compressed, but examples are read at offsets in a shard; unpack it to "
                f"{packed[0].name.split('.')[0]}.tar (compression does not make images smaller)"
            )
        raise ValueError(f"folder {folder} holds neither .tar files nor folders of images; {self.hint}")

    def splits(self, root: str) -> tuple[dict[str, Any], dict[str, Source]]:
        """Find the splits of a dataset. Returns the content of ``meta.json``, if there is one, and the splits."""
        if root.endswith(".tar") or root.startswith(PIPE):
            return {}, {"train": self.source(root)}
        if is_remote(root):
            check_address(root, self.allow_pipe)
        folder = Path(root)
        meta: dict[str, Any] = {}
        if is_remote(root) or (folder / META_FILE).is_file():
            meta = read_meta(root, self.hint)
            if meta.get("format") in (
                IMAGES_FORMAT,
                CODES_FORMAT,
                CAPTIONS_FORMAT,
            ):  # otherwise it is an unrelated file
                splits = meta.get("splits")
                if not isinstance(splits, dict):
                    raise ValueError(f"splits in {META_FILE} of {root} is invalid; {self.hint}")
                return meta, {split: _source_in(root, split, meta) for split in SPLITS if split in splits}
        if not root.strip():
            raise ValueError(f"root is empty; {self.hint}")
        if not folder.is_dir():
            raise ValueError(f"folder {folder} {_missing(folder)}; {self.hint}")
        if found := split_folders(folder, self.run_folder):
            return meta, {split: self.folder(path) for split, path in found.items()}
        if named := split_shards(sorted(str(path) for path in folder.glob("*.tar"))):
            return meta, {split: Source(f"{folder} ({split})", shards) for split, shards in named.items()}
        return meta, {"train": self.folder(folder)}


def find_source(name: str | Sequence[str], hint: str, allow_pipe: bool = False) -> Source:
    """Find one split.

    Args:
        name: a folder of shards or of class folders; the path or address of a shard, with patterns like ``{000..123}``
            and ``{a,b}``; or a list of these.
        hint: remedy that ends the error messages about missing data.
        allow_pipe: let ``pipe:`` addresses run their command.

    Raises:
        ValueError: if there are no data, or an address is not allowed.
    """
    return Finder(hint, allow_pipe).source(name)


def find_sources(
    root: Path | str | None,
    train: str | Sequence[str] | None,
    val: str | Sequence[str] | None,
    hint: str,
    allow_pipe: bool = False,
    class_order: ClassOrder = "auto",
    run_folder: Path | None = None,
) -> tuple[Source | None, Source | None, dict[str, Any]]:
    """Find the splits of a dataset.

    Args:
        root: folder or address of a dataset with its splits; or a folder of training data; or the path, address or
            pattern of shards.
        train: shards or a folder for training, instead of ``root``.
        val: shards or a folder for validation, instead of the validation split in ``root``.
        hint: remedy that ends the error messages about missing data.
        allow_pipe: let ``pipe:`` addresses run their command.
        class_order: how class folders are numbered, see :func:`~datamodules.storage.class_order.number_classes`.
        run_folder: folder that the current run writes to, which is not part of the data.

    Returns:
        Training split, validation split (None if missing), and the content of ``meta.json`` (empty if missing).

    Raises:
        ValueError: if data are missing, or an address is not allowed.
    """
    finder = Finder(hint, allow_pipe, class_order, run_folder)
    meta: dict[str, Any] = {}
    if train is not None:
        found = {"train": finder.source(train)}
    elif root is not None:
        meta, found = finder.splits(str(root))
    else:
        raise ValueError(f"neither root nor train is given; {hint}")
    if val is not None:
        found["val"] = finder.source(val)
    training, validation = found.get("train"), found.get("val")
    if training is not None and validation is not None and validation.folder is not None and training.classes:
        validation.classes, validation.numbering, validation.warnings = training.classes, "", []
    for source in (training, validation):
        for warning in source.warnings if source is not None else ():
            warn_on_rank_zero(warning)
    return training, validation, meta


def _missing(folder: Path) -> str:
    return "is a file, not a folder" if folder.exists() else "does not exist"


def _source_in(root: str, split: str, meta: dict[str, Any]) -> Source:
    base = f"{root.rstrip('/')}/{split}"
    entries = {f"{base}/{entry.name}": entry for entry in shard_entries(meta, split, root)}
    return Source(base, list(entries), classes=meta.get("classes") or [], entries=entries)


def hold_out(index: ExampleIndex, share: float) -> np.ndarray:
    """Choose the validation examples, (N,) bool: with two or more examples, at least one and not all.

    The choice depends only on the key and the shard's name, so adding examples does not move others between the splits.
    """
    ends, block = index.keys.ends, index.keys.block
    starts = np.concatenate([[0], ends])[:-1]
    # Keys need not be unique across shards, so the name of the shard seeds the hash.
    names = [PurePath(path).name if path.endswith(".tar") else "" for path in index.paths]
    seeds = np.array([zlib.crc32(name.encode(errors="surrogateescape")) for name in names], np.int64)[index.file_of]
    spans = zip(starts.tolist(), ends.tolist(), seeds.tolist(), strict=True)
    hashes = np.array([zlib.crc32(block[start:end], seed) for start, end, seed in spans], np.int64)
    held_out: np.ndarray = hashes < share * 2**32
    if len(index) > 1 and held_out.all():
        held_out = hashes < hashes.max()
    return held_out if held_out.any() or len(index) < 2 else hashes == hashes.min()
