"""Examples of shards that are fetched and indexed only when one of them is asked for."""

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
    """The examples of a source by number: shard · 2⁴⁰ + place, where places beyond the last begin with the first again.

    Args:
        source: shards, no folder.
        cache: where remote ones are kept.
        extensions: an example needs one of these members.
        labels_needed: see :meth:`~datamodules.storage.index.ExampleIndex.usable`.

    Raises:
        ValueError: if it is a folder, or its first shard has no examples.
    """

    def __init__(
        self, source: Source, cache: ShardCache, extensions: Sequence[str], labels_needed: bool | None = None
    ) -> None:
        if source.folder is not None:
            raise ValueError(f"resampled_epoch needs shards, but {source.name} is a folder of images; leave it out")
        self.source, self.cache, self._needed = source, cache, (tuple(extensions), labels_needed)
        self._indexes: OrderedDict[int, ExampleIndex] = OrderedDict()
        self._news: list[Skipped] = []
        self._opened = 0
        self.examples_per_shard = len(self._shard(0))
        if not self.examples_per_shard:
            raise ValueError(f"shard {source.shards[0]} holds no examples that can be used; leave it out")

    @property
    def shards(self) -> int:
        """Number of shards."""
        return len(self.source.shards)

    @property
    def members(self) -> Collection[str]:
        """Extensions of the examples' parts, as far as the first shard tells."""
        return self._shard(0).members

    def __len__(self) -> int:
        """About how many examples there are: as if each shard had as many as the first."""
        return self.examples_per_shard * self.shards

    def _shard(self, number: int) -> ExampleIndex:
        if number not in self._indexes:
            self._indexes[number] = index = self._open(self.source.shards[number])
            if index.bad:
                self._news += index.bad
                self._opened += len(index) + len(index.bad)
            if len(self._indexes) > MAX_INDEXES:
                self._indexes.popitem(last=False)
        self._indexes.move_to_end(number)
        return self._indexes[number]

    def _open(self, address: str) -> ExampleIndex:
        while True:  # another process may make room in the cache just now
            path = self.cache.fetch(address)
            try:
                index = IndexStore(self.cache.folder).index(path).usable(*self._needed)
                index.files.open(str(path))
                return index
            except (OSError, ValueError):
                if path.exists() or path == Path(address):
                    raise

    def locate(self, number: int) -> tuple[ExampleIndex, int]:
        """The index of an example's shard, and its place there.

        Raises:
            BadExampleError: if the shard has no examples.
            ValueError: if it cannot be had.
        """
        shard, place = number >> SHARD_BITS, number & ((1 << SHARD_BITS) - 1)
        index = self._shard(shard)
        if not len(index):
            raise BadExampleError(
                "truncated shard", f"shard {self.source.shards[shard]} holds no examples that can be used"
            )
        return index, place % len(index)

    def __getitem__(self, number: Any) -> Any:
        """Example ``number``."""
        index, place = self.locate(number)
        return index[place]

    def another(self, number: int, attempt: int) -> int:
        """An example of another shard."""
        return ((number >> SHARD_BITS) + attempt) % self.shards << SHARD_BITS

    def take_news(self) -> tuple[list[Skipped], int]:
        """What was found not to be usable since the last time, by opening shards, and of how many examples in these."""
        news, self._news = (self._news, self._opened), []
        self._opened = 0
        return news
