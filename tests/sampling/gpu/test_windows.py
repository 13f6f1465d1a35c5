"""Windows in the decode loop of GPUs, tested without one: see ``without_gpu.py``."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llamagen.sampling import SamplingConfig, code_counters
from llamagen.sampling.gpu.decoder import GPUCodeDecoder
from llamagen.sampling.gpu.window_draws import Noise, draw, limit, settle
from llamagen.sampling.gpu.windows import AHEAD, CountsOnHost
from llamagen.sampling.inputs import SamplingRequest
from tests.sampling.gpu.without_gpu import no_gpu, request_for  # noqa: F401
from tests.sampling.plain import SETTINGS, plain_loop
from tests.small_models import codes_for, small_gpt

pytestmark = pytest.mark.usefixtures("no_gpu")
GREEDY = SamplingConfig(**SETTINGS["greedy, guided"])
CASES = [
    ("class", "greedy", 3, 0, 3),
    ("class", "greedy, guided for 5 codes", 4, 0, 3),
    ("class", "sampled", 40, 0, 1),
    ("class", "sampled, guided", "auto", 3, 3),
    ("class", "sampled, guided for 1 code", 6, 0, 1),
    ("class", "sampled by top-k alone", 8, 15, 3),
    ("text", "sampled, guided from code 3 to 9", 5, 2, 3),
    ("text", "sampled, linear", 8, 0, 3),
    ("text", "sampled, guided for no code", 15, 0, 3),
    ("text", "sampled from all codes", "auto", 0, 1),
]


@torch.no_grad()
@pytest.mark.parametrize(("kind", "setting", "window", "kept", "batch"), CASES)
def test_windows_do_not_change_the_codes(kind: str, setting: str, window: int | str, kept: int, batch: int) -> None:
    config = SamplingConfig(**SETTINGS[setting])
    _, request = request_for(kind, config, kept=codes_for(small_gpt(), 3, kept) if kept else None)
    gpt, request = small_gpt(condition=kind), request.rows(torch.arange(batch))
    decoder, counts, counts_in_windows = GPUCodeDecoder(gpt, batch, torch.float32), list[int](), list[int]()
    expected = decoder(request, lambda codes, count: counts.append(count)).codes
    request = replace(request, config=replace(config, window=window))

    def watch(codes: Tensor, count: int) -> None:
        counts_in_windows.append(count)
        assert torch.equal(codes[:, :count], expected[:, :count])
        assert not codes[:, count:].any()

    for _ in range(2):
        found = decoder(request, watch)
        assert torch.equal(found.codes, expected)
        assert not found.broken.any()
    assert counts_in_windows == 2 * counts


@torch.no_grad()
@pytest.mark.parametrize("kept", [0, 5])
@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("kind", ["class", "text"])
def test_target_aware_models_with_qk_norm_give_the_codes_of_uncached_sampling(
    kind: str, window: int, kept: int
) -> None:
    config = SamplingConfig(**SETTINGS["sampled, guided from code 3 to 9"], window=window)
    given = codes_for(small_gpt(), 3, kept) if kept else None
    gpt, request = request_for(kind, config, kept=given, qk_norm=True, target_aware=True)
    found = GPUCodeDecoder(gpt, 3, torch.float32)(request).codes
    assert torch.equal(
        found, plain_loop(gpt, request.condition, config, request.caption_lengths, 11, request.indices, given)
    )


@torch.no_grad()
def test_the_window_may_change_between_calls_and_right_guesses_save_passes() -> None:
    gpt, request = request_for("class", GREEDY)
    with torch.no_grad():
        gpt.output.weight[7] *= 40  # one code is far more likely than the others, so many guesses are right
    decoder, passes = GPUCodeDecoder(gpt, 3, torch.float32), list[int]()
    expected = decoder(request).codes
    for window in (2, 8, 1, 40, 2):
        assert torch.equal(decoder(replace(request, config=replace(GREEDY, window=window))).codes, expected)
        passes.append(decoder._free[0].passes)
    assert passes[0] == passes[4] >= passes[1] >= passes[3]
    assert passes[1] < 15


@torch.no_grad()
def test_an_image_of_one_code_needs_no_window() -> None:
    gpt = small_gpt(block_size=1)
    request = SamplingRequest.from_inputs(gpt, torch.arange(2), SamplingConfig(0.0, window="auto"), None, 0, None)
    decoder = GPUCodeDecoder(gpt, 2, torch.float32)
    expected = decoder(replace(request, config=SamplingConfig(0.0))).codes
    assert torch.equal(decoder(request).codes, expected)


@torch.no_grad()
def test_finished_images_change_nothing() -> None:
    gpt, request = request_for("class", SamplingConfig(window=4))
    decoder = GPUCodeDecoder(gpt, 3, torch.float32)
    expected = decoder(request).codes
    graphs = decoder._free[0]
    gpt.tok_embeddings.weight.fill_(torch.nan)
    for span in (4, 2):
        graphs._pass(request.config, span, False)
    assert torch.equal(graphs.codes, expected)
    assert graphs.counts.tolist() == [16] * 3
    assert not graphs.broken.any()


@torch.no_grad()
def test_a_window_is_chosen_among_the_graphs_by_their_times(monkeypatch: pytest.MonkeyPatch) -> None:
    gpt, request = request_for("class", replace(GREEDY, window="auto"))
    decoder, seen = GPUCodeDecoder(gpt, 3, torch.float32), list[int]()
    expected = decoder(replace(request, config=GREEDY)).codes
    seconds = {1: 1.0, 2: 1.1, 4: 1.2, 8: 5.0, 15: 9.0}
    graphs, real = decoder._free[0], decoder._free[0]._window_graph

    def graph(config: SamplingConfig, span: int, guided: bool) -> object:
        seen.append(span)
        return real(config, span, guided)

    monkeypatch.setattr(graphs, "_window_graph", graph)
    monkeypatch.setattr(graphs, "_seconds", lambda graph: seconds[seen[-1]])
    times = decoder.pass_times(request.config)
    assert list(times.seconds[0].values()) == [1.0, 1.1, 1.2, 1.2, 5.0, 5.0, 9.0]
    seen.clear()
    assert torch.equal(decoder(request).codes, expected)
    assert set(seen[5:]) <= {1, 2, 4}, "windows that cost more than they save are not used"


@pytest.mark.parametrize(("temperature", "span", "widest"), [(0.0, 4, 4), (1.0, 4, 4), (1.0, 2, 5), (1.0, 1, 3)])
def test_draws_are_final_up_to_the_first_wrong_guess(temperature: float, span: int, widest: int) -> None:
    config, length = SamplingConfig(temperature), 9
    generator = torch.Generator().manual_seed(0)
    limited = torch.randn(20 * span, 3, generator=generator)
    counts = torch.randint(1, length + 1, (20,), generator=generator)
    codes, broken = (
        torch.randint(3, (20, length), generator=generator),
        torch.rand(20 * span, generator=generator) < 0.3,
    )
    noise = Noise(torch.arange(20), torch.arange(20) * 5, code_counters(3))
    old, before, flags = codes.clone(), counts.tolist(), torch.zeros(20, dtype=torch.bool)
    settle(limited, broken, config, span, widest, codes, counts, flags, noise)
    for image, count in enumerate(before):
        start, flag, final = min(count - 1, length - 1 - span), False, count
        rows = limited.view(20, span, 3)[image : image + 1]
        own = Noise(noise.seeds[image : image + 1], noise.indices[image : image + 1], noise.counters)
        steps = torch.arange(start + 1, start + span + 1)[None]
        drawn = dict(zip(steps[0].tolist(), draw(rows, config, steps, own)[0].tolist(), strict=True))
        for step in range(count, start + span + 1):
            final, flag = step + 1, flag or bool(broken.view(20, span)[image, step - start - 1])
            if drawn[step] != old[image, step]:
                break
        new = [drawn.get(step, code) if step >= count else code for step, code in enumerate(old[image].tolist())]
        # The next pass may read as far as its widest window. What this pass and those before it guessed stays.
        for place in range(max(start + span + 1, count - 1 + widest), min(count - 1 + widest + span, length)):
            new[place] = int(draw(rows[:, -1:], config, torch.tensor([[place]]), own))
        assert count - 1 + widest + span >= min(final - 1 + widest, length), "no code of the next pass lacks a guess"
        assert (codes[image].tolist(), int(counts[image]), bool(flags[image])) == (new, final, flag)


def test_the_unconditional_branch_is_not_checked_after_the_last_guided_code() -> None:
    logits = torch.zeros(8, 3)
    logits[1], logits[4:] = torch.nan, torch.nan  # the conditional row of the second code, all unconditional rows
    steps, scales = torch.tensor([[3, 3], [2, 4]]), torch.tensor([1.0, 2.0, 2.0, 1.0, 1.0])
    limited, broken = limit(logits, GREEDY, scales, torch.tensor(3), steps)
    assert broken.tolist() == [False, True, True, False]
    assert limited[[0, 3]].isfinite().all()


def test_counts_arrive_in_the_order_in_which_they_were_sent() -> None:
    counts = torch.zeros(2, dtype=torch.int64)
    host, sent = CountsOnHost(counts), 0
    for batch in (AHEAD + 1, 1, AHEAD + 1):  # from another slot each time
        for number in range(sent, sent + batch):
            counts.fill_(number)
            host.send(10 + number)
        received = [host.receive() for _ in range(batch)]
        assert [(span, found.tolist()) for span, found in received] == [
            (10 + number, [number] * 2) for number in range(sent, sent + batch)
        ]
        sent += batch


@torch.no_grad()
def test_passes_are_timed_once_with_guidance_and_once_without(monkeypatch: pytest.MonkeyPatch) -> None:
    gpt, request = request_for("class", replace(GREEDY, window="auto"))
    graphs, timed = GPUCodeDecoder(gpt, 3, torch.float32)._free[0], list[object]()
    monkeypatch.setattr(graphs, "prepare", timed.append)
    monkeypatch.setattr(graphs, "_window_graph", lambda *_: None)
    monkeypatch.setattr(graphs, "_seconds", lambda graph: 1.0)
    for temperature in (0.0, 1.0):
        for scale in (1.0, 2.0):
            graphs.pass_times(replace(request.config, temperature=temperature, guidance_scale=scale))
    assert len(timed) == 2
