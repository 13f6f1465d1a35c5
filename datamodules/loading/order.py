"""Which example comes when: a pure function of seed and epoch, shared out over ranks, with a place to return to.

The examples of an epoch are cut into global batches, of which each rank gets its share. The place is the number of
examples that all ranks together have consumed. It does not know of ranks and workers, so the rest of an epoch can be
shared out anew over another number of them.
"""

from collections.abc import Iterator
from math import ceil
from typing import Literal, Protocol

import numpy as np

Address = tuple[int, int]
"""An example as a dataset is asked for it: its number and the epoch, which together decide its augmentation."""

NO_EPOCH = -1
"""In place of the epoch: the example as it is, without anything random."""

Remainder = Literal["keep", "drop", "repeat"]

SHARD_BITS = 40
"""Of an example's number in a stream: shard · 2⁴⁰ + place."""

SHARDS_PER_SHUFFLE = 8
"""Shards whose examples are shuffled together in a stream."""


class Plan(Protocol):
    """The order of an epoch, for one rank.

    Attributes:
        count: examples of an epoch, over all ranks.
    """

    count: int

    def ends(self, consumed: int) -> np.ndarray:
        """Examples that all ranks have consumed after each batch of the rest of an epoch."""

    def batches(self, epoch: int, consumed: int) -> Iterator[list[Address]]:
        """The batches of this rank for the rest of an epoch."""


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of ``count`` examples for an epoch, (count,) int64, equal on every rank."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def cut(count: int, start: int, batch_size: int, world_size: int, remainder: Remainder) -> np.ndarray:
    """Where the global batches of the rest of an epoch end, the same on every rank.

    Args:
        count: examples of the whole epoch.
        start: number of them that all ranks together have consumed.
        batch_size: examples a rank and batch.
        world_size: number of ranks.
        remainder: what to do with examples that do not fill a global batch. ``keep``: each comes once, so the last
            batches of ranks are smaller, or, where there are fewer examples than ranks, one larger; ``drop``: leave them
            out; ``repeat``: fill up with the first examples of the epoch.

    Returns:
        (batches,) int64; an end beyond ``count`` means examples from the beginning of the epoch.
    """
    step = batch_size * world_size
    full, rest = divmod(max(count - start, 0), step)
    ends = start + step * np.arange(1, full + 1, dtype=np.int64)
    if rest == 0 or remainder == "drop":
        return ends
    if remainder == "repeat":
        return np.append(ends, start + step * (full + 1))
    if rest >= world_size:
        return np.append(ends, count)
    if full:
        ends[-1] = count
        return ends
    return np.array([start + world_size], np.int64)  # nobody may wait: fewer examples than ranks


class EpochPlan:
    """Every example once an epoch, shuffled over the whole set.

    Args:
        count: examples of the set.
        batch_size: examples a rank and batch.
        seed: of the order.
        rank: this rank.
        world_size: number of ranks.
        remainder: see :func:`cut`.
    """

    def __init__(
        self, count: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, remainder: Remainder = "keep"
    ) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.rank, self.world_size, self.remainder = rank, world_size, remainder
        if count < world_size or not len(self.ends(0)):
            raise ValueError(
                f"{count} training examples cannot be shared out over {world_size} ranks with batch_size {batch_size} "
                f"and remainder {remainder}; use fewer ranks or a smaller batch"
            )

    def ends(self, consumed: int) -> np.ndarray:
        """Examples that all ranks have consumed after each batch of the rest of an epoch."""
        return cut(self.count, consumed, self.batch_size, self.world_size, self.remainder)

    def batches(self, epoch: int, consumed: int) -> Iterator[list[Address]]:
        """The batches of this rank for the rest of an epoch."""
        order = epoch_order(self.count, self.seed, epoch)
        for end in self.ends(consumed).tolist():
            share = order.take(range(consumed + self.rank, end, self.world_size), mode="wrap")
            yield [(number, epoch) for number in share.tolist()]
            consumed = end


