"""Loaders: training resumes at the next example, evaluation reads every example once."""

import gc
import os
import signal
import weakref
from itertools import islice, pairwise
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from datamodules.loading.loader import SKIPPED, EvaluationLoader, TrainLoader
from datamodules.loading.order import (
    NO_EPOCH,
    SHARD_BITS,
    Address,
    EpochPlan,
    Remainder,
    StreamPlan,
    epoch_order,
    evaluation_batches,
)
from datamodules.storage.bad_examples import Skipped, Tally
from tests.datamodules.loading.test_order import CASES
from tests.datamodules.shard_files import Numbers

# PyTorch warns about more worker processes than cores.
pytestmark = pytest.mark.filterwarnings("ignore:.*worker processes in total.*")

Batches = list[list[tuple[int, int]]]
"""(number, epoch) of each example of each batch."""


def loader(
    count: int = 22,
    batch_size: int = 3,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    seed: int = 5,
    remainder: Remainder = "keep",
) -> TrainLoader:
    return TrainLoader(Numbers(count), EpochPlan(count, batch_size, seed, rank, world_size, remainder), num_workers)


def evaluation(
    count: int, batch_size: int, rank: int = 0, world_size: int = 1, num_workers: int = 0
) -> EvaluationLoader:
    return EvaluationLoader(Numbers(count), evaluation_batches(range(rank, count, world_size), batch_size), num_workers)


def take(source: TrainLoader | EvaluationLoader, batches: int | None = None) -> Batches:
    """The next batches of an iteration; all for None."""
    return [list(zip(*(part.tolist() for part in batch), strict=True)) for batch in islice(source, batches)]


def numbers(batches: Batches) -> list[int]:
    return [number for batch in batches for number, _ in batch]


def test_epoch_holds_every_example_once_and_ranks_are_disjoint() -> None:
    for case in CASES:
        count, batch_size, world_size = case
        ranks = [loader(count, batch_size, rank, world_size) for rank in range(world_size)]
        epochs = [[take(rank) for rank in ranks] for _ in range(3)]
        for epoch, batches in enumerate(epochs):
            assert [len(share) for share in batches] == [len(rank) for rank in ranks], case
            assert len({len(rank) for rank in ranks}) == 1, case
            assert {asked_for for share in batches for batch in share for _, asked_for in batch} == {epoch}, case
            assert sorted(number for share in batches for number in numbers(share)) == list(range(count)), case
        orders = [[numbers(share) for share in batches] for batches in epochs]
        assert count < 10 or all(a != b for a, b in pairwise(orders)), case


def test_order_depends_on_seed_and_epoch() -> None:
    source = loader(seed=8)
    for epoch in range(3):
        assert numbers(take(source)) == epoch_order(22, 8, epoch).tolist()


@pytest.mark.parametrize(("done", "num_workers"), [(0, 0), (1, 0), (4, 0), (7, 0), (4, 2)])
def test_stopped_epoch_resumes_with_exactly_its_rest(done: int, num_workers: int) -> None:
    uninterrupted = loader()
    expected = [take(uninterrupted) for _ in range(3)]
    stopped = loader(num_workers=num_workers)
    take(stopped)
    before = take(stopped, done)
    resumed = loader(num_workers=num_workers)
    resumed.load_state_dict(stopped.state_dict())
    # Before the first batch, the position is the end of the previous epoch.
    assert before + take(resumed) == expected[1]
    assert take(resumed) == expected[2]


