"""Passes over windows as CUDA graphs: several codes of each image, for exactly the image of one code at a time.

``llamagen/sampling/windows.py`` has the method. Here counts, codes and guesses stay on the device, and the host learns
the counts later, while further passes run. All images stay in the batch to the end, because graphs have fixed shapes;
those that are finished read and draw their last codes again, and change nothing.

B images, R rows (2 B while guided), T tokens of a row in a pass (the window), L codes of an image, D model width,
V vocabulary size.
"""

import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from llamagen.models.gpt import GPT
from llamagen.models.kv_cache import KVCache
from llamagen.sampling.config import SamplingConfig
from llamagen.sampling.decode_weights import DecodeWeights
from llamagen.sampling.gpu.graphs import Graph, StepGraphs
from llamagen.sampling.gpu.window_draws import (
    Noise,
    draw,
    limit,
    limit_and_settle,
    read_window,
    settle,
    window_places,
)
from llamagen.sampling.inputs import SamplingRequest
from llamagen.sampling.window_choice import WINDOWS, PassTimes, WindowChoice
from llamagen.sampling.windows import Array

AUTO_SPANS = (1, 2, 4, 8, 16)
"""Windows of ``auto``: few, because each one needs graphs of its own."""
AHEAD = 2
"""Maximum number of passes that the host queues after the one that it waits for."""
TIMED_PASSES = 8


class CountsOnHost:
    """Sends counts of final codes to the host. A pass that the host does not look at yet may still run.

    Args:
        counts: (B,) int64, on the device.
    """

    def __init__(self, counts: Tensor) -> None:
        self._counts, self._cuda = counts, counts.device.type == "cuda"
        self._slots = [self._slot() for _ in range(AHEAD + 1)]
        self._sent = 0
        self.spans: deque[int] = deque()  # windows of the passes whose counts were not received

    def _slot(self) -> tuple[Tensor, torch.cuda.Event | None]:
        memory = torch.empty(len(self._counts), dtype=torch.int64, device="cpu", pin_memory=self._cuda)
        return memory, torch.cuda.Event(blocking=True) if self._cuda else None

    def send(self, span: int) -> None:
        """Send the counts after a pass with this window."""
        memory, event = self._slots[self._sent % len(self._slots)]
        memory.copy_(self._counts, non_blocking=True)
        if event is not None:
            event.record()
        self._sent += 1
        self.spans.append(span)

    def receive(self) -> tuple[int, Array]:
        """Wait for the oldest counts: the window of their pass, and (B,) int64."""
        memory, event = self._slots[(self._sent - len(self.spans)) % len(self._slots)]
        if event is not None:
            event.synchronize()
        return self.spans.popleft(), memory.numpy().copy()


