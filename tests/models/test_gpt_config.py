"""GPTConfig rejects invalid shapes, and each of its options has an effect."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from llamagen.models.gpt import GPT, GPTConfig
from tests.golden import fill
from tests.small_models import CLASS_GPT, TEXT_GPT, codes_for, condition_for

# One change of every option; those of captions have an effect in a text model only.
CHANGES: dict[str, Any] = {
    "dim": 48,
    "n_layer": 3,
    "n_head": 8,
    "n_kv_head": 2,
    "multiple_of": 128,
    "ffn_dim_multiplier": 2.0,
    "rope_base": 100.0,
    "norm_eps": 0.1,
    "vocab_size": 50,
    "block_size": 25,
    "condition": "text",
    "num_classes": 8,
    "caption_dim": 13,
    "caption_length": 7,
    "condition_dropout": 0.5,
    "token_dropout": 0.5,
    "resid_dropout": 0.5,
    "ffn_dropout": 0.5,
    "attn_dropout": 0.5,
    "drop_path": 0.5,
    "rope_condition": "identity",
    "qk_norm": True,
    "adaptive_norm": True,
    "target_aware": True,
    "code_factors": [6, 8],
}
TRAINING_ONLY = [name for name in CHANGES if "drop" in name]


def compute(config: GPTConfig, training: bool) -> tuple[dict[str, torch.Size], Tensor]:
    """Shapes of the state dict, and logits with a fixed seed."""
    gpt = fill(GPT(config)).train(training)
    torch.manual_seed(0)
    with torch.no_grad():
        logits = gpt(codes_for(gpt, 6, config.block_size - 1), condition_for(gpt, 6))
    return {name: value.shape for name, value in gpt.state_dict().items()}, logits


def test_the_table_of_changes_covers_all_options() -> None:
    assert list(CHANGES) == [field.name for field in fields(GPTConfig)]


@pytest.mark.parametrize("option", CHANGES)
def test_every_option_changes_parameters_or_outputs(option: str) -> None:
    base = TEXT_GPT if option.startswith("caption") else CLASS_GPT
    shapes, logits = compute(base, training=True)
    again_shapes, again_logits = compute(base, training=True)
    assert shapes == again_shapes
    assert torch.equal(logits, again_logits)
    changed_shapes, changed_logits = compute(replace(base, **{option: CHANGES[option]}), training=True)
    assert changed_shapes != shapes or not torch.equal(changed_logits, logits)


@pytest.mark.parametrize("option", TRAINING_ONLY)
def test_dropout_is_off_in_evaluation(option: str) -> None:
    _, logits = compute(CLASS_GPT, training=False)
    _, dropped = compute(replace(CLASS_GPT, **{option: CHANGES[option]}), training=False)
    assert torch.equal(logits, dropped)


@pytest.mark.parametrize(
    ("options", "phrases"),
    [
        ({"dim": 0}, ("dim is 0",)),
        ({"n_layer": 0}, ("n_layer is 0",)),
        ({"n_head": -2}, ("n_head is -2",)),
        ({"multiple_of": 0}, ("multiple_of is 0",)),
        ({"vocab_size": 0}, ("vocab_size is 0",)),
        ({"block_size": 0}, ("block_size is 0",)),
        ({"num_classes": -1}, ("num_classes is -1",)),
        ({"caption_dim": 0}, ("caption_dim is 0",)),
        ({"caption_length": 0}, ("caption_length is 0",)),
        ({"dim": 32, "n_head": 3}, ("dim 32", "n_head 3")),
        ({"dim": 24, "n_head": 4}, ("dim 24", "n_head 4", "width 6")),
        ({"n_kv_head": 3}, ("n_kv_head 3", "n_head 4")),
        ({"n_kv_head": 0}, ("n_kv_head 0",)),
        ({"n_kv_head": -4}, ("n_kv_head -4",)),
        ({"n_kv_head": 8}, ("n_kv_head 8",)),
        ({"block_size": 250}, ("block_size 250",)),
        ({"condition": "image"}, ("'image'",)),
        ({"rope_condition": "none"}, ("'none'",)),
        ({"condition_dropout": 1.0}, ("condition_dropout is 1.0",)),
        ({"token_dropout": -0.1}, ("token_dropout is -0.1",)),
        ({"resid_dropout": 1.5}, ("resid_dropout is 1.5",)),
        ({"ffn_dropout": float("nan")}, ("ffn_dropout is nan",)),
        ({"attn_dropout": 2.0}, ("attn_dropout is 2.0",)),
        ({"drop_path": 1.0}, ("drop_path is 1.0",)),
        ({"code_factors": [6, 9]}, ("code_factors is [6, 9]", "vocab_size 48", "set it to [6, 8]")),
        ({"code_factors": [48, 1]}, ("code_factors is [48, 1]", "at least 2")),
        ({"code_factors": 6, "vocab_size": 47}, ("code_factors is 6", "leave it out")),
    ],
    ids=str,
)
def test_rejects_invalid_shapes_with_name_and_value(options: dict[str, Any], phrases: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:
        replace(CLASS_GPT, **options)
    assert [phrase for phrase in phrases if phrase not in str(error.value)] == []


@pytest.mark.parametrize(
    ("dim", "multiple_of", "multiplier", "expected"),
    [
        (768, 256, None, 2048),
        (1024, 256, None, 2816),
        (3200, 256, None, 8704),
        (96, 32, 1.3, 352),
        (96, 1, 1.3, 332),
        (100, 1, None, 266),
        (100, 1, 1.3, 345),
        (96, 256, None, 256),
        (100, 256, None, 512),
    ],
)
def test_ffn_dim_is_eight_thirds_scaled_and_rounded_up(
    dim: int, multiple_of: int, multiplier: float | None, expected: int
) -> None:
    config = GPTConfig(dim=dim, n_layer=1, n_head=1, multiple_of=multiple_of, ffn_dim_multiplier=multiplier)
    assert config.ffn_dim == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (8, 4, 4, 1)),
        ({"n_head": 8, "n_kv_head": 2}, (4, 2, 4, 1)),
        ({"condition": "text", "caption_length": 9, "block_size": 576}, (8, 4, 24, 9)),
    ],
)
def test_derived_sizes(options: dict[str, Any], expected: tuple[int, ...]) -> None:
    config = replace(CLASS_GPT, **options)
    assert (config.head_dim, config.kv_heads, config.grid_size, config.condition_length) == expected


@pytest.mark.parametrize("name", ["ffn_dim_multiplier", "rope_base", "norm_eps"])
def test_rejects_a_negative_scale(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is -1.0|{name} -1.0"):
        replace(CLASS_GPT, **{name: -1.0})