@pytest.mark.parametrize(
    ("ranks_before", "ranks_after", "done"), [(1, 2, 3), (2, 1, 1), (2, 3, 2), (4, 2, 3), (3, 4, 1), (3, 4, 2)]
)
def test_stopped_epoch_resumes_on_another_number_of_ranks(ranks_before: int, ranks_after: int, done: int) -> None:
    count = 61
    stopped = [loader(count, 4, rank, ranks_before) for rank in range(ranks_before)]
    before = [number for rank in stopped for number in numbers(take(rank, done))]
    states = [rank.state_dict() for rank in stopped]
    assert states == [{"epoch": 0, "consumed": len(before)}] * ranks_before
    resumed = [loader(count, 5, rank, ranks_after) for rank in range(ranks_after)]
    for rank in resumed:
        rank.load_state_dict(states[0])
    shares = [take(rank) for rank in resumed]
    assert sorted([*before, *(number for share in shares for number in numbers(share))]) == list(range(count))
    assert len({len(share) for share in shares}) == 1
    assert {epoch for share in shares for batch in share for _, epoch in batch} == {0}
    assert {epoch for rank in resumed for batch in take(rank) for _, epoch in batch} == {1}
    assert [rank.state_dict() for rank in resumed] == [{"epoch": 1, "consumed": count}] * ranks_after


@pytest.mark.parametrize("remainder", ["drop", "repeat"])
@pytest.mark.parametrize(("count", "batch_size", "world_size"), [(22, 3, 1), (22, 3, 2), (24, 3, 2), (7, 3, 2)])
def test_epoch_is_over_after_its_last_batch_with_any_remainder(
    count: int, batch_size: int, world_size: int, remainder: Remainder
) -> None:
    for rank in range(world_size):
        source = loader(count, batch_size, rank, world_size, remainder=remainder)
        # Like Lightning, request no batch after the last.
        assert len(take(source, len(source))) == len(source)
        assert source.state_dict() == {"epoch": 0, "consumed": count}
        restored = loader(count, batch_size, rank, world_size, remainder=remainder)
        restored.load_state_dict(source.state_dict())
        assert {epoch for batch in take(restored) for _, epoch in batch} == {1}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_position_counts_examples_handed_out_and_not_prefetched(num_workers: int) -> None:
    source = loader(num_workers=num_workers)
    batches = iter(source)
    for handed_out in range(1, 4):
        next(batches)
        assert source.state_dict() == {"epoch": 0, "consumed": 3 * handed_out}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unused_iterator_does_not_move_the_position(num_workers: int) -> None:
    source = loader(num_workers=num_workers)
    start = source.state_dict()
    iter(source)
    assert source.state_dict() == start
    assert numbers(take(source)) == epoch_order(22, 5, 0).tolist()
    restored = loader()
    restored.load_state_dict({"epoch": 1, "consumed": 6})
    iter(restored)
    assert restored.state_dict() == {"epoch": 1, "consumed": 6}
    assert numbers(take(restored)) == epoch_order(22, 5, 1).tolist()[6:]


def test_position_of_an_unused_loader_restores_to_the_first_epoch() -> None:
    source = loader()
    source.load_state_dict(loader().state_dict())
    assert numbers(take(source)) == epoch_order(22, 5, 0).tolist()


def test_after_a_whole_epoch_the_next_one_starts_also_after_restore() -> None:
    for case in CASES:
        count, batch_size, world_size = case
        uninterrupted = loader(count, batch_size, 0, world_size)
        # Like Lightning, request no batch after the last.
        assert len(take(uninterrupted, len(uninterrupted))) == len(uninterrupted), case
        restored = loader(count, batch_size, 0, world_size)
        restored.load_state_dict(uninterrupted.state_dict())
        expected = take(uninterrupted)
        assert {epoch for batch in expected for _, epoch in batch} == {1}, case
        assert take(restored) == expected, case


def test_epoch_that_dropped_examples_is_over_on_any_number_of_ranks() -> None:
    source = loader(10, 1, 0, world_size=4, remainder="drop")
    take(source, len(source))
    alone = loader(10, 1)
    alone.load_state_dict(source.state_dict())
    assert {epoch for batch in take(alone) for _, epoch in batch} == {1}


def test_remainder_too_small_for_the_ranks_is_dropped_on_request() -> None:
    source = loader(10, 1)
    take(source, 8)
    for rank in range(4):
        resumed = loader(10, 1, rank, world_size=4, remainder="drop")
        resumed.load_state_dict(source.state_dict())
        assert resumed.batches_left() == 0
        assert {epoch for batch in take(resumed) for _, epoch in batch} == {1}


