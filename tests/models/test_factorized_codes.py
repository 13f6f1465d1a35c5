"""Factorised prediction: two heads in sequence give one distribution over all codes, for training and for scoring."""

from dataclasses import replace
from math import log
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules import ARGenModule
from llamagen.losses import heads_cross_entropy, heads_token_nll
from llamagen.models import factorized_codes
from llamagen.models.gpt import GPT, KVCache
from tests.small_models import CLASS_GPT, caption_lengths_for, codes_for, condition_for, small_gpt

FACTORS = (6, 8)
BATCH = 3


def inputs(gpt: GPT) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, condition and caption lengths."""
    return codes_for(gpt, BATCH, 16), condition_for(gpt, BATCH), caption_lengths_for(gpt, BATCH)


def by_hand(gpt: GPT, hidden: Tensor) -> Tensor:
    """Log-probabilities (V1, V2) of the codes after one hidden state (D,), from the weights of both heads."""
    weights = {name.removeprefix("second_factor."): value for name, value in gpt.named_parameters()}

    def normalised(x: Tensor, gain: str) -> Tensor:
        return x / (x.square().mean() + gpt.config.norm_eps).sqrt() * weights[f"{gain}.weight"]

    rows = []
    first = F.log_softmax(dict(gpt.named_parameters())["output.weight"] @ hidden, 0)
    for a in range(FACTORS[0]):
        x = hidden + weights["embedding.weight"][a]
        inner = normalised(x, "ffn_norm")
        gate, up, down = (weights[f"feed_forward.{name}.weight"] for name in ("w1", "w3", "w2"))
        x = x + down @ (F.silu(gate @ inner) * (up @ inner))
        rows.append(
            first[a] + F.log_softmax(gpt.get_parameter("second_factor.output.weight") @ normalised(x, "norm"), 0)
        )
    return torch.stack(rows)


@torch.no_grad()
def test_the_joint_probabilities_are_those_of_both_heads_and_sum_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    gpt = small_gpt(code_factors=list(FACTORS))  # as YAML gives it
    codes, condition, _ = inputs(gpt)
    hidden = gpt.features(codes[:, :-1], condition)
    whole = gpt(codes[:, :-1], condition)
    assert whole.shape == (BATCH, 16, 48)
    monkeypatch.setattr(factorized_codes, "MAX_PAIRS", 7)  # blocks that end within a row
    found = gpt(codes[:, :-1], condition)
    torch.testing.assert_close(found, whole)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(BATCH, 16))
    for image, place in ((0, 0), (2, 15)):
        torch.testing.assert_close(found[image, place], by_hand(gpt, hidden[image, place]).flatten())
    first, second = (gpt.get_parameter(f"tok_embeddings.{name}.weight") for name in ("first", "second"))
    torch.testing.assert_close(gpt.tok_embeddings(codes), first[codes // 8] + second[codes % 8])


def test_the_loss_is_that_of_the_joint_probabilities_and_trains_every_part() -> None:
    gpt = small_gpt(code_factors=FACTORS)
    codes, condition, _ = inputs(gpt)
    joint = gpt(codes[:, :-1], condition).gather(2, codes[..., None])[..., 0]
    names, parameters = zip(*gpt.named_parameters(), strict=True)
    wanted = torch.autograd.grad(-joint.mean(), parameters)
    terms = gpt.head_terms(gpt.features(codes[:, :-1], condition).flatten(0, 1), codes.flatten())
    loss, nats = heads_cross_entropy(terms)
    torch.testing.assert_close(loss, -joint.mean())
    assert nats == loss
    for name, found, gradient in zip(names, torch.autograd.grad(loss, parameters), wanted, strict=True):
        torch.testing.assert_close(found, gradient, msg=name)
        assert found.abs().sum() > 0, name
    nll, rank = heads_token_nll(terms)
    torch.testing.assert_close(nll.view_as(codes), -joint)
    # The rank is the larger one of a among the first factors, and of b among the second factors given a.
    split = gpt(codes[:, :-1], condition).flatten(0, 1).unflatten(1, FACTORS)
    rows, a, b = torch.arange(codes.numel()), codes.flatten() // 8, codes.flatten() % 8
    ranks = [
        (each > each.gather(1, right[:, None])).sum(1) for each, right in ((split.logsumexp(2), a), (split[rows, a], b))
    ]
    assert torch.equal(rank, torch.maximum(*ranks))
    smooth = heads_cross_entropy(terms, label_smoothing=0.1, z_loss=0.5)
    logits = [term.head(term.hidden) for term in terms]
    each = [F.cross_entropy(x, term.targets, label_smoothing=0.1) for x, term in zip(logits, terms, strict=True)]
    squared = [0.5 * x.logsumexp(1).square().mean() for x in logits]
    torch.testing.assert_close(smooth, type(smooth)(sum(each) + sum(squared), nats))


def test_a_new_model_predicts_every_code_with_the_same_probability() -> None:
    gpt = GPT(replace(CLASS_GPT, code_factors=FACTORS))
    codes, condition, _ = inputs(gpt)
    torch.testing.assert_close(gpt(codes[:, :-1], condition), torch.full((BATCH, 16, 48), -log(48)))


@torch.no_grad()
def test_with_a_cache_the_probabilities_are_those_of_a_full_pass() -> None:
    gpt = small_gpt(code_factors=FACTORS, condition="text")
    codes, condition, lengths = inputs(gpt)
    expected = gpt(codes[:, :-1], condition, caption_lengths=lengths)
    cache = KVCache.allocate(gpt.config, BATCH)
    parts = [gpt(None, condition, caption_lengths=lengths, cache=cache)]
    parts += [gpt(part, caption_lengths=lengths, cache=cache) for part in codes[:, :-1].split([1, 4, 10], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected)


def test_weights_without_factors_and_with_other_factors_are_refused_by_name(tmp_path: Path) -> None:
    for own, other in (((6, 8), None), (None, (6, 8)), ((6, 8), (8, 6))):
        torch.save(small_gpt(code_factors=other).state_dict(), tmp_path / "weights.pt")
        with pytest.raises(ValueError) as error:
            ARGenModule(small_gpt(code_factors=own).config, init_from=tmp_path / "weights.pt")
        given, wanted = (None if factors is None else list(factors) for factors in (other, own))
        assert f"code_factors is {given}, but the model's is {wanted}; set code_factors to {given}" in str(error.value)
        assert "\n" not in str(error.value)
    gpt = small_gpt(code_factors=(6, 8))
    torch.save(gpt.state_dict(), tmp_path / "weights.pt")
    assert torch.equal(ARGenModule(gpt.config, init_from=tmp_path / "weights.pt").gpt.output.weight, gpt.output.weight)
