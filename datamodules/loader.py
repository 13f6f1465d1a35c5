"""Training batches in a reproducible order, from the very sample at which a run was stopped."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset

from datamodules.order import count_batches, epoch_order, share_out

Address = tuple[int, int]
"""A sample as a dataset is asked for it: its number and the epoch, which together decide its augmentation."""

NO_EPOCH = -1
"""In place of the epoch: the sample as it is, without anything random."""


class TrainLoader:
    """An endless supply of epochs whose place can be saved and restored.

    Each iteration is one epoch; the first one after :meth:`load_state_dict` is the rest of the saved epoch. The place
    is counted in samples over all ranks, as they are handed out and not as workers prefetch them, so it is right for
    any number of workers and can be shared out anew over another number of ranks.

    Args:
        dataset: maps an :data:`Address` to a sample, and has a length.
        batch_size: samples a rank and batch.
        num_workers: processes that prepare batches; 0 for none.
        seed: decides the order of each epoch.
        rank: this rank.
        world_size: number of ranks.
        pin_memory: prepare batches in pinned memory, for a GPU.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        num_workers: int,
        seed: int,
        rank: int,
        world_size: int,
        pin_memory: bool,
    ) -> None:
        self.count = len(dataset)  # type: ignore[arg-type]
        self.batch_size, self.world_size = batch_size, world_size
        self._order = _Remaining(self.count, batch_size, seed, rank, world_size)
        self._resume = False
        if len(self) == 0:
            raise ValueError(f"{self.count} training samples cannot be shared out over {world_size} ranks; use fewer")
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=self._order,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
        )

    def __len__(self) -> int:
        """Batches of a whole epoch, the same on every rank."""
        return count_batches(self.count, self.batch_size, self.world_size)

    def __iter__(self) -> Iterator[Any]:
        """The batches of the next epoch, or of the rest of a restored one."""
        # A generator: the place moves when the first batch is asked for, so an iterator that nobody uses costs nothing.
        place = self._order
        if not (self._resume and self._left() >= self.world_size):
            place.epoch, place.consumed = place.epoch + 1, 0
        self._resume = False
        for batch in self._loader:
            place.consumed += self.batch_size * self.world_size
            if self._left() < self.world_size:  # these are left out: the epoch is over
                place.consumed = self.count
            yield batch

    # Lightning ends the workers of a DataLoader at the end of a fit by way of this attribute.
    @property
    def _iterator(self) -> Any:
        return self._loader._iterator

    @_iterator.setter
    def _iterator(self, value: None) -> None:
        self._loader._iterator = value

    def _left(self) -> int:
        return self.count - self._order.consumed

    def state_dict(self) -> dict[str, int]:
        """Place: epoch, and samples of it that all ranks together have consumed."""
        return {"epoch": self._order.epoch, "consumed": self._order.consumed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on at a saved place with the next iteration."""
        self._order.epoch, self._order.consumed = state["epoch"], state["consumed"]
        self._resume = state["epoch"] >= 0


class _Remaining:
    """A place, and what is left of its epoch, as addresses; read anew at each iteration.

    It does not know the loader: in a cycle of references the garbage collector closes the queues of the workers before
    they are told to end, and then waits for each of them for five seconds.
    """

    def __init__(self, count: int, batch_size: int, seed: int, rank: int, world_size: int) -> None:
        self.count, self.seed, self.share = count, seed, (batch_size, rank, world_size)
        self.epoch, self.consumed = -1, 0

    def __iter__(self) -> Iterator[list[Address]]:
        epoch = self.epoch
        for batch in share_out(epoch_order(self.count, self.seed, epoch), self.consumed, *self.share):
            yield [(int(number), epoch) for number in batch]


class EvaluationLoader:
    """Every sample once, as it is, in order: rank r takes the samples r, r + world_size, … and nobody gets one twice.

    Ranks may have unequal numbers of batches, so nothing in a step may wait for another rank. Like :class:`TrainLoader`
    it is no DataLoader: Lightning would share out its samples a second time.

    Args:
        dataset: maps an :data:`Address` to a sample, and has a length.
        batch_size: samples a rank and batch.
        num_workers: processes that prepare batches; 0 for none.
        rank: this rank.
        world_size: number of ranks.
        pin_memory: prepare batches in pinned memory, for a GPU.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        num_workers: int,
        rank: int,
        world_size: int,
        pin_memory: bool,
    ) -> None:
        numbers = range(rank, len(dataset), world_size)  # type: ignore[arg-type]
        batches = [
            [(number, NO_EPOCH) for number in numbers[first : first + batch_size]]
            for first in range(0, len(numbers), batch_size)
        ]
        self._loader: DataLoader[Any] = DataLoader(
            dataset, batch_sampler=batches, num_workers=num_workers, pin_memory=pin_memory
        )

    def __len__(self) -> int:
        """Batches of this rank."""
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        """The batches, from the first."""
        return iter(self._loader)
