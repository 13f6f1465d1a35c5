"""Quantisation losses match their formulas; published values are tested in tests/models/test_vqgan_golden.py."""

from math import exp, log

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llamagen.losses import codebook_loss, commitment_loss, entropy_loss
from tests.golden import normal_input


def pair() -> tuple[Tensor, Tensor]:
    """Entries and latents (2, 4, 3, 3), both with gradient."""
    return (
        normal_input("losses/entries", (2, 4, 3, 3)).requires_grad_(),
        normal_input("losses/latent", (2, 4, 3, 3)).requires_grad_(),
    )


def test_codebook_and_commitment_loss_equal_the_mean_squared_distance() -> None:
    entries, latent = pair()
    pairs = zip(entries.flatten().tolist(), latent.flatten().tolist(), strict=True)
    expected = sum((entry - value) ** 2 for entry, value in pairs) / 72
    assert codebook_loss(entries, latent).item() == pytest.approx(expected, rel=1e-5)
    assert commitment_loss(entries, latent).item() == pytest.approx(expected, rel=1e-5)


def test_the_codebook_loss_moves_only_entries() -> None:
    entries, latent = pair()
    codebook_loss(entries, latent).backward()
    assert latent.grad is None
    assert entries.grad is not None
    torch.testing.assert_close(entries.grad, 2 * (entries - latent).detach() / 72)


def test_the_commitment_loss_moves_only_latents() -> None:
    entries, latent = pair()
    commitment_loss(entries, latent).backward()
    assert entries.grad is None
    assert latent.grad is not None
    torch.testing.assert_close(latent.grad, 2 * (latent - entries).detach() / 72)


def slow_entropy_loss(vectors: list[list[float]], codebook: list[list[float]]) -> float:
    """Mean entropy of the assignments minus entropy of the mean assignment, in float64."""
    choices: list[list[float]] = []
    for vector in vectors:
        logits = [-sum((a - b) ** 2 for a, b in zip(vector, entry, strict=True)) / 0.01 for entry in codebook]
        weights = [exp(logit - max(logits)) for logit in logits]
        choices.append([weight / sum(weights) for weight in weights])
    each = sum(-sum(p * log(p) for p in choice if p > 0) for choice in choices) / len(choices)
    mean = [sum(column) / len(choices) for column in zip(*choices, strict=True)]
    return float(each + sum(p * log(p + 1e-5) for p in mean))


def test_the_entropy_loss_matches_its_formula() -> None:
    latent = F.normalize(normal_input("entropy/latent", (2, 3, 2, 5)), dim=1)
    codebook = F.normalize(normal_input("entropy/codebook", (200, 3)), dim=-1)
    expected = slow_entropy_loss(latent.movedim(1, -1).flatten(0, 2).tolist(), codebook.tolist())
    assert entropy_loss(latent, codebook).item() == pytest.approx(expected, abs=1e-3)
    assert abs(expected) > 0.5


def test_confident_uniform_assignments_minimise_the_entropy_loss() -> None:
    codebook = torch.eye(8)
    spread = codebook.T.reshape(1, 8, 2, 4)
    collapsed = codebook[:1].T.reshape(1, 8, 1, 1).expand(1, 8, 2, 4)
    undecided = torch.full((1, 8, 2, 4), 8**-0.5)
    assert entropy_loss(spread, codebook).item() == pytest.approx(-log(8), abs=1e-3)
    assert entropy_loss(collapsed, codebook).item() == pytest.approx(0.0, abs=1e-3)
    assert entropy_loss(undecided, codebook).item() == pytest.approx(0.0, abs=1e-3)


def test_the_entropy_loss_trains_encoder_and_codebook() -> None:
    latent = F.normalize(normal_input("entropy/latent", (2, 3, 2, 5)), dim=1).requires_grad_()
    codebook = F.normalize(normal_input("entropy/codebook", (200, 3)), dim=-1).requires_grad_()
    entropy_loss(latent, codebook).backward()
    for tensor in (latent, codebook):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
        assert tensor.grad.any()
