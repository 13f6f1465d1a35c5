"""Sampling in any order of the grid, of target-aware models."""

from typing import Any

import pytest
import torch
from torch import Tensor

from llamagen.models.gpt import GPT
from llamagen.sampling import Sampler, SamplingConfig, generate
from llamagen.sampling.inputs import SamplingRequest
from tests.sampling.plain import SAMPLED, SETTINGS, plain_loop
from tests.small_models import caption_lengths_for, codes_for, condition_for, small_gpt

ENGINES = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
BATCH = 3
ORDERS = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(row)) for row in range(BATCH)])


def target_aware(**options: Any) -> GPT:
    return small_gpt(target_aware=True, **options)


def inputs(gpt: GPT) -> tuple[Tensor, dict[str, Any]]:
    options = {"caption_lengths": caption_lengths_for(gpt, BATCH), "indices": torch.arange(BATCH) * 37 + 4, "seed": 11}
    return condition_for(gpt, BATCH), options


@ENGINES
@pytest.mark.parametrize("count", [0, 1, 6])
@pytest.mark.parametrize("setting", ["sampled", "sampled, guided from code 3 to 9"])
@pytest.mark.parametrize("kind", ["class", "text"])
def test_codes_are_those_of_an_uncached_model_in_the_same_order(
    kind: str, setting: str, count: int, compiled: bool
) -> None:
    gpt, config = target_aware(condition=kind), SamplingConfig(**SETTINGS[setting])
    (condition, options), kept = inputs(gpt), codes_for(small_gpt(), BATCH, count)
    found = Sampler(gpt, 2, compiled=compiled)(condition, config, **options, kept=kept, order=ORDERS)
    lengths, indices = options["caption_lengths"], options["indices"]
    expected = plain_loop(gpt, condition, config, lengths, 11, indices, kept, ORDERS)
    assert torch.equal(found.gather(1, ORDERS), expected)
    assert torch.equal(found.gather(1, ORDERS)[:, :count], kept)


@ENGINES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_raster_order_is_the_default(dtype: torch.dtype, compiled: bool) -> None:
    gpt, config = target_aware().to(dtype), SamplingConfig(**SAMPLED, guidance_scale=2.0, window="auto")
    sampler, kept = Sampler(gpt, BATCH, compiled=compiled), codes_for(gpt, BATCH, 5)
    for given in (None, kept):
        expected = sampler(torch.arange(BATCH), SamplingConfig(**SAMPLED, guidance_scale=2.0), kept=given)
        assert torch.equal(sampler(torch.arange(BATCH), config, kept=given, order=torch.arange(16)), expected)


@ENGINES
def test_an_image_does_not_depend_on_the_batch_or_the_orders_of_others(compiled: bool) -> None:
    gpt, config = target_aware(), SamplingConfig(**SAMPLED, guidance_scale=2.0)
    (condition, options), kept = inputs(gpt), codes_for(gpt, BATCH, 6)
    sampler = Sampler(gpt, 2, compiled=compiled)
    expected = sampler(condition, config, **options, kept=kept, order=ORDERS)
    for row in range(BATCH):
        found = sampler(
            condition[row : row + 1],
            config,
            seed=11,
            indices=options["indices"][row : row + 1],
            kept=kept[row : row + 1],
            order=ORDERS[row],
        )
        assert torch.equal(found[0], expected[row])


def test_reports_have_the_final_codes_at_their_places() -> None:
    gpt, kept, seen = target_aware(), codes_for(small_gpt(), BATCH, 6), list[tuple[Tensor, int]]()
    codes = generate(
        gpt, torch.arange(BATCH), kept=kept, order=ORDERS, on_row=lambda codes, count, _: seen.append((codes, count))
    )
    assert [count for _, count in seen] == [6, 8, 12, 16]
    for found, count in seen:
        expected = torch.zeros_like(codes).scatter(1, ORDERS[:, :count], codes.gather(1, ORDERS[:, :count]))
        assert torch.equal(found, expected)


def test_keeping_all_codes_returns_them_in_raster_order() -> None:
    codes, seen = codes_for(small_gpt(), BATCH, 16), list[Tensor]()
    found = generate(
        target_aware(),
        torch.arange(BATCH),
        kept=codes.gather(1, ORDERS),
        order=ORDERS,
        on_row=lambda codes, *_: seen.append(codes),
    )
    assert torch.equal(found, codes)
    assert torch.equal(seen[0], codes)


def test_the_layer_of_values_that_are_not_finite_is_named_in_another_order() -> None:
    gpt = target_aware()
    with torch.no_grad():
        gpt.layers[1].attention.wo.weight.fill_(float("nan"))  # type: ignore[union-attr]
    with pytest.raises(FloatingPointError, match=r"layers\.1\.attention"):
        generate(gpt, [1, 2], order=ORDERS[:2])


def test_an_engine_of_the_raster_order_refuses_others(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = Sampler(target_aware(), BATCH)
    monkeypatch.setattr(sampler.decoder, "any_order", False)
    with pytest.raises(ValueError, match="compiled for the raster order only; leave compiled out for an order"):
        sampler([1], order=ORDERS[0])
    assert sampler([1]).shape == (1, 16)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (torch.arange(15), "order must have shape (16,) or (2, 16), the raster position of each code in the order of"),
        (torch.arange(48).view(3, 16), "not (3, 16)"),
        (
            torch.stack([torch.arange(16), torch.arange(1, 17)]),
            "order of image 1 is not a permutation of 0 to 15; name",
        ),
        (torch.zeros(16, dtype=torch.int64), "order of image 0 is not a permutation"),
        (torch.arange(16.0), "order must be integers, not torch.float32"),
    ],
)
def test_rejects_orders_that_do_not_fit(order: Tensor, message: str) -> None:
    with pytest.raises(ValueError) as error:
        generate(target_aware(), torch.arange(2), order=order)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_rejects_an_order_of_a_model_that_knows_only_the_raster_order() -> None:
    with pytest.raises(ValueError, match=r"generates in raster order only; use one that was trained in random orders"):
        generate(small_gpt(), [1], order=torch.arange(16))


def test_rejects_windows() -> None:
    with pytest.raises(ValueError, match="window is 4, but windows follow the raster order; set window to 1 or auto"):
        SamplingRequest.from_inputs(
            target_aware(), [1], SamplingConfig(window=4), None, 0, None, order=torch.arange(16)
        )
