"""The adaptive weight and LeCAM."""

import pytest
import torch

from llamagen.losses import LeCAM, adaptive_weight


def test_the_adaptive_weight_is_the_ratio_of_the_gradient_norms() -> None:
    weight = torch.tensor([[1.0, 2.0]], requires_grad=True)
    pixels = (weight * torch.tensor([[3.0, 4.0]])).sum()  # gradient of norm 5
    game = (weight * torch.tensor([[0.0, 0.1]])).sum()
    found = adaptive_weight(pixels, game, weight)
    assert found.item() == pytest.approx(5 / (0.1 + 1e-4))
    assert not found.requires_grad
    assert weight.grad is None
    (pixels + found * game).backward()  # the graphs are retained


def test_the_adaptive_weight_is_bounded_if_the_discriminator_has_no_gradient() -> None:
    weight = torch.ones(3, requires_grad=True)
    assert adaptive_weight(1e6 * weight.sum(), 0 * weight.sum(), weight).item() == 1e4
    assert adaptive_weight(0 * weight.sum(), weight.sum(), weight).item() == 0


def test_the_loss_scale_prevents_underflow_in_float16() -> None:
    weight = torch.ones(4, dtype=torch.float16, requires_grad=True)
    pixels, game = (factor * weight.float().square().sum() for factor in (1e-9, 2e-9))
    assert adaptive_weight(pixels, game, weight).item() == 0
    # 2e-9 · norm 2 over 4e-9 · norm 2 and 1e-4
    found = adaptive_weight(pixels, game, weight, scale=2.0**16)
    assert found.item() == pytest.approx(4e-9 / (8e-9 + 1e-4), rel=0.1)


def test_the_adaptive_weight_is_nan_if_a_gradient_overflows() -> None:
    weight = torch.ones(4, dtype=torch.float16, requires_grad=True)
    pixels, game = (factor * weight.float().square().sum() for factor in (1.0, 10.0))
    assert adaptive_weight(pixels, game, weight, scale=2.0**14).isnan()
    assert adaptive_weight(game, pixels, weight, scale=2.0**14).isnan()


def test_lecam_averages_stay_in_float32() -> None:
    lecam = LeCAM().to(torch.bfloat16)
    for _ in range(300):
        lecam.update(torch.tensor(1.0, dtype=torch.bfloat16), torch.tensor(0.0))
        lecam.real.add_(0)
    lecam.update(torch.tensor(3.0), torch.tensor(0.0))
    assert lecam.real.item() == pytest.approx(1.02)


def test_lecam_averages_start_with_the_first_batch_and_follow_slowly() -> None:
    lecam = LeCAM()
    lecam.update(torch.tensor(1.0), torch.tensor(-2.0))
    assert (lecam.real.item(), lecam.fake.item()) == (1.0, -2.0)
    lecam.update(torch.tensor(2.0), torch.tensor(-2.0))
    assert lecam.real.item() == pytest.approx(1.01)
    assert lecam.fake.item() == pytest.approx(-2.0)


def test_lecam_penalises_logits_beyond_the_average_of_the_other_side() -> None:
    lecam = LeCAM()
    lecam.update(torch.tensor(1.0), torch.tensor(-1.0))
    real = torch.tensor([3.0, -5.0], requires_grad=True)
    fake = torch.tensor([-2.0, 4.0], requires_grad=True)
    loss = lecam(real, fake)
    # relu(3 + 1)² and 0; relu(1 + 2)² and 0, each halved by the mean
    assert loss.item() == pytest.approx(16 / 2 + 9 / 2)
    loss.backward()
    assert real.grad is not None
    assert fake.grad is not None
    assert real.grad.tolist() == [4.0, 0.0]
    assert fake.grad.tolist() == [-3.0, 0.0]


def test_lecam_averages_are_in_the_state_dict_and_have_no_gradient() -> None:
    lecam = LeCAM()
    lecam.update(torch.tensor(1.0, requires_grad=True), torch.tensor(0.5))
    assert {name: value.item() for name, value in lecam.state_dict().items()} == {
        "real": 1.0,
        "fake": 0.5,
        "started": 1.0,
    }
    assert not lecam.real.requires_grad
    assert not list(lecam.parameters())
