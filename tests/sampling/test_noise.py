"""Noise is a pure function of seed, sample, step and code, and follows the published SplitMix64."""

from itertools import product
from math import log, log1p

import pytest
import torch
from torch import Tensor

from llamagen.sampling import code_counters, gumbel, seed_tensor

MASK = 2**64 - 1
GOLDEN_GAMMA = 0x9E3779B97F4A7C15


def splitmix64(state: int) -> int:
    """Output of SplitMix64 for a state, in Python integers."""
    z = (state + GOLDEN_GAMMA) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def slow_gumbel(seed: int, index: int, step: int, code: int) -> float:
    """Mix seed, index and step into the state, one round each; then take the output for the code."""
    state = splitmix64(seed & MASK)
    state = splitmix64(state ^ (index & MASK))
    state = splitmix64(state ^ (step & MASK))
    uniform = ((splitmix64(state + code * GOLDEN_GAMMA & MASK) >> 32) + 0.5) / 2**32
    return -log(-log1p(-uniform))


def noise(seed: int, indices: list[int] | Tensor, step: int, count: int) -> Tensor:
    return gumbel(seed_tensor(seed), torch.as_tensor(indices), torch.tensor(step), code_counters(count))


def test_the_slow_reference_gives_the_published_numbers_of_splitmix64() -> None:
    known = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [splitmix64(round_ * GOLDEN_GAMMA) for round_ in range(3)] == known


@pytest.mark.parametrize("seed", [0, 1, 42, -1, 2**31, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), 2**64 + 5])
def test_noise_equals_the_slow_reference(seed: int) -> None:
    indices = [0, 1, 2, 49_999, 2**31, 2**40 + 7, 2**63 - 1]
    for step in (0, 1, 255, 1023):
        expected = [[slow_gumbel(seed, index, step, code) for code in range(9)] for index in indices]
        assert noise(seed, indices, step, 9).tolist() == [pytest.approx(row, rel=1e-5, abs=1e-5) for row in expected]


def test_noise_is_finite_for_random_numbers_that_float32_rounds_to_one() -> None:
    found = noise(0, [1080], 0, 15_807)[0, -1].item()
    assert slow_gumbel(0, 1080, 0, 15_806) < -2.85  # the 117th largest of all random numbers
    assert -2.9 < found < -2.8


def test_noise_follows_gumbels_distribution() -> None:
    values = noise(0, torch.arange(400), 0, 1000)
    assert values.dtype == torch.float32
    assert -2.9 < float(values.min()) < float(values.max()) < 23
    assert values.max() > 11  # of 400,000 values
    uniform = torch.exp(-torch.exp(-values.double())).flatten()
    observed = torch.histc(uniform, 50, 0.0, 1.0)
    chi_square = ((observed - 8000) ** 2 / 8000).sum().item()
    assert chi_square < 85.4  # 49 degrees of freedom: exceeded once in 1000


def test_noise_does_not_depend_on_the_batch_or_the_number_of_codes() -> None:
    order = torch.tensor([7, 3, 3, 999, 0])
    together = noise(5, torch.arange(1000), 9, 20)
    assert torch.equal(noise(5, order, 9, 20), together[order])
    assert torch.equal(noise(5, [7], 9, 11)[0], together[7, :11])


@pytest.mark.parametrize("varied", ["index", "step", "seed", "code"])
def test_noise_is_random_along_every_axis(varied: str) -> None:
    count, bins = 20_000, 20
    if varied == "index":
        values = noise(3, torch.arange(count), 17, 1)
    elif varied == "step":
        values = torch.cat([noise(3, torch.arange(10), step, 1) for step in range(count // 10)])
    elif varied == "seed":
        values = torch.cat([noise(seed, torch.arange(10), 17, 1) for seed in range(count // 10)])
    else:
        values = noise(3, [4], 17, count)
    observed = torch.histc(torch.exp(-torch.exp(-values)).flatten(), bins, 0.0, 1.0)
    chi_square = ((observed - count / bins) ** 2 / (count / bins)).sum().item()
    assert chi_square < 43.8  # 19 degrees of freedom: exceeded once in 1000


@pytest.mark.parametrize(("seed", "shift", "step"), [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 1)])
def test_noise_of_neighbouring_seeds_samples_and_steps_is_uncorrelated(seed: int, shift: int, step: int) -> None:
    indices = torch.arange(2_000)
    pair = torch.stack([noise(0, indices, 0, 10).flatten(), noise(seed, indices + shift, step, 10).flatten()])
    assert abs(torch.corrcoef(pair)[0, 1].item()) < 0.03


def test_seed_index_and_step_are_not_interchangeable() -> None:
    numbers = {noise(a, [b], c, 1).item() for a, b, c in product(range(6), repeat=3)}
    assert len(numbers) == 6**3


def test_noise_neither_reads_nor_changes_the_global_random_state() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = noise(0, [0, 1, 2], 0, 5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(noise(0, [0, 1, 2], 0, 5), first)
