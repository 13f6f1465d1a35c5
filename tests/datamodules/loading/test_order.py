"""The order of examples is a pure function of seed and epoch and is distributed over ranks without loss."""

from collections import Counter
from itertools import pairwise
from typing import Literal

import numpy as np
import pytest

from datamodules.loading.order import (
    NO_EPOCH,
    SHARD_BITS,
    EpochPlan,
    StreamPlan,
    batch_ends,
    epoch_order,
    evaluation_batches,
    random_integers,
    shared_batches,
)
from tests.datamodules.shard_files import assert_one_line

# (count, batch_size, world_size); each rank gets at least one example.
CASES = [
    (1, 1, 1),
    (10, 3, 1),
    (12, 3, 2),
    (13, 3, 2),
    (10, 1, 4),
    (11, 2, 4),
    (7, 8, 3),
    (24, 2, 3),
    (25, 2, 3),
    (26, 2, 3),
    (27, 2, 3),
    (101, 7, 3),
    (5, 1, 5),
    (64, 1, 7),
    (1000, 16, 8),
]
RANDOM_CASES = [
    (int(count), int(batch_size), int(world_size))
    for count, batch_size, world_size in np.random.default_rng(0).integers(1, [200, 12, 9], (60, 3))
    if count >= world_size
]
EPOCH = 4


def ranks(
    count: int, batch_size: int, world_size: int, remainder: Literal["keep", "drop", "repeat"] = "keep", start: int = 0
) -> list[list[list[int]]]:
    """The remaining batches of an epoch for each rank."""
    found = []
    for rank in range(world_size):
        plan = EpochPlan(count, batch_size, 5, rank, world_size, remainder)
        batches = list(plan.batches(EPOCH, start))
        assert {epoch for batch in batches for _, epoch in batch} <= {EPOCH}
        assert len(batches) == len(plan.ends(start))
        found.append([[number for number, _ in batch] for batch in batches])
    assert len({len(batches) for batches in found}) == 1  # no rank waits for another
    assert all(batch for batches in found for batch in batches)
    return found


def flat(batches: list[list[list[int]]]) -> list[int]:
    """All examples in the order of consumption: by batch, then by position in the batch, then by rank."""
    order = []
    for step in zip(*batches, strict=True):
        turns = [list(batch) for batch in step]
        while any(turns):
            order += [turn.pop(0) for turn in turns if turn]
    return order


def planned(count: int) -> list[int]:
    order: list[int] = epoch_order(count, 5, EPOCH).tolist()
    return order


def test_order_is_a_permutation_that_depends_only_on_seed_and_epoch() -> None:
    order = epoch_order(50, seed=3, epoch=2)
    np.random.seed(1)
    assert epoch_order(50, seed=3, epoch=2).tolist() == order.tolist()
    assert sorted(order.tolist()) == list(range(50))
    others = [epoch_order(50, seed, epoch).tolist() for seed, epoch in ((3, 0), (3, 1), (3, 3), (2, 2), (2, 3), (0, 0))]
    assert all(other != order.tolist() for other in others)
    assert len({tuple(other) for other in others}) == len(others)


