"""The hinge losses: published values, and gradients only where a judgement is not yet sure."""

import pytest
import torch

from llamagen.losses import hinge_discriminator_loss, hinge_generator_loss
from tests.golden import golden, normal_input


def test_hinge_losses_have_the_published_values() -> None:
    real, fake = (normal_input(f"loss/{kind}", (2, 1, 6, 6)) for kind in ("real", "fake"))
    record = golden("adversarial")
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx(record["hinge_d"], abs=1e-6)
    assert hinge_generator_loss(fake).item() == pytest.approx(record["hinge_g"], abs=1e-6)


def test_the_discriminator_learns_from_judgements_inside_the_margin_only() -> None:
    real = torch.tensor([2.0, 1.5, 0.5, -3.0], requires_grad=True)
    fake = torch.tensor([-2.0, 0.5, 4.0], requires_grad=True)
    loss = hinge_discriminator_loss(real, fake)
    assert loss.item() == pytest.approx(0.5 * (4.5 / 4 + 6.5 / 3))
    loss.backward()
    assert real.grad is not None
    assert fake.grad is not None
    torch.testing.assert_close(real.grad, torch.tensor([0.0, 0.0, -0.125, -0.125]))
    torch.testing.assert_close(fake.grad, torch.tensor([0.0, 1 / 6, 1 / 6]))


def test_the_generator_learns_from_every_judgement() -> None:
    fake = torch.tensor([[-9.0, 0.0], [1.0, 9.0]], requires_grad=True)
    loss = hinge_generator_loss(fake)
    loss.backward()
    assert loss.item() == -0.25
    assert fake.grad is not None
    torch.testing.assert_close(fake.grad, torch.full((2, 2), -0.25))


def test_sure_and_right_judgements_cost_nothing() -> None:
    assert hinge_discriminator_loss(torch.full((2, 3), 1.0), torch.full((4,), -1.0)).item() == 0.0
