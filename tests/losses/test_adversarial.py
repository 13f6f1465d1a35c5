"""Adversarial losses match published values and have the right gradients."""

import pytest
import torch
from torch import Tensor

from llamagen.losses import (
    ADVERSARIAL_LOSSES,
    hinge_discriminator_loss,
    hinge_generator_loss,
    logistic_discriminator_loss,
    non_saturating_generator_loss,
)
from tests.golden import golden, normal_input


def logits() -> tuple[Tensor, Tensor]:
    """Real and fake logits of the golden record."""
    real, fake = (normal_input(f"loss/{kind}", (2, 1, 6, 6)).requires_grad_() for kind in ("real", "fake"))
    return real, fake


def gradient(of: Tensor) -> Tensor:
    assert of.grad is not None
    return of.grad


def test_losses_match_published_values() -> None:
    real, fake = logits()
    record = golden("adversarial")
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx(record["hinge_d"], abs=1e-6)
    assert hinge_generator_loss(fake).item() == pytest.approx(record["hinge_g"], abs=1e-6)
    assert logistic_discriminator_loss(real, fake).item() == pytest.approx(record["vanilla_d"], abs=1e-6)


def test_the_swapped_arguments_of_the_published_non_saturating_loss_are_not_copied() -> None:
    real, fake = logits()
    record = golden("adversarial")
    game = ADVERSARIAL_LOSSES["non_saturating"]
    assert abs(game.discriminator(real, fake).item() - record["non_saturating_d_as_published"]) > 0.1
    assert abs(game.generator(fake).item() - record["non_saturating_g_as_published"]) > 0.1


@pytest.mark.parametrize("name", ADVERSARIAL_LOSSES)
def test_gradients_of_every_loss_have_the_right_sign(name: str) -> None:
    real, fake = (torch.zeros(4, requires_grad=True) for _ in range(2))
    ADVERSARIAL_LOSSES[name].discriminator(real, fake).backward()
    assert (gradient(real) < 0).all()
    assert (gradient(fake) > 0).all()
    fake.grad = None
    ADVERSARIAL_LOSSES[name].generator(fake).backward()
    assert (gradient(fake) < 0).all()


def test_discriminator_and_generator_losses_are_paired_as_in_their_papers() -> None:
    pairs = {
        "hinge": (hinge_discriminator_loss, hinge_generator_loss),
        "vanilla": (logistic_discriminator_loss, hinge_generator_loss),
        "non_saturating": (logistic_discriminator_loss, non_saturating_generator_loss),
    }
    assert pairs == ADVERSARIAL_LOSSES


def test_logistic_losses_equal_binary_cross_entropy() -> None:
    real, fake = logits()
    entropy = torch.nn.functional.binary_cross_entropy_with_logits
    expected = 0.5 * (entropy(real, torch.ones_like(real)) + entropy(fake, torch.zeros_like(fake)))
    torch.testing.assert_close(logistic_discriminator_loss(real, fake), expected)
    torch.testing.assert_close(non_saturating_generator_loss(fake), entropy(fake, torch.ones_like(fake)))


def test_logistic_losses_are_finite_for_large_wrong_logits() -> None:
    sure = torch.tensor([1e4], requires_grad=True)
    loss = logistic_discriminator_loss(-sure, sure) + non_saturating_generator_loss(-sure)
    loss.backward()
    assert loss.item() == pytest.approx(2e4)
    assert gradient(sure).item() == pytest.approx(2.0)


def test_the_non_saturating_gradient_is_largest_for_confidently_rejected_fakes() -> None:
    fake = torch.tensor([-8.0, 0.0, 8.0], requires_grad=True)
    non_saturating_generator_loss(fake).backward()
    torch.testing.assert_close(gradient(fake), -torch.sigmoid(-fake.detach()) / 3)


@pytest.mark.parametrize("name", ADVERSARIAL_LOSSES)
def test_real_and_fake_have_equal_weight_for_any_batch_sizes(name: str) -> None:
    real, fake = torch.tensor([0.3]), torch.tensor([-0.2])
    few = ADVERSARIAL_LOSSES[name].discriminator(real, fake)
    many = ADVERSARIAL_LOSSES[name].discriminator(real.expand(2, 1, 3, 3), fake)
    torch.testing.assert_close(few, many)


def test_the_hinge_discriminator_loss_has_gradients_only_inside_the_margin() -> None:
    real = torch.tensor([2.0, 1.5, 0.5, -3.0], requires_grad=True)
    fake = torch.tensor([-2.0, 0.5, 4.0], requires_grad=True)
    loss = hinge_discriminator_loss(real, fake)
    assert loss.item() == pytest.approx(0.5 * (4.5 / 4 + 6.5 / 3))
    loss.backward()
    torch.testing.assert_close(gradient(real), torch.tensor([0.0, 0.0, -0.125, -0.125]))
    torch.testing.assert_close(gradient(fake), torch.tensor([0.0, 1 / 6, 1 / 6]))


def test_the_hinge_generator_loss_has_gradients_for_all_logits() -> None:
    fake = torch.tensor([[-9.0, 0.0], [1.0, 9.0]], requires_grad=True)
    loss = hinge_generator_loss(fake)
    loss.backward()
    assert loss.item() == -0.25
    torch.testing.assert_close(gradient(fake), torch.full((2, 2), -0.25))


def test_confident_correct_logits_have_no_hinge_loss() -> None:
    assert hinge_discriminator_loss(torch.full((2, 3), 1.0), torch.full((4,), -1.0)).item() == 0.0
