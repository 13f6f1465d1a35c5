"""Order of the examples: a pure function of seed and epoch, distributed over ranks and resumable.

The examples of an epoch are split into global batches, and each rank reads its share of each batch. The position in an
epoch is the number of examples that all ranks together have consumed. It does not depend on ranks and workers, so the
rest of an epoch can be distributed over another number of them.
"""

from collections.abc import Iterator
from math import ceil
from typing import Literal, Protocol

import numpy as np

Address = tuple[int, int]
"""Index into a dataset: example number and epoch, which together determine the augmentation."""

NO_EPOCH = -1
"""Epoch of an address that requests an example without augmentation."""

Remainder = Literal["keep", "drop", "repeat"]

SHARD_BITS = 40
"""The number of an example in a stream is shard · 2⁴⁰ + position in the shard."""

SHARDS_PER_SHUFFLE = 8
"""Shards whose examples are shuffled together in a stream."""


class Plan(Protocol):
    """The order of an epoch, for one rank.

    Attributes:
        count: examples of an epoch, over all ranks.
    """

    count: int

    def ends(self, consumed: int) -> np.ndarray:
        """Position after each remaining batch of an epoch: examples that all ranks together have consumed."""

    def batches(self, epoch: int, consumed: int) -> Iterator[list[Address]]:
        """Remaining batches of an epoch for this rank."""


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Permutation of ``count`` examples for an epoch, (count,) int64, the same on every rank."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def batch_ends(count: int, start: int, batch_size: int, world_size: int, remainder: Remainder) -> np.ndarray:
    """Ends of the remaining global batches of an epoch, the same on every rank.

    Args:
        count: examples of the whole epoch.
        start: examples that all ranks together have consumed.
        batch_size: examples per batch and rank.
        world_size: number of ranks.
        remainder: what to do with the examples that do not fill a global batch. ``keep`` reads each of them once, in a
            smaller last batch, or, if there are fewer than ranks, as part of the previous batch. ``drop`` leaves them
            out. ``repeat`` fills the batch with the first examples of the epoch.

    Returns:
        (batches,) int64. An end beyond ``count`` means examples from the start of the epoch.
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
    return np.array([start + world_size], np.int64)  # fewer examples than ranks: repeat some, so that no rank waits


class EpochPlan:
    """Plan that reads every example once per epoch, shuffled over the whole dataset.

    Args:
        count: examples of the dataset.
        batch_size: examples per batch and rank.
        seed: seed of the order.
        rank: this rank.
        world_size: number of ranks.
        remainder: see :func:`batch_ends`.

    Raises:
        ValueError: if there are too few examples for a batch on every rank.
    """

    def __init__(
        self, count: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, remainder: Remainder = "keep"
    ) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.rank, self.world_size, self.remainder = rank, world_size, remainder
        if count < world_size or not len(self.ends(0)):
            raise ValueError(
                f"{count} training examples cannot be distributed over {world_size} ranks with batch_size {batch_size} "
                f"and remainder {remainder}; use fewer ranks or a smaller batch"
            )

    def ends(self, consumed: int) -> np.ndarray:
        """Position after each remaining batch of an epoch: examples that all ranks together have consumed."""
        return batch_ends(self.count, consumed, self.batch_size, self.world_size, self.remainder)

    def batches(self, epoch: int, consumed: int) -> Iterator[list[Address]]:
        """Remaining batches of an epoch for this rank."""
        order = epoch_order(self.count, self.seed, epoch)
        for end in self.ends(consumed).tolist():
            share = order.take(range(consumed + self.rank, end, self.world_size), mode="wrap")
            yield [(number, epoch) for number in share.tolist()]
            consumed = end


class StreamPlan:
    """Plan that samples shards with replacement, for datasets too large to shuffle or to index.

    From each sampled shard it reads ``examples_per_shard`` consecutive examples from a random start, wrapping around at
    the end of the shard. The examples of eight shards are shuffled together. Each rank samples its own shards, as a
    pure function of seed, epoch, rank and number of ranks. An epoch is just a number of examples, after which
    validation can run.

    Args:
        shards: number of shards.
        examples_per_shard: examples read from each sampled shard.
        count: examples of an epoch, over all ranks; rounded down to whole global batches.
        batch_size: examples per batch and rank.
        seed: seed of the sampling.
        rank: this rank.
        world_size: number of ranks.

    Raises:
        ValueError: if ``count`` is less than one global batch.
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
        """Position after each remaining batch of an epoch: examples that all ranks together have consumed."""
        return batch_ends(self.count, consumed, self.batch_size, self.world_size, "drop")

    def batches(self, epoch: int, consumed: int) -> Iterator[list[Address]]:
        """Remaining batches of an epoch for this rank."""
        size = SHARDS_PER_SHUFFLE * self.examples_per_shard
        buffer: list[int] = []
        group, skip = divmod(consumed // self.world_size, size)
        for _ in self.ends(consumed):
            while len(buffer) < self.batch_size:
                buffer += self._group(epoch, group)[skip:]
                group, skip = group + 1, 0
            batch, buffer = buffer[: self.batch_size], buffer[self.batch_size :]
            yield [(number, epoch) for number in batch]

    def _group(self, epoch: int, group: int) -> list[int]:
        generator = np.random.default_rng([self.seed, epoch, self.world_size, self.rank, group])
        shards = generator.integers(self.shards, size=(SHARDS_PER_SHUFFLE, 1))
        first = generator.integers(1 << 31, size=(SHARDS_PER_SHUFFLE, 1))
        numbers = (shards << SHARD_BITS) + first + np.arange(self.examples_per_shard)
        order: list[int] = generator.permutation(numbers.flatten()).tolist()
        return order


def evaluation_batches(numbers: range | np.ndarray, batch_size: int) -> list[list[Address]]:
    """Addresses without augmentation, in order, in batches of at most ``batch_size``."""
    return [
        [(int(number), NO_EPOCH) for number in numbers[first : first + batch_size]]
        for first in range(0, len(numbers), batch_size)
    ]


def shared_batches(
    count: int, batch_size: int, rank: int, world_size: int, equally: bool = False
) -> list[list[Address]]:
    """Batches of a rank, which reads examples rank, rank + world_size, and so on.

    Args:
        count: examples of the dataset.
        batch_size: maximum number of examples in a batch.
        rank: this rank.
        world_size: number of ranks.
        equally: give all ranks the same number of batches, as required if ranks wait for each other in each batch. A
            rank with one example less may then get one of its batches split in two.

    Raises:
        ValueError: if ``equally`` is impossible.
    """
    batches = evaluation_batches(range(rank, count, world_size), batch_size)
    if not equally:
        return batches
    needed = ceil(ceil(count / world_size) / batch_size)
    if count // world_size < needed:
        raise ValueError(
            f"{count} examples in batches of {batch_size} cannot be distributed over {world_size} ranks that wait for "
            "each other, as ranks with sharded parameters do; use larger batches or fewer ranks"
        )
    if len(batches) < needed:
        longest = max(range(len(batches)), key=lambda position: len(batches[position]))
        half = len(batches[longest]) // 2
        batches[longest : longest + 1] = [batches[longest][:half], batches[longest][half:]]
    return batches


def random_integers(seed: int, epoch: int, numbers: np.ndarray, high: int) -> np.ndarray:
    """A random integer in [0, high) for each example: a pure function of seed, epoch and example number.

    Args:
        seed: seed of the run.
        epoch: epoch of the examples.
        numbers: numbers of the examples, (B,) int64.
        high: exclusive upper bound.

    Returns:
        (B,) int64, from SplitMix64 (Steele et al., 2014) used as a hash.
    """
    key = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)
    with np.errstate(over="ignore"):
        z = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + key
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return ((z >> np.uint64(11)) % np.uint64(high)).astype(np.int64)
