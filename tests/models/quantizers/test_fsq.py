"""FSQ: codes and levels correspond one to one, and latents are bounded by a shifted tanh and rounded."""

import itertools

import pytest
import torch

from llamagen.models.quantizers import FSQ

LEVELS = [8, 5, 4, 3]


def test_codes_and_combinations_of_levels_correspond_one_to_one() -> None:
    fsq = FSQ(LEVELS)
    assert (fsq.size, fsq.dim) == (480, 4)
    vectors = fsq.lookup(torch.arange(480).view(1, 20, 24))
    found = {tuple(each) for each in vectors.movedim(1, -1).reshape(-1, 4).tolist()}
    steps = [[number / (count // 2) for number in range(-(count // 2), (count + 1) // 2)] for count in LEVELS]
    assert found == set(itertools.product(*steps))
    assert torch.equal(fsq(fsq.residual_input(vectors)).codes, torch.arange(480).view(1, 20, 24))


def test_the_first_channel_is_the_least_significant_digit() -> None:
    fsq = FSQ(LEVELS)
    digits = torch.tensor([7, 3, 0, 2])
    code = 7 + 8 * (3 + 5 * (0 + 4 * 2))
    expected = (digits - torch.tensor([4, 2, 2, 1])) / torch.tensor([4, 2, 2, 1])
    assert torch.equal(fsq.lookup(torch.tensor([[[code]]])).flatten(), expected)


def test_latents_are_bounded_by_a_shifted_tanh_and_rounded() -> None:
    torch.manual_seed(0)
    latent = 3 * torch.randn(2, 4, 3, 3, dtype=torch.float64)
    encoding = FSQ(LEVELS)(latent.float())
    for channel, count in enumerate(LEVELS):
        half = (count - 1) * (1 + 1e-3) / 2
        offset = 0.0 if count % 2 else 0.5
        shift = torch.atanh(torch.tensor(offset / half, dtype=torch.float64))
        bounded = torch.tanh(latent[:, channel] + shift) * half - offset
        torch.testing.assert_close(encoding.latent[:, channel].double(), bounded / (count // 2), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(encoding.quantized[:, channel].double(), bounded.round() / (count // 2))
    assert torch.equal(FSQ(LEVELS).lookup(encoding.codes), encoding.quantized)
    extreme = FSQ(LEVELS)(torch.tensor([-50.0, 50.0]).view(2, 1, 1, 1).expand(2, 4, 1, 1))
    assert extreme.codes.flatten().tolist() == [0, 479]


@pytest.mark.parametrize("levels", [[1024], [4096, 3]])
def test_many_levels_have_no_code_more(levels: list[int]) -> None:
    fsq = FSQ(levels)
    encoding = fsq(torch.tensor([-50.0, 50.0]).view(2, 1, 1, 1).expand(2, len(levels), 1, 1))
    assert encoding.codes.flatten().tolist() == [0, fsq.size - 1]
    assert torch.equal(fsq.lookup(encoding.codes), encoding.quantized)


def test_the_gradient_passes_the_rounding_straight_through() -> None:
    torch.manual_seed(0)
    latent = torch.randn(2, 4, 3, 3, requires_grad=True)
    upstream = torch.randn(2, 4, 3, 3)
    encoding = FSQ(LEVELS)(latent)
    through_rounding = torch.autograd.grad(encoding.quantized, latent, upstream, retain_graph=True)[0]
    through_bound = torch.autograd.grad(encoding.latent, latent, upstream)[0]
    assert torch.equal(through_rounding, through_bound)
    assert (through_bound != 0).all()


def test_an_infinite_latent_is_reported() -> None:
    fsq = FSQ(LEVELS)
    encoding = fsq(torch.full((1, 4, 1, 1), torch.inf))
    assert fsq.broken_parts(encoding)["the encoder's latent"]


@pytest.mark.parametrize("levels", [[8, 2], [], "88", [8, 4.5], 8])
def test_wrong_levels_are_an_error_of_one_line(levels: object) -> None:
    with pytest.raises(ValueError, match="levels of FSQ") as error:
        FSQ(levels)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