class StreamPlan:
    """Shards drawn at random with replacement, for sets that are too large to shuffle or to index.

    From each drawn shard ``examples_per_shard`` examples are taken, from a random place on and, in a smaller shard, from its
    beginning again. The examples of eight draws are shuffled together. Each rank draws shards of its own, a pure
    function of seed, epoch, rank and number of ranks; an epoch is only a number of examples, after which validation may
    come.

    Args:
        shards: number of shards.
        examples_per_shard: examples of each drawn shard.
        count: examples of an epoch, over all ranks; rounded down to whole global batches.
        batch_size: examples a rank and batch.
        seed: of the draws.
        rank: this rank.
        world_size: number of ranks.
    """

    def __init__(
        self,
        shards: int,
        examples_per_shard: int,
        count: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.shards, self.examples_per_shard, self.batch_size, self.seed = shards, examples_per_shard, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.count = count // (batch_size * world_size) * batch_size * world_size
        if self.count == 0:
            raise ValueError(
                f"resampled_epoch is {count}, less than one batch of {batch_size} on {world_size} ranks; make it larger"
            )

    def ends(self, consumed: int) -> np.ndarray:
        """Examples that all ranks have consumed after each batch of the rest of an epoch."""
        return cut(self.count, consumed, self.batch_size, self.world_size, "drop")

    def batches(self, epoch: int, consumed: int) -> Iterator[list[Address]]:
        """The batches of this rank for the rest of an epoch."""
        size = SHARDS_PER_SHUFFLE * self.examples_per_shard
        place = consumed // self.world_size
        left: list[int] = []
        group, skip = divmod(place, size)
        for _ in self.ends(consumed):
            while len(left) < self.batch_size:
                left += self._group(epoch, group)[skip:]
                group, skip = group + 1, 0
            batch, left = left[: self.batch_size], left[self.batch_size :]
            yield [(number, epoch) for number in batch]

    def _group(self, epoch: int, group: int) -> list[int]:
        generator = np.random.default_rng([self.seed, epoch, self.world_size, self.rank, group])
        shards = generator.integers(self.shards, size=(SHARDS_PER_SHUFFLE, 1))
        first = generator.integers(1 << 31, size=(SHARDS_PER_SHUFFLE, 1))
        numbers = (shards << SHARD_BITS) + first + np.arange(self.examples_per_shard)
        order: list[int] = generator.permutation(numbers.flatten()).tolist()
        return order


def evaluation_batches(numbers: range | np.ndarray, batch_size: int) -> list[list[Address]]:
    """Examples as they are, in order, in batches of at most ``batch_size``."""
    return [
        [(int(number), NO_EPOCH) for number in numbers[first : first + batch_size]]
        for first in range(0, len(numbers), batch_size)
    ]


def shared_batches(
    count: int, batch_size: int, rank: int, world_size: int, equally: bool = False
) -> list[list[Address]]:
    """The batches of a rank, which takes every ``world_size``-th example, from the ``rank``-th on.

    Args:
        count: examples of the set.
        batch_size: most examples of a batch.
        rank: this rank.
        world_size: number of ranks.
        equally: all ranks get the same number of batches, as they must where they wait for each other in each; then one
            batch of a rank that has an example less may be cut in two.

    Raises:
        ValueError: if ``equally`` cannot be.
    """
    batches = evaluation_batches(range(rank, count, world_size), batch_size)
    if not equally:
        return batches
    most = ceil(ceil(count / world_size) / batch_size)
    if count // world_size < most:
        raise ValueError(
            f"{count} examples in batches of {batch_size} cannot be shared out over {world_size} ranks that wait for "
            "each other, as they do where parameters are sharded; use larger batches or fewer ranks"
        )
    if len(batches) < most:
        longest = max(range(len(batches)), key=lambda place: len(batches[place]))
        half = len(batches[longest]) // 2
        batches[longest : longest + 1] = [batches[longest][:half], batches[longest][half:]]
    return batches


def draw(seed: int, epoch: int, numbers: np.ndarray, below: int) -> np.ndarray:
    """A random whole number in [0, below) for each example: a pure function of seed, epoch and number.

    Args:
        seed: of the draws.
        epoch: of the draws.
        numbers: (B,) int64, numbers of examples.
        below: how many values there are.

    Returns:
        (B,) int64, by SplitMix64 (Steele et al., 2014) as a hash.
    """
    key = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)
    with np.errstate(over="ignore"):
        z = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + key
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return ((z >> np.uint64(11)) % np.uint64(below)).astype(np.int64)
