"""LFQ: signs, codes, and the exact entropy loss."""

import pytest
import torch

from llamagen.losses import factorized_entropy_loss
from llamagen.models.quantizers import LFQ


def brute_force_entropy_loss(latent: torch.Tensor) -> torch.Tensor:
    """The entropy loss with a softmax over all codes. ``latent`` (B, E, h, w)."""
    vectors = latent.movedim(1, -1).flatten(0, -2)
    codes = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=latent.dtype)] * vectors.shape[1])
    distances = (vectors[:, None] - codes.view(1, -1, vectors.shape[1])).square().sum(-1)
    probabilities = (-distances).softmax(-1)
    mean = probabilities.mean(0)
    return -(probabilities * probabilities.log()).sum(-1).mean() + (mean * mean.log()).sum()


@pytest.mark.parametrize("bits", [1, 4, 7])
def test_the_factorised_entropy_equals_that_over_all_codes(bits: int) -> None:
    torch.manual_seed(bits)
    latent = torch.randn(2, bits, 3, 5, requires_grad=True)
    exact = latent.detach().double().requires_grad_()
    loss, wanted = factorized_entropy_loss(latent), brute_force_entropy_loss(exact)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-6)
    (found,), (expected,) = torch.autograd.grad(loss, latent), torch.autograd.grad(wanted, exact)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


def test_the_entropy_of_certain_signs_has_a_finite_gradient() -> None:
    latent = torch.full((1, 18, 2, 2), 60.0, requires_grad=True)
    (gradient,) = torch.autograd.grad(factorized_entropy_loss(latent), latent)
    assert gradient.isfinite().all()


def test_codes_are_the_numbers_of_the_signs() -> None:
    lfq = LFQ(5)
    codes = torch.arange(32).view(1, 4, 8)
    signs = lfq.lookup(codes)
    assert torch.equal(signs.unique(), torch.tensor([-1.0, 1.0]))
    assert torch.equal(lfq(0.3 * signs).codes, codes)
    assert lfq.lookup(torch.tensor([[[6]]])).flatten().tolist() == [-1, 1, 1, -1, -1]  # 6 = 2 + 4


def test_the_gradient_passes_the_sign_straight_through() -> None:
    torch.manual_seed(0)
    latent = torch.randn(2, 5, 3, 3, requires_grad=True)
    upstream = torch.randn(2, 5, 3, 3)
    encoding = LFQ(5)(latent)
    torch.testing.assert_close(encoding.quantized, latent.sign(), rtol=0, atol=1e-6)
    assert torch.equal(torch.autograd.grad(encoding.quantized, latent, upstream)[0], upstream)


def test_the_entropy_loss_is_computed_only_if_it_has_a_weight() -> None:
    lfq, latent = LFQ(5), torch.randn(1, 5, 2, 2)
    assert lfq(latent).losses.keys() == {"commitment"}
    lfq.set_loss_weights({"entropy": 0.1})
    losses = lfq(latent).losses
    assert tuple(losses) == lfq.loss_names == ("commitment", "entropy")
    torch.testing.assert_close(losses["commitment"], (latent - latent.sign()).square().mean())
    assert losses["entropy"] == factorized_entropy_loss(latent)
