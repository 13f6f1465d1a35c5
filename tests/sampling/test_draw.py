"""Logits to a code: what is filtered, and that draws follow the distribution that is left."""

from math import inf

import pytest
import torch
from torch import Tensor

from llamagen.sampling import SamplingConfig, draw, filter_logits, uniform
from tests.golden import golden, normal_input

LARGEST_UNIFORM = 1 - 2**-52


def kept(logits: Tensor) -> list[list[int]]:
    """Codes of each row that may be drawn."""
    return [row.isfinite().nonzero().flatten().tolist() for row in logits]


def log_probabilities(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities]).log()


def frequencies(logits: Tensor, config: SamplingConfig, count: int = 20_000) -> Tensor:
    """How often each code of one row of logits (1, V) is drawn, (V,) int64."""
    codes = draw(logits.expand(count, -1), config, uniform(0, torch.arange(count), 0))
    return torch.bincount(codes, minlength=logits.shape[-1])


def assert_follows(observed: Tensor, probabilities: Tensor) -> None:
    """Chi-square test: never a code of probability 0, and a deviation that chance exceeds once in 1000."""
    possible = probabilities > 0
    assert observed[~possible].sum() == 0
    expected = probabilities[possible].double() * observed.sum()
    chi_square = ((observed[possible] - expected) ** 2 / expected).sum().item()
    degrees = int(possible.sum()) - 1
    bound = degrees * (1 - 2 / (9 * degrees) + 3.0902 * (2 / (9 * degrees)) ** 0.5) ** 3  # Wilson and Hilferty
    assert chi_square < bound


@pytest.mark.parametrize("setting", list(golden("filter")))
def test_top_k_and_top_p_keep_the_published_tokens(setting: str) -> None:
    top_k, top_p = (part.split("=")[1] for part in setting.split(","))
    logits = normal_input("filter/logits", (4, 50))
    filtered = filter_logits(logits, int(top_k), float(top_p))
    assert kept(filtered) == golden("filter")[setting]
    assert torch.equal(filtered[filtered.isfinite()], logits[filtered.isfinite()])


@pytest.mark.parametrize(
    ("probabilities", "top_k", "top_p", "expected"),
    [
        ((0.4, 0.3, 0.2, 0.1), 0, 0.5, [0, 1]),
        ((0.4, 0.3, 0.2, 0.1), 2, 0.5, [0]),  # 0.4 of the 0.7 that top-k left is more than half
        ((0.1, 0.2, 0.3, 0.4), 0, 0.65, [2, 3]),
        ((0.1, 0.2, 0.3, 0.4), 0, 0.75, [1, 2, 3]),
        ((0.1, 0.2, 0.3, 0.4), 0, 1e-9, [3]),
        ((0.1, 0.2, 0.3, 0.4), 1, 1.0, [3]),
        ((0.1, 0.2, 0.3, 0.4), 4, 1.0, [0, 1, 2, 3]),
        ((0.1, 0.2, 0.3, 0.4), 100, 1.0, [0, 1, 2, 3]),
        ((0.1, 0.3, 0.3, 0.3), 2, 1.0, [1, 2, 3]),
    ],
)
def test_top_k_comes_before_top_p(
    probabilities: tuple[float, ...], top_k: int, top_p: float, expected: list[int]
) -> None:
    assert kept(filter_logits(log_probabilities(*probabilities), top_k, top_p)) == [expected]


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (0, 0.5), (3, 0.5), (0, 1.0)])
def test_filtering_leaves_its_input_alone(top_k: int, top_p: float) -> None:
    logits = normal_input("filter/logits", (4, 50))
    before = logits.clone()
    filter_logits(logits, top_k, top_p)
    draw(logits, SamplingConfig(0.7, top_k, top_p), uniform(0, torch.arange(4), 0))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution_at_a_temperature(temperature: float) -> None:
    logits = normal_input("draw/logits", (1, 8))
    assert_follows(frequencies(logits, SamplingConfig(temperature)), (logits[0] / temperature).softmax(-1))


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (0, 0.7), (5, 0.7)])
def test_draws_follow_the_distribution_of_the_codes_that_are_kept(top_k: int, top_p: float) -> None:
    logits = normal_input("draw/logits", (1, 8))
    probabilities = filter_logits(logits, top_k, top_p)[0].softmax(-1)
    assert 1 < (probabilities > 0).sum() < 8
    assert_follows(frequencies(logits, SamplingConfig(1.0, top_k, top_p)), probabilities)


