"""IBQ: blocks and recomputation give the gradient of the plain softmax over all codes."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llamagen.models.quantizers import IBQ, ibq

SIZE, DIM = 48, 6


def plain(latent: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Quantised latents, codes and losses by one-hot vectors over all codes, without blocks."""
    vectors = latent.movedim(1, -1)
    vectors, codebook = vectors / vectors.norm(dim=-1, keepdim=True), codebook / codebook.norm(dim=1, keepdim=True)
    probabilities = (vectors @ codebook.T / 0.05).softmax(-1)
    codes = probabilities.argmax(-1)
    one_hot = F.one_hot(codes, len(codebook)).to(latent.dtype)
    quantized = (one_hot + probabilities - probabilities.detach()) @ codebook
    chosen, mean = one_hot @ codebook, probabilities.flatten(0, -2).mean(0)
    losses = {
        "codebook": (chosen - vectors.detach()).square().mean(),
        "commitment": (chosen.detach() - vectors).square().mean(),
        "index": (quantized - vectors).square().mean(),
        "entropy": -(probabilities * probabilities.log()).sum(-1).mean() + (mean * mean.log()).sum(),
    }
    return quantized.movedim(-1, 1), codes, losses


@pytest.mark.parametrize("block", [1 << 20, 7 * SIZE])
def test_values_and_gradients_equal_those_of_the_plain_softmax(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ibq, "BLOCK_ON_CPU", block)
    torch.manual_seed(0)
    quantizer = IBQ(SIZE, DIM)
    quantizer.set_loss_weights({"entropy": 1.0})
    latent, weight = torch.randn(2, DIM, 3, 5, requires_grad=True), quantizer.embedding.weight
    exact, codebook = (each.detach().double().requires_grad_() for each in (latent, weight))
    encoding = quantizer(latent)
    quantized, codes, losses = plain(exact, codebook)
    assert torch.equal(encoding.codes, codes)
    torch.testing.assert_close(encoding.quantized.double(), quantized)
    assert tuple(encoding.losses) == quantizer.loss_names == tuple(losses)
    upstream = torch.randn(2, DIM, 3, 5)
    outputs = {"quantized": ((encoding.quantized * upstream).sum(), (quantized * upstream).sum())}
    for name, (found, expected) in (outputs | {name: (encoding.losses[name], losses[name]) for name in losses}).items():
        torch.testing.assert_close(
            found.double(), expected, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: name + text
        )
        for own, wanted in (
            (torch.autograd.grad(found, each, retain_graph=True, allow_unused=True)[0], other)
            for each, other in zip(
                (latent, weight),
                torch.autograd.grad(expected, (exact, codebook), retain_graph=True, allow_unused=True),
                strict=True,
            )
        ):
            assert (own is None or not own.any()) == (wanted is None or not wanted.any()), name
            if own is not None and wanted is not None:
                torch.testing.assert_close(own.double(), wanted, rtol=1e-4, atol=1e-6)


def test_the_gradient_reaches_every_code() -> None:
    torch.manual_seed(0)
    quantizer = IBQ(SIZE, DIM)
    latent = torch.randn(1, DIM, 2, 2, requires_grad=True)
    encoding = quantizer(latent)
    assert encoding.codes.unique().numel() <= 4
    (gradient,) = torch.autograd.grad(encoding.quantized.square().sum(), quantizer.embedding.weight)
    assert (gradient.abs().amax(1) > 0).all()


def test_codes_can_be_moved() -> None:
    quantizer = IBQ(SIZE, DIM)
    quantizer.move_codes(torch.tensor([3, 5]), torch.ones(2, DIM))
    torch.testing.assert_close(quantizer.lookup(torch.tensor([[[5]]])).flatten(), torch.full((DIM,), DIM**-0.5))
    assert quantizer.learned_codes is quantizer.embedding.weight
