"""Cache of shard indexes on this machine, so that the headers of a shard are read only once."""

import hashlib
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from datamodules.storage.bad_examples import Skipped
from datamodules.storage.index import ExampleIndex, Strings
from datamodules.storage.tar_index import index_shard
from llamagen.files import atomic_file

VERSION = 4
START_METHOD = "fork" if sys.platform == "linux" else "spawn"
"""Start method of processes that only copy bytes. Forked processes start quickly and do not run the main script again.
"""
MIN_PARALLEL = 64
"""Minimum number of new shards for indexing in several processes."""


class IndexStore:
    """Cache of indexes, by path, size and modification time of a shard.

    Args:
        folder: folder of the cache. If it is not writable, shards are indexed each time.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "indexes"

    def _path(self, shard: Path) -> Path:
        status = shard.stat()
        name = f"{VERSION} {shard.absolute()} {status.st_size} {status.st_mtime_ns}"
        return self.folder / f"{hashlib.sha256(name.encode('utf-8', 'surrogateescape')).hexdigest()[:24]}.npz"

    def index(self, shard: Path) -> ExampleIndex:
        """Index of a shard, from the cache if possible.

        Raises:
            ValueError: if the shard is missing or cannot be read.
        """
        try:
            path = self._path(shard)
        except OSError as error:
            raise ValueError(f"shard {shard} cannot be read ({error}); write it again, or leave it out") from error
        try:
            return _load(path, shard)
        except Exception:  # the cached file is missing, or may hold anything
            index = index_shard(shard)
        with suppress(OSError):
            _save(path, index)
        return index

    def index_all(self, shards: Sequence[Path], counts: Sequence[int | None] = ()) -> ExampleIndex:
        """Index several shards, in their order.

        Args:
            shards: paths of the shards.
            counts: expected number of examples in each shard, None if unknown. Examples missing from a truncated shard
                are recorded as bad.

        Raises:
            ValueError: if a shard is missing, cannot be read, or is complete but has another number of examples.
        """
        missing = [shard for shard in shards if not shard.exists() or not self._path(shard).exists()]
        if len(missing) >= MIN_PARALLEL:
            workers = min(os.cpu_count() or 1, 16)
            with ProcessPoolExecutor(workers, get_context(START_METHOD)) as pool:
                for _ in tqdm(pool.map(self._store, missing), "reading headers", len(missing), unit="shard"):
                    pass
        indexes = [self.index(shard) for shard in shards]
        for shard, index, count in zip(shards, indexes, counts or [None] * len(indexes), strict=True):
            if count is None:
                continue
            lost = count - len(index)
            if lost < 0 or (lost and not index.bad):
                raise ValueError(
                    f"shard {shard} holds {len(index)} examples, but meta.json says {count}; write the dataset again"
                )
            missing_example = Skipped(-1, "", "truncated shard", f"an example of shard {shard} is lost; write it again")
            index.bad = [*index.bad, *lost * [missing_example]][:lost]  # none if only the end mark is cut off
        return ExampleIndex.concatenate(indexes)

    def _store(self, shard: Path) -> None:
        self.index(shard)


def _save(path: Path, index: ExampleIndex) -> None:
    columns = {f"member_{extension}": column for extension, column in index.members.items()}
    bad = Strings.from_strings(
        [text for example in index.bad for text in (example.key, example.reason, example.message)]
    )
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            keys=np.frombuffer(index.keys.block, np.uint8),
            key_ends=index.keys.ends,
            labels=index.labels,
            bad=np.frombuffer(bad.block, np.uint8),
            bad_ends=bad.ends,
            **columns,  # type: ignore[arg-type]
        )


def _load(path: Path, shard: Path) -> ExampleIndex:
    with np.load(path, allow_pickle=False) as stored:
        columns = {name: stored[name] for name in stored.files}
    keys = Strings(columns["keys"].tobytes(), columns["key_ends"])
    bad = Strings(columns["bad"].tobytes(), columns["bad_ends"])
    return ExampleIndex(
        Strings.from_strings([str(shard)]),
        np.zeros(len(keys), np.int64),
        keys,
        {name.removeprefix("member_"): column for name, column in columns.items() if name.startswith("member_")},
        columns["labels"],
        [Skipped(-1, *(bad[first + part] for part in range(3))) for first in range(0, len(bad), 3)],
    )
