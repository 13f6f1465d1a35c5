"""Positions of tokens: they change the rotary embedding, and a sequence may visit the grid in any order."""

import pytest
import torch
from torch import Tensor

from llamagen.models.gpt import GPT
from llamagen.models.kv_cache import KVCache
from tests.small_models import GPT_VARIANTS, caption_lengths_for, codes_for, condition_for, small_gpt

VARIANTS = list(GPT_VARIANTS)
ROWS, LENGTH = 3, 15


def orders() -> Tensor:
    """A different random order of the grid for each row, (ROWS, 16)."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(16, generator=generator) for _ in range(ROWS)])


def logits(gpt: GPT, positions: Tensor | None) -> Tensor:
    """Logits of one full pass, (ROWS, 16, V)."""
    codes, condition, lengths = codes_for(gpt, ROWS, LENGTH), condition_for(gpt, ROWS), caption_lengths_for(gpt, ROWS)
    with torch.no_grad():
        return gpt(codes, condition, caption_lengths=lengths, positions=positions)


@pytest.mark.parametrize("shape", [(LENGTH,), (ROWS, LENGTH)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_raster_positions_are_the_default(variant: str, shape: tuple[int, ...]) -> None:
    gpt = small_gpt(**GPT_VARIANTS[variant])
    assert torch.equal(logits(gpt, torch.arange(LENGTH).expand(shape)), logits(gpt, None))


@pytest.mark.parametrize("variant", VARIANTS)
def test_positions_select_rows_of_the_rotary_table(variant: str) -> None:
    gpt, order = small_gpt(**GPT_VARIANTS[variant]), orders()[0, :LENGTH]
    found = logits(gpt, order)
    raster, first = logits(gpt, None), gpt.config.condition_length
    gpt.rope = torch.cat([gpt.rope[:first], gpt.rope[first + order], gpt.rope[-1:]])
    assert torch.equal(logits(gpt, None), found)
    assert torch.equal(found[:, 0], raster[:, 0])
    assert not torch.allclose(found[:, -1], raster[:, -1], atol=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_row_may_have_its_own_order(variant: str) -> None:
    gpt, order = small_gpt(**GPT_VARIANTS[variant]), orders()[:, :LENGTH]
    together = logits(gpt, order)
    for row in range(ROWS):
        torch.testing.assert_close(together[row], logits(gpt, order[row])[row], atol=1e-5, rtol=0)


@pytest.mark.parametrize("chunks", [(0, *(1,) * LENGTH), (0, 5, 1, 9), (3, 4, 8)], ids=["one", "mixed", "prefill"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_decoding_in_a_random_order_equals_one_full_pass(variant: str, chunks: tuple[int, ...]) -> None:
    gpt, order = small_gpt(**GPT_VARIANTS[variant]), orders()[:, :LENGTH]
    codes, condition, lengths = codes_for(gpt, ROWS, LENGTH), condition_for(gpt, ROWS), caption_lengths_for(gpt, ROWS)
    cache, parts = KVCache.allocate(gpt.config, ROWS), []
    pairs = zip(codes.split(list(chunks), dim=1), order.split(list(chunks), dim=1), strict=True)
    with torch.no_grad():
        for call, (tokens, positions) in enumerate(pairs):
            given = condition if call == 0 else None
            parts.append(gpt(tokens, given, caption_lengths=lengths, cache=cache, positions=positions))
    torch.testing.assert_close(torch.cat(parts, dim=1), logits(gpt, order), atol=1e-5, rtol=0)


def test_rejected_drafts_are_discarded_by_lowering_the_length_of_the_cache() -> None:
    gpt = small_gpt()
    codes, condition, cache = codes_for(gpt, ROWS, LENGTH), condition_for(gpt, ROWS), KVCache.allocate(gpt.config, ROWS)
    drafts = codes.clone()
    drafts[:, 5:] = (drafts[:, 5:] + 1) % gpt.config.vocab_size
    with torch.no_grad():
        gpt(codes[:, :3], condition, cache=cache)
        window = gpt(drafts[:, 3:9], cache=cache)
        cache.length -= 4  # the window has two right codes
        rest = gpt(codes[:, 5:], cache=cache)
    expected = logits(gpt, None)
    torch.testing.assert_close(window[:, :2], expected[:, 4:6], atol=1e-5, rtol=0)
    torch.testing.assert_close(rest, expected[:, 6:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("recompute", [False, True], ids=["stored", "recomputed"])
def test_gradients_do_not_depend_on_how_an_order_is_passed(recompute: bool) -> None:
    gpt, order = small_gpt().train(), orders()[0, :LENGTH]
    gpt.checkpoint_activations(recompute)
    codes, condition, gradients = codes_for(gpt, ROWS, LENGTH), condition_for(gpt, ROWS), []
    for positions in (order, order.expand(ROWS, -1)):
        gpt.zero_grad()
        gpt(codes, condition, positions=positions).square().mean().backward()
        gradients.append(gpt.tok_embeddings.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
    assert gradients[0] is not None
    assert gradients[0].any()


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (torch.arange(14), r"positions must have shape \(15,\) or \(3, 15\), one for each token, not \(14,\)"),
        (torch.zeros(2, 15, dtype=torch.int64), r"not \(2, 15\)"),
        (torch.arange(15.0), "positions must be integers, not float32"),
        (torch.arange(2, 17), "positions 2 … 16 are out of range; the model takes 0 to 15"),
        (torch.arange(-1, 14), "positions -1 … 13 are out of range"),
    ],
)
def test_rejects_positions_that_do_not_fit(positions: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        logits(small_gpt(), positions)


def test_rejects_positions_without_tokens() -> None:
    gpt = small_gpt()
    with pytest.raises(ValueError, match="one for each token"):
        gpt(None, condition_for(gpt, ROWS), positions=torch.arange(1))