class WindowGraphs(StepGraphs):
    """Adds passes over windows to the steps, and the loop over them.

    Attributes:
        counts: (B,) int64 on the device, number of final codes of each image. In ``codes`` guesses follow them.
        passes: number of passes of the last call.
    """

    def __init__(self, gpt: GPT, batch_size: int, weights: DecodeWeights) -> None:
        super().__init__(gpt, batch_size, weights)
        self.counts = torch.ones(batch_size, dtype=torch.int64, device=self.device)
        self.passes = 0
        self._guided_steps = torch.zeros((), dtype=torch.int64, device=self.device)
        self._host: CountsOnHost | None = None
        self._first_logits: Tensor | None = None
        self._noise = Noise(self._seeds, self._indices, self._counters)
        compiled = partial(torch.compile, fullgraph=True, dynamic=False)
        self._read_window: Callable[..., tuple[Tensor, Tensor]] = compiled(read_window)
        self._draw: Callable[..., Tensor] = compiled(draw)
        self._settle: Callable[..., None] = compiled(settle)
        self._limit_and_settle: Callable[..., None] = compiled(limit_and_settle)
        self._times: dict[bool, PassTimes] = {}

    def prepare(self, config: SamplingConfig) -> KVCache:
        """Allocate memory and capture the graphs that these settings need."""
        spans, length = self._spans(config), self.gpt.config.block_size
        if spans:
            self._reserve(2 * self.batch_size * spans[-1])
            if self._host is None:
                self._host = CountsOnHost(self.counts)
                shape = (2 * self.batch_size, self.gpt.config.vocab_size)
                self._first_logits = torch.zeros(shape, dtype=torch.float32, device=self.device)
        cache = super().prepare(config)
        guided = config.guided_steps(length)
        # footgun: a capture overwrites the cache, so all graphs of a call must exist before it starts.
        if spans:
            self._guess_graph(config, guided > 0)
        for span in spans:
            if guided > 1:
                self._window_graph(config, span, True)
            if guided < length:
                self._window_graph(config, span, False)
        return cache

    def begin(self, request: SamplingRequest, caption_lengths: Tensor | None) -> None:
        """Initialise the memory of the graphs for a call."""
        super().begin(request, caption_lengths)
        self._guided_steps.fill_(request.config.guided_steps(self.gpt.config.block_size))

    def pass_times(self, config: SamplingConfig) -> PassTimes:
        """Times of passes of ``auto`` in the middle of an image. They are measured once with guidance, once without."""
        guided = config.guided_steps(self.gpt.config.block_size) > 1
        if guided not in self._times:
            config = replace(config, window="auto")
            self.prepare(config)
            spans = self._spans(config)
            with self._restored():
                by_span = {span: self._seconds(self._window_graph(config, span, guided)) for span in spans}
            # A window without a graph takes the time of the next one, which runs instead.
            times = {
                window: by_span[min(span for span in spans if span >= window)]
                for window in WINDOWS
                if window <= max(spans, default=0)
            }
            # An image of one code has no passes.
            self._times[guided] = PassTimes([2 * self.batch_size], [times or {1: 0.0}])
        return self._times[guided]

    def run(
        self,
        config: SamplingConfig,
        window: int | WindowChoice,
        first: int,
        logits: Tensor | None,
        guided_steps: int,
        report: Callable[[int], None],
    ) -> None:
        """Sample all codes. The host waits for a pass only if :data:`AHEAD` further ones are queued, or near the end.

        Args:
            config: settings of sampling.
            window: number of tokens of an image in a pass, or the choice of it.
            first: number of codes that are final, at least 1.
            logits: (R, V), the logits of the first code; None if codes were kept.
            guided_steps: number of codes, from the first one, that need the unconditional branch.
            report: called with the number of codes that all images have, when it is known.
        """
        length, spans, host = self.gpt.config.block_size, self._spans(config), self._host
        if first == length:
            report(first)
            return
        assert host is not None
        host.spans.clear()
        self.passes = 0
        self.counts.fill_(first)
        self._guess_first(config, first, logits, spans[-1])
        counts, fewest = np.full(self.batch_size, first), first
        report(fewest)
        while fewest < length:
            wanted = min(window if isinstance(window, int) else window.choose(2 * self.batch_size), spans[-1])
            span = min(span for span in spans if span >= wanted)
            self._window_graph(config, span, fewest < guided_steps).replay()
            host.send(span)
            self.passes += 1
            while host.spans and (len(host.spans) > AHEAD or fewest + sum(host.spans) >= length):
                span, received = host.receive()
                if not isinstance(window, int):
                    whole = counts + span <= length  # the window was not moved to the left
                    window.observe(span, (received - counts - 1)[whole].tolist())
                counts, fewest = received, int(received.min())
                report(fewest)

    def _spans(self, config: SamplingConfig) -> list[int]:
        """Windows of the graphs of these settings, ascending; none without windows."""
        longest = self.gpt.config.block_size - 1
        if config.window == 1 or longest < 1:
            return []
        wanted = AUTO_SPANS if config.window == "auto" else (config.window,)
        return sorted({min(span, longest) for span in wanted})

    def _guess_first(self, config: SamplingConfig, first: int, logits: Tensor | None, span: int) -> None:
        """Guess the codes that the first pass reads after the final ones."""
        assert self._first_logits is not None
        if logits is None:
            self.codes[:, first : first + span - 1] = self.codes[:, first - 1 : first]
        elif span > 1:
            self._first_logits[: len(logits)].copy_(logits)
            self._guess_graph(config, len(logits) > self.batch_size).replay()

    def _guess_graph(self, config: SamplingConfig, guided: bool) -> Graph:
        span = self._spans(config)[-1]
        return self._graph(("guess", span, guided, *_settings(config)), partial(self._guess, config, span, guided))

    def _guess(self, config: SamplingConfig, span: int, guided: bool) -> None:
        assert self._first_logits is not None
        logits = self._first_logits[: 2 * self.batch_size if guided else self.batch_size]
        steps = (self.counts[:, None] + torch.arange(span - 1, device=self.device)).clamp(max=self.codes.shape[1] - 1)
        limited, _ = limit(logits, config, self._scales, self._guided_steps, self.counts)
        self.codes.scatter_(1, steps, self._draw(limited[:, None], config, steps, self._noise))

    def _window_graph(self, config: SamplingConfig, span: int, guided: bool) -> Graph:
        key = (span, self._spans(config)[-1], guided, *_settings(config))
        return self._graph(key, partial(self._pass, config, span, guided))

    def _pass(self, config: SamplingConfig, span: int, guided: bool) -> None:
        """One pass over ``span`` tokens of each row."""
        assert self._cache is not None
        length, condition_length = self.gpt.config.block_size, self.gpt.config.condition_length
        branches = 2 if guided else 1
        tables = self._embedding, self._target_embedding
        x, cached = self._read_window(self.codes, self.counts, *tables, span, condition_length, branches)
        first = None if self._first is None else self._first[: len(cached)]
        logits = self._gpu_step(x, cached, first, self._cache.keys, self._cache.values)
        state = (config, span, self._spans(config)[-1], self.codes, self.counts, self.broken, self._noise)
        if config.top_p < 1.0:  # see :meth:`_sample`
            steps = window_places(self.counts, length, span) + 1
            self._settle(*limit(logits, config, self._scales, self._guided_steps, steps), *state)
        else:
            self._limit_and_settle(logits, self._scales, self._guided_steps, *state)

    def _state(self) -> list[Tensor]:
        return [*super()._state(), self.counts]

    def _rewind(self) -> None:
        super()._rewind()
        self.counts.fill_(1)

    def _seconds(self, graph: Graph) -> float:
        """Seconds of a pass in the middle of an image."""
        middle, seconds, events = max(1, self.gpt.config.block_size // 2), list[float](), []
        for _ in range(TIMED_PASSES):
            self.counts.fill_(middle)
            if self.device.type == "cuda":
                events.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
                events[-1][0].record()
                graph.replay()
                events[-1][1].record()
            else:
                start = time.perf_counter()
                graph.replay()
                seconds.append(time.perf_counter() - start)
        for start_event, end_event in events:
            end_event.synchronize()
            seconds.append(start_event.elapsed_time(end_event) / 1e3)
        return min(seconds)


def _settings(config: SamplingConfig) -> tuple[Hashable, ...]:
    """Settings that are constants of a graph."""
    return config.temperature, config.top_k, config.top_p
