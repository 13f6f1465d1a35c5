"""What a user names as a data set, made out: folders of class folders, shards by path, pattern or address."""

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
from datamodules.storage.rank_zero_warning import warn_on_rank_zero
from datamodules.storage.remote import PIPE, ShardCache, check_address, check_presence, is_remote
from datamodules.storage.shards import (
    CAPTIONS_FORMAT,
    CODES_FORMAT,
    IMAGES_FORMAT,
    META_FILE,
    ShardNote,
    read_meta,
    shard_notes,
)

PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass
class Source:
    """A split of a data set.

    Attributes:
        name: what the user called it.
        shards: addresses of its shards; none for a folder.
        folder: the folder of class folders, else None.
        classes: names of the classes, where they are known.
        described: how many examples each shard holds, and its checksum, where that is known.
        numbering: how class folders were numbered, for messages.
        warnings: what of that may not be as the user wants it.
        run_folder: folder that the current run writes to, which is no part of the data.
    """

    name: str
    shards: list[str] = field(default_factory=list)
    folder: Path | None = None
    classes: list[str] = field(default_factory=list)
    described: dict[str, ShardNote] = field(default_factory=dict)
    numbering: str = ""
    warnings: list[str] = field(default_factory=list)
    run_folder: Path | None = None

    def index(self, cache: ShardCache) -> ExampleIndex:
        """Its examples, after fetching what is not on this machine.

        Raises:
            ValueError: if something is missing.
        """
        if self.folder is not None:
            return index_folder(self.folder, self.classes, self.run_folder)
        check_presence(address for address in self.shards if not is_remote(address))
        checksums = {address: note.sha256 for address, note in self.described.items()}
        counts = [self.described[address].examples if address in self.described else None for address in self.shards]
        return IndexStore(cache.folder).index_all(cache.fetch_all(self.shards, checksums), counts)


@dataclass(frozen=True)
class Finder:
    """Makes out what a user names as data.

    Args:
        hint: what to do if there is nothing; ends the message.
        allow_pipe: let ``pipe:`` addresses run their command.
        class_order: how class folders are numbered, see :func:`~datamodules.storage.class_order.number_classes`.
        run_folder: folder that the current run writes to, which is no part of the data.
    """

    hint: str
    allow_pipe: bool = False
    class_order: ClassOrder = "auto"
    run_folder: Path | None = None

    def source(self, name: str | Sequence[str]) -> Source:
        """Make out one split, see :func:`find_source`."""
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
        # A command, or a path that exists, may hold braces and backslashes of its own, which are no pattern.
        shards = [name] if name.startswith(PIPE) or os.path.isfile(name) else list(expand_urls(name))
        for address in shards:
            check_address(address, self.allow_pipe)
        return Source(name, shards)

    def folder(self, folder: Path) -> Source:
        """A folder of shards or of class folders."""
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
                f"{packed[0]} is compressed, but examples are read by their place in a shard; unpack it to "
                f"{packed[0].name.split('.')[0]}.tar (images do not get smaller by it)"
            )
        raise ValueError(f"folder {folder} holds neither .tar files nor folders of images; {self.hint}")

    def splits(self, root: str) -> tuple[dict[str, Any], dict[str, Source]]:
        """The description of a set, if it has one, and its splits."""
        if root.endswith(".tar") or root.startswith(PIPE):
            return {}, {"train": self.source(root)}
        if is_remote(root):
            check_address(root, self.allow_pipe)
        folder = Path(root)
        meta: dict[str, Any] = {}
        if is_remote(root) or (folder / META_FILE).is_file():
            meta = read_meta(root, self.hint)
            if meta.get("format") in (IMAGES_FORMAT, CODES_FORMAT, CAPTIONS_FORMAT):  # else it is about something else
                described = meta.get("splits")
                if not isinstance(described, dict):
                    raise ValueError(f"splits in {META_FILE} of {root} is wrong; {self.hint}")
                return meta, {split: _described(root, split, meta) for split in SPLITS if split in described}
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
    """Make out one split.

    Args:
        name: a folder of shards or of class folders; a path or address of a shard, with ``{000..123}`` and ``{a,b}`` as
            in a shell; or a list of these.
        hint: what to do if there is nothing; ends the message.
        allow_pipe: let ``pipe:`` addresses run their command.

    Raises:
        ValueError: if there is nothing, or an address is not allowed.
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
    """Make out a data set.

    Args:
        root: folder or address of a set: its splits within it, or, for a folder without them, itself; or shards, by a
            path, an address or a pattern.
        train: shards or a folder for training, instead of all of ``root``.
        val: shards or a folder for validation, instead of what is in ``root``.
        hint: what to do if there is nothing; ends the message.
        allow_pipe: let ``pipe:`` addresses run their command.
        class_order: how class folders are numbered, see :func:`~datamodules.storage.class_order.number_classes`.
        run_folder: folder that the current run writes to, which is no part of the data.

    Returns:
        Training split and validation split, each if there is one, and the set's ``meta.json`` if it has one.

    Raises:
        ValueError: if there is nothing, something is missing, or an address is not allowed.
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


def _described(root: str, split: str, meta: dict[str, Any]) -> Source:
    base = f"{root.rstrip('/')}/{split}"
    notes = {f"{base}/{note.name}": note for note in shard_notes(meta, split, root)}
    return Source(base, list(notes), classes=meta.get("classes") or [], described=notes)


def hold_out(index: ExampleIndex, share: float) -> np.ndarray:
    """Which examples are for validation, (N,) bool: at least one, and not all, of two and more.

    They are drawn by keys and names of shards, so that new examples move no others.
    """
    ends, block = index.keys.ends, index.keys.block
    starts = np.concatenate([[0], ends])[:-1]
    # The keys of several shards may be unique within each of them alone.
    names = [PurePath(path).name if path.endswith(".tar") else "" for path in index.paths]
    seeds = np.array([zlib.crc32(name.encode(errors="surrogateescape")) for name in names], np.int64)[index.file_of]
    spans = zip(starts.tolist(), ends.tolist(), seeds.tolist(), strict=True)
    drawn = np.array([zlib.crc32(block[start:end], seed) for start, end, seed in spans], np.int64)
    chosen: np.ndarray = drawn < share * 2**32
    if len(index) > 1 and chosen.all():
        chosen = drawn < drawn.max()
    return chosen if chosen.any() or len(index) < 2 else drawn == drawn.min()
