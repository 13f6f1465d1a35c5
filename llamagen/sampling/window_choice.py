"""The choice of the window for each pass: from measured times of passes, and from how many guesses were right."""

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch

from llamagen.models.gpt import GPT
from llamagen.sampling.config import SamplingConfig
from llamagen.sampling.inputs import SamplingRequest
from llamagen.sampling.windows import WindowLoop, WindowState

WINDOWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
TIMED = (1, 4, 2, 8, 16, 32)  # in this order: a slow model gets only the first ones
MAX_SECONDS = 1.0  # for each number of rows, after the first two windows
REPEATS, SLOW = 4, 0.1  # a pass is timed four times after a first one, and not again if that took longer, in seconds
HOLD = 8  # passes of one code before the choice is made again, because it takes time, too
FIRST_CHANCE, FIRST_WEIGHT = 0.6, 2.0  # assumed chance that a guess is right, and the observations that outweigh it
MARGIN = 1.5  # times as fast that windows must be, with that chance, for a call to use them
FADING = 0.98  # of observations, with each pass


class PassTimes(NamedTuple):
    """Measured seconds of a pass.

    Attributes:
        rows: numbers of rows of the measured passes, ascending; at least one.
        seconds: for each of them, seconds by window, at least for window 1.
        plain: for each of them, seconds of a pass of sampling without windows, which needs less bookkeeping; empty if
            they are those of window 1.
    """

    rows: list[int]
    seconds: list[dict[int, float]]
    plain: Sequence[float] = ()

    @classmethod
    def measure(cls, rows: Iterable[int], longest: int, timed: Callable[[int, int], float]) -> "PassTimes":
        """Time passes: of each number of rows two windows, and further ones for about a second.

        Args:
            rows: numbers of rows.
            longest: largest window.
            timed: returns the seconds of a pass with a number of rows and a window; 0 means without windows.
        """
        counts = sorted(set(rows))
        plain = [timed(count, 0) for count in counts]
        return cls(counts, [cls._by_window(count, longest, timed) for count in counts], plain)

    @staticmethod
    def _by_window(rows: int, longest: int, timed: Callable[[int, int], float]) -> dict[int, float]:
        found, start = dict[int, float](), time.perf_counter()
        for window in TIMED:
            if window > longest or (len(found) > 1 and time.perf_counter() - start > MAX_SECONDS):
                continue
            found[window] = timed(rows, window)
            if window > 4 and found[window] > 0.95 * window * found[1]:
                break  # not even right guesses would make it faster
        return found

    def at(self, rows: int, window: int) -> float:
        """Seconds of a pass, interpolated linearly between measured windows and between measured numbers of rows."""
        upper = min(bisect_left(self.rows, rows), len(self.rows) - 1)
        if upper == 0 or self.rows[upper] <= rows:
            return self._at_window(upper, window)
        low, high = self.rows[upper - 1], self.rows[upper]
        share = (rows - low) / (high - low)
        return (1 - share) * self._at_window(upper - 1, window) + share * self._at_window(upper, window)

    def _at_window(self, number: int, window: int) -> float:
        """Beyond the largest measured window, the time grows with the window."""
        times = self.seconds[number]
        known = sorted(times)
        upper = bisect_left(known, window)
        if upper == len(known):
            return times[known[-1]] * window / known[-1]
        if known[upper] == window:
            return times[window]
        low, high = known[upper - 1], known[upper]
        return times[low] + (times[high] - times[low]) * (window - low) / (high - low)


class TimedEngine(Protocol):
    """What :func:`measure_passes` needs of an engine."""

    gpt: GPT
    batch_size: int

    def start(self, request: SamplingRequest) -> AbstractContextManager[WindowState]:
        """State of a call."""


