"""The order of samples is a pure function of seed and epoch, and is shared out over ranks without loss."""

import numpy as np
import pytest

from datamodules.order import count_batches, epoch_order, share_out

# (count, batch_size, world_size)
CASES = [
    (1, 1, 1),
    (10, 3, 1),
    (12, 3, 2),
    (13, 3, 2),
    (10, 1, 4),
    (11, 2, 4),
    (7, 8, 3),
    (24, 2, 3),
    (101, 7, 3),
]


def shares(order: np.ndarray, start: int, batch_size: int, world_size: int) -> list[list[list[int]]]:
    """Batches of each rank."""
    return [
        [batch.tolist() for batch in share_out(order, start, batch_size, rank, world_size)]
        for rank in range(world_size)
    ]


def flat(batches: list[list[list[int]]]) -> list[int]:
    """All samples of all ranks."""
    return [number for rank in batches for batch in rank for number in batch]


def test_the_order_is_a_permutation_that_depends_on_seed_and_epoch_alone() -> None:
    order = epoch_order(50, seed=3, epoch=2)
    np.random.seed(1)
    assert epoch_order(50, seed=3, epoch=2).tolist() == order.tolist()
    assert sorted(order.tolist()) == list(range(50))
    others = [epoch_order(50, seed, epoch).tolist() for seed, epoch in ((3, 0), (3, 1), (3, 3), (2, 2), (2, 3), (0, 0))]
    assert all(other != order.tolist() for other in others)
    assert len({tuple(other) for other in others}) == len(others)


@pytest.mark.parametrize(("count", "batch_size", "world_size"), CASES)
def test_every_sample_is_shared_out_once_but_for_fewer_than_there_are_ranks(
    count: int, batch_size: int, world_size: int
) -> None:
    order = epoch_order(count, seed=0, epoch=0)
    numbers = flat(shares(order, 0, batch_size, world_size))
    assert len(numbers) == len(set(numbers))
    assert set(numbers) <= set(range(count))
    assert count - len(numbers) == count % world_size


@pytest.mark.parametrize(("count", "batch_size", "world_size"), CASES)
def test_no_rank_waits_for_another(count: int, batch_size: int, world_size: int) -> None:
    batches = shares(epoch_order(count, seed=0, epoch=0), 0, batch_size, world_size)
    sizes = [[len(batch) for batch in rank] for rank in batches]
    assert all(rank == sizes[0] for rank in sizes)
    assert len(sizes[0]) == count_batches(count, batch_size, world_size)
    assert all(size == batch_size for size in sizes[0][:-1])
    assert all(0 < size <= batch_size for size in sizes[0])


@pytest.mark.parametrize(("count", "batch_size", "world_size"), CASES)
def test_the_rest_of_an_epoch_is_its_tail(count: int, batch_size: int, world_size: int) -> None:
    order = epoch_order(count, seed=0, epoch=0)
    whole = shares(order, 0, batch_size, world_size)
    for done in range(len(whole[0]) + 1):
        rest = shares(order, done * batch_size * world_size, batch_size, world_size)
        assert rest == [rank[done:] for rank in whole]


def test_a_global_batch_holds_the_same_samples_on_any_number_of_ranks() -> None:
    order = epoch_order(24, seed=0, epoch=0)
    found = []
    for world_size in (1, 2, 3, 6):
        batches = shares(order, 0, 12 // world_size, world_size)
        found.append([sorted(number for batch in step for number in batch) for step in zip(*batches, strict=True)])
    assert found == [[sorted(order[:12].tolist()), sorted(order[12:].tolist())]] * 4


def test_fewer_samples_than_ranks_make_no_batch() -> None:
    assert shares(np.arange(2), 0, 1, 3) == [[], [], []]
    assert count_batches(2, 1, 3) == 0
