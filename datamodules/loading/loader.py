"""Loaders that prepare batches in worker processes: resumable for training, sequential for evaluation."""

import signal
from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset, default_collate

from datamodules.loading.order import NO_EPOCH, Address, Plan
from datamodules.storage.bad_examples import Tally

SKIPPED = "skipped"
"""Entry of a batch with the arguments of :meth:`~datamodules.storage.bad_examples.Tally.add`. If all examples of a
batch are bad, it is the only entry."""


class TrainLoader:
    """Endless loader of training epochs whose position can be saved and restored.

    Each iteration is one epoch. The first iteration after :meth:`load_state_dict` is the rest of the saved epoch. The
    position counts examples when they are handed out, not when workers prefetch them, so it is exact for any number of
    workers.

    Args:
        dataset: maps an :data:`~datamodules.loading.order.Address` to an example, or, with ``__getitems__``, a list of
            addresses to a batch with bad examples under :data:`SKIPPED`.
        plan: order of the examples.
        num_workers: worker processes that prepare batches; 0 prepares them in the main process.
        pin_memory: prepare batches in pinned memory, for a GPU.
        tally: counts bad examples.
    """

    def __init__(
        self, dataset: Dataset[Any], plan: Plan, num_workers: int, pin_memory: bool = False, tally: Tally | None = None
    ) -> None:
        self.plan, self.tally = plan, tally
        self._position = _Position(plan)
        self._resume = False
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=self._position,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
            collate_fn=_collate_of(dataset),
            worker_init_fn=_leave_signals_to_the_run,
        )

    def __len__(self) -> int:
        """Number of batches in a whole epoch, the same on every rank."""
        return len(self.plan.ends(0))

    def __iter__(self) -> Iterator[Any]:
        """Batches of the next epoch, or the rest of a restored epoch."""
        # As a generator it moves the position only at the first batch. Lightning creates iterators that it never uses.
        position = self._position
        if not (self._resume and self.batches_left()):
            position.epoch, position.consumed = position.epoch + 1, 0
        self._resume = False
        ends = self.plan.ends(position.consumed).tolist()
        ends[-1] = self.plan.count  # with remainder `drop` the epoch also ends here
        for end, batch in zip(ends, self._loader, strict=True):
            position.consumed = end
            if take_skipped(batch, self.tally):
                yield batch

    def batches_left(self) -> int:
        """Number of batches from the current or restored position to the end of the epoch."""
        return len(self.plan.ends(self._position.consumed))

    # Lightning shuts down the workers at the end of a fit through this attribute of a DataLoader.
    @property
    def _iterator(self) -> Any:
        return self._loader._iterator

    @_iterator.setter
    def _iterator(self, value: None) -> None:
        self._loader._iterator = value

    def state_dict(self) -> dict[str, int]:
        """Position: the epoch, and the number of its examples that all ranks together have consumed."""
        return {"epoch": self._position.epoch, "consumed": self._position.consumed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume from a saved position with the next iteration."""
        self._position.epoch, self._position.consumed = state["epoch"], state["consumed"]
        self._resume = state["epoch"] >= 0


class _Position:
    """Position in an epoch; iterating gives the remaining batches as addresses.

    footgun: it must not refer to the loader. In a reference cycle the garbage collector closes the queues before the
    workers are asked to exit, and then waits five seconds for each worker.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.epoch, self.consumed = -1, 0

    def __iter__(self) -> Iterator[list[Address]]:
        return self.plan.batches(self.epoch, self.consumed)


class EvaluationLoader:
    """Loader that reads given batches in order.

    Ranks may have different numbers of batches, unless ranks wait for each other in each step. Like
    :class:`TrainLoader` it is not a DataLoader, because Lightning would distribute its examples a second time.

    Args:
        dataset: as in :class:`TrainLoader`.
        batches: addresses of the examples in each batch of this rank.
        num_workers: worker processes that prepare batches; 0 prepares them in the main process.
        pin_memory: prepare batches in pinned memory, for a GPU.
        tally: counts bad examples.
        never_empty: if all examples of this rank are bad, yield a batch with one example of another rank. Needed in
            validation, where ranks wait for each other's metrics.
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
        """Number of batches of this rank, including those with bad examples only."""
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        """All batches, from the first."""
        if self.tally is not None:
            self.tally.reset()
        empty = True
        for batch in self._loader:
            if take_skipped(batch, self.tally):
                empty = False
                yield batch
        if empty and self.never_empty and len(self):
            yield self._substitute()

    def _substitute(self) -> Any:
        """A batch of one example, the first usable one of the dataset."""
        for number in range(len(self._loader.dataset)):  # type: ignore[arg-type]
            batch = self._loader.dataset.__getitems__([(number, NO_EPOCH)])  # type: ignore[attr-defined]
            if take_skipped(batch, None):
                return batch
        raise ValueError("all examples are bad; check the data with `python -m datamodules.inspection`")


def ranks_wait(trainer: Any) -> bool:
    """Whether ranks wait for each other in each evaluation step, because the model is sharded over them.

    Args:
        trainer: Lightning's trainer, or None.
    """
    return getattr(getattr(trainer, "lightning_module", None), "device_mesh", None) is not None


def take_skipped(batch: Any, tally: Tally | None) -> bool:
    """Remove the entry :data:`SKIPPED` from a batch and count it. Returns whether the batch has examples left."""
    if not isinstance(batch, dict):
        return True
    skipped, opened = batch.pop(SKIPPED, ((), 0))
    if skipped and tally is not None:
        tally.add(skipped, opened)
    return bool(batch)


def _leave_signals_to_the_run(worker: int) -> None:
    """Keep a worker alive after Ctrl-C or a first SIGTERM to all processes of a job, so that the run finishes its step.

    A second SIGTERM ends the worker. The main process sends it when it no longer waits for its workers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))


def _collate_of(dataset: Any) -> Any:
    return _unchanged if hasattr(dataset, "__getitems__") else default_collate


def _unchanged(batch: Any) -> Any:
    return batch
