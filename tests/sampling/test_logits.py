"""Top-k and top-p keep the right codes, and samples follow the distribution of the kept codes."""

from math import inf

import pytest
import torch
from torch import Tensor

from llamagen.sampling import SamplingConfig, code_counters, filter_logits, guide, gumbel, sample_codes, seed_tensor
from tests.golden import golden, normal_input


def noise_for(logits: Tensor) -> Tensor:
    return gumbel(seed_tensor(0), torch.arange(len(logits)), torch.tensor(0), code_counters(logits.shape[1]))


def kept(logits: Tensor) -> list[list[int]]:
    """Codes of each row that the filter keeps."""
    return [row.isfinite().nonzero().flatten().tolist() for row in logits]


def log_probabilities(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities]).log()


def frequencies(logits: Tensor, config: SamplingConfig, count: int = 20_000) -> Tensor:
    """Count how often each code of one row of logits (1, V) is sampled, (V,) int64."""
    rows = logits.expand(count, -1)
    codes = sample_codes(rows, config, noise_for(rows))
    return torch.bincount(codes, minlength=logits.shape[-1])


def assert_follows(observed: Tensor, probabilities: Tensor) -> None:
    """Chi-square test: no code of probability 0, and a deviation that occurs by chance once in 1000 times."""
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
        ((0.4, 0.3, 0.2, 0.1), 2, 0.5, [0]),  # 0.4 is more than half of the 0.7 that top-k keeps
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
def test_filtering_does_not_change_its_input(top_k: int, top_p: float) -> None:
    logits = normal_input("filter/logits", (4, 50))
    before = logits.clone()
    filter_logits(logits, top_k, top_p)
    sample_codes(logits, SamplingConfig(0.7, top_k, top_p), noise_for(logits))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_distribution_at_a_temperature(temperature: float) -> None:
    logits = normal_input("draw/logits", (1, 8))
    assert_follows(frequencies(logits, SamplingConfig(temperature)), (logits[0] / temperature).softmax(-1))


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (0, 0.7), (5, 0.7)])
def test_samples_follow_the_distribution_of_the_kept_codes(top_k: int, top_p: float) -> None:
    logits = normal_input("draw/logits", (1, 8))
    probabilities = filter_logits(logits, top_k, top_p)[0].softmax(-1)
    assert 1 < (probabilities > 0).sum() < 8
    assert_follows(frequencies(logits, SamplingConfig(1.0, top_k, top_p)), probabilities)


def test_top_p_counts_the_probabilities_at_the_temperature() -> None:
    logits = log_probabilities(0.7, 0.2, 0.1)
    assert frequencies(logits, SamplingConfig(1.0, top_p=0.6)).count_nonzero() == 1
    assert frequencies(logits, SamplingConfig(4.0, top_p=0.6)).count_nonzero() == 2


def test_a_row_has_its_own_noise_and_its_own_filter() -> None:
    logits = torch.tensor([[0.0, 0.0, -inf], [0.0, 0.0, -inf], [-inf, 0.0, 0.0], [9.0, 0.0, 0.0]])
    noise = torch.tensor([[1.0, 0.0, 9.0], [0.0, 1.0, 9.0], [9.0, 0.0, 1.0], [0.0, 20.0, 0.0]])
    assert sample_codes(logits, SamplingConfig(top_p=0.99), noise).tolist() == [0, 1, 2, 0]


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
def test_a_code_of_probability_zero_is_never_sampled(logits: list[float], possible: set[int]) -> None:
    rows = torch.tensor([logits]).expand(3000, -1)
    codes = sample_codes(rows, SamplingConfig(), noise_for(rows))
    assert codes.dtype == torch.int64
    assert set(codes.tolist()) == possible


def test_codes_of_probability_one_millionth_are_sampled_as_often_as_expected() -> None:
    # One likely code and 16,383 codes of 1e-6 each, which uniform numbers of low resolution would never sample.
    rows = torch.cat([torch.zeros(1, 1), torch.full((1, 16_383), -13.8)], dim=1).expand(2000, -1)
    share = (sample_codes(rows, SamplingConfig(), noise_for(rows)) > 0).double().mean().item()
    expected = 1 - rows[0].double().softmax(-1)[0].item()
    assert share == pytest.approx(expected, abs=4 * (expected / 2000) ** 0.5)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.75, 4.0])
def test_guidance_moves_away_from_the_unconditional_rows(scale: float) -> None:
    logits = normal_input("guide/logits", (6, 50))
    expected = scale * logits[:3] + (1 - scale) * logits[3:]
    torch.testing.assert_close(guide(logits, torch.tensor(scale)), expected, atol=1e-5, rtol=0)


def test_a_scale_of_one_gives_the_conditional_rows_bit_for_bit() -> None:
    logits = normal_input("guide/logits", (6, 50))
    assert torch.equal(guide(logits, torch.tensor(1.0)), logits[:3])


@pytest.mark.parametrize(("top_k", "top_p"), [(2, 1.0), (0, 0.4), (2, 0.4)])
def test_equally_likely_codes_are_kept_or_excluded_together(top_k: int, top_p: float) -> None:
    assert kept(filter_logits(log_probabilities(0.3, 0.1, 0.3, 0.3), top_k, top_p)) == [[0, 2, 3]]


@pytest.mark.parametrize("config", [SamplingConfig(0.0), SamplingConfig(0.0, 5, 0.5), SamplingConfig(3.0, top_k=1)])
def test_temperature_zero_and_top_k_one_are_greedy(config: SamplingConfig) -> None:
    logits = normal_input("draw/greedy", (500, 40))
    assert torch.equal(sample_codes(logits, config, noise_for(logits)), logits.argmax(-1))


def test_a_low_temperature_sharpens_and_a_high_one_flattens() -> None:
    logits = normal_input("draw/logits", (1, 8))
    best = int(logits.argmax())
    shares = [frequencies(logits, SamplingConfig(temperature))[best].item() for temperature in (0.2, 0.5, 1.0, 4.0)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 1.5 * shares[2] > 2 * shares[3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_low_precision_are_sampled_in_float32(dtype: torch.dtype) -> None:
    logits = normal_input("draw/logits", (200, 3000)).to(dtype)
    noise = noise_for(logits)
    config = SamplingConfig(0.7, 500, 0.9)
    assert torch.equal(sample_codes(logits, config, noise), sample_codes(logits.float(), config, noise))


@pytest.mark.parametrize("temperature", [1e-38, 1e-45])
def test_a_tiny_temperature_is_greedy_and_never_leaves_the_vocabulary(temperature: float) -> None:
    logits = torch.tensor([[5.0, 90.0, 1.0]])
    assert sample_codes(logits, SamplingConfig(temperature), noise_for(logits)).item() == 1
