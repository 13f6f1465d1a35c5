"""The decode loop on NVIDIA GPUs: each step is one CUDA graph, and nothing waits for the device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import cast

import torch
from torch import Tensor

from llamagen.models.gpt import GPT
from llamagen.sampling.config import SamplingConfig
from llamagen.sampling.decode_weights import DecodeWeights
from llamagen.sampling.decoder import CodeDecoder, DecodedCodes, DecodeState
from llamagen.sampling.draws import Draws
from llamagen.sampling.gpu.windows import WindowGraphs
from llamagen.sampling.inputs import SamplingRequest
from llamagen.sampling.window_choice import PassTimes, WindowChoice
from llamagen.sampling.windows import Array


class GPUCodeDecoder(CodeDecoder):
    """Samples codes by Triton kernels in CUDA graphs.

    footgun: graphs read and write fixed memory, so a decoder runs one call at a time. A second thread gets an error,
    because waiting for the first would hide that the two do not run in parallel.

    Args:
        gpt: the model, on the GPU.
        batch_size: number of images of every batch.
        dtype: dtype of products and cache.
        int8: keep the weights as int8.

    Raises:
        ValueError: if Triton is not installed, or the model has adaptive norms.
    """

    full_batches = True
    any_order = False

    def __init__(self, gpt: GPT, batch_size: int, dtype: torch.dtype, int8: bool = False) -> None:
        super().__init__(gpt, batch_size, dtype)
        if gpt.config.adaptive_norm:
            raise ValueError("sampling on GPUs is not compiled for adaptive norms; leave compiled out")
        if torch.version.hip or find_spec("triton") is None:
            raise ValueError(
                "compiled sampling on a GPU needs Triton for CUDA, which is not installed; sample without compiling"
            )
        self.weights = DecodeWeights.from_gpt(gpt, dtype, int8)
        self._free = [WindowGraphs(gpt, batch_size, self.weights)]  # append and pop are atomic

    def prepare(self, config: SamplingConfig) -> None:
        """Allocate the key-value cache and capture the graphs."""
        with self._take() as graphs:
            graphs.prepare(config)
        if config.window == "auto":
            self.pass_times(config)

    def pass_times(self, config: SamplingConfig) -> PassTimes:
        """Measured times of passes with these settings, for the choice of the window. The first call measures them."""
        with self._take() as graphs:
            return graphs.pass_times(config)

    @property
    def passes(self) -> int:
        """Number of passes of the last call with windows."""
        with self._take() as graphs:
            return graphs.passes

    @contextmanager
    def start(self, request: SamplingRequest) -> Iterator[DecodeState]:
        """State of a new call."""
        with self._take() as graphs:
            yield GPUDecodeState(self.gpt, request, graphs)

    @contextmanager
    def _take(self) -> Iterator["WindowGraphs"]:
        """The graphs and their memory, for one call alone."""
        try:
            graphs = self._free.pop()
        except IndexError:
            raise RuntimeError(
                "this sampler is already sampling in another thread, and its CUDA graphs have memory for one call; "
                "use a Sampler for each thread, or sample in one thread"
            ) from None
        try:
            yield graphs
        finally:
            self._free.append(graphs)


class GPUDecodeState(DecodeState):
    """State of a call of :class:`GPUCodeDecoder`; its tensors are those that the graphs read and write."""

    def __init__(self, gpt: GPT, request: SamplingRequest, graphs: WindowGraphs) -> None:
        cache = graphs.prepare(request.config)
        cache.length = 0
        super().__init__(gpt, request, cache)
        self._graphs = graphs
        self.codes, self.broken = graphs.codes, graphs.broken
        graphs.begin(request, self.caption_lengths)

    def prefill(self) -> Tensor:
        """Logits (R, V) of the first code."""
        condition, dropped = self.conditions()
        if self.gpt.config.condition == "class":
            self.cache.advance(1)
            x = self.gpt.cls_embedding(condition, dropped)[:, 0]
            target = self.gpt.target_embedding(torch.zeros(1, dtype=torch.int64, device=x.device))
            return self._graphs.logits((x if target is None else x + target).float())
        with self._precision():
            logits = self.gpt(
                None, condition, caption_lengths=self.caption_lengths, drop_condition=dropped, cache=self.cache
            )
        return cast(Tensor, logits[:, -1])

    def decode(self, tokens: Tensor, positions: Tensor | None = None, targets: Tensor | None = None) -> Tensor:
        """Not available: a captured step reads its own last code, at the next position in raster order.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "compiled sampling on a GPU decodes one code at a time in raster order; sample without compiling"
        )

    def decode_in_windows(
        self, window: int | WindowChoice, first: int, logits: Tensor | None, report: Callable[[int], None]
    ) -> None:
        """Sample the codes from ``first`` on in graphs: see :class:`~llamagen.sampling.gpu.windows.WindowGraphs`."""
        guided_steps = self.request.config.guided_steps(self.length) if self.guided else 0
        self._graphs.run(self.request.config, window, first, logits, guided_steps, report)

    def start_windows(self) -> None:
        """Not available: a captured pass reads and draws codes itself."""
        raise NotImplementedError

    def move_row(self, source: int, target: int) -> None:
        """Not available, like :meth:`start_windows`."""
        raise NotImplementedError

    def read_windows(self, tokens: Array, rows: list[int], starts: Array) -> Tensor:
        """Not available, like :meth:`start_windows`."""
        raise NotImplementedError

    def draw(self, logits: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Not available, like :meth:`start_windows`."""
        raise NotImplementedError

    def read(self, tokens: Tensor, positions: Tensor | None = None, targets: Tensor | None = None) -> None:
        """Read codes (R, T) by a call of the model, into the cache of the graphs."""
        with self._precision():
            self.gpt.features(tokens, caption_lengths=self.caption_lengths, cache=self.cache)

    def keep(self, kept: Tensor) -> None:
        """Start with given codes (B, K)."""
        super().keep(kept)
        self._graphs.skip_to(kept.shape[1])

    def _precision(self) -> torch.autocast:
        """Autocast for calls of the model, if the graphs compute in another dtype."""
        dtype = self._graphs.dtype
        return torch.autocast("cuda", dtype, enabled=dtype is not self.gpt.output.weight.dtype)

    def sample(self, logits: Tensor, step: int) -> None:
        """Sample the first code; :meth:`advance` samples the others."""
        assert step == 0
        self._graphs.sample_first(logits, self.request.config)

    def advance(self, step: int) -> None:
        """Read code ``step − 1`` and sample code ``step``."""
        self._graphs.advance(self.request.config, self.rows > self.batch)

    def result(self) -> DecodedCodes:
        """Copies of the codes: the next call overwrites the memory of the graphs."""
        return DecodedCodes(self.codes.clone(), self.broken.clone())
