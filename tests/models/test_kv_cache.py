"""Decoding with a cache computes the same function as without one, and does not change the model."""

import pytest
import torch

from llamagen.models.kv_cache import KVCache
from tests.small_models import CLASS_GPT, GPT_VARIANTS, caption_lengths_for, codes_for, condition_for, small_gpt

# Numbers of codes of each call, the first one with the condition; 15 of 16 codes in total.
CHUNKS = {"one by one": (0, *(1,) * 15), "mixed": (0, 5, 1, 9), "codes in the prefill": (3, 4, 8), "at once": (15,)}


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=list(CHUNKS))
@pytest.mark.parametrize("variant", list(GPT_VARIANTS))
def test_cached_logits_equal_uncached_ones(variant: str, chunks: tuple[int, ...]) -> None:
    gpt = small_gpt(**GPT_VARIANTS[variant])
    condition, lengths, codes = condition_for(gpt, 4), caption_lengths_for(gpt, 4), codes_for(gpt, 4, 15)
    cache = KVCache.allocate(gpt.config, 4)
    with torch.no_grad():
        expected = gpt(codes, condition, caption_lengths=lengths)
        parts = [
            gpt(tokens, condition if call == 0 else None, caption_lengths=lengths, cache=cache)
            for call, tokens in enumerate(codes.split(list(chunks), dim=1))
        ]
    assert [part.shape[1] for part in parts] == [chunks[0] + 1, *chunks[1:]]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-5, rtol=0)
    assert cache.length == gpt.config.condition_length + 15


@pytest.mark.parametrize("variant", list(GPT_VARIANTS))
def test_rows_may_have_different_lengths(variant: str) -> None:
    gpt = small_gpt(**GPT_VARIANTS[variant])
    condition, lengths, codes = condition_for(gpt, 4), caption_lengths_for(gpt, 4), codes_for(gpt, 4, 15)
    first, cache = gpt.config.condition_length, KVCache.allocate(gpt.config, 4)
    for memory in (cache.keys, cache.values):
        memory.fill_(torch.nan)
        memory[..., : first + 10, :] = 0.0  # what shorter rows do not attend to must be finite
    # In the second call the longest row takes its tokens again, and the others continue.
    calls = [(torch.tensor(counts), span) for counts, span in (([1, 6, 0, 3], 4), ([5, 6, 3, 4], 3), ([6, 8, 4, 7], 1))]
    with torch.no_grad():
        expected = gpt(codes, condition, caption_lengths=lengths)
        gpt(codes[:, :6], condition, caption_lengths=lengths, cache=cache)
        for counts, span in calls:
            places, longest = counts[:, None] + torch.arange(span), first + int(counts.max())
            cache.set_row_lengths(first + counts, longest)
            found = gpt(codes.gather(1, places), caption_lengths=lengths, cache=cache)
            torch.testing.assert_close(found, expected[torch.arange(4)[:, None], places + 1], atol=1e-5, rtol=0)
            assert cache.length == longest + span
            assert cache.row_lengths is not None
            assert torch.equal(cache.row_lengths, first + counts + span)


