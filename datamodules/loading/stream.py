"""Samples of shards that are fetched and indexed only when one of them is asked for."""

from collections import OrderedDict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from datamodules.loading.order import DRAWS_MIXED, SHARD_BITS
from datamodules.storage.bad_samples import BadSampleError, Skipped
from datamodules.storage.index import Sample, SampleIndex
from datamodules.storage.index_store import IndexStore
from datamodules.storage.remote import ShardCache
from datamodules.storage.sources import Source

MAX_INDEXES = 4 * DRAWS_MIXED


class StreamIndex(Sequence[Sample]):
    """The samples of a source by number: shard · 2⁴⁰ + place, where places beyond the last begin with the first again.

    Args:
        source: shards, no folder.
        cache: where remote ones are kept.
        extensions: a sample needs one of these members.
        labels_needed: see :meth:`~datamodules.storage.index.SampleIndex.usable`.

    Raises:
        ValueError: if it is a folder, or its first shard has no samples.
    """

    def __init__(
        self, source: Source, cache: ShardCache, extensions: Sequence[str], labels_needed: bool | None = None
    ) -> None:
        if source.folder is not None:
            raise ValueError(f"resampled_epoch needs shards, but {source.name} is a folder of images; leave it out")
        self.source, self.cache, self._needed = source, cache, (tuple(extensions), labels_needed)
        self._indexes: OrderedDict[int, SampleIndex] = OrderedDict()
        self._news: list[Skipped] = []
        self._opened = 0
        self.per_draw = len(self._shard(0))
        if not self.per_draw:
            raise ValueError(f"shard {source.shards[0]} holds no samples that can be used; leave it out")

    @property
    def shards(self) -> int:
        """Number of shards."""
        return len(self.source.shards)

    @property
    def members(self) -> Collection[str]:
        """Extensions of the samples' parts, as far as the first shard tells."""
        return self._shard(0).members

    def __len__(self) -> int:
        """About how many samples there are: as if each shard had as many as the first."""
        return self.per_draw * self.shards

    def _shard(self, number: int) -> SampleIndex:
        if number not in self._indexes:
            self._indexes[number] = index = self._open(self.source.shards[number])
            if index.bad:
                self._news += index.bad
                self._opened += len(index) + len(index.bad)
            if len(self._indexes) > MAX_INDEXES:
                self._indexes.popitem(last=False)
        self._indexes.move_to_end(number)
        return self._indexes[number]

    def _open(self, address: str) -> SampleIndex:
        while True:  # another process may make room in the cache just now
            path = self.cache.fetch(address)
            try:
                index = IndexStore(self.cache.folder).index(path).usable(*self._needed)
                index.files.open(str(path))
                return index
            except (OSError, ValueError):
                if path.exists() or path == Path(address):
                    raise

    def locate(self, number: int) -> tuple[SampleIndex, int]:
        """The index of a sample's shard, and its place there.

        Raises:
            BadSampleError: if the shard has no samples.
            ValueError: if it cannot be had.
        """
        shard, place = number >> SHARD_BITS, number & ((1 << SHARD_BITS) - 1)
        index = self._shard(shard)
        if not len(index):
            raise BadSampleError(
                "truncated shard", f"shard {self.source.shards[shard]} holds no samples that can be used"
            )
        return index, place % len(index)

    def __getitem__(self, number: Any) -> Any:
        """Sample ``number``."""
        index, place = self.locate(number)
        return index[place]

    def another(self, number: int, attempt: int) -> int:
        """A sample of another shard."""
        return ((number >> SHARD_BITS) + attempt) % self.shards << SHARD_BITS

    def take_news(self) -> tuple[list[Skipped], int]:
        """What was found not to be usable since the last time, by opening shards, and of how many samples in these."""
        news, self._news = (self._news, self._opened), []
        self._opened = 0
        return news