def test_remainder_too_small_for_the_ranks_is_filled_up() -> None:
    order = epoch_order(10, 5, 0).tolist()
    source = loader(10, 1)
    take(source, 8)
    for rank, number in enumerate([order[8], order[9], order[0], order[1]]):
        resumed = loader(10, 1, rank, world_size=4)
        resumed.load_state_dict(source.state_dict())
        assert take(resumed) == [[(number, 0)]]
        assert resumed.state_dict() == {"epoch": 0, "consumed": 10}
        assert {epoch for batch in take(resumed) for _, epoch in batch} == {1}


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (2, 0), (1, 2)])
def test_stream_resumes_at_the_next_example(world_size: int, num_workers: int) -> None:
    for rank in range(world_size):
        plan = StreamPlan(9, 4, 40, 3, 5, rank, world_size)
        uninterrupted = TrainLoader(Numbers(0), plan, 0)
        expected = [take(uninterrupted) for _ in range(3)]
        assert expected[1] != [[(number, 1) for number, _ in batch] for batch in expected[0]]
        stopped = TrainLoader(Numbers(0), plan, num_workers)
        assert take(stopped) == expected[0]
        before = take(stopped, 4)
        assert stopped.state_dict() == {"epoch": 1, "consumed": 12 * world_size}
        resumed = TrainLoader(Numbers(0), StreamPlan(9, 4, 40, 3, 5, rank, world_size), num_workers)
        resumed.load_state_dict(stopped.state_dict())
        assert before + take(resumed) == expected[1]
        assert take(resumed) == expected[2]
        assert all(0 <= number >> SHARD_BITS < 9 for batch in expected[0] for number, _ in batch)


def test_length_is_that_of_a_whole_epoch_after_restore() -> None:
    source = loader()
    assert len(source) == 8
    assert source.batches_left() == 8
    source.load_state_dict({"epoch": 0, "consumed": 12})
    assert len(source) == 8
    assert source.batches_left() == 4
    take(source, 1)
    assert source.batches_left() == 3


def test_unreferenced_loader_is_freed_without_the_garbage_collector() -> None:
    # The collector closes the workers' queues before it asks them to exit, and then waits five seconds for each.
    source = loader()
    take(source, 2)
    freed = weakref.ref(source)
    gc.disable()
    try:
        del source
        assert freed() is None
    finally:
        gc.enable()


