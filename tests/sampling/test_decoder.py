"""Passes of the decode loop: any order of the grid, several codes at once, and memory that calls do not share."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llamagen.models.gpt import GPT
from llamagen.sampling import SamplingConfig
from llamagen.sampling.cache_pool import CachePool
from llamagen.sampling.cpu.decoder import CPUCodeDecoder
from llamagen.sampling.decoder import CodeDecoder
from llamagen.sampling.eager import EagerCodeDecoder
from llamagen.sampling.inputs import SamplingRequest
from tests.small_models import (
    GPT_VARIANTS,
    HEAD_VARIANTS,
    RECIPE_VARIANTS,
    caption_lengths_for,
    codes_for,
    condition_for,
    small_gpt,
)

ENGINES: dict[str, Callable[[GPT, int, torch.dtype], CodeDecoder]] = {
    "eager": EagerCodeDecoder,
    "compiled": CPUCodeDecoder,
}
VARIANTS = {
    **GPT_VARIANTS,
    **{name: HEAD_VARIANTS[name] for name in ("heads of 32, text grouped", "heads of 100, class")},
    **{name: RECIPE_VARIANTS[name] for name in RECIPE_VARIANTS if "target" in name},
}
CHUNKS = {"one by one": (1,) * 15, "mixed": (5, 1, 9), "at once": (15,)}
ROWS = 3


def request_for(gpt: GPT, config: SamplingConfig | None = None) -> SamplingRequest:
    return SamplingRequest.from_inputs(gpt, condition_for(gpt, ROWS), config, caption_lengths_for(gpt, ROWS), 0, None)


def orders() -> Tensor:
    """A different random order of the grid for each row, (ROWS, 16). The first code is that of raster order."""
    generator = torch.Generator().manual_seed(1)
    rest = torch.stack([torch.randperm(15, generator=generator) + 1 for _ in range(ROWS)])
    return torch.cat([torch.zeros_like(rest[:, :1]), rest], dim=1)


def decoded(engine: str, gpt: GPT, chunks: tuple[int, ...], order: Tensor | None) -> Tensor:
    """Logits (ROWS, 16, V) of given codes, decoded in some passes."""
    codes, parts = codes_for(gpt, ROWS, 15), []
    passes: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * len(chunks)
    if order is not None:
        positions, targets = (part.split(list(chunks), dim=-1) for part in (order[..., :-1], order[..., 1:]))
        passes = list(zip(positions, targets if gpt.config.target_aware else [None] * len(chunks), strict=True))
    with torch.no_grad(), ENGINES[engine](gpt, ROWS, torch.float32).start(request_for(gpt)) as state:
        parts.append(state.prefill()[:, None].clone())
        for tokens, (places, following) in zip(codes.split(list(chunks), dim=1), passes, strict=True):
            parts.append(state.decode(tokens, places, following).clone())
    return torch.cat(parts, dim=1)


def expected(gpt: GPT, order: Tensor | None) -> Tensor:
    """The same logits of one full pass of the model."""
    codes, lengths = codes_for(gpt, ROWS, 15), caption_lengths_for(gpt, ROWS)
    positions, targets = None if order is None else order[..., :-1], order if gpt.config.target_aware else None
    with torch.no_grad():
        condition = condition_for(gpt, ROWS)
        return gpt(codes, condition, caption_lengths=lengths, positions=positions, targets=targets)


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=list(CHUNKS))
@pytest.mark.parametrize("order", ["raster", "one for all rows", "one for each row"])
@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("engine", list(ENGINES))
def test_decoding_in_any_order_equals_one_full_pass(
    engine: str, variant: str, order: str, chunks: tuple[int, ...]
) -> None:
    gpt = small_gpt(**VARIANTS[variant])
    places = {"raster": None, "one for all rows": orders()[0], "one for each row": orders()}[order]
    found = decoded(engine, gpt, chunks, places)
    torch.testing.assert_close(found, expected(gpt, places), atol=1e-5, rtol=0)


@pytest.mark.parametrize("engine", list(ENGINES))
def test_raster_positions_are_the_default(engine: str) -> None:
    for gpt in (small_gpt(condition="text"), small_gpt(target_aware=True)):
        for chunks in CHUNKS.values():
            assert torch.equal(decoded(engine, gpt, chunks, torch.arange(16)), decoded(engine, gpt, chunks, None))


def test_codes_in_one_compiled_pass_have_the_bits_of_codes_one_by_one() -> None:
    recipe = small_gpt(**RECIPE_VARIANTS["QK-norm, adaptive norms, target-aware"])
    for gpt in (small_gpt(condition="text", dim=144, n_head=3), recipe):
        for order in (None, orders()):
            alone = decoded("compiled", gpt, CHUNKS["one by one"], order)
            for chunks in CHUNKS.values():
                assert torch.equal(decoded("compiled", gpt, chunks, order), alone)


@pytest.mark.parametrize("engine", list(ENGINES))
def test_rejected_drafts_are_overwritten(engine: str) -> None:
    gpt = small_gpt()
    codes = codes_for(gpt, ROWS, 15)
    drafts = (codes + 1) % gpt.config.vocab_size
    with torch.no_grad(), ENGINES[engine](gpt, ROWS, torch.float32).start(request_for(gpt)) as state:
        state.prefill()
        state.decode(torch.cat([codes[:, :4], drafts[:, 4:9]], dim=1))
        state.cache.length -= 5
        found = state.decode(codes[:, 4:])
    torch.testing.assert_close(found, expected(gpt, None)[:, 5:], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (torch.arange(2), r"positions must have shape \(1,\) or \(3, 1\)"),
        (torch.tensor([16]), "positions 16 … 16 are out of range; the model takes 0 to 15"),
        (torch.tensor([0.0]), "positions must be integers"),
    ],
)
@pytest.mark.parametrize("engine", list(ENGINES))
def test_rejects_positions_that_do_not_fit(engine: str, positions: Tensor, message: str) -> None:
    gpt = small_gpt()
    with torch.no_grad(), ENGINES[engine](gpt, ROWS, torch.float32).start(request_for(gpt)) as state:
        state.prefill()
        with pytest.raises(ValueError, match=message):
            state.decode(codes_for(gpt, ROWS, 1), positions)


@pytest.mark.parametrize("engine", list(ENGINES))
def test_targets_are_needed_with_positions_by_target_aware_models_alone(engine: str) -> None:
    place = torch.arange(1)
    for gpt, targets, message in (
        (small_gpt(target_aware=True), None, "a target-aware model needs targets with positions"),
        (small_gpt(target_aware=True), torch.tensor([16]), "targets 16 … 16 are out of range"),
        (small_gpt(), place, "targets were passed to a model that is not target-aware; leave them out"),
    ):
        with torch.no_grad(), ENGINES[engine](gpt, ROWS, torch.float32).start(request_for(gpt)) as state:
            state.prefill()
            with pytest.raises(ValueError, match=message):
                state.decode(codes_for(gpt, ROWS, 1), place, targets)


@pytest.mark.parametrize("engine", list(ENGINES))
def test_overlapping_calls_do_not_share_memory(engine: str) -> None:
    gpt = small_gpt()
    decoder, request = ENGINES[engine](gpt, ROWS, torch.float32), request_for(gpt, SamplingConfig(top_k=9))
    with torch.no_grad():
        alone = decoder(request).codes
        with decoder.start(request) as one, decoder.start(request) as two:
            for state in (one, two):
                state.sample(state.prefill(), 0)
            for step in range(1, 16):  # in turns
                for state in (one, two):
                    state.advance(step)
            assert one.cache.keys.data_ptr() != two.cache.keys.data_ptr()
            assert torch.equal(one.codes, alone)
            assert torch.equal(two.codes, alone)


def test_a_pool_reuses_free_caches_and_replaces_small_ones() -> None:
    pool = CachePool(small_gpt().config, torch.device("cpu"), torch.float32)
    with pool.take(2) as first, pool.take(2) as second:
        assert first is not second
        first.advance(3)
    assert len(pool.free) == 2
    with pool.take(1) as again:
        assert again is first
        assert again.length == 0
    with pool.take(4) as larger:
        assert larger.keys.shape[1] == 4
    assert len(pool.free) == 2


def test_a_cache_returns_to_the_pool_after_an_error() -> None:
    pool = CachePool(small_gpt().config, torch.device("cpu"), torch.float32)
    with pytest.raises(ArithmeticError), pool.take(2):
        raise ArithmeticError
    assert len(pool.free) == 1
