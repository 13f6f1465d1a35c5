"""The decode loop: from a condition to the codes of an image, one code after the other.

Three engines run it: calls of the model on any device (``eager.py``), C++ on CPUs (``cpu/``), Triton in CUDA graphs
(``gpu/``). With windows, a pass decides several codes: see ``windows.py``.

Shapes: B images, R rows (2 B while guided: the conditional rows first, then the unconditional ones), L codes of an
image, of which the first K are kept, T new tokens of a pass, V vocabulary size.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple, cast

import torch
from torch import Tensor

from llamagen.models.gpt import GPT
from llamagen.models.kv_cache import KVCache
from llamagen.sampling.cache_pool import CachePool
from llamagen.sampling.config import SamplingConfig
from llamagen.sampling.decode_weights import DecodeWeights
from llamagen.sampling.draws import Draws
from llamagen.sampling.inputs import SamplingRequest
from llamagen.sampling.order import to_raster
from llamagen.sampling.window_choice import PassTimes, WindowChoice, measure_passes
from llamagen.sampling.windows import Array, WindowLoop

MAX_PASS_TOKENS = 2048
"""Maximum number of kept codes, of all rows together, that a pass reads: enough to keep a CPU busy."""


class DecodedCodes(NamedTuple):
    """Codes of a batch. A GPU may still be computing them.

    Attributes:
        codes: (B, L) int64, in raster order.
        broken: (B,) bool, True for images with logits that are not finite.
    """

    codes: Tensor
    broken: Tensor


class DecodeState(ABC):
    """State of one decode call, and the passes that change it. Concurrent calls share only the weights.

    Args:
        gpt: the model.
        request: condition and settings of the batch.
        cache: an empty cache of at least R rows, used by this call alone.

    Attributes:
        rows: R, number of rows that the next pass computes.
        codes: (B, L) int64 in the order of generation; column ``step`` is valid after code ``step`` was sampled.
        broken: (B,) bool, True once some logits of an image are not finite.
    """

    def __init__(self, gpt: GPT, request: SamplingRequest, cache: KVCache) -> None:
        self.gpt, self.request, self.batch = gpt, request, len(request)
        self.length, self.condition_length = gpt.config.block_size, gpt.config.condition_length
        # Kept codes are not sampled, so they need no guidance.
        self.guided = request.config.guided_steps(self.length) > request.kept_count
        self.rows = 2 * self.batch if self.guided else self.batch
        self.cache = cache.first_rows(self.rows)
        device = request.condition.device
        self.codes = torch.empty(self.batch, self.length, dtype=torch.int64, device=device)
        self.broken = torch.zeros(self.batch, dtype=torch.bool, device=device)
        self.caption_lengths = self._both_branches(request.caption_lengths)

    @abstractmethod
    def prefill(self) -> Tensor:
        """Read the condition into the cache.

        Returns:
            (R, V), the logits of the first code.
        """

    @abstractmethod
    def decode(self, tokens: Tensor, positions: Tensor | None = None, targets: Tensor | None = None) -> Tensor:
        """Read new codes into the cache, in one pass.

        Args:
            tokens: (R, T) int64. Each attends to the cache and to the new tokens before it.
            positions: (T,) or (R, T) integers, the position of each token on the grid, counted in raster order; None
                means the next T positions.
            targets: (T,) or (R, T) integers, the position of the code after each token, which a target-aware model
                needs with ``positions``; None means the next position in raster order.

        Returns:
            (R, T, V), the logits after each token; valid until the next pass.
        """

    @abstractmethod
    def read(self, tokens: Tensor, positions: Tensor | None = None, targets: Tensor | None = None) -> None:
        """Read new codes (R, T) into the cache like :meth:`decode`, without logits."""

    @abstractmethod
    def sample(self, logits: Tensor, step: int) -> None:
        """Sample code ``step`` of each image from its logits (R, V)."""

    @abstractmethod
    def read_windows(self, tokens: Array, rows: list[int], starts: Array) -> Tensor:
        """Read new codes into the cache in one pass, each row at its own place.

        Args:
            tokens: (R, T) int64. Each attends to the cached tokens of its row and to the new tokens before it.
            rows: the row of the cache that each row belongs to, counted as at the start of the call.
            starts: (R,) int64, the number of cached tokens of each row. Those after it are overwritten.

        Returns:
            (R, T, V), the logits after each token; valid until the next pass.
        """

    @abstractmethod
    def draw(self, logits: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Draw N codes.

        Args:
            logits: (rows, V), contiguous.
            draws: what to draw from which rows; its tensors are on the model's device.

        Returns:
            (N,) int64 codes, and (N,) bool: whether some logits of a draw are not finite.
        """

    @abstractmethod
    def start_windows(self) -> None:
        """Prepare the cache for :meth:`read_windows`, after the condition and the kept codes were read."""

    @abstractmethod
    def move_row(self, source: int, target: int) -> None:
        """Row ``source`` of a pass becomes row ``target``: copy it, if passes read the first rows of the cache."""

    def keep(self, kept: Tensor) -> None:
        """Start with given codes (B, K): read all but the last one, which :meth:`advance` reads."""
        self.codes[:, : kept.shape[1]] = kept
        tokens = kept[:, :-1]
        if tokens.numel():
            start = 0
            for part in self._each_row(tokens).split(max(1, MAX_PASS_TOKENS // self.rows), dim=1):
                end = start + part.shape[1]
                self.read(part, self._order(start, end), self._order(start + 1, end + 1))
                start = end

    def advance(self, step: int) -> None:
        """Read code ``step − 1`` and sample code ``step``."""
        self._decode_and_sample(step)

    def advance_from(self, step: int, rows: int) -> Tensor:
        """:meth:`advance` after passes of :meth:`read_windows`, when all images have ``step`` codes.

        Args:
            step: number of codes.
            rows: number of rows of the pass, the first ones.

        Returns:
            (R, V), the logits of code ``step``; valid until the next pass.
        """
        self.cache.length = self.condition_length + step - 1
        if rows < self.rows:
            self.drop_unconditional()
        return self._decode_and_sample(step)

    def _decode_and_sample(self, step: int) -> Tensor:
        tokens = self._each_row(self.codes[:, step - 1 : step])
        logits = self.decode(tokens, self._order(step - 1, step), self._order(step, step + 1))[:, -1]
        self.sample(logits, step)
        return logits

    def decode_in_windows(
        self, window: int | WindowChoice, first: int, logits: Tensor | None, report: Callable[[int], None]
    ) -> None:
        """Sample the codes from ``first`` on, several in a pass: see :class:`~llamagen.sampling.windows.WindowLoop`."""
        WindowLoop(self, first, logits).run(window, report)

    def result(self) -> DecodedCodes:
        """The codes, in memory that later calls do not overwrite."""
        return DecodedCodes(to_raster(self.codes, self.request.order), self.broken)

    def drop_unconditional(self) -> None:
        """Continue with the conditional rows only, because no later code is guided. This halves the cost of a pass."""
        self.rows = self.batch
        self.cache = self.cache.first_rows(self.batch)
        if self.caption_lengths is not None:
            self.caption_lengths = self.caption_lengths[: self.batch]

    def conditions(self) -> tuple[Tensor, Tensor]:
        """Condition of each row, and (R,) bool: whether the row drops it."""
        dropped = torch.arange(self.rows, device=self.codes.device) >= self.batch
        condition = self._both_branches(self.request.condition)
        return cast(Tensor, condition), dropped

    def _image_of(self, rows: list[int]) -> list[int]:
        """Image of rows of the cache."""
        return [row % self.batch for row in rows]

    def _order(self, start: int, stop: int) -> Tensor | None:
        """Raster positions (R, stop − start) of the codes from ``start`` to ``stop``; None in raster order."""
        order = self.request.order
        return None if order is None else self._each_row(order[:, start:stop])

    def _each_row(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T) of the images → (R, T)."""
        return torch.cat([tokens, tokens]) if self.rows > self.batch else tokens

    def _both_branches(self, values: Tensor | None) -> Tensor | None:
        return torch.cat([values, values]) if values is not None and self.guided else values


class CodeDecoder(ABC):
    """Weights, memory and compiled code of an engine. Each call samples the codes of one batch.

    Args:
        gpt: the model, in evaluation mode during calls.
        batch_size: number of images of the largest batch.
        dtype: dtype of products and of the key-value cache.
    """

    weights: DecodeWeights | None = None  # of compiled steps
    full_batches = False  # whether each batch must have its full size
    any_order = True  # whether requests may have an order

    def __init__(self, gpt: GPT, batch_size: int, dtype: torch.dtype) -> None:
        self.gpt, self.batch_size, self.dtype = gpt, batch_size, dtype
        self.device = gpt.output.weight.device
        self._pass_times = dict[bool, PassTimes]()

    @abstractmethod
    def prepare(self, config: SamplingConfig) -> None:
        """Allocate memory, and compile the steps that these settings need, before the first batch."""

    @abstractmethod
    def start(self, request: SamplingRequest) -> AbstractContextManager[DecodeState]:
        """State of a new call. Later calls reuse its memory once the ``with`` statement has ended."""

    def __call__(self, request: SamplingRequest, on_row: Callable[[Tensor, int], object] | None = None) -> DecodedCodes:
        """Sample the codes of a batch of at most ``batch_size`` images, after those that the request keeps.

        Args:
            request: the batch.
            on_row: called with codes (B, L) in raster order and their number so far after the kept rows, and after each
                further complete row of the grid; in another order, after as many codes. An exception of it ends the
                call.

        Raises:
            ValueError: in one line, if the engine cannot sample in the order of the request.
        """
        if request.order is not None and not self.any_order:
            raise ValueError("sampling on GPUs is compiled for the raster order only; leave compiled out for an order")
        length, side, kept = self.gpt.config.block_size, self.gpt.config.grid_size, request.kept_count
        guided, window = request.config.guided_steps(length), request.config.window
        if request.kept is not None and kept == length:
            return _nothing_to_sample(to_raster(request.kept, request.order), on_row)
        first = max(kept, 1)
        choice = window if window != "auto" else self._window_choice(request)
        # 1. Take memory that no other call uses.
        with self.start(request) as state:
            report = _RowReports(state.codes, side, on_row, request.order)
            # 2. Prefill: read the condition, for both branches if any new code is guided.
            logits = state.prefill()
            # 3. Read the kept codes in one pass, or sample the first code.
            if request.kept is None:
                state.sample(logits, 0)
            else:
                state.keep(request.kept)
            # 4. Sample the others. Only reports may wait for the device.
            if choice != 1:
                state.decode_in_windows(choice, first, None if kept else logits, report)
                return state.result()
            report(first)
            for step in range(first, length):
                # 5. Halve the batch as soon as no later code is guided.
                if step == guided > kept:
                    state.drop_unconditional()
                # 6. One pass over the last code, one new code.
                state.advance(step)
                report(step + 1)
            return state.result()

    def _window_choice(self, request: SamplingRequest) -> int | WindowChoice:
        length = self.gpt.config.block_size
        choice = WindowChoice(self.pass_times(request.config), length - 1)
        guided = request.config.guided_steps(length) > request.kept_count
        return choice if choice.pays(2 * len(request) if guided else len(request)) else 1

    def pass_times(self, config: SamplingConfig) -> PassTimes:
        """Measured times of passes, guided or not, for the choice of the window. The first call measures them."""
        guided = config.guided_steps(self.gpt.config.block_size) > 0
        if guided not in self._pass_times:
            self._pass_times[guided] = measure_passes(self, config)
        return self._pass_times[guided]

    def refresh(self) -> None:
        """Copy the model's weights again, if the engine keeps copies."""
        if self.weights is not None:
            self.weights.refresh(self.gpt)


class _RowReports:
    """Calls ``on_row`` once for each complete row of the grid, and first for all that are complete at the start.

    In another order it calls it after as many codes as a row has, and first with all kept codes.
    """

    def __init__(
        self, codes: Tensor, side: int, on_row: Callable[[Tensor, int], object] | None, order: Tensor | None
    ) -> None:
        self._codes, self._side, self._on_row, self._order = codes, side, on_row, order
        self._rows: int | None = None

    def __call__(self, count: int) -> None:
        """All images have their first ``count`` codes."""
        if self._on_row is None:
            return
        rows = count // self._side
        new = range(self._rows + 1, rows + 1) if self._rows is not None else [rows] if rows else []
        self._rows = rows
        for row in new:
            final = row * self._side if self._order is None else count
            codes = torch.zeros_like(self._codes)  # a copy, which the callback may keep
            codes[:, :final] = self._codes[:, :final]
            self._on_row(to_raster(codes, self._order), final)


def _nothing_to_sample(kept: Tensor, on_row: Callable[[Tensor, int], object] | None) -> DecodedCodes:
    """Result of a call that keeps all codes (B, L)."""
    if on_row is not None:
        on_row(kept.clone(), kept.shape[1])
    return DecodedCodes(kept.clone(), torch.zeros(len(kept), dtype=torch.bool, device=kept.device))


class PooledCodeDecoder(CodeDecoder):
    """Base of engines whose calls take a key-value cache from a pool, so that concurrent calls never share one."""

    def __init__(self, gpt: GPT, batch_size: int, dtype: torch.dtype) -> None:
        super().__init__(gpt, batch_size, dtype)
        self.caches = CachePool(gpt.config, self.device, dtype)

    @abstractmethod
    def new_state(self, request: SamplingRequest, cache: KVCache) -> DecodeState:
        """State of a call that uses this cache alone."""

    def prepare(self, config: SamplingConfig) -> None:
        """Allocate the key-value cache, and time passes if the window is chosen by their times."""
        with self.caches.take(self.cache_rows(config)):
            pass
        if config.window == "auto":
            self.pass_times(config)

    @contextmanager
    def start(self, request: SamplingRequest) -> Iterator[DecodeState]:
        """State of a new call."""
        with self.caches.take(self.cache_rows(request.config)) as cache:
            yield self.new_state(request, cache)

    def cache_rows(self, config: SamplingConfig) -> int:
        """Rows of a cache for the largest batch."""
        return 2 * self.batch_size if config.guided_steps(self.gpt.config.block_size) else self.batch_size
