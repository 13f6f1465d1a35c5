"""The adversarial losses: published values, and gradients for whom each judgement concerns."""

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
    """Real and fake, those of the golden record."""
    real, fake = (normal_input(f"loss/{kind}", (2, 1, 6, 6)).requires_grad_() for kind in ("real", "fake"))
    return real, fake


def gradient(of: Tensor) -> Tensor:
    assert of.grad is not None
    return of.grad


def test_losses_have_the_published_values() -> None:
    real, fake = logits()
    record = golden("adversarial")
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx(record["hinge_d"], abs=1e-6)
    assert hinge_generator_loss(fake).item() == pytest.approx(record["hinge_g"], abs=1e-6)
    assert logistic_discriminator_loss(real, fake).item() == pytest.approx(record["vanilla_d"], abs=1e-6)


def test_the_published_non_saturating_losses_with_swapped_arguments_are_not_repeated() -> None:
    real, fake = logits()
    record = golden("adversarial")
    game = ADVERSARIAL_LOSSES["non_saturating"]
    assert abs(game.discriminator(real, fake).item() - record["non_saturating_d_as_published"]) > 0.1
    assert abs(game.generator(fake).item() - record["non_saturating_g_as_published"]) > 0.1


@pytest.mark.parametrize("name", ADVERSARIAL_LOSSES)
def test_every_game_moves_judgements_and_images_the_right_way(name: str) -> None:
    real, fake = (torch.zeros(4, requires_grad=True) for _ in range(2))
    ADVERSARIAL_LOSSES[name].discriminator(real, fake).backward()
    assert (gradient(real) < 0).all()
    assert (gradient(fake) > 0).all()
    fake.grad = None
    ADVERSARIAL_LOSSES[name].generator(fake).backward()
    assert (gradient(fake) < 0).all()


def test_the_games_are_paired_as_their_papers_pair_them() -> None:
    pairs = {
        "hinge": (hinge_discriminator_loss, hinge_generator_loss),
        "vanilla": (logistic_discriminator_loss, hinge_generator_loss),
        "non_saturating": (logistic_discriminator_loss, non_saturating_generator_loss),
    }
    assert pairs == ADVERSARIAL_LOSSES


def test_logistic_losses_are_cross_entropies_of_the_judgement() -> None:
    real, fake = logits()
    entropy = torch.nn.functional.binary_cross_entropy_with_logits
    expected = 0.5 * (entropy(real, torch.ones_like(real)) + entropy(fake, torch.zeros_like(fake)))
    torch.testing.assert_close(logistic_discriminator_loss(real, fake), expected)
    torch.testing.assert_close(non_saturating_generator_loss(fake), entropy(fake, torch.ones_like(fake)))


def test_logistic_losses_stay_finite_for_logits_that_are_very_sure_and_wrong() -> None:
    sure = torch.tensor([1e4], requires_grad=True)
    loss = logistic_discriminator_loss(-sure, sure) + non_saturating_generator_loss(-sure)
    loss.backward()
    assert loss.item() == pytest.approx(2e4)
    assert gradient(sure).item() == pytest.approx(2.0)


def test_the_non_saturating_generator_learns_most_where_it_is_found_out() -> None:
    fake = torch.tensor([-8.0, 0.0, 8.0], requires_grad=True)
    non_saturating_generator_loss(fake).backward()
    torch.testing.assert_close(gradient(fake), -torch.sigmoid(-fake.detach()) / 3)


@pytest.mark.parametrize("name", ADVERSARIAL_LOSSES)
def test_real_and_fake_count_the_same_whatever_their_numbers(name: str) -> None:
    real, fake = torch.tensor([0.3]), torch.tensor([-0.2])
    few = ADVERSARIAL_LOSSES[name].discriminator(real, fake)
    many = ADVERSARIAL_LOSSES[name].discriminator(real.expand(2, 1, 3, 3), fake)
    torch.testing.assert_close(few, many)


def test_the_discriminator_learns_from_judgements_inside_the_margin_only() -> None:
    real = torch.tensor([2.0, 1.5, 0.5, -3.0], requires_grad=True)
    fake = torch.tensor([-2.0, 0.5, 4.0], requires_grad=True)
    loss = hinge_discriminator_loss(real, fake)
    assert loss.item() == pytest.approx(0.5 * (4.5 / 4 + 6.5 / 3))
    loss.backward()
    torch.testing.assert_close(gradient(real), torch.tensor([0.0, 0.0, -0.125, -0.125]))
    torch.testing.assert_close(gradient(fake), torch.tensor([0.0, 1 / 6, 1 / 6]))


def test_the_generator_learns_from_every_judgement() -> None:
    fake = torch.tensor([[-9.0, 0.0], [1.0, 9.0]], requires_grad=True)
    loss = hinge_generator_loss(fake)
    loss.backward()
    assert loss.item() == -0.25
    torch.testing.assert_close(gradient(fake), torch.full((2, 2), -0.25))


def test_sure_and_right_judgements_cost_nothing() -> None:
    assert hinge_discriminator_loss(torch.full((2, 3), 1.0), torch.full((4,), -1.0)).item() == 0.0
