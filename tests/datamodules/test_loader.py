"""Training batches go on at the very sample; evaluation sees every sample once."""

import gc
import weakref
from itertools import islice, pairwise
from multiprocessing import active_children
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from datamodules.loader import NO_EPOCH, EvaluationLoader, TrainLoader
from datamodules.order import epoch_order
from tests.datamodules.shard_files import Numbers, assert_one_line
from tests.datamodules.test_order import CASES

# Torch advises against more worker processes than cores; the tests need two of them on one.
pytestmark = pytest.mark.filterwarnings("ignore:.*worker processes in total.*")

Batches = list[list[tuple[int, int]]]
"""(number, epoch) of each sample of each batch."""


def loader(
    count: int = 22, batch_size: int = 3, rank: int = 0, world_size: int = 1, num_workers: int = 0, seed: int = 5
) -> TrainLoader:
    return TrainLoader(Numbers(count), batch_size, num_workers, seed, rank, world_size, pin_memory=False)


def take(source: TrainLoader | EvaluationLoader, batches: int | None = None) -> Batches:
    """The next batches of an iteration, all if it is not said how many."""
    return [list(zip(*(part.tolist() for part in batch), strict=True)) for batch in islice(source, batches)]


def numbers(batches: Batches) -> list[int]:
    return [number for batch in batches for number, _ in batch]


@pytest.mark.parametrize(("count", "batch_size", "world_size"), CASES)
def test_an_epoch_holds_every_sample_once_and_ranks_are_disjoint(count: int, batch_size: int, world_size: int) -> None:
    ranks = [loader(count, batch_size, rank, world_size) for rank in range(world_size)]
    epochs = [[take(rank) for rank in ranks] for _ in range(3)]
    for epoch, batches in enumerate(epochs):
        assert [len(share) for share in batches] == [len(rank) for rank in ranks]
        assert len({len(rank) for rank in ranks}) == 1
        assert {asked_for for share in batches for batch in share for _, asked_for in batch} == {epoch}
        seen = [number for share in batches for number in numbers(share)]
        assert len(seen) == len(set(seen)) == count - count % world_size
    orders = [[numbers(share) for share in batches] for batches in epochs]
    assert count < 10 or all(a != b for a, b in pairwise(orders))


def test_the_order_is_that_of_seed_and_epoch() -> None:
    source = loader(seed=8)
    for epoch in range(3):
        assert numbers(take(source)) == epoch_order(22, 8, epoch).tolist()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("done", [0, 1, 4, 7])
def test_a_stopped_epoch_goes_on_with_exactly_its_rest(done: int, num_workers: int) -> None:
    uninterrupted = loader()
    expected = [take(uninterrupted) for _ in range(3)]
    stopped = loader(num_workers=num_workers)
    take(stopped)
    before = take(stopped, done)
    resumed = loader(num_workers=num_workers)
    resumed.load_state_dict(stopped.state_dict())
    # A place of no batches at all is the end of the epoch before.
    assert before + take(resumed) == expected[1]
    assert take(resumed) == expected[2]


@pytest.mark.parametrize(("ranks_before", "ranks_after"), [(1, 2), (2, 1), (2, 3), (4, 2), (3, 4)])
@pytest.mark.parametrize("done", [1, 2, 3])
def test_a_stopped_epoch_goes_on_over_another_number_of_ranks(ranks_before: int, ranks_after: int, done: int) -> None:
    count = 60
    stopped = [loader(count, 4, rank, ranks_before) for rank in range(ranks_before)]
    before = [number for rank in stopped for number in numbers(take(rank, done))]
    states = [rank.state_dict() for rank in stopped]
    assert states == [{"epoch": 0, "consumed": len(before)}] * ranks_before
    resumed = [loader(count, 5, rank, ranks_after) for rank in range(ranks_after)]
    for rank in resumed:
        rank.load_state_dict(states[0])
    after = [number for rank in resumed for number in numbers(take(rank))]
    assert len(set(before + after)) == len(before + after)
    assert count - len(before + after) == (count - len(before)) % ranks_after
    assert {epoch for rank in resumed for batch in take(rank) for _, epoch in batch} == {1}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_place_counts_what_was_handed_out_and_not_what_workers_prefetched(num_workers: int) -> None:
    source = loader(num_workers=num_workers)
    batches = iter(source)
    for handed_out in range(1, 4):
        next(batches)
        assert source.state_dict() == {"epoch": 0, "consumed": 3 * handed_out}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unused_iterator_moves_nothing(num_workers: int) -> None:
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