@pytest.mark.parametrize("kind", ["class", "text"])
def test_captions_without_padding_and_labels_need_no_lengths(kind: str) -> None:
    gpt = small_gpt(condition=kind)
    condition, codes, cache = condition_for(gpt, 2), codes_for(gpt, 2, 15), KVCache.allocate(gpt.config, 2)
    with torch.no_grad():
        expected = gpt(codes, condition)
        parts = [gpt(codes[:, :2], condition, cache=cache)]
        parts += [gpt(tokens, cache=cache) for tokens in codes[:, 2:].split([6, 1, 1, 5], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-5, rtol=0)


def test_a_cache_does_not_change_the_model() -> None:
    gpt = small_gpt()
    names = list(gpt.state_dict())
    buffers = [name for name, _ in gpt.named_buffers()]
    codes, condition = codes_for(gpt, 2, 15), condition_for(gpt, 2)
    with torch.no_grad():
        before = gpt(codes, condition)
        gpt(codes, condition, cache=KVCache.allocate(gpt.config, 2))
        after = gpt(codes, condition)
    assert torch.equal(before, after)
    assert list(gpt.state_dict()) == names
    assert [name for name, _ in gpt.named_buffers()] == buffers


def test_two_caches_are_independent() -> None:
    gpt = small_gpt()
    codes = codes_for(gpt, 2, 15)
    caches = [KVCache.allocate(gpt.config, 2) for _ in range(2)]
    conditions = [torch.tensor([0, 1]), torch.tensor([2, 3])]
    with torch.no_grad():
        for condition, cache in zip(conditions, caches, strict=True):
            gpt(codes[:, :7], condition, cache=cache)
        for condition, cache in zip(conditions, caches, strict=True):
            found = gpt(codes[:, 7:], cache=cache)
            torch.testing.assert_close(found, gpt(codes, condition)[:, 8:], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("n_kv_head", "heads"), [(None, 4), (2, 2), (1, 1)])
def test_the_cache_has_key_value_heads_and_room_for_all_tokens_but_the_last(n_kv_head: int | None, heads: int) -> None:
    config = small_gpt(n_kv_head=n_kv_head).config
    cache = KVCache.allocate(config, 3, dtype=torch.bfloat16)
    assert cache.keys.shape == cache.values.shape == (2, 3, heads, 1 + 16 - 1, 8)
    assert cache.keys.dtype == cache.values.dtype == torch.bfloat16
    assert cache.length == 0


def test_a_float32_model_may_use_a_bfloat16_cache() -> None:
    gpt = small_gpt()
    codes, condition = codes_for(gpt, 2, 15), condition_for(gpt, 2)
    cache = KVCache.allocate(gpt.config, 2, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = gpt(codes, condition)
        parts = [gpt(None, condition, cache=cache), *(gpt(code, cache=cache) for code in codes.split(1, dim=1))]
    found = torch.cat(parts, dim=1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0)


def test_decoding_can_continue_with_only_the_first_rows_in_the_same_memory() -> None:
    gpt = small_gpt()
    codes, condition, cache = codes_for(gpt, 4, 15), condition_for(gpt, 4), KVCache.allocate(gpt.config, 4)
    with torch.no_grad():
        expected = gpt(codes, condition)[:2, 8:]
        gpt(codes[:, :7], condition, cache=cache)
        rows = cache.first_rows(2)
        found = gpt(codes[:2, 7:], cache=rows)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert rows.keys.data_ptr() == cache.keys.data_ptr()
    assert rows.values.data_ptr() == cache.values.data_ptr()
    assert (rows.length, cache.length) == (16, 8)


def test_append_writes_after_the_cached_tokens_and_advance_counts() -> None:
    cache = KVCache.allocate(CLASS_GPT, 1)
    first, second = torch.randn(2, 1, 4, 3, 8, generator=torch.Generator().manual_seed(0))
    cache.layer(1).append(first, -first)
    cache.advance(3)
    keys, values = cache.layer(1).append(second, -second)
    assert torch.equal(keys, torch.cat([first, second], dim=2))
    assert torch.equal(values, -torch.cat([first, second], dim=2))
    assert cache.length == 3


def test_rejects_more_tokens_than_the_cache_holds() -> None:
    cache = KVCache.allocate(CLASS_GPT, 1)
    cache.advance(15)
    cache.layer(0).append(torch.zeros(1, 4, 1, 8), torch.zeros(1, 4, 1, 8))
    with pytest.raises(ValueError, match="holds 16 tokens and has no room for token 17"):
        cache.layer(0).append(torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 2, 8))


def test_rejects_more_codes_than_an_image_has() -> None:
    gpt = small_gpt()
    cache = KVCache.allocate(gpt.config, 1)
    gpt(codes_for(gpt, 1, 15), condition_for(gpt, 1), cache=cache)
    with pytest.raises(ValueError, match="16 codes"):
        gpt(codes_for(gpt, 1, 1), cache=cache)


@pytest.mark.parametrize(
    ("repeat", "message"), [(True, "repeated at position 1"), (False, "neither tokens nor a condition")]
)
def test_rejects_a_repeated_condition_and_an_empty_call(repeat: bool, message: str) -> None:
    gpt = small_gpt()
    condition, cache = condition_for(gpt, 1), KVCache.allocate(gpt.config, 1)
    gpt(None, condition, cache=cache)
    with pytest.raises(ValueError, match=message):
        gpt(None, condition if repeat else None, cache=cache)
    assert cache.length == 1