def test_keep_reads_every_example_once_in_the_planned_order() -> None:
    for case in CASES + RANDOM_CASES:
        count, batch_size, world_size = case
        batches = ranks(*case)
        assert flat(batches) == planned(count), case
        sizes = [[len(batch) for batch in step] for step in zip(*batches, strict=True)]
        assert all(max(step) - min(step) <= 1 for step in sizes), case
        assert all(step == [batch_size] * world_size for step in sizes[:-1]), case
        # If fewer examples than ranks remain, the last batches of some ranks are larger by one.
        rest = count % (batch_size * world_size)
        enlarged = 0 < rest < world_size and count > rest
        largest = batch_size + 1 if enlarged else min(batch_size, -(-(rest or count) // world_size))
        assert max(sizes[-1]) == largest, case


def test_drop_leaves_out_the_incomplete_global_batch() -> None:
    for case in CASES + RANDOM_CASES:
        count, batch_size, world_size = case
        step = batch_size * world_size
        if count < step:
            phrases = [f"{count} training examples", f"{world_size} ranks", f"batch_size {batch_size}", "drop"]
            with pytest.raises(ValueError) as error:
                EpochPlan(count, batch_size, 5, 0, world_size, "drop")
            assert_one_line(error, *phrases)
            continue
        batches = ranks(*case, "drop")
        assert flat(batches) == planned(count)[: count // step * step], case
        assert {len(batch) for rank in batches for batch in rank} == {batch_size}, case


def test_repeat_fills_up_with_the_first_examples_of_the_epoch() -> None:
    for case in CASES + RANDOM_CASES:
        count, batch_size, world_size = case
        batches = ranks(*case, "repeat")
        missing = -count % (batch_size * world_size)
        order = planned(count)
        assert flat(batches) == order + (order * (missing // count + 1))[:missing], case
        assert {len(batch) for rank in batches for batch in rank} == {batch_size}, case


@pytest.mark.parametrize("remainder", ["keep", "repeat", "drop"])
def test_resumed_epoch_has_the_remaining_batches_of_the_whole_epoch(
    remainder: Literal["keep", "drop", "repeat"],
) -> None:
    for case in CASES:
        count, batch_size, world_size = case
        if remainder == "drop" and count < batch_size * world_size:
            continue
        whole = ranks(*case, remainder)
        ends = EpochPlan(count, batch_size, 5, 0, world_size, remainder).ends(0).tolist()
        for done, consumed in enumerate([0, *ends]):
            if consumed < count:
                assert ranks(*case, remainder, consumed) == [rank[done:] for rank in whole], (case, consumed)


# (count, batch size and ranks before, batch size and ranks after), stopped at a random position
RESUMED = [
    (int(count) + 10, (int(a), int(b)), (int(c), int(d)), float(place))
    for (count, a, b, c, d), place in zip(
        np.random.default_rng(1).integers(1, [150, 8, 9, 8, 9], (150, 5)),
        np.random.default_rng(2).random(150),
        strict=True,
    )
]


def test_epoch_resumed_on_other_ranks_loses_nothing_and_keeps_its_order() -> None:
    for case in RESUMED:
        count, before, after, place = case
        whole = ranks(count, *before)
        done = int(place * len(whole[0]))
        seen = flat([rank[:done] for rank in whole])
        rest = flat(ranks(count, *after, start=len(seen)))
        left = count - len(seen)
        order = planned(count)
        # If fewer examples than ranks remain, the first ones of the epoch fill up, so that no rank waits.
        assert seen + rest == order + order[: max(after[1] - left, 0)], case
        assert len(rest) == max(left, after[1]), case


def test_resumed_cases_include_ends_with_fewer_examples_than_ranks() -> None:
    # Otherwise the test above would miss these cases.
    ends = []
    for count, before, (batch_size, world_size), place in RESUMED:
        whole = ranks(count, *before)
        left = count - len(flat([rank[: int(place * len(whole[0]))] for rank in whole]))
        rest = left % (batch_size * world_size)
        ends.append(
            "few" if left < world_size else "enlarged" if 0 < rest < world_size else "whole" if not rest else ""
        )
    assert set(ends) == {"few", "enlarged", "whole", ""}


def test_few_remaining_examples_for_many_ranks_are_filled_up() -> None:
    order = planned(10)
    assert ranks(10, 2, 4, start=8) == [[[order[8]]], [[order[9]]], [[order[0]]], [[order[1]]]]
    assert ranks(10, 2, 4, "drop", start=8) == [[], [], [], []]
    repeated = ranks(10, 2, 4, "repeat", start=8)
    assert repeated == [[[order[8], order[2]]], [[order[9], order[3]]], [[order[0], order[4]]], [[order[1], order[5]]]]


def test_epoch_that_is_over_has_no_batches() -> None:
    for remainder in ("keep", "drop", "repeat"):
        assert batch_ends(10, 10, 3, 2, remainder).tolist() == []
        assert batch_ends(10, 12, 3, 2, remainder).tolist() == []


def test_global_batch_holds_the_same_examples_on_any_number_of_ranks() -> None:
    order = planned(24)
    found = []
    for world_size in (1, 2, 3, 6):
        batches = ranks(24, 12 // world_size, world_size)
        found.append([sorted(number for batch in step for number in batch) for step in zip(*batches, strict=True)])
    assert found == [[sorted(order[:12]), sorted(order[12:])]] * 4


@pytest.mark.parametrize("remainder", ["keep", "drop", "repeat"])
def test_fewer_examples_than_ranks_are_refused(remainder: Literal["keep", "drop", "repeat"]) -> None:
    with pytest.raises(ValueError) as error:
        EpochPlan(2, 1, 0, 0, 3, remainder)
    assert_one_line(error, "2 training examples", "3 ranks", "use fewer ranks")


STREAM = {"shards": 20, "examples_per_shard": 7, "count": 1000, "batch_size": 6, "seed": 5}
"""Eight shards give 56 examples. An epoch on two ranks has 996 examples, 498 on each, and ends within a ninth group."""


def stream(rank: int = 0, world_size: int = 1, epoch: int = 0, consumed: int = 0, **options: int) -> list[list[int]]:
    """The example numbers in the batches of a rank."""
    plan = StreamPlan(**{**STREAM, **options}, rank=rank, world_size=world_size)
    batches = list(plan.batches(epoch, consumed))
    assert {asked_for for batch in batches for _, asked_for in batch} <= {epoch}
    assert len(batches) == len(plan.ends(consumed))
    return [[number for number, _ in batch] for batch in batches]


def numbers(batches: list[list[int]]) -> list[int]:
    return [number for batch in batches for number in batch]


def shard_counts(batches: list[list[int]]) -> list[Counter[int]]:
    """How often each shard occurs in each complete group of eight shards."""
    shards = [number >> SHARD_BITS for number in numbers(batches)]
    return [Counter(shards[first : first + 56]) for first in range(0, len(shards) // 56 * 56, 56)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_rank_of_a_stream_gets_the_same_number_of_full_batches(world_size: int) -> None:
    plan = StreamPlan(**STREAM, world_size=world_size)
    assert plan.count == 1000 // (6 * world_size) * 6 * world_size
    assert plan.ends(0).tolist() == list(range(6 * world_size, plan.count + 1, 6 * world_size))
    for rank in range(world_size):
        assert [len(batch) for batch in stream(rank, world_size)] == [6] * (plan.count // (6 * world_size))


def test_stream_is_a_pure_function_of_seed_epoch_rank_and_number_of_ranks() -> None:
    np.random.seed(1)
    first = stream(1, 3, epoch=2)
    np.random.seed(2)
    assert stream(1, 3, epoch=2) == first
    others = [stream(0, 3, epoch=2), stream(2, 3, epoch=2), stream(1, 2, epoch=2), stream(1, 3, epoch=1)]
    others.append(stream(1, 3, epoch=2, seed=6))
    assert len({tuple(numbers(batches)[:300]) for batches in [first, *others]}) == 6


def test_each_rank_samples_its_own_shards() -> None:
    sampled = [shard_counts(stream(rank, 4, shards=1000)) for rank in range(4)]
    for a in range(4):
        for b in range(a):
            assert all(first != second for first, second in zip(sampled[a], sampled[b], strict=True))


@pytest.mark.parametrize("batch_size", [1, 6, 56, 60])
def test_batch_size_does_not_change_the_examples_of_a_stream(batch_size: int) -> None:
    expected, found = numbers(stream()), numbers(stream(batch_size=batch_size))
    least = min(len(expected), len(found))
    assert least >= 900
    assert found[:least] == expected[:least]


@pytest.mark.parametrize("world_size", [1, 3])
def test_stream_resumes_with_exactly_its_rest_on_the_same_number_of_ranks(world_size: int) -> None:
    for rank in range(world_size):
        whole = stream(rank, world_size)
        for done in (0, 1, 9, 10, 28, 55):
            assert stream(rank, world_size, consumed=done * 6 * world_size) == whole[done:], (rank, done)


def test_stream_resumes_with_another_batch_size() -> None:
    whole = numbers(stream())
    rest = numbers(stream(consumed=12, batch_size=4))
    assert rest == [*whole, *rest[len(whole) - 12 :]][12 : 12 + len(rest)]
    assert len(rest) == 988


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_stream_resumed_on_other_ranks_ends_with_its_epoch(world_size: int) -> None:
    for rank in range(world_size):
        batches = stream(rank, world_size, consumed=497)
        plan = StreamPlan(**STREAM, rank=rank, world_size=world_size)
        assert len(batches) == (plan.count - 497) // (6 * world_size)
        assert plan.ends(497).max() <= plan.count


def test_consecutive_examples_are_read_from_each_sampled_shard() -> None:
    for group in range(8):
        found = np.array(numbers(stream(shards=10**6)))[group * 56 : (group + 1) * 56]
        runs = [sorted(found[found >> SHARD_BITS == shard]) for shard in set((found >> SHARD_BITS).tolist())]
        assert len(runs) == 8
        assert all(np.array_equal(run, np.arange(run[0], run[0] + 7)) for run in runs)
        # They are shuffled: two consecutive examples are rarely from the same shard.
        assert sum(a >> SHARD_BITS == b >> SHARD_BITS for a, b in pairwise(found.tolist())) < 20


def test_shards_and_positions_are_sampled_about_uniformly() -> None:
    found = np.array(numbers(stream(count=56_000)))
    shards = Counter((found >> SHARD_BITS).tolist())
    assert sorted(shards) == list(range(20))
    assert all(2000 < count < 3600 for count in shards.values())  # 2800 ± 137 (400 samples of 7)
    places = found & ((1 << SHARD_BITS) - 1)
    assert places.max() < 1 << 32  # far from the next shard
    # As in StreamIndex, in shards of 24 and 5 examples.
    for size in (24, 5):
        counts = np.bincount(places % size, minlength=size)
        assert len(counts) == size
        assert counts.min() > 0.85 * 55_998 / size


@pytest.mark.parametrize("world_size", [1, 2])
def test_stream_of_less_than_a_batch_is_refused(world_size: int) -> None:
    with pytest.raises(ValueError) as error:
        StreamPlan(20, 7, 6 * world_size - 1, 6, 0, 0, world_size)
    assert_one_line(error, f"resampled_epoch is {6 * world_size - 1}", f"batch of 6 on {world_size} ranks")


@pytest.mark.parametrize("below", [1, 2, 10, 20, 1000])
def test_random_integers_are_about_uniform_in_their_range(below: int) -> None:
    sampled = random_integers(3, 2, np.arange(20_000), below)
    assert (sampled.dtype, sampled.shape) == (np.int64, (20_000,))
    counts = np.bincount(sampled, minlength=below)
    assert len(counts) == below
    expected = 20_000 / below
    assert ((counts - expected) ** 2 / expected).sum() < below + 5 * (2 * below) ** 0.5  # χ²: below ± √(2 · below)


def test_random_integers_are_a_pure_function_of_seed_epoch_and_number() -> None:
    numbers = np.random.default_rng(0).permutation(5000)
    whole = random_integers(3, 2, numbers, 20)
    np.random.seed(1)
    assert random_integers(3, 2, numbers, 20).tolist() == whole.tolist()
    # The batches do not matter.
    in_batches = np.concatenate([random_integers(3, 2, numbers[first : first + 7], 20) for first in range(0, 5000, 7)])
    assert in_batches.tolist() == whole.tolist()
    assert random_integers(3, 2, np.sort(numbers), 20)[numbers].tolist() == whole.tolist()


@pytest.mark.parametrize("other", [(3, 1), (2, 2), (2, 3), (0, 0)])
def test_random_integers_of_other_seeds_and_epochs_are_independent(other: tuple[int, int]) -> None:
    numbers = np.arange(20_000)
    same = (random_integers(3, 2, numbers, 10) == random_integers(*other, numbers, 10)).mean()
    assert 0.09 < same < 0.11  # 0.1 ± 0.002


def test_random_integers_of_neighbouring_numbers_are_independent() -> None:
    sampled = random_integers(3, 2, np.arange(20_000), 10)
    for distance in (1, 2, 10, 64):
        assert 0.09 < (sampled[distance:] == sampled[:-distance]).mean() < 0.11


def test_random_integers_accept_example_numbers_of_streams() -> None:
    numbers = (np.arange(2000) << SHARD_BITS) + 3
    counts = np.bincount(random_integers(0, 0, numbers, 2))
    assert 900 < counts.min() <= counts.max() < 1100


@pytest.mark.parametrize(("count", "batch_size"), [(0, 3), (1, 3), (6, 3), (7, 3), (2, 1)])
def test_evaluation_batches_hold_each_example_once_in_order(count: int, batch_size: int) -> None:
    batches = evaluation_batches(range(count), batch_size)
    assert [address for batch in batches for address in batch] == [(number, NO_EPOCH) for number in range(count)]
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * max(-(-count // batch_size) - 1, 0)
    assert all(0 < len(batch) <= batch_size for batch in batches)


def test_evaluation_batches_are_plain_numbers_also_from_an_array() -> None:
    assert (batches := evaluation_batches(np.array([5, 2, 9]), 2)) == [[(5, NO_EPOCH), (2, NO_EPOCH)], [(9, NO_EPOCH)]]
    assert {type(number) for batch in batches for number, _ in batch} == {int}


@pytest.mark.parametrize(("batch_size", "world_size"), [(2, 1), (3, 2), (7, 2), (2, 3), (3, 8), (7, 8)])
def test_ranks_that_wait_for_each_other_get_the_same_number_of_batches(batch_size: int, world_size: int) -> None:
    for count in range(world_size, 60):
        shares = [shared_batches(count, batch_size, rank, world_size, equally=True) for rank in range(world_size)]
        assert len({len(batches) for batches in shares}) == 1, count
        for rank, batches in enumerate(shares):
            assert all(1 <= len(batch) <= batch_size for batch in batches)
            numbers = [number for batch in batches for number, _ in batch]
            assert numbers == list(range(rank, count, world_size))
            plain = shared_batches(count, batch_size, rank, world_size)
            assert len(plain) in (len(batches), len(batches) - 1)
            assert plain == batches or len(plain) < len(batches)


@pytest.mark.parametrize(("count", "batch_size", "world_size"), [(3, 1, 2), (1, 4, 2), (10, 1, 8)])
def test_impossible_equal_distribution_is_refused(count: int, batch_size: int, world_size: int) -> None:
    with pytest.raises(ValueError, match=f"{count} examples in batches of {batch_size} cannot be distributed"):
        shared_batches(count, batch_size, 0, world_size, equally=True)


def test_batches_are_full_if_ranks_do_not_wait() -> None:
    assert [len(batch) for batch in shared_batches(9, 4, 1, 2)] == [4]
    assert [len(batch) for batch in shared_batches(9, 4, 1, 2, equally=True)] == [2, 2]