def test_the_place_of_an_unused_loader_restores_to_the_first_epoch() -> None:
    source = loader()
    source.load_state_dict(loader().state_dict())
    assert numbers(take(source)) == epoch_order(22, 5, 0).tolist()


@pytest.mark.parametrize(("count", "batch_size", "world_size"), CASES)
def test_after_a_whole_epoch_the_next_one_starts_also_after_restore(
    count: int, batch_size: int, world_size: int
) -> None:
    uninterrupted = loader(count, batch_size, 0, world_size)
    # As Lightning does: no batch is asked for beyond the last.
    assert len(take(uninterrupted, len(uninterrupted))) == len(uninterrupted)
    restored = loader(count, batch_size, 0, world_size)
    restored.load_state_dict(uninterrupted.state_dict())
    expected = take(uninterrupted)
    assert {epoch for batch in expected for _, epoch in batch} == {1}
    assert take(restored) == expected


def test_a_whole_epoch_that_left_samples_out_is_over_on_any_number_of_ranks() -> None:
    source = loader(10, 1, 0, world_size=4)
    take(source, len(source))
    alone = loader(10, 1)
    alone.load_state_dict(source.state_dict())
    assert {epoch for batch in take(alone) for _, epoch in batch} == {1}


def test_a_rest_too_small_for_the_ranks_is_left_out() -> None:
    source = loader(10, 1)
    take(source, 8)
    for rank in range(4):
        resumed = loader(10, 1, rank, world_size=4)
        resumed.load_state_dict(source.state_dict())
        assert {epoch for batch in take(resumed) for _, epoch in batch} == {1}


def test_the_length_is_that_of_a_whole_epoch_also_after_restore() -> None:
    source = loader()
    assert len(source) == 8
    source.load_state_dict({"epoch": 0, "consumed": 12})
    assert len(source) == 8


def test_a_dropped_loader_is_freed_without_the_garbage_collector() -> None:
    # The collector closes the workers' queues before it tells them to end, and then waits five seconds for each.
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
    """Trains a number that nobody needs."""

    def __init__(self) -> None:
        super().__init__()
        self.number = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.number * batch[0].sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_a_fit_that_stops_within_an_epoch_ends_its_workers(tmp_path: Path) -> None:
    before = set(active_children())
    source = loader(num_workers=2)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Counting(), source)
    assert source.state_dict() == {"epoch": 0, "consumed": 6}
    assert set(active_children()) == before


def test_too_few_samples_for_the_ranks_are_refused() -> None:
    with pytest.raises(ValueError) as error:
        loader(2, 1, 0, world_size=3)
    assert_one_line(error, "2 training samples", "3 ranks", "use fewer")


@pytest.mark.parametrize(
    ("count", "batch_size", "world_size", "num_workers"), [*((*case, 0) for case in CASES), (2, 4, 3, 0), (11, 2, 2, 2)]
)
def test_evaluation_sees_every_sample_once_in_order(
    count: int, batch_size: int, world_size: int, num_workers: int
) -> None:
    seen = []
    for rank in range(world_size):
        source = EvaluationLoader(Numbers(count), batch_size, num_workers, rank, world_size, pin_memory=False)
        batches = take(source)
        assert len(batches) == len(source)
        assert numbers(batches) == list(range(rank, count, world_size))
        assert {epoch for batch in batches for _, epoch in batch} <= {NO_EPOCH}
        assert all(len(batch) == batch_size for batch in batches[:-1])
        assert take(source) == batches
        seen += numbers(batches)
    assert sorted(seen) == list(range(count))


def test_ranks_may_have_unequal_numbers_of_evaluation_batches() -> None:
    ranks = [EvaluationLoader(Numbers(5), 2, 0, rank, 2, pin_memory=False) for rank in range(2)]
    assert [len(rank) for rank in ranks] == [2, 1]
    assert [[numbers([batch]) for batch in take(rank)] for rank in ranks] == [[[0, 2], [4]], [[1, 3]]]
