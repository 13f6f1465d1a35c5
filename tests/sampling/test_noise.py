"""Random numbers are a pure function of seed, sample and step, computed as published for SplitMix64."""

from itertools import product

import pytest
import torch

from llamagen.sampling import uniform

MASK = 2**64 - 1
GOLDEN_GAMMA = 0x9E3779B97F4A7C15


def splitmix64(state: int) -> int:
    """The output of SplitMix64 for a state, in Python's unbounded integers."""
    z = (state + GOLDEN_GAMMA) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def slow_uniform(seed: int, index: int, step: int) -> float:
    """Seed, index and step, each mixed into the state by one round; the upper 52 bits are the number."""
    state = splitmix64(seed & MASK)
    state = splitmix64(state ^ (index & MASK))
    state = splitmix64(state ^ (step & MASK))
    return (state >> 12) / 2**52


def test_the_slow_reference_gives_the_known_first_numbers_of_splitmix64() -> None:
    known = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [splitmix64(round_ * GOLDEN_GAMMA) for round_ in range(3)] == known


@pytest.mark.parametrize("seed", [0, 1, 42, -1, 2**31, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), 2**64 + 5])
def test_numbers_are_those_of_the_slow_reference(seed: int) -> None:
    indices = [0, 1, 2, 49_999, 2**31, 2**40 + 7, 2**63 - 1]
    for step in (0, 1, 255, 1023):
        expected = [slow_uniform(seed, index, step) for index in indices]
        assert uniform(seed, torch.tensor(indices), step).tolist() == expected


def test_numbers_are_float64_from_zero_to_below_one() -> None:
    numbers = uniform(0, torch.arange(100_000), 0)
    assert numbers.dtype == torch.float64
    assert numbers.min() >= 0
    assert numbers.max() <= 1 - 2**-52
    assert len(numbers.unique()) == 100_000


def test_a_number_does_not_depend_on_its_batch() -> None:
    order = torch.tensor([7, 3, 3, 999, 0])
    together = uniform(5, torch.arange(1000), 9)
    assert torch.equal(uniform(5, order, 9), together[order])
    assert uniform(5, torch.tensor([7]), 9).item() == together[7].item()


@pytest.mark.parametrize("varied", ["index", "step", "seed"])
def test_numbers_are_uniform_along_every_axis(varied: str) -> None:
    count, bins = 20_000, 20
    if varied == "index":
        numbers = uniform(3, torch.arange(count), 17)
    elif varied == "step":
        numbers = torch.cat([uniform(3, torch.arange(10), step) for step in range(count // 10)])
    else:
        numbers = torch.cat([uniform(seed, torch.arange(10), 17) for seed in range(count // 10)])
    observed = torch.histc(numbers, bins, 0.0, 1.0)
    chi_square = ((observed - count / bins) ** 2 / (count / bins)).sum().item()
    assert chi_square < 43.8  # 19 degrees of freedom: exceeded once in 1000
    assert numbers.mean().item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(("seed", "shift", "step"), [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 1)])
def test_neighbouring_seeds_samples_and_steps_are_unrelated(seed: int, shift: int, step: int) -> None:
    indices = torch.arange(20_000)
    pair = torch.stack([uniform(0, indices, 0), uniform(seed, indices + shift, step)])
    assert abs(torch.corrcoef(pair)[0, 1].item()) < 0.03


def test_seed_index_and_step_are_not_interchangeable() -> None:
    numbers = {uniform(a, torch.tensor([b]), c).item() for a, b, c in product(range(6), repeat=3)}
    assert len(numbers) == 6**3


def test_the_global_random_state_is_neither_read_nor_moved() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = uniform(0, torch.arange(5), 0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(uniform(0, torch.arange(5), 0), first)
