"""The vector quantiser picks the nearest entry, passes gradients straight through, and computes in float32."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llamagen.losses import codebook_loss, commitment_loss, entropy_loss
from llamagen.models.vector_quantizer import VectorQuantizer, nearest_codes
from tests.golden import fill, normal_input


def quantizer() -> VectorQuantizer:
    return fill(VectorQuantizer(32, 4))


def latent() -> Tensor:
    """Raw latents (2, 4, 3, 5) with norms far from 1."""
    return 3.0 * normal_input("quantizer/latent", (2, 4, 3, 5))


def test_codes_are_the_nearest_entries() -> None:
    model, raw = quantizer(), latent()
    entries = F.normalize(model.embedding.weight.double(), dim=-1)
    codes = model(raw).codes
    assert codes.shape == (2, 3, 5)
    assert codes.dtype == torch.int64
    for batch in range(2):
        for row in range(3):
            for column in range(5):
                vector = raw[batch, :, row, column].double()
                distances = (entries - vector / vector.norm()).square().sum(-1)
                assert codes[batch, row, column] == distances.argmin()
    assert len(codes.unique()) > 8


def test_results_are_unit_vectors_and_consistent() -> None:
    model, raw = quantizer(), latent()
    quantized, codes, normalized, _ = model(raw)
    entries = model.lookup(codes)
    torch.testing.assert_close(normalized, raw / raw.norm(dim=1, keepdim=True))
    torch.testing.assert_close(entries.norm(dim=1), torch.ones(2, 3, 5))
    torch.testing.assert_close(quantized, entries)
    weight = model.embedding.weight[codes[1, 2, 3]]
    torch.testing.assert_close(entries[1, :, 2, 3], weight / weight.norm())


def test_codes_do_not_depend_on_the_norm_of_the_latent() -> None:
    model, raw = quantizer(), latent()
    assert torch.equal(model(raw).codes, model(100.0 * raw).codes)


def test_entries_are_quantised_to_themselves() -> None:
    model = quantizer()
    codes = torch.arange(32).view(2, 4, 4)
    assert torch.equal(model(model.lookup(codes)).codes, codes)


def test_gradients_pass_straight_through_to_the_normalised_latent() -> None:
    model, direction = quantizer(), normal_input("quantizer/direction", (2, 4, 3, 5))
    through, identity = (latent().requires_grad_() for _ in range(2))
    (model(through).quantized * direction).sum().backward()
    (F.normalize(identity, dim=1) * direction).sum().backward()
    assert through.grad is not None
    assert identity.grad is not None
    assert torch.equal(through.grad, identity.grad)
    assert through.grad.abs().max() > 0
    assert model.embedding.weight.grad is None


def test_losses_are_those_of_the_entries_and_latents() -> None:
    model = quantizer()
    quantized = model(latent())
    entries = model.lookup(quantized.codes)
    assert quantized.losses.keys() == {"codebook", "commitment"} == set(model.loss_names)
    assert torch.equal(quantized.losses["codebook"], codebook_loss(entries, quantized.latent))
    assert torch.equal(quantized.losses["commitment"], commitment_loss(entries, quantized.latent))


@pytest.mark.parametrize("training", [False, True])
def test_the_entropy_loss_is_computed_only_if_it_has_a_weight(training: bool) -> None:
    model = quantizer().train(training)
    model.set_loss_weights({"codebook": 0.0, "commitment": 0.0, "entropy": 0.1})
    found = model(latent())
    assert found.losses.keys() == {"codebook", "commitment", "entropy"} == set(model.loss_names)
    assert torch.equal(found.losses["entropy"], entropy_loss(found.latent, model.codebook()))
    model.set_loss_weights({"entropy": 0.0})
    assert model(latent()).losses.keys() == {"codebook", "commitment"} == set(model.loss_names)


def test_the_entropy_loss_takes_its_mean_over_ranks_in_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        called.append(x)
        return x

    monkeypatch.setattr("llamagen.models.vector_quantizer.mean_over_ranks", note)
    model = quantizer().eval()
    model.set_loss_weights({"entropy": 0.1})
    model(latent())  # ranks may have different numbers of batches, so none may wait for another
    assert not called
    model.train()(latent())
    assert [each.shape for each in called] == [(32,)]


def test_moved_codes_are_l2_normalised() -> None:
    model = quantizer()
    before = model.embedding.weight.detach().clone()
    model.move_codes(torch.tensor([3, 5]), 2.0 * torch.eye(4)[:2])
    assert torch.equal(model.embedding.weight[[3, 5]], torch.eye(4)[:2])
    others = [code for code in range(32) if code not in (3, 5)]
    assert torch.equal(model.embedding.weight[others], before[others])
    assert model.learned_codes is model.embedding.weight


def test_the_codebook_loss_reaches_only_the_codebook() -> None:
    model, raw = quantizer(), latent().requires_grad_()
    quantized = model(raw)
    quantized.losses["codebook"].backward()
    assert raw.grad is None
    gradient = model.embedding.weight.grad
    assert gradient is not None
    chosen = torch.zeros(32, dtype=torch.bool).index_fill(0, quantized.codes.flatten(), True)
    assert torch.equal(gradient.ne(0).any(-1), chosen)


def test_the_commitment_loss_reaches_only_the_encoder() -> None:
    model, raw = quantizer(), latent().requires_grad_()
    quantized = model(raw)
    quantized.losses["commitment"].backward()
    assert model.embedding.weight.grad is None
    assert raw.grad is not None
    assert raw.grad.ne(0).any(1).all()


def test_a_step_on_the_codebook_loss_moves_entries_towards_latents() -> None:
    model, raw = quantizer(), latent()
    before = model(raw).losses["codebook"]
    before.backward()
    with torch.no_grad():
        assert model.embedding.weight.grad is not None
        model.embedding.weight -= 0.5 * model.embedding.weight.grad
        assert model(raw).losses["codebook"] < before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantisation_is_float32_under_autocast(dtype: torch.dtype) -> None:
    # bfloat16 cannot tell these entries apart: dot products in low precision would pick others.
    model, raw = VectorQuantizer(256, 4), latent().to(dtype)
    with torch.no_grad():
        model.embedding.weight.copy_(torch.ones(4) + 0.01 * normal_input("quantizer/close", (256, 4)))
    expected = model(raw.float())
    with torch.autocast("cpu", torch.bfloat16):
        found = model(raw)
    assert torch.equal(found.codes, expected.codes)
    assert [part.dtype for part in (found.quantized, found.latent, *found.losses.values())] == [torch.float32] * 4
    assert torch.equal(found.latent, expected.latent)
    assert found.losses == expected.losses
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.lookup(found.codes), model.lookup(expected.codes))


def test_initial_entries_are_distinct_points_on_the_unit_sphere() -> None:
    torch.manual_seed(0)
    weight = VectorQuantizer(64, 8).embedding.weight
    torch.testing.assert_close(weight.norm(dim=-1), torch.ones(64))
    assert len(weight.unique(dim=0)) == 64


def test_the_published_usage_window_is_kept_but_never_updated() -> None:
    model = quantizer().train()
    model(latent())
    window = model.state_dict()["codebook_used"]
    assert window.shape == (65536,)
    assert window.abs().max() == 0
    assert not window.requires_grad


@pytest.mark.parametrize("limit", [1, 7, 64, 1 << 18])
def test_codes_do_not_depend_on_the_block_size(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = F.normalize(normal_input("blocks/latent", (3, 4, 5, 2)), dim=1)
    codebook = F.normalize(normal_input("blocks/codebook", (16, 4)), dim=1)
    expected = torch.cdist(vectors.movedim(1, -1).reshape(-1, 4), codebook).argmin(1).view(3, 5, 2)
    largest = 0
    argmax = torch.Tensor.argmax

    def watched(x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, x.numel())
        return argmax(x, *arguments, **options)

    monkeypatch.setattr("llamagen.models.vector_quantizer.MAX_SIMILARITIES_ON_CPU", limit)
    monkeypatch.setattr(torch.Tensor, "argmax", watched)
    assert torch.equal(nearest_codes(vectors, codebook), expected)
    assert largest == min(max(limit // 16, 1), 30) * 16


def test_the_first_of_equal_entries_is_chosen() -> None:
    codebook = F.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), dim=1)
    assert nearest_codes(torch.tensor([1.0, 0.0]).view(1, 2, 1, 1), codebook).item() == 0
