"""Properties of a GPT with any weights: causality, independent rows, masked padding, initial loss."""

from math import log

import pytest
import torch
from torch.nn import functional as F

from llamagen.models.gpt import GPT
from llamagen.models.transformer_block import DropPath, RMSNorm
from tests.small_models import GPT_VARIANTS, caption_lengths_for, codes_for, condition_for, small_gpt

VARIANTS = list(GPT_VARIANTS)


@pytest.mark.parametrize("changed", [0, 6, 14])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_code_changes_all_later_logits_and_no_earlier_one(variant: str, changed: int) -> None:
    gpt = small_gpt(**GPT_VARIANTS[variant])
    condition, lengths, codes = condition_for(gpt, 3), caption_lengths_for(gpt, 3), codes_for(gpt, 3, 15)
    other = codes.clone()
    other[:, changed] = (codes[:, changed] + 1) % gpt.config.vocab_size
    with torch.no_grad():
        before, after = (gpt(each, condition, caption_lengths=lengths) for each in (codes, other))
    differs = (before != after).flatten(2).any(2).all(0)
    assert differs.tolist() == [position > changed for position in range(16)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_condition_changes_every_logit(variant: str) -> None:
    gpt = small_gpt(**GPT_VARIANTS[variant])
    condition, lengths, codes = condition_for(gpt, 3), caption_lengths_for(gpt, 3), codes_for(gpt, 3, 15)
    with torch.no_grad():
        before, after = (gpt(codes, each, caption_lengths=lengths) for each in (condition, condition.flip(0)))
    assert (before != after)[[0, 2]].any(-1).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_does_not_depend_on_the_other_rows(variant: str) -> None:
    gpt = small_gpt(**GPT_VARIANTS[variant])
    condition, lengths, codes = condition_for(gpt, 4), caption_lengths_for(gpt, 4), codes_for(gpt, 4, 15)
    order = torch.tensor([0, 3, 3, 1])
    with torch.no_grad():
        together = gpt(codes, condition, caption_lengths=lengths)
        mixed = gpt(codes[order], condition[order], caption_lengths=None if lengths is None else lengths[order])
        alone = gpt(codes[:1], condition[:1], caption_lengths=None if lengths is None else lengths[:1])
    assert torch.equal(mixed[0], together[0])
    torch.testing.assert_close(mixed, together[order], atol=1e-5, rtol=0)
    torch.testing.assert_close(alone[0], together[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("rotation", ["zero", "identity"])
def test_the_content_of_padding_changes_no_logit(rotation: str) -> None:
    gpt = small_gpt(condition="text", rope_condition=rotation)
    features, codes, lengths = condition_for(gpt, 3), codes_for(gpt, 3, 15), torch.tensor([1, 4, 6])
    padding = torch.arange(6) < 6 - lengths[:, None]
    garbage = torch.where(padding[..., None], 100.0 * features.flip(0) + 7.0, features)
    with torch.no_grad():
        clean, dirty = (gpt(codes, each, caption_lengths=lengths) for each in (features, garbage))
        unmasked = gpt(codes, garbage)
    assert torch.equal(clean, dirty)
    assert not torch.equal(unmasked[:2], clean[:2])


@pytest.mark.parametrize("rotation", ["zero", "identity"])
def test_padding_attends_to_itself_only(rotation: str) -> None:
    gpt = small_gpt(condition="text", rope_condition=rotation)
    attention = gpt.layers[0].get_submodule("attention")
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []
    attention.register_forward_hook(lambda _module, inputs, output: calls.append((inputs[0], output)))
    lengths = torch.tensor([1, 4])
    padding = torch.arange(6) < 6 - lengths[:, None]
    with torch.no_grad():
        gpt(None, condition_for(gpt, 2), caption_lengths=lengths)
        ((x, found),) = calls
        values = x @ attention.get_parameter("wqkv.weight")[-32:].T
        expected = values @ attention.get_parameter("wo.weight").T
    torch.testing.assert_close(found[padding], expected[padding], atol=1e-5, rtol=0)
    assert not torch.allclose(found[1, -1], expected[1, -1], atol=1e-2)


@pytest.mark.parametrize("rotation", ["zero", "identity"])
def test_a_caption_without_padding_needs_no_lengths(rotation: str) -> None:
    gpt = small_gpt(condition="text", rope_condition=rotation)
    features, codes = condition_for(gpt, 2), codes_for(gpt, 2, 15)
    with torch.no_grad():
        plain, masked = gpt(codes, features), gpt(codes, features, caption_lengths=torch.tensor([6, 6]))
    torch.testing.assert_close(plain, masked, atol=1e-5, rtol=0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["class", "text"])
@pytest.mark.parametrize("count", [0, 1, 15])
def test_there_is_one_more_position_of_logits_than_codes(kind: str, training: bool, count: int) -> None:
    gpt = small_gpt(condition=kind).train(training)
    logits = gpt(codes_for(gpt, 2, count), condition_for(gpt, 2))
    assert logits.shape == (2, count + 1, 48)


def test_no_tokens_equal_an_empty_sequence() -> None:
    gpt = small_gpt()
    with torch.no_grad():
        assert torch.equal(gpt(None, condition_for(gpt, 2)), gpt(codes_for(gpt, 2, 0), condition_for(gpt, 2)))


@pytest.mark.parametrize("condition", ["class", "text"])
def test_the_first_training_loss_is_the_log_of_the_vocabulary_size(condition: str) -> None:
    torch.manual_seed(0)
    shape = small_gpt(condition=condition, condition_dropout=0.5, token_dropout=0.1, resid_dropout=0.1).config
    gpt = GPT(shape).train()
    codes = codes_for(gpt, 3, 16)
    logits = gpt(codes[:, :-1], condition_for(gpt, 3))
    assert logits.abs().max() == 0
    assert F.cross_entropy(logits.flatten(0, 1), codes.flatten()).item() == pytest.approx(log(48), abs=1e-6)


@pytest.mark.parametrize("condition", ["class", "text"])
def test_weights_are_initialized_as_published(condition: str) -> None:
    torch.manual_seed(0)
    gpt = GPT(small_gpt(condition=condition).config)
    for name, weight in gpt.named_parameters():
        if "norm" in name:
            assert (weight == 1).all(), name
        elif name == "output.weight":
            assert (weight == 0).all()
        else:
            assert weight.mean().abs().item() < 0.01, name
            assert weight.std().item() == pytest.approx(0.02, rel=0.2), name


def test_rms_norm_divides_by_the_root_mean_square_in_float32() -> None:
    norm = RMSNorm(4, eps=0.5)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        found = norm(torch.tensor([[1.0, -1.0, 3.0, 5.0]]))
    expected = torch.tensor([[1.0, -2.0, 9.0, 20.0]]) / (9.0 + 0.5) ** 0.5
    torch.testing.assert_close(found, expected)
    # 300² overflows float16, so only float32 can hold its mean square.
    low = norm.half()(torch.full((1, 4), 300.0, dtype=torch.float16))
    assert low.tolist() == [[1.0, 2.0, 3.0, 4.0]]


def test_drop_path_grows_linearly_with_depth() -> None:
    gpt = small_gpt(n_layer=5, drop_path=0.4)
    probabilities = [block.get_submodule("drop_path").probability for block in gpt.layers]
    assert probabilities == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_drop_path_skips_whole_examples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    branch = torch.ones(4000, 2, 3)
    kept = DropPath(0.25).train()(branch)
    assert set(kept.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert (kept == kept[:, :1, :1]).all()
    assert kept.mean().item() == pytest.approx(1.0, abs=0.03)
    assert torch.equal(DropPath(0.25).eval()(branch), branch)


def test_token_dropout_covers_the_condition() -> None:
    gpt = small_gpt(condition="text")
    lengths: list[int] = []
    gpt.tok_dropout.register_forward_hook(lambda _module, inputs, _output: lengths.append(inputs[0].shape[1]))
    gpt(codes_for(gpt, 2, 5), condition_for(gpt, 2))
    assert lengths == [gpt.config.caption_length + 5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_cast_model_computes_in_its_dtype(dtype: torch.dtype) -> None:
    gpt = small_gpt(condition="text")
    condition, codes = condition_for(gpt, 2), codes_for(gpt, 2, 15)
    with torch.no_grad():
        expected = gpt(codes, condition)
        found = gpt.to(dtype)(codes, condition)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=0.15 if dtype == torch.bfloat16 else 1e-4, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_a_gradient(variant: str) -> None:
    gpt = small_gpt(**GPT_VARIANTS[variant])
    lengths = caption_lengths_for(gpt, 7)
    gpt(codes_for(gpt, 7, 15), condition_for(gpt, 7), caption_lengths=lengths).square().mean().backward()
    for name, weight in gpt.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.any(), name
        assert weight.grad.isfinite().all(), name


def test_rejects_too_many_codes_with_their_number() -> None:
    gpt = small_gpt()
    with pytest.raises(ValueError, match=r"16 codes .* block_size 16"):
        gpt(codes_for(gpt, 2, 16), condition_for(gpt, 2))


@pytest.mark.parametrize("tokens", [None, torch.zeros(2, 3, dtype=torch.int64)])
def test_rejects_a_missing_condition(tokens: torch.Tensor | None) -> None:
    with pytest.raises(ValueError, match="missing at position 0"):
        small_gpt()(tokens)


@pytest.mark.parametrize(
    ("kind", "shape"), [("class", (2, 1)), ("class", ()), ("text", (2, 5, 12)), ("text", (2, 6, 13)), ("text", (2,))]
)
def test_rejects_a_condition_of_another_shape(kind: str, shape: tuple[int, ...]) -> None:
    gpt = small_gpt(condition=kind)
    dtype = torch.int64 if kind == "class" else torch.float32
    with pytest.raises(ValueError) as error:
        gpt(None, torch.zeros(shape, dtype=dtype))
    assert f"not {shape}" in str(error.value)


@pytest.mark.parametrize("shape", [(3,), (3, 2)])
def test_rejects_tokens_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"tokens must have shape \(2, T\)"):
        small_gpt()(torch.zeros(shape, dtype=torch.int64), torch.arange(2))


@pytest.mark.parametrize("lengths", [[2], [1, 2], [[1, 1, 1]]])
def test_rejects_a_wrong_number_of_caption_lengths(lengths: list[int]) -> None:
    gpt = small_gpt(condition="text")
    with pytest.raises(ValueError, match=r"caption_lengths must have shape \(3,\)"):
        gpt(None, condition_for(gpt, 3), caption_lengths=torch.tensor(lengths))


def test_a_class_model_rejects_caption_lengths() -> None:
    with pytest.raises(ValueError, match="belongs to a text-conditional model"):
        small_gpt()(None, torch.arange(2), caption_lengths=torch.tensor([1, 1]))