def test_top_p_counts_the_probabilities_at_the_temperature() -> None:
    logits = log_probabilities(0.7, 0.2, 0.1)
    assert frequencies(logits, SamplingConfig(1.0, top_p=0.6)).count_nonzero() == 1
    assert frequencies(logits, SamplingConfig(4.0, top_p=0.6)).count_nonzero() == 2


def test_a_row_has_its_own_number_and_its_own_filter() -> None:
    logits = torch.tensor(
        [[0.0, 0.0, -inf, -inf], [0.0, 0.0, -inf, -inf], [-inf, -inf, 0.0, 0.0], [9.0, 0.0, 0.0, 0.0]]
    )
    numbers = torch.tensor([0.4, 0.6, 0.6, 0.9], dtype=torch.float64)
    assert draw(logits, SamplingConfig(top_p=0.99), numbers).tolist() == [0, 1, 3, 0]


@pytest.mark.parametrize("number", [0.0, 0.25, 0.5, LARGEST_UNIFORM])
@pytest.mark.parametrize(
    ("logits", "possible"),
    [
        ([-inf, 0.0, -inf], {1}),
        ([-inf, 1.0, 1.0, -inf], {1, 2}),
        ([0.0, -inf, -inf, 0.0], {0, 3}),
        ([0.0, -200.0], {0}),
        ([-200.0, 0.0, -200.0], {1}),
    ],
)
def test_a_code_of_probability_zero_is_never_drawn(logits: list[float], possible: set[int], number: float) -> None:
    code = draw(torch.tensor([logits]), SamplingConfig(), torch.tensor([number], dtype=torch.float64))
    assert code.dtype == torch.int64
    assert code.item() in possible


@pytest.mark.parametrize("vocabulary", [2, 7, 1000, 16384])
def test_the_smallest_and_largest_number_give_a_code_of_the_vocabulary(vocabulary: int) -> None:
    logits = 3.0 * normal_input("draw/ends", (200, vocabulary))
    lowest, highest = (
        draw(logits, SamplingConfig(), torch.full((200,), number, dtype=torch.float64))
        for number in (0.0, LARGEST_UNIFORM)
    )
    assert (lowest == 0).all()
    assert highest.max() == vocabulary - 1
    assert (logits.gather(1, highest[:, None]).isfinite()).all()


def test_cumulative_sums_keep_small_probabilities_apart() -> None:
    # In float32 a sum near 1 has steps of 6e-8; these 2000 codes of 1e-10 each would be lost.
    logits = torch.cat([torch.zeros(1, 1), torch.full((1, 2000), -23.0)], dim=1)
    tail = 2000 * torch.tensor(-23.0).exp().double()
    numbers = 1 - tail * torch.linspace(0.05, 0.95, 50, dtype=torch.float64)
    codes = draw(logits.expand(50, -1), SamplingConfig(), numbers)
    assert (codes > 0).all()
    assert (codes.diff() < 0).all()


@pytest.mark.parametrize("config", [SamplingConfig(0.0), SamplingConfig(0.0, 5, 0.5), SamplingConfig(3.0, top_k=1)])
def test_temperature_zero_and_top_k_one_are_greedy(config: SamplingConfig) -> None:
    logits = normal_input("draw/greedy", (500, 40))
    assert torch.equal(draw(logits, config, uniform(0, torch.arange(500), 0)), logits.argmax(-1))


def test_a_low_temperature_sharpens_and_a_high_one_flattens() -> None:
    logits = normal_input("draw/logits", (1, 8))
    best = int(logits.argmax())
    shares = [frequencies(logits, SamplingConfig(temperature))[best].item() for temperature in (0.2, 0.5, 1.0, 4.0)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 1.5 * shares[2] > 2 * shares[3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_low_precision_are_drawn_from_in_float32(dtype: torch.dtype) -> None:
    logits = normal_input("draw/logits", (200, 3000)).to(dtype)
    numbers = uniform(0, torch.arange(200), 0)
    config = SamplingConfig(0.7, 500, 0.9)
    assert torch.equal(draw(logits, config, numbers), draw(logits.float(), config, numbers))


@pytest.mark.parametrize("temperature", [1e-38, 1e-45])
def test_a_tiny_temperature_is_greedy_and_never_leaves_the_vocabulary(temperature: float) -> None:
    logits = torch.tensor([[5.0, 90.0, 1.0]])
    assert draw(logits, SamplingConfig(temperature), torch.tensor([0.3], dtype=torch.float64)).item() == 1
