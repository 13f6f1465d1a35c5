"""The choice of the window for each pass: from measured times of passes, and from how many guesses were right."""

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch

from llamagen.models.gpt import GPT
from llamagen.sampling.config import SamplingConfig
from llamagen.sampling.inputs import SamplingRequest
from llamagen.sampling.windows import WindowLoop, WindowState

SPANS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
REPEATS = 3
MAX_SECONDS = 1.5
FIRST_CHANCE, FIRST_WEIGHT = 0.6, 2.0  # assumed chance that a guess is right, and the observations that outweigh it


class PassTimes(NamedTuple):
    """Measured seconds of a pass.

    Attributes:
        images: number of images of the measured passes, ascending; at least one.
        seconds: for each of them, seconds by window for the first of :data:`SPANS`, at least for window 1.
    """

    images: list[int]
    seconds: list[list[float]]

    @classmethod
    def measure(cls, images: Iterable[int], longest: int, timed: Callable[[int, int], float]) -> "PassTimes":
        """Time passes, for at most a few seconds.

        Args:
            images: numbers of images.
            longest: largest window.
            timed: runs a pass with a number of images and a window, and returns its seconds.
        """
        counts = sorted(set(images))
        return cls(counts, [cls._by_span(count, longest, timed) for count in counts])

    @staticmethod
    def _by_span(images: int, longest: int, timed: Callable[[int, int], float]) -> list[float]:
        found, start = list[float](), time.perf_counter()
        timed(images, 1)  # allocates memory
        for span in SPANS:
            if found and (span > longest or time.perf_counter() - start > MAX_SECONDS):
                break
            found.append(min(timed(images, span) for _ in range(REPEATS)))
            if found[-1] > 0.95 * span * found[0] and span > 1:
                break  # not even right guesses would make it faster
        return found

    def at(self, images: int, position: int) -> float:
        """Seconds of a pass with a window of ``SPANS[position]``, interpolated linearly."""
        upper = min(bisect_left(self.images, images), len(self.images) - 1)
        if upper == 0 or self.images[upper] <= images:
            return self._known(upper, position)
        low, high = self.images[upper - 1], self.images[upper]
        share = (images - low) / (high - low)
        return (1 - share) * self._known(upper - 1, position) + share * self._known(upper, position)

    def _known(self, row: int, position: int) -> float:
        times = self.seconds[row]
        if position < len(times):
            return times[position]
        return times[-1] * SPANS[position] / SPANS[len(times) - 1]


class Decoder(Protocol):
    """What :func:`measure_passes` needs of an engine."""

    gpt: GPT
    batch_size: int

    def start(self, request: SamplingRequest) -> AbstractContextManager[WindowState]:
        """State of a call."""


def measure_passes(decoder: Decoder, config: SamplingConfig) -> PassTimes:
    """Time passes of an engine in the middle of an image, for one image and for a whole batch.

    Args:
        decoder: the engine.
        config: settings of sampling.
    """
    shape, device = decoder.gpt.config, decoder.gpt.output.weight.device
    one = torch.zeros((), dtype=torch.int64)
    if shape.condition == "text":
        one = torch.zeros(shape.caption_length, shape.caption_dim)

    def timed(images: int, span: int) -> float:
        condition = one.to(device).expand(images, *one.shape)
        request = SamplingRequest.from_inputs(decoder.gpt, condition, replace(config, window=1), None, 0, None)
        with decoder.start(request) as state:
            state.codes.zero_()
            state.start_windows()  # the eager engine takes another path if the cache holds NaN
            loop = WindowLoop(state, max(1, shape.block_size // 2), None)
            start = time.perf_counter()
            loop.advance(span)
            loop.codes[0].sum()  # the pass is done when its codes are here
            return time.perf_counter() - start

    return PassTimes.measure((1, decoder.batch_size), shape.block_size // 2, timed)


class WindowChoice:
    """Chooses the window with the most expected codes a second.

    The chance that guess j of a window is right, if all guesses before it are, is estimated from the passes of this
    call. Where few were observed, it is that of the guess before it.

    Args:
        times: seconds of passes.
        longest: largest window.
    """

    def __init__(self, times: PassTimes, longest: int) -> None:
        self._times = times
        self._positions = [position for position, span in enumerate(SPANS) if span <= max(longest, 1)]
        self._right = [0] * max(SPANS)
        self._offered = [0] * max(SPANS)

    def choose(self, images: int) -> int:
        """Window of the next pass over this many images."""
        best, highest = 1, 0.0
        expected, reached, chance, depth = 1.0, 1.0, FIRST_CHANCE, 0
        for position in self._positions:
            while depth < SPANS[position] - 1:
                chance = (self._right[depth] + FIRST_WEIGHT * chance) / (self._offered[depth] + FIRST_WEIGHT)
                reached *= chance
                expected += reached
                depth += 1
            rate = expected / self._times.at(images, position)
            if rate > highest:
                best, highest = SPANS[position], rate
        return best

    def observe(self, span: int, right: Iterable[int]) -> None:
        """Learn from a pass.

        Args:
            span: its window.
            right: for each image, the number of its first guesses that were right, at most ``span − 1``.
        """
        for count in right:
            for depth in range(min(count + 1, span - 1)):
                self._offered[depth] += 1
                self._right[depth] += depth < count
