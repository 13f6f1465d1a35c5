"""The decode loop equals an uncached one, does not depend on the batch and restores the model."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llamagen.models.kv_cache import LayerCache
from llamagen.sampling import SamplingConfig, generate
from tests.sampling.plain import SETTINGS, plain_loop
from tests.small_models import GPT_VARIANTS, caption_lengths_for, condition_for, small_gpt


@pytest.mark.parametrize("setting", list(SETTINGS))
@pytest.mark.parametrize("variant", list(GPT_VARIANTS))
def test_codes_equal_those_of_an_uncached_loop(variant: str, setting: str) -> None:
    gpt, config = small_gpt(**GPT_VARIANTS[variant]), SamplingConfig(**SETTINGS[setting])
    condition, lengths, indices = condition_for(gpt, 3), caption_lengths_for(gpt, 3), torch.tensor([4, 0, 77])
    expected = plain_loop(gpt, condition, config, lengths, 11, indices)
    found = generate(gpt, condition, config, caption_lengths=lengths, seed=11, indices=indices)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("setting", ["greedy, guided", "sampled", "sampled, guided", "sampled, guided for 1 code"])
@pytest.mark.parametrize("kind", ["class", "text"])
def test_codes_do_not_depend_on_the_batch(kind: str, setting: str) -> None:
    gpt, config = small_gpt(condition=kind), SamplingConfig(**SETTINGS[setting])
    condition, lengths, indices = condition_for(gpt, 5), caption_lengths_for(gpt, 5), torch.arange(10, 15)

    def sampled(rows: list[int]) -> Tensor:
        own = None if lengths is None else lengths[rows]
        return generate(gpt, condition[rows], config, caption_lengths=own, seed=3, indices=indices[rows])

    together = sampled([0, 1, 2, 3, 4])
    assert torch.equal(torch.cat([sampled([row]) for row in range(5)]), together)
    assert torch.equal(sampled([3, 0, 4, 1, 2]), together[[3, 0, 4, 1, 2]])
    assert len(together.unique(dim=0)) == 5


def test_seed_and_index_determine_the_codes() -> None:
    gpt, labels = small_gpt(), torch.zeros(3, dtype=torch.int64)
    codes = generate(gpt, labels, seed=0)
    assert torch.equal(generate(gpt, labels, seed=0), codes)
    assert torch.equal(generate(gpt, labels, seed=0, indices=torch.arange(3)), codes)
    assert len(codes.unique(dim=0)) == 3
    assert (generate(gpt, labels, seed=1) != codes).any(1).all()
    assert (generate(gpt, labels, seed=0, indices=torch.arange(3, 6)) != codes).any(1).all()


def test_greedy_codes_do_not_depend_on_seed_or_index() -> None:
    gpt, labels, greedy = small_gpt(), torch.arange(3), SamplingConfig(temperature=0.0)
    codes = generate(gpt, labels, greedy, seed=0)
    assert torch.equal(generate(gpt, labels, greedy, seed=1, indices=torch.tensor([9, 8, 7])), codes)


def test_the_default_settings_leave_the_distribution_of_the_model() -> None:
    gpt, labels = small_gpt(), torch.arange(3)
    assert torch.equal(generate(gpt, labels), generate(gpt, labels, SamplingConfig(1.0, 0, 1.0, 1.0, None)))


@pytest.mark.parametrize("kind", ["class", "text"])
@pytest.mark.parametrize("training", [True, False])
def test_sampling_restores_the_model_and_the_random_state(training: bool, kind: str) -> None:
    gpt = small_gpt(condition=kind, condition_dropout=0.5, token_dropout=0.5, resid_dropout=0.5)
    condition, config = condition_for(gpt, 3), SamplingConfig(**SETTINGS["sampled, guided"])
    expected = generate(gpt, condition, config)
    state = {name: value.clone() for name, value in gpt.state_dict().items()}
    gpt.train(training)
    torch.manual_seed(0)
    random_state = torch.get_rng_state()
    codes = generate(gpt, condition, config)
    assert torch.equal(codes, expected)
    assert {module.training for module in gpt.modules()} == {training}
    assert list(gpt.state_dict()) == list(state)
    assert [name for name, value in gpt.state_dict().items() if not torch.equal(value, state[name])] == []
    assert all(weight.requires_grad and weight.grad is None for weight in gpt.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_restored_after_an_error(training: bool) -> None:
    gpt = small_gpt().train(training)
    names = list(gpt.state_dict())
    calls: list[int] = []

    def fail_later(_module: nn.Module, _inputs: object) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise ArithmeticError

    handle = gpt.layers[1].register_forward_pre_hook(fail_later)
    with pytest.raises(ArithmeticError):
        generate(gpt, torch.arange(2), SamplingConfig(guidance_scale=2.0))
    handle.remove()
    assert {module.training for module in gpt.modules()} == {training}
    assert list(gpt.state_dict()) == names
    gpt(None, torch.arange(2)).sum().backward()


@pytest.mark.parametrize(
    ("setting", "doubled"),
    [
        ("sampled", 0),
        ("sampled, guided", 16),
        ("sampled, guided for 1 code", 1),
        ("greedy, guided for 5 codes", 5),
        ("sampled, guided for no code", 0),
    ],
)
def test_a_step_computes_one_token_a_row_and_guidance_doubles_the_rows(setting: str, doubled: int) -> None:
    gpt = small_gpt()
    shapes: list[tuple[int, ...]] = []
    gpt.layers[0].register_forward_pre_hook(lambda _module, inputs: shapes.append(tuple(inputs[0].shape[:2])))
    generate(gpt, torch.arange(3), SamplingConfig(**SETTINGS[setting]))
    assert shapes == [(6, 1)] * doubled + [(3, 1)] * (16 - doubled)


@pytest.mark.parametrize(
    ("weights", "autocast", "expected"),
    [
        (torch.float32, False, torch.float32),
        (torch.bfloat16, False, torch.bfloat16),
        (torch.float32, True, torch.bfloat16),
    ],
)
def test_the_cache_has_the_dtype_of_the_keys(weights: torch.dtype, autocast: bool, expected: torch.dtype) -> None:
    gpt = small_gpt().to(weights)
    found: set[torch.dtype] = set()

    def record(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        cache = inputs[3]
        assert isinstance(cache, LayerCache)
        found.update({cache.keys.dtype, cache.values.dtype})

    gpt.layers[0].register_forward_pre_hook(record)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        codes = generate(gpt, torch.arange(3), SamplingConfig(guidance_scale=2.0))
    assert found == {expected}
    assert codes.dtype == torch.int64
    assert 0 <= int(codes.min()) <= int(codes.max()) < 48


def test_no_labels_give_an_empty_batch() -> None:
    gpt = small_gpt()
    for scale in (1.0, 2.0):
        codes = generate(gpt, torch.empty(0, dtype=torch.int64), SamplingConfig(guidance_scale=scale))
        assert codes.shape == (0, 16)


@pytest.mark.parametrize(("labels", "named"), [([0, 7], "class 7"), ([-1, 3], "class -1"), ([1000], "class 1000")])
def test_rejects_unknown_classes_by_number(labels: list[int], named: str) -> None:
    gpt = small_gpt().train()
    with pytest.raises(ValueError, match=f"{named} .* 0 to 6"):
        generate(gpt, torch.tensor(labels))
    assert gpt.training


@pytest.mark.parametrize(
    ("kind", "shape"), [("class", (2, 1)), ("text", (2, 5, 12)), ("text", (6, 12)), ("text", (2,))]
)
def test_rejects_a_condition_of_another_shape(kind: str, shape: tuple[int, ...]) -> None:
    gpt = small_gpt(condition=kind)
    with pytest.raises(ValueError) as error:
        generate(gpt, torch.zeros(shape, dtype=torch.int64))
    assert f"not {shape}" in str(error.value)


@pytest.mark.parametrize("count", [1, 3])
def test_rejects_a_wrong_number_of_indices(count: int) -> None:
    with pytest.raises(ValueError, match=r"indices must have shape \(5,\)"):
        generate(small_gpt(), torch.zeros(5, dtype=torch.int64), indices=torch.arange(count))


@pytest.mark.parametrize("length", [0, 7])
def test_rejects_caption_lengths_out_of_range(length: int) -> None:
    gpt = small_gpt(condition="text")
    with pytest.raises(ValueError, match=f"caption_lengths holds {length}, not 1 to 6"):
        generate(gpt, condition_for(gpt, 2), caption_lengths=torch.tensor([3, length]))


def test_modules_in_evaluation_mode_stay_in_it() -> None:
    gpt = small_gpt().train()
    gpt.layers[0].eval()
    generate(gpt, torch.arange(2))
    assert gpt.training
    assert not gpt.layers[0].training
