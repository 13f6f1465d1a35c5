"""Batches from worker processes: training in a planned order with a place to return to, evaluation in order."""

import signal
from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset, default_collate

from datamodules.loading.order import NO_EPOCH, Address, Plan
from datamodules.storage.bad_examples import Tally

SKIPPED = "skipped"
"""Entry of a dataset's batch: arguments of :meth:`~datamodules.storage.bad_examples.Tally.add`. A batch of which
nothing could be used has no other entry."""


class TrainLoader:
    """An endless supply of epochs whose place can be saved and restored.

    Each iteration is one epoch; the first one after :meth:`load_state_dict` is the rest of the saved epoch. The place
    counts examples as they are handed out and not as workers prefetch them, so it is right for any number of workers.

    Args:
        dataset: maps an :data:`~datamodules.loading.order.Address` to an example; or a list of them to a batch, by
            ``__getitems__``, which then says under :data:`SKIPPED` what could not be used.
        plan: order of the examples.
        num_workers: processes that prepare batches; 0 for none.
        pin_memory: prepare batches in pinned memory, for a GPU.
        tally: counts what could not be used.
    """

    def __init__(
        self, dataset: Dataset[Any], plan: Plan, num_workers: int, pin_memory: bool = False, tally: Tally | None = None
    ) -> None:
        self.plan, self.tally = plan, tally
        self._place = _Place(plan)
        self._resume = False
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=self._place,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
            collate_fn=_collate_of(dataset),
            worker_init_fn=_leave_signals_to_the_run,
        )

    def __len__(self) -> int:
        """Batches of a whole epoch, the same on every rank."""
        return len(self.plan.ends(0))

    def __iter__(self) -> Iterator[Any]:
        """The batches of the next epoch, or of the rest of a restored one."""
        # A generator: the place moves when the first batch is asked for, so an iterator that nobody uses costs nothing.
        place = self._place
        if not (self._resume and self.batches_left()):
            place.epoch, place.consumed = place.epoch + 1, 0
        self._resume = False
        ends = self.plan.ends(place.consumed).tolist()
        ends[-1] = self.plan.count  # where examples are left out, the epoch is over all the same
        for end, batch in zip(ends, self._loader, strict=True):
            place.consumed = end
            if usable(batch, self.tally):
                yield batch

    def batches_left(self) -> int:
        """Batches until the end of the epoch, from the current or restored place."""
        return len(self.plan.ends(self._place.consumed))

    # Lightning ends the workers of a DataLoader at the end of a fit by way of this attribute.
    @property
    def _iterator(self) -> Any:
        return self._loader._iterator

    @_iterator.setter
    def _iterator(self, value: None) -> None:
        self._loader._iterator = value

    def state_dict(self) -> dict[str, int]:
        """Place: epoch, and examples of it that all ranks together have consumed."""
        return {"epoch": self._place.epoch, "consumed": self._place.consumed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on at a saved place with the next iteration."""
        self._place.epoch, self._place.consumed = state["epoch"], state["consumed"]
        self._resume = state["epoch"] >= 0


class _Place:
    """A place, and what is left of its epoch, as addresses; read anew at each iteration.

    It does not know the loader: in a cycle of references the garbage collector closes the queues of the workers before
    they are told to end, and then waits for each of them for five seconds.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.epoch, self.consumed = -1, 0

    def __iter__(self) -> Iterator[list[Address]]:
        return self.plan.batches(self.epoch, self.consumed)


class EvaluationLoader:
    """Given batches, in order.

    Ranks may have unequal numbers of them; where a step waits for other ranks, they are shared out equally. Like
    :class:`TrainLoader` it is no DataLoader: Lightning would share out its examples a second time.

    Args:
        dataset: as in :class:`TrainLoader`.
        batches: addresses of the examples of each batch of this rank.
        num_workers: processes that prepare batches; 0 for none.
        pin_memory: prepare batches in pinned memory, for a GPU.
        tally: counts what could not be used.
        never_empty: where nothing can be used, give one example of another rank. For validation, where ranks wait for
            each other's metrics.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batches: Sequence[list[Address]],
        num_workers: int,
        pin_memory: bool = False,
        tally: Tally | None = None,
        never_empty: bool = False,
    ) -> None:
        self.tally, self.never_empty = tally, never_empty
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=num_workers,
            pin_memory=pin_memory,
            collate_fn=_collate_of(dataset),
            worker_init_fn=_leave_signals_to_the_run,
        )

    def __len__(self) -> int:
        """Batches of this rank, those of which nothing can be used included."""
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        """The batches, from the first."""
        if self.tally is not None:
            self.tally.reset()
        empty = True
        for batch in self._loader:
            if usable(batch, self.tally):
                empty = False
                yield batch
        if empty and self.never_empty and len(self):
            yield self._stand_in()

    def _stand_in(self) -> Any:
        """A batch of one example of the set, whichever can be used."""
        for number in range(len(self._loader.dataset)):  # type: ignore[arg-type]
            batch = self._loader.dataset.__getitems__([(number, NO_EPOCH)])  # type: ignore[attr-defined]
            if usable(batch, None):
                return batch
        raise ValueError("none of the examples can be used; look at the data with `python -m datamodules.inspection`")


def ranks_wait(trainer: Any) -> bool:
    """Whether ranks wait for each other in each step of an evaluation, because none has the whole model.

    Args:
        trainer: Lightning's, or None.
    """
    return getattr(getattr(trainer, "lightning_module", None), "device_mesh", None) is not None


def usable(batch: Any, tally: Tally | None) -> bool:
    """Take the entry :data:`SKIPPED` out of a batch and count it; whether anything is left of the batch."""
    if not isinstance(batch, dict):
        return True
    skipped, opened = batch.pop(SKIPPED, ((), 0))
    if skipped and tally is not None:
        tally.add(skipped, opened)
    return bool(batch)


def _leave_signals_to_the_run(worker: int) -> None:
    """Let a worker live on after Ctrl-C, or a SIGTERM to all processes of a job: the run finishes its step first.

    The second SIGTERM ends it, as that of a run that waits for its workers no longer.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))


def _collate_of(dataset: Any) -> Any:
    return _as_it_is if hasattr(dataset, "__getitems__") else default_collate


def _as_it_is(batch: Any) -> Any:
    return batch