def measure_passes(engine: TimedEngine, config: SamplingConfig) -> PassTimes:
    """Time passes of an engine in the middle of an image, of one image and of a whole batch.

    Args:
        engine: the engine.
        config: settings of sampling.
    """
    shape, device = engine.gpt.config, engine.gpt.output.weight.device
    if shape.block_size == 1:
        return PassTimes([1], [{1: 0.0}])  # the only code comes from the condition, without a pass
    branches = 2 if config.guided_steps(shape.block_size) else 1
    condition = torch.zeros((), dtype=torch.int64)
    if shape.condition == "text":
        condition = torch.zeros(shape.caption_length, shape.caption_dim)

    def timed(rows: int, window: int) -> float:
        images = rows // branches
        given = condition.to(device).expand(images, *condition.shape)
        request = SamplingRequest.from_inputs(engine.gpt, given, replace(config, window=1), None, 0, None)
        with engine.start(request) as state:
            state.codes.zero_()
            state.start_windows()  # the eager engine takes another path if the cache holds NaN
            loop = WindowLoop(state, shape.block_size // 2, None)
            seconds = list[float]()
            while len(seconds) <= REPEATS and (not seconds or seconds[0] < SLOW):
                loop.counts[:] = shape.block_size // 2
                start = time.perf_counter()
                if window:
                    loop.advance(window)  # returns when the codes are on the host
                else:
                    state.advance_from(shape.block_size // 2, rows)
                    state.codes[0, 0].item()
                seconds.append(time.perf_counter() - start)
            return min(seconds)  # the first one allocates memory

    return PassTimes.measure((branches, branches * engine.batch_size), shape.block_size // 2, timed)


class WindowChoice:
    """Chooses the window with the most expected codes a second.

    The chance that guess j of a window is right, if all guesses before it are, is estimated from the passes of this
    call; older ones count less. Where few were observed, it is that of the guess before it. So after some passes
    without guesses, a window is tried again.

    Args:
        times: seconds of passes.
        longest: largest window.
    """

    def __init__(self, times: PassTimes, longest: int) -> None:
        self._times = times
        self._windows = [window for window in WINDOWS if window <= max(longest, 1)]
        self._held = 0
        self._right = [0.0] * max(WINDOWS)
        self._offered = [0.0] * max(WINDOWS)

    def pays(self, rows: int) -> bool:
        """Whether a call should use windows at all: if they are clearly faster with the assumed chance."""
        plain = self._times.plain[bisect_left(self._times.rows[:-1], rows)] if self._times.plain else None
        _, rate = self._best(rows)
        return rate * (self._times.at(rows, 1) if plain is None else plain) >= MARGIN

    def choose(self, rows: int) -> int:
        """Window of the next pass over this many rows."""
        if self._held:
            self._held -= 1
            return 1
        best, _ = self._best(rows)
        self._held = HOLD - 1 if best == 1 else 0
        return best

    def _best(self, rows: int) -> tuple[int, float]:
        """The best window, and its expected codes a second of an image."""
        best, highest = 1, 0.0
        expected, reached, chance, depth = 1.0, 1.0, FIRST_CHANCE, 0
        for window in self._windows:
            while depth < window - 1:
                chance = (self._right[depth] + FIRST_WEIGHT * chance) / (self._offered[depth] + FIRST_WEIGHT)
                reached *= chance
                expected += reached
                depth += 1
            rate = expected / max(self._times.at(rows, window), 1e-9)
            if rate > highest:
                best, highest = window, rate
        return best, highest

    def observe(self, window: int, right: Iterable[int]) -> None:
        """Learn from a pass.

        Args:
            window: its window.
            right: for each image with ``window − 1`` guesses, how many were right before the first wrong one.
        """
        if self._held:
            return
        fading = FADING if window > 1 else FADING**HOLD
        for seen in (self._right, self._offered):
            seen[:] = [fading * count for count in seen]
        for count in right:
            for depth in range(min(count + 1, window - 1)):
                self._offered[depth] += 1
                self._right[depth] += depth < count
