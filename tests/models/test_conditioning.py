"""A dropped condition is "no class" or "no caption", and it is dropped in training only."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llamagen.models.conditioning import CaptionEmbedder, LabelEmbedder, sample_dropped
from llamagen.models.gpt import GPT
from tests.small_models import codes_for, condition_for, small_gpt

KINDS = ["class", "text"]


def no_condition(gpt: GPT, batch_size: int) -> Tensor:
    """The condition "no class" or "no caption"."""
    if isinstance(gpt.cls_embedding, LabelEmbedder):
        return torch.full((batch_size,), gpt.config.num_classes)
    return gpt.cls_embedding.uncond_embedding.expand(batch_size, -1, -1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dropped_row_equals_a_row_without_a_condition(kind: str) -> None:
    gpt = small_gpt(condition=kind)
    condition, codes, dropped = condition_for(gpt, 3), codes_for(gpt, 3, 15), torch.tensor([True, False, True])
    with torch.no_grad():
        with_condition, without = gpt(codes, condition), gpt(codes, no_condition(gpt, 3))
        mixed = gpt(codes, condition, drop_condition=dropped)
    assert torch.equal(mixed, torch.where(dropped[:, None, None], without, with_condition))
    assert (with_condition != without).any(-1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_without_a_caption_keeps_the_padding_of_its_prompt(kind: str) -> None:
    gpt = small_gpt(condition=kind)
    condition, codes, dropped = condition_for(gpt, 3), codes_for(gpt, 3, 15), torch.ones(3, dtype=torch.bool)
    lengths = None if kind == "class" else torch.tensor([1, 3, 6])
    with torch.no_grad():
        found = gpt(codes, condition, caption_lengths=lengths, drop_condition=dropped)
        expected = gpt(codes, no_condition(gpt, 3), caption_lengths=lengths)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_conditions_are_dropped_in_training_only(kind: str) -> None:
    torch.manual_seed(0)
    gpt = small_gpt(condition=kind, condition_dropout=0.5)
    condition, codes = condition_for(gpt, 1).expand(64, *condition_for(gpt, 1).shape[1:]), codes_for(gpt, 64, 3)
    with torch.no_grad():
        with_condition, without = gpt(codes, condition), gpt(codes, no_condition(gpt, 64))
        trained = gpt.train()(codes, condition)
        kept = gpt(codes, condition, drop_condition=torch.zeros(64, dtype=torch.bool))
    is_with, is_without = ((trained == each).flatten(1).all(1) for each in (with_condition, without))
    assert (is_with ^ is_without).all()
    assert 16 <= int(is_without.sum()) <= 48
    assert torch.equal(kept, with_condition)


def test_no_condition_is_dropped_at_probability_zero() -> None:
    gpt = small_gpt(condition_dropout=0.0)
    condition, codes = condition_for(gpt, 4), codes_for(gpt, 4, 3)
    with torch.no_grad():
        assert torch.equal(gpt.train()(codes, condition), gpt.eval()(codes, condition))


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.9])
def test_conditions_are_dropped_at_the_configured_rate(probability: float) -> None:
    torch.manual_seed(0)
    dropped = sample_dropped(20000, probability, torch.device("cpu"))
    assert dropped.dtype == torch.bool
    assert dropped.float().mean().item() == pytest.approx(probability, abs=0.01)


def test_labels_are_rows_of_the_table() -> None:
    embedder = LabelEmbedder(4, 3)
    table = embedder.embedding_table.weight
    assert table.shape == (5, 3)
    found = embedder(torch.tensor([2, 0, 3]), torch.tensor([False, True, False]))
    assert torch.equal(found, table[[2, 4, 3]].unsqueeze(1))


def test_captions_pass_two_linear_layers_with_a_tanh_gelu() -> None:
    gpt = small_gpt(condition="text")
    embedder = gpt.cls_embedding
    assert isinstance(embedder, CaptionEmbedder)
    features = condition_for(gpt, 2)
    hidden = F.gelu(features @ embedder.cap_proj.fc1.weight.T, approximate="tanh")
    torch.testing.assert_close(embedder(features), hidden @ embedder.cap_proj.fc2.weight.T)


def test_the_unconditional_features_are_a_buffer_in_the_state_dict() -> None:
    torch.manual_seed(0)
    gpt = GPT(small_gpt(condition="text").config)
    name = "cls_embedding.uncond_embedding"
    assert name in gpt.state_dict()
    assert name not in dict(gpt.named_parameters())
    assert gpt.state_dict()[name].std().item() == pytest.approx(12**-0.5, rel=0.25)


def test_captions_of_another_dtype_are_cast_to_that_of_the_weights() -> None:
    gpt = small_gpt(condition="text")
    features, codes = condition_for(gpt, 2).bfloat16(), codes_for(gpt, 2, 3)
    with torch.no_grad():
        assert torch.equal(gpt(codes, features), gpt(codes, features.float()))
