"""Windows change the number of passes and nothing else: the same codes as one code at a time, on both engines."""

from dataclasses import replace
from functools import cache
from itertools import cycle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llamagen.finite import NotFiniteError
from llamagen.models.gpt import GPT
from llamagen.sampling import Sampler, SamplingConfig
from llamagen.sampling.cpu.step import Scratch
from llamagen.sampling.decoder import CodeDecoder, PooledCodeDecoder
from llamagen.sampling.eager import EagerDecodeState
from llamagen.sampling.window_choice import PassTimes, WindowChoice
from llamagen.sampling.windows import Array, WindowLoop
from tests.sampling.plain import SAMPLED, SETTINGS
from tests.small_models import RECIPE_VARIANTS, caption_lengths_for, codes_for, condition_for, small_gpt

ENGINES = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
WINDOWS = (2, 3, 8, 99)
LENGTH = 16
IMAGES = 5
ALL_OPTIONS = RECIPE_VARIANTS["QK-norm, adaptive norms, target-aware"]
GUIDED = {**SAMPLED, "guidance_scale": 2.0, "guidance_steps": 9}
# Each setting with each window; each of them on both engines, for labels and for padded captions.
CASES = [
    pytest.param(setting, window, (s + w) % 2 == 0, ("class", "text")[(s + w // 2) % 2], id=f"{setting}, {window}")
    for s, setting in enumerate(SETTINGS)
    for w, window in enumerate(WINDOWS)
]


class Passes:
    """Records the passes of all calls.

    Attributes:
        counts: for each pass, the number of final codes of each image before it.
        rows: for each pass, the number of rows.
        spans: for each pass, the number of tokens of a row.
        plain: for each pass like those without windows, the number of rows that it has and of those that it needs.
    """

    def __init__(self) -> None:
        self.counts: list[list[int]] = []
        self.rows: list[int] = []
        self.spans: list[int] = []
        self.plain: list[tuple[int, int]] = []


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    found, advance = Passes(), WindowLoop.advance

    def recorded(loop: WindowLoop, span: int) -> Array:
        found.counts.append(loop.counts.tolist())
        found.rows.append(len(loop._rows.rows))
        found.spans.append(span)
        is_plain = span == 1 and loop._is_aligned()
        right = advance(loop, span)
        if is_plain:
            found.plain.append((loop.state.rows, len(loop._rows.rows)))  # type: ignore[attr-defined]
        return right

    monkeypatch.setattr(WindowLoop, "advance", recorded)
    return found


@cache
def model(kind: str) -> GPT:
    """A model of filled weights, whose codes cannot be guessed: of classes, of captions, or with all other options."""
    return small_gpt(**ALL_OPTIONS) if kind == "options" else small_gpt(condition=kind)


def arguments(gpt: GPT, count: int) -> dict[str, Any]:
    lengths, indices = caption_lengths_for(gpt, count), torch.arange(count) * 37 + 4
    return {"condition": condition_for(gpt, count), "caption_lengths": lengths, "seed": 11, "indices": indices}


@cache
def sampler(kind: str, compiled: bool) -> Sampler:
    return Sampler(model(kind), IMAGES, compiled=compiled)


@cache
def one_by_one(kind: str, compiled: bool, setting: str) -> Tensor:
    """Codes (5, 16) without windows."""
    return sampler(kind, compiled)(config=SamplingConfig(**SETTINGS[setting]), **arguments(model(kind), IMAGES))


@pytest.mark.parametrize(("setting", "window", "compiled", "kind"), CASES)
def test_windows_give_the_codes_of_one_at_a_time(
    setting: str, window: int, compiled: bool, kind: str, passes: Passes
) -> None:
    config = SamplingConfig(**SETTINGS[setting], window=window)
    found = sampler(kind, compiled)(config=config, **arguments(model(kind), IMAGES))
    assert torch.equal(found, one_by_one(kind, compiled, setting))
    assert max(passes.spans) == min(window, LENGTH - 1)
    assert len(passes.spans) <= LENGTH - 1  # never more than without windows


@ENGINES
@pytest.mark.parametrize("kind", ["class", "text", "options"])
def test_windows_give_the_same_codes_in_any_batch_after_kept_codes_and_for_seeds_of_each_image(
    kind: str, compiled: bool
) -> None:
    gpt, config = model(kind), SamplingConfig(**GUIDED)
    given = {**arguments(gpt, 64), "seed": list(range(64))}
    expected = Sampler(gpt, 64, compiled=compiled)(config=config, **given)
    for batch_size, images, kept in ((64, 64, 0), (7, 10, 0), (1, 3, 0), (7, 7, 3), (64, 8, 11), (3, 3, 15)):
        part = {name: None if value is None else value[:images] for name, value in given.items()}
        found = Sampler(gpt, batch_size, compiled=compiled)(
            config=SamplingConfig(**GUIDED, window=5), kept=expected[:images, :kept], **part
        )
        assert torch.equal(found, expected[:images]), (batch_size, kept)


@ENGINES
def test_windows_after_codes_of_another_image_and_for_images_of_one_code(compiled: bool) -> None:
    gpt, kept = model("class"), codes_for(model("class"), IMAGES, 6)
    expected, found = (
        sampler("class", compiled)(config=SamplingConfig(**GUIDED, window=window), kept=kept, **arguments(gpt, IMAGES))
        for window in (1, 99)
    )
    assert torch.equal(found, expected)
    tiny = Sampler(small_gpt(block_size=1), 2, compiled=compiled)
    expected, found = (tiny(torch.arange(2), SamplingConfig(top_k=9, window=window)) for window in (1, 4))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
@pytest.mark.parametrize("kind", ["class", "text", "options"])
def test_the_cpu_engine_gives_the_same_bits_in_other_precisions(kind: str, precision: str) -> None:
    gpt = model(kind) if kind == "options" else small_gpt(condition=kind, dim=144, n_head=3)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        cpu = Sampler(gpt, 4, compiled=True, int8=precision == "int8")
    given = arguments(gpt, 7)
    expected = cpu(config=SamplingConfig(**GUIDED), **given)
    for window in (2, 8, 15):
        assert torch.equal(cpu(config=SamplingConfig(**GUIDED, window=window), **given), expected), window


@cache
def predictable() -> GPT:
    """A model whose logits do not depend on the codes before, so that every pass draws all its codes right."""
    gpt = small_gpt()
    with torch.no_grad():
        gpt.tok_embeddings.weight.copy_(gpt.tok_embeddings.weight[:1].expand_as(gpt.tok_embeddings.weight))
    return gpt


@ENGINES
@pytest.mark.parametrize(("window", "most"), [(2, 10), (4, 7), (8, 5), (99, 3)])
def test_right_guesses_save_passes(window: int, most: int, compiled: bool, passes: Passes) -> None:
    gpt, rows = predictable(), list[int]()
    engine, given = Sampler(gpt, IMAGES, compiled=compiled), arguments(predictable(), IMAGES)
    expected = engine(config=SamplingConfig(**GUIDED), **given)
    config = SamplingConfig(**GUIDED, window=window)
    found = engine(config=config, on_row=lambda codes, count, start: rows.append(count), **given)
    assert torch.equal(found, expected)
    assert len(passes.spans) <= most  # without windows 15
    assert rows == [4, 8, 12, 16]  # also if a pass completes several


@ENGINES
def test_passes_compute_only_rows_of_unfinished_images_and_guided_codes(compiled: bool, passes: Passes) -> None:
    gpt, config = model("class"), SamplingConfig(**GUIDED, window=8)
    Sampler(gpt, 16, compiled=compiled)(config=config, **arguments(gpt, 16))
    for counts, rows in zip(passes.counts, passes.rows, strict=True):
        assert rows == sum(count < LENGTH for count in counts) + sum(count < 9 for count in counts)
    assert any(LENGTH in counts for counts in passes.counts)
    assert any(len({count for count in counts if count < LENGTH}) > 2 for counts in passes.counts)


@pytest.fixture
def changing_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """``auto`` chooses these windows, whatever passes would take."""
    windows = cycle((1, 4, 1, 1, 3, 1, 1, 1, 1, 8))
    monkeypatch.setattr(CodeDecoder, "pass_times", lambda decoder, config: PassTimes([1], [[1.0]]))
    monkeypatch.setattr(WindowChoice, "pays", lambda choice, rows: True)
    monkeypatch.setattr(WindowChoice, "choose", lambda choice, rows: next(windows))


@ENGINES
@pytest.mark.parametrize(("kind", "images"), [("class", IMAGES), ("text", IMAGES), ("class", 1), ("text", 1)])
@pytest.mark.usefixtures("changing_windows")
def test_windows_may_change_from_pass_to_pass(kind: str, images: int, compiled: bool, passes: Passes) -> None:
    engine, given = sampler(kind, compiled), arguments(model(kind), images)
    expected = engine(config=SamplingConfig(**GUIDED), **given)
    for kept in (0, 6):
        found = engine(config=SamplingConfig(**GUIDED, window="auto"), kept=expected[:, :kept], **given)
        assert torch.equal(found, expected), kept
    assert {1, 4} < set(passes.spans)
    assert all(computed == needed for computed, needed in passes.plain)
    assert images > 1 or {needed for _, needed in passes.plain} == {1, 2}


def codes_read(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The codes that later passes of the eager engine read, final or not."""
    found, read = set[int](), EagerDecodeState.read_windows

    def recorded(state: EagerDecodeState, tokens: Array, rows: list[int], starts: Array) -> Tensor:
        found.update(tokens.reshape(-1).tolist())
        return read(state, tokens, rows, starts)

    monkeypatch.setattr(EagerDecodeState, "read_windows", recorded)
    return found


def with_broken_code(code: int) -> GPT:
    """A model whose logits are not finite after a code."""
    gpt = small_gpt()
    with torch.no_grad():
        gpt.tok_embeddings.weight[code, 0] = torch.nan
    return gpt


@ENGINES
@pytest.mark.usefixtures("changing_windows")
def test_a_wrong_guess_with_logits_that_are_not_finite_breaks_no_image(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, config = arguments(model("class"), IMAGES), SamplingConfig(**GUIDED, window=8)
    with monkeypatch.context() as patch:
        read = codes_read(patch)
        expected = Sampler(model("class"), IMAGES)(config=config, **given)
    wrong = sorted(read - set(expected.flatten().tolist()))
    assert len(wrong) > 3
    for code in wrong[:3]:
        engine = Sampler(with_broken_code(code), IMAGES, compiled=compiled)
        for window in (config.window, "auto"):
            assert torch.equal(engine(config=replace(config, window=window), **given), expected), (code, window)


@ENGINES
def test_logits_that_are_not_finite_are_reported_for_the_same_images(compiled: bool) -> None:
    given, config = arguments(model("class"), IMAGES), SamplingConfig(**GUIDED)
    codes = Sampler(model("class"), IMAGES)(config=config, **given)[:, :-1]  # nothing is read after the last one
    checked = set[tuple[int, ...]]()
    for code in codes.unique().tolist():
        broken = tuple((codes == code).any(1).nonzero().flatten().tolist())
        if len(broken) == IMAGES or broken in checked or len(checked) == 3:
            continue
        checked.add(broken)
        engine = Sampler(with_broken_code(code), IMAGES, compiled=compiled)
        with pytest.raises(NotFiniteError) as error:
            engine(config=SamplingConfig(**GUIDED, window=len(checked) * 3), **given)
        assert error.value.rows == broken, code
    assert len(checked) == 3


def test_the_unconditional_branch_is_not_checked_after_the_last_guided_code(monkeypatch: pytest.MonkeyPatch) -> None:
    gpt, read = model("class"), EagerDecodeState.read_windows
    given = arguments(gpt, IMAGES)
    expected = Sampler(gpt, IMAGES)(config=SamplingConfig(**GUIDED), **given)

    def broken(state: EagerDecodeState, tokens: Array, rows: list[int], starts: Array) -> Tensor:
        logits = read(state, tokens, rows, starts)
        steps = starts[:, None] - state.condition_length + np.arange(tokens.shape[1]) + 1
        wrong = (np.array(rows) >= state.batch)[:, None] & (steps >= 9)
        logits[torch.from_numpy(wrong)] = torch.nan
        return logits

    monkeypatch.setattr(EagerDecodeState, "read_windows", broken)
    assert torch.equal(Sampler(gpt, IMAGES)(config=SamplingConfig(**GUIDED, window=8), **given), expected)


@ENGINES
@pytest.mark.parametrize("kind", ["text", "options"])
def test_what_earlier_calls_left_in_the_cache_has_no_effect(kind: str, compiled: bool) -> None:
    engine, given = Sampler(model(kind), IMAGES, compiled=compiled), arguments(model(kind), IMAGES)
    expected = engine(config=SamplingConfig(**GUIDED), **given)
    assert isinstance(engine.decoder, PooledCodeDecoder)
    [cache] = engine.decoder.caches.free
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    if cache.adaptive is not None:
        cache.adaptive.fill_(torch.nan)
    assert torch.equal(engine(config=SamplingConfig(**GUIDED, window=4), **given), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_earlier_passes_left_in_the_scratch_memory_has_no_effect(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpt = small_gpt(block_size=64).to(dtype)
    sampler, pointer = Sampler(gpt, 2, compiled=True), Scratch.pointer
    expected = sampler([1, 2], GUIDED)

    def with_garbage(scratch: Scratch, size: int) -> int:
        address = pointer(scratch, size)
        scratch._bytes.fill_(255)  # NaN in both dtypes
        return address

    monkeypatch.setattr(Scratch, "pointer", with_garbage)
    for window, kept in ((1, 40), (3, 0), (8, 5), (16, 0), (63, 0)):
        found = sampler([1, 2], {**GUIDED, "window": window}, kept=expected[:, :kept])
        assert torch.equal(found, expected), window


def test_numpy_integers_are_windows() -> None:
    assert SamplingConfig(window=np.int64(3)).window.__class__ is int  # type: ignore[arg-type]
