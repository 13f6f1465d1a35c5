"""Adapters of a frozen GPT: without an effect at first, equal to merged weights afterwards."""

import sys
from typing import Any

import pytest
import torch

from llamagen.checkpoints.contents import weights_checksum
from llamagen.models.gpt import GPT
from llamagen.models.lora import (
    UP,
    Adapters,
    BaseWeights,
    LoRAConfig,
    add_adapters,
    base_entries,
    merged_entries,
    saved_entries,
)
from llamagen.sampling.decode_weights import DecodeWeights
from tests.golden import normal_input
from tests.small_models import caption_lengths_for, codes_for, condition_for, small_gpt

VARIANTS: dict[str, dict[str, Any]] = {
    "class": {"qk_norm": True, "adaptive_norm": True, "target_aware": True, "code_factors": (6, 8)},
    "text": {"condition": "text", "n_kv_head": 2},
}
LORA = LoRAConfig(rank=4, alpha=6.0)


def adapted(options: dict[str, Any], trained: bool, lora: LoRAConfig = LORA) -> GPT:
    """A small model with new adapters, or with adapters that have an effect."""
    gpt = small_gpt(**options)
    add_adapters(gpt, Adapters(lora, BaseWeights("base.pt", "0" * 64, False), 5), train_classes=True)
    if trained:
        with torch.no_grad():
            for name, parameter in gpt.named_parameters():
                if name.endswith(UP):
                    parameter.copy_(0.1 * normal_input(f"lora/{name}", tuple(parameter.shape)))
    return gpt.eval()


def merged(gpt: GPT, options: dict[str, Any]) -> GPT:
    """The model without adapters that computes the same."""
    plain = small_gpt(**options)
    plain.load_state_dict(merged_entries(base_entries(gpt), saved_entries(gpt), LORA))
    return plain


@torch.no_grad()
def logits(gpt: GPT) -> torch.Tensor:
    result: torch.Tensor = gpt(
        codes_for(gpt, 3, 15), condition_for(gpt, 3), caption_lengths=caption_lengths_for(gpt, 3)
    )
    return result


@pytest.mark.parametrize("variant", VARIANTS)
def test_new_adapters_change_no_output_and_merged_ones_equal_those_next_to_the_weights(variant: str) -> None:
    options = VARIANTS[variant]
    base = logits(small_gpt(**options))
    assert torch.equal(logits(adapted(options, trained=False)), base)
    gpt = adapted(options, trained=True)
    assert (logits(gpt) - base).abs().max() > 0.1
    plain = merged(gpt, options)
    torch.testing.assert_close(logits(plain), logits(gpt), rtol=0, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert weights_checksum(gpt) == weights_checksum(plain)


def test_adapters_scale_with_alpha_over_rank() -> None:
    layer, plain = (gpt.layers[0].attention.wo for gpt in (adapted({}, trained=True), small_gpt()))  # type: ignore[union-attr]
    x = normal_input("lora/x", (5, 32))
    factors = layer.lora_B["default"].weight @ layer.lora_A["default"].weight  # type: ignore[index, union-attr]
    torch.testing.assert_close(layer(x), plain(x) + 1.5 * x @ factors.T)  # type: ignore[operator]


def test_only_adapters_of_linear_layers_and_class_embeddings_train() -> None:
    trained = {
        variant: {name for name, each in adapted(options, False).named_parameters() if each.requires_grad}
        for variant, options in VARIANTS.items()
    }
    layers = [f"layers.{n}.{name}" for n in (0, 1) for name in ("attention.wqkv", "attention.wo")]
    layers += [f"layers.{n}.feed_forward.{name}" for n in (0, 1) for name in ("w1", "w2", "w3")]
    captions = [f"cls_embedding.cap_proj.{name}" for name in ("fc1", "fc2")]
    between = [f"second_factor.feed_forward.{name}" for name in ("w1", "w2", "w3")]

    def factors(names: list[str]) -> set[str]:
        return {f"{name}.lora_{each}.default.weight" for name in names for each in "AB"}

    assert trained["class"] == factors(layers + between) | {"cls_embedding.embedding_table.weight"}
    assert trained["text"] == factors(layers + captions)
    for options in VARIANTS.values():
        gpt = adapted(options, False)
        assert base_entries(gpt).keys() == small_gpt(**options).state_dict().keys()
        assert saved_entries(gpt).keys() == {name for name, each in gpt.named_parameters() if each.requires_grad}


@pytest.mark.parametrize(
    ("dtype", "int8"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)], ids=str
)
def test_compiled_steps_read_merged_weights_also_after_a_change(dtype: torch.dtype, int8: bool) -> None:
    gpt = adapted({}, trained=False)
    weights = DecodeWeights.from_gpt(gpt, dtype, int8)
    places = [tensor.data_ptr() for tensor in weights._tensors()]
    trained = adapted({}, trained=True)
    for current in (small_gpt(), merged(trained, {})):
        wanted = DecodeWeights.from_gpt(current, dtype, int8)._tensors()
        assert all(torch.equal(one, other) for one, other in zip(weights._tensors(), wanted, strict=True))
        gpt.load_state_dict(trained.state_dict())
        weights.refresh(gpt)
    assert [tensor.data_ptr() for tensor in weights._tensors()] == places


def test_merging_needs_no_peft_and_adding_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    gpt = adapted({}, trained=True)
    monkeypatch.setitem(sys.modules, "peft", None)
    merged(gpt, {})
    with pytest.raises(ValueError, match=r'lora needs peft .*\[lora\]"$'):
        adapted({}, trained=False)


def test_factors_of_another_rank_are_refused() -> None:
    gpt = adapted({}, trained=True)
    message = (
        r"layers.0.attention.wqkv has the shapes \(4, 32\) and \(96, 4\), but .* rank 2 need \(2, 32\) and \(96, 2\)$"
    )
    with pytest.raises(ValueError, match=message):
        merged_entries(base_entries(gpt), saved_entries(gpt), LoRAConfig(rank=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "lora.rank is 0; it must be at least 1"),
        ({"rank": 33}, "lora.rank is 33, but the smallest layer has a width of 32; choose less"),
        ({"alpha": 0.0}, "lora.alpha is 0.0; it must be positive and finite"),
        ({"dropout": 1.0}, "lora.dropout is 1.0; a probability must be at least 0 and below 1"),
    ],
)
def test_wrong_settings_are_errors_of_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        adapted({}, False, LoRAConfig(**options))
    assert str(error.value) == message


def test_dropout_acts_on_adapters_in_training_only() -> None:
    gpt = adapted({}, True, LoRAConfig(rank=4, alpha=6.0, dropout=0.5))
    assert torch.equal(logits(gpt), logits(adapted({}, True)))
    assert not torch.allclose(logits(gpt.train()), logits(gpt.train()))