class Counting(pl.LightningModule):
    """A module with one unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.number = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.number * batch[0].sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_fit_stopped_within_an_epoch_ends_its_workers(tmp_path: Path) -> None:
    before = set(active_children())
    source = loader(num_workers=2)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Counting(), source)
    assert source.state_dict() == {"epoch": 0, "consumed": 6}
    assert set(active_children()) == before


def test_evaluation_sees_every_example_once_in_order() -> None:
    for case in [*((*case, 0) for case in CASES), (2, 4, 3, 0), (11, 2, 2, 2)]:
        count, batch_size, world_size, num_workers = case
        seen = []
        for rank in range(world_size):
            source = evaluation(count, batch_size, rank, world_size, num_workers)
            batches = take(source)
            assert len(batches) == len(source), case
            assert numbers(batches) == list(range(rank, count, world_size)), case
            assert {epoch for batch in batches for _, epoch in batch} <= {NO_EPOCH}, case
            assert all(len(batch) == batch_size for batch in batches[:-1]), case
            assert take(source) == batches, case
            seen += numbers(batches)
        assert sorted(seen) == list(range(count)), case


def test_ranks_may_have_unequal_numbers_of_evaluation_batches() -> None:
    ranks = [evaluation(5, 2, rank, world_size=2) for rank in range(2)]
    assert [len(rank) for rank in ranks] == [2, 1]
    assert [[numbers([batch]) for batch in take(rank)] for rank in ranks] == [[[0, 2], [4]], [[1, 3]]]


def test_evaluation_reads_the_given_batches() -> None:
    batches = [[(5, NO_EPOCH)], [(2, NO_EPOCH), (9, NO_EPOCH)], [(2, NO_EPOCH)]]
    assert take(EvaluationLoader(Numbers(10), batches, 0)) == batches


class Leaky(Dataset[Any]):
    """Dataset that returns whole batches like ExampleDataset; examples with numbers divisible by ``divisor`` are
    bad.
    """

    def __init__(self, divisor: int) -> None:
        self.divisor = divisor

    def __len__(self) -> int:
        return 20

    def __getitem__(self, address: Address) -> Any:
        raise AssertionError("examples are requested in batches")

    def __getitems__(self, addresses: list[Address]) -> dict[str, Any]:
        good = [number for number, _ in addresses if number % self.divisor]
        bad = [Skipped(number, str(number), "empty file", "") for number, _ in addresses if number % self.divisor == 0]
        batch = {"numbers": torch.tensor(good)} if good else {}
        return {**batch, SKIPPED: (bad, 0)} if bad else batch


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skipped_examples_are_counted_and_removed_from_the_batch(num_workers: int) -> None:
    tally = Tally("train", 20, max_share=1.0, keep=True)
    source = TrainLoader(Leaky(4), EpochPlan(20, 3, 5), num_workers, tally=tally)
    batches = list(source)
    assert all(batch.keys() == {"numbers"} for batch in batches)
    seen = [number for batch in batches for number in batch["numbers"].tolist()]
    assert seen == [number for number in epoch_order(20, 5, 0).tolist() if number % 4]
    assert tally.counts == {"empty file": 5}
    assert {example.number for example in tally.skipped} == {0, 4, 8, 12, 16}


def test_batch_of_bad_examples_is_skipped_and_advances_the_position() -> None:
    tally = Tally("train", 20, max_share=1.0)
    source = TrainLoader(Leaky(2), EpochPlan(20, 1, 5), 0, tally=tally)
    order = epoch_order(20, 5, 0).tolist()
    batches = iter(source)
    for place, number in enumerate(order, start=1):
        if number % 2:
            assert next(batches)["numbers"].tolist() == [number]
            assert source.state_dict() == {"epoch": 0, "consumed": place}
    assert next(batches, None) is None
    assert source.state_dict() == {"epoch": 0, "consumed": 20}
    assert tally.counts == {"empty file": 10}


def test_each_evaluation_resets_the_skipped_counts() -> None:
    tally = Tally("val", 20, max_share=0.3)
    source = EvaluationLoader(Leaky(4), evaluation_batches(np.arange(20), 3), 0, tally=tally)
    for _ in range(3):
        assert [number for batch in source for number in batch["numbers"].tolist()] == [
            number for number in range(20) if number % 4
        ]
        assert tally.counts == {"empty file": 5}


@pytest.mark.parametrize("loader_of", ["training", "evaluation"])
def test_too_many_bad_examples_end_the_run(loader_of: str) -> None:
    tally = Tally(loader_of, 20, max_share=0.2)
    source: Any = TrainLoader(Leaky(4), EpochPlan(20, 1, 5), 0, tally=tally)
    if loader_of == "evaluation":
        source = EvaluationLoader(Leaky(4), evaluation_batches(range(20), 1), 0, tally=tally)
    with pytest.raises(ValueError, match=rf"5 of 20 examples of {loader_of} are bad"):
        list(source)
    assert tally.counts == {"empty file": 5}


def test_skipped_examples_are_removed_without_a_tally() -> None:
    assert all(batch.keys() == {"numbers"} for batch in TrainLoader(Leaky(4), EpochPlan(20, 4, 5), 0))


class Signalled(Dataset[Any]):
    """Dataset that sends signals to its process while reading."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, address: Any) -> int:
        for number in (signal.SIGINT, signal.SIGTERM) if address[0] == 0 else (signal.SIGINT,):
            os.kill(os.getpid(), number)
        return int(address[0])


def test_workers_survive_signals_while_the_run_finishes_its_step() -> None:
    loader = EvaluationLoader(Signalled(), [[(0, 0)], [(1, 0)], [(2, 0)], [(3, 0)]], num_workers=1)
    assert [batch.item() for batch in loader] == [0, 1, 2, 3]
