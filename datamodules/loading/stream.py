"""Streams of shards, which are downloaded and indexed only when one of their examples is read."""

from collections import OrderedDict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from datamodules.loading.order import SHARD_BITS, SHARDS_PER_SHUFFLE
from datamodules.storage.bad_examples import BadExampleError, Skipped
from datamodules.storage.index import Example, ExampleIndex
from datamodules.storage.index_store import IndexStore
from datamodules.storage.remote import ShardCache
from datamodules.storage.sources import Source

MAX_INDEXES = 4 * SHARDS_PER_SHUFFLE


class StreamIndex(Sequence[Example]):
    """Examples of a source by number: shard · 2⁴⁰ + position in the shard. Positions wrap around at its last example.

    Args:
        source: shards; folders are not supported.
        cache: keeps remote shards.
        extensions: an example needs at least one of these members.
        labels_needed: see :meth:`~datamodules.storage.index.ExampleIndex.usable`.

    Raises:
        ValueError: if the source is a folder, or its first shard has no usable examples.
    """

    def __init__(
        self, source: Source, cache: ShardCache, extensions: Sequence[str], labels_needed: bool | None = None
    ) -> None:
        if source.folder is not None:
            raise ValueError(f"resampled_epoch needs shards, but {source.name} is a folder of images; leave it out")
        self.source, self.cache, self._needed = source, cache, (tuple(extensions), labels_needed)
        self._indexes: OrderedDict[int, ExampleIndex] = OrderedDict()
        self._skipped: list[Skipped] = []
        self._opened = 0
        self.examples_per_shard = len(self._shard(0))
        if not self.examples_per_shard:
            raise ValueError(f"shard {source.shards[0]} holds no usable examples; leave it out")

    @property
    def shards(self) -> int:
        """Number of shards."""
        return len(self.source.shards)

    @property
    def members(self) -> Collection[str]:
        """Extensions of the examples' members in the first shard."""
        return self._shard(0).members

    def __len__(self) -> int:
        """Estimated number of examples, as if each shard had as many as the first."""
        return self.examples_per_shard * self.shards

    def _shard(self, number: int) -> ExampleIndex:
        if number not in self._indexes:
            self._indexes[number] = index = self._open(self.source.shards[number])
            if index.bad:
                self._skipped += index.bad
                self._opened += len(index) + len(index.bad)
            if len(self._indexes) > MAX_INDEXES:
                self._indexes.popitem(last=False)
        self._indexes.move_to_end(number)
        return self._indexes[number]

    def _open(self, address: str) -> ExampleIndex:
        while True:  # another process may remove the shard from the cache at any time
            path = self.cache.fetch(address)
            try:
                index = IndexStore(self.cache.folder).index(path).usable(*self._needed)
                index.files.open(str(path))
                return index
            except (OSError, ValueError):
                if path.exists() or path == Path(address):
                    raise

    def locate(self, number: int) -> tuple[ExampleIndex, int]:
        """Index of an example's shard, and its position in it.

        Raises:
            BadExampleError: if the shard has no usable examples.
            ValueError: if it cannot be downloaded.
        """
        shard, position = number >> SHARD_BITS, number & ((1 << SHARD_BITS) - 1)
        index = self._shard(shard)
        if not len(index):
            raise BadExampleError("truncated shard", f"shard {self.source.shards[shard]} holds no usable examples")
        return index, position % len(index)

    def __getitem__(self, number: Any) -> Any:
        """Example ``number``."""
        index, position = self.locate(number)
        return index[position]

    def substitute(self, number: int, attempt: int) -> int:
        """Number of an example in another shard."""
        return ((number >> SHARD_BITS) + attempt) % self.shards << SHARD_BITS

    def pop_skipped(self) -> tuple[list[Skipped], int]:
        """Bad examples in the shards indexed since the last call, and the number of examples in these shards."""
        result, self._skipped = (self._skipped, self._opened), []
        self._opened = 0
        return result
