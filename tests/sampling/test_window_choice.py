"""The choice of the window: from times of passes and shares of right guesses, without measured times in a test."""

import pytest
import torch

from llamagen.sampling import Sampler, SamplingConfig, window_choice
from llamagen.sampling.window_choice import PassTimes, WindowChoice
from tests.small_models import small_gpt

FREE = PassTimes([1], [{1: 1.0, 32: 1.0}])  # any window takes the time of one code
PROPORTIONAL = PassTimes([1], [{1: 1.0}])


def test_times_are_interpolated_between_windows_and_rows_and_grow_with_larger_windows() -> None:
    times = PassTimes([2, 10], [{1: 1.0, 4: 2.5}, {1: 3.0, 4: 9.0}])
    assert [times.at(2, window) for window in (1, 2, 4, 8)] == [1.0, 1.5, 2.5, 5.0]
    assert [times.at(rows, 4) for rows in (1, 2, 6, 10, 20)] == [2.5, 2.5, 5.75, 9.0, 9.0]


@pytest.mark.parametrize(
    ("seconds", "windows"),
    [
        (lambda window: 1e-3, [0, 1, 2, 4, 8, 16]),  # up to the largest window
        (lambda window: 1e-3 * window, [0, 1, 2, 4, 8]),  # until it cannot pay
        (lambda window: 0.6, [0, 1, 4]),  # a slow model
    ],
    ids=["free", "proportional", "slow"],
)
def test_measurement_ends_when_a_window_cannot_pay_or_takes_long(
    seconds: "object", windows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    now, calls = [0.0], list[int]()

    def timed(rows: int, window: int) -> float:
        calls.append(window)
        now[0] += seconds(window)  # type: ignore[operator]
        return seconds(window)  # type: ignore[operator, no-any-return]

    monkeypatch.setattr(window_choice.time, "perf_counter", lambda: now[0])
    times = PassTimes.measure([1], 31, timed)
    assert sorted(times.seconds[0]) == windows[1:]
    assert times.plain == [seconds(0)]  # type: ignore[operator]
    assert times.seconds[0][4] == seconds(4)  # type: ignore[operator]
    assert sorted(calls) == windows


def test_windows_grow_where_guesses_are_right_and_shrink_where_they_are_wrong() -> None:
    choice = WindowChoice(FREE, 31)
    assert choice.choose(1) == 24  # the largest one: it costs nothing
    choice = WindowChoice(PassTimes([1], [{1: 1.0, 32: 4.0}]), 31)
    first = choice.choose(1)
    for _ in range(20):
        choice.observe(choice.choose(1), [choice.choose(1) - 1])
    assert choice.choose(1) == 24 > first
    chosen = list[int]()
    for _ in range(300):
        chosen.append(choice.choose(1))
        choice.observe(chosen[-1], [0] if chosen[-1] > 1 else [])
    assert chosen[-50:].count(1) >= 40


def test_a_window_that_takes_as_long_as_its_codes_is_never_chosen() -> None:
    choice = WindowChoice(PROPORTIONAL, 31)
    for _ in range(50):
        assert choice.choose(1) == 1
        choice.observe(1, [0, 0])


def test_a_window_is_tried_again_after_many_passes_of_one_code() -> None:
    choice = WindowChoice(PassTimes([1], [{1: 1.0, 2: 1.4}]), 2)
    choice.observe(2, [0] * 4)
    chosen = list[int]()
    for _ in range(200):
        chosen.append(choice.choose(1))
        choice.observe(1, [0])
    assert chosen[:20] == [1] * 20
    assert chosen[-1] == 2


def test_guesses_count_up_to_the_first_wrong_one() -> None:
    choice = WindowChoice(FREE, 31)
    choice.observe(4, [3, 1])
    assert choice._offered[:4] == [2, 2, 1, 0]
    assert choice._right[:4] == [2, 1, 1, 0]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("length", [1, 4, 16])
def test_a_sampler_times_passes_once_for_guided_and_once_for_other_codes(
    length: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler, calls, measure = Sampler(small_gpt(block_size=length), 3, compiled=compiled), [], PassTimes.measure

    def counted(rows: object, longest: int, timed: object) -> PassTimes:
        calls.append(sorted(set(rows)))  # type: ignore[call-overload]
        return measure(rows, longest, timed)  # type: ignore[arg-type]

    monkeypatch.setattr(PassTimes, "measure", counted)
    for scale, expected in ((1.0, [[1, 3]]), (2.0, [[1, 3], [2, 6]])):
        config = SamplingConfig(guidance_scale=scale, window="auto")
        sampler.prepare(config)
        assert calls == (expected if length > 1 else [])
        found = sampler(torch.arange(4), config, seed=1)
        assert torch.equal(found, sampler(torch.arange(4), SamplingConfig(guidance_scale=scale), seed=1))
    assert len(calls) == (2 if length > 1 else 0)


def test_windows_are_used_only_if_they_are_clearly_faster_than_sampling_without() -> None:
    seconds = [{1: 1.0, 4: 1.2}, {1: 8.0, 4: 32.0}]
    assert [WindowChoice(PassTimes([2, 8], seconds, plain), 31).pays(rows) for plain, rows in _PLAIN] == [
        *(True, False, False),
        *(True, False),
    ]


_PLAIN = [([1.0, 8.0], 2), ([0.5, 8.0], 2), ([1.0, 8.0], 8), ([], 2), ([], 8)]
