"""The decode loop on NVIDIA GPUs: each step is one CUDA graph, and nothing waits for the device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from llamagen.models.gpt import GPT
from llamagen.models.kv_cache import KVCache
from llamagen.sampling.config import SamplingConfig
from llamagen.sampling.decode_weights import DecodeWeights
from llamagen.sampling.decoder import CodeDecoder, DecodedCodes, DecodeState
from llamagen.sampling.draws import Draws, next_code
from llamagen.sampling.gpu.step import GPUStep
from llamagen.sampling.inputs import SamplingRequest
from llamagen.sampling.noise import code_counters
from llamagen.sampling.windows import Array

WARM_UP = 3
MAX_GRAPHS = 32
"""Maximum number of graphs, so that a server whose clients vary the settings does not fill the memory."""


@contextmanager
def _compiling() -> Iterator[None]:
    """Allow compilation, which :func:`evaluation_mode` switches off, and without a limit on the number of settings."""
    with torch.compiler.set_stance("default"), torch._dynamo.config.patch(recompile_limit=1000):
        yield


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
        ValueError: if Triton is not installed.
    """

    full_batches = True

    def __init__(self, gpt: GPT, batch_size: int, dtype: torch.dtype, int8: bool = False) -> None:
        super().__init__(gpt, batch_size, dtype)
        if torch.version.hip or find_spec("triton") is None:
            raise ValueError(
                "compiled sampling on a GPU needs Triton for CUDA, which is not installed; sample without compiling"
            )
        self.weights = DecodeWeights.from_gpt(gpt, dtype, int8)
        self._free = [StepGraphs(gpt, batch_size, self.weights)]  # append and pop are atomic

    def prepare(self, config: SamplingConfig) -> None:
        """Allocate the key-value cache and capture the graphs."""
        with self._take() as graphs:
            graphs.prepare(config)

    @contextmanager
    def start(self, request: SamplingRequest) -> Iterator[DecodeState]:
        """State of a new call."""
        with self._take() as graphs:
            yield GPUDecodeState(self.gpt, request, graphs)

    @contextmanager
    def _take(self) -> Iterator["StepGraphs"]:
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


class StepGraphs:
    """Decode steps as CUDA graphs, one for guided codes and one for others, and the memory that they share.

    All values that change between steps or calls (position, seeds, guidance scale) are tensors that the graphs read.

    Args:
        gpt: the model, on the GPU.
        batch_size: number of images B.
        weights: weights of the steps.
    """

    def __init__(self, gpt: GPT, batch_size: int, weights: DecodeWeights) -> None:
        self.gpt, self.batch_size, self.dtype = gpt, batch_size, weights.dtype
        self.device = device = gpt.output.weight.device
        length = gpt.config.block_size
        self.codes = torch.zeros(batch_size, length, dtype=torch.int64, device=device)
        self.broken = torch.zeros(batch_size, dtype=torch.bool, device=device)
        self._cache: KVCache | None = None
        self._graphs: dict[tuple[object, ...], Callable[[], None]] = {}
        self._gpu_step = GPUStep(weights, 2 * batch_size)
        self._embedding = gpt.tok_embeddings.weight  # keeps the memory alive that the graphs read
        self._next_code = torch.compile(next_code, fullgraph=True, dynamic=False)
        self._seeds, self._indices = torch.zeros(2, batch_size, dtype=torch.int64, device=device).unbind()
        self._counters = code_counters(gpt.config.vocab_size, device)
        self._scales = torch.ones(length, dtype=torch.float32, device=device)
        self._step, self._position = torch.zeros(2, dtype=torch.int64, device=device).unbind()
        text = gpt.config.condition == "text"
        self._first = torch.zeros(2 * batch_size, dtype=torch.int32, device=device) if text else None

    def prepare(self, config: SamplingConfig) -> KVCache:
        """Allocate the cache and capture the graphs that these settings need."""
        length = self.gpt.config.block_size
        guided = config.guided_steps(length)
        cache = self._allocate(2 * self.batch_size if guided else self.batch_size)
        if guided > 1:
            self._graph(config, True)
        if guided < length > 1:
            self._graph(config, False)
        return cache

    def begin(self, request: SamplingRequest, caption_lengths: Tensor | None) -> None:
        """Initialise the memory of the graphs for a call."""
        self._seeds.copy_(request.seeds)
        self._indices.copy_(request.indices)
        scales = request.config.guidance_scales(self.gpt.config.block_size)
        self._scales.copy_(torch.tensor(scales, dtype=torch.float32, device="cpu"), non_blocking=True)
        self.broken.zero_()
        self._step.zero_()
        self._position.zero_()
        if self._first is not None:
            if caption_lengths is None:
                self._first.zero_()
            else:
                self._first[: len(caption_lengths)].copy_(self.gpt.config.condition_length - caption_lengths)

    def logits(self, x: Tensor) -> Tensor:
        """Logits (R, V) after one more token for each row, embedded as ``x`` (R, D) float32."""
        assert self._cache is not None
        first = None if self._first is None else self._first[: len(x)]
        return self._gpu_step(x, self._position, first, self._cache.keys, self._cache.values)

    def sample_first(self, logits: Tensor, config: SamplingConfig) -> None:
        """Sample the first code, after the condition. The graphs sample the others."""
        with _compiling():
            self._sample(logits, config)
        self._position.fill_(self.gpt.config.condition_length)

    def skip_to(self, step: int) -> None:
        """Continue with code ``step``, after the earlier codes were given and all but the last of them were read."""
        self._step.fill_(step)
        self._position.fill_(self.gpt.config.condition_length + step - 1)

    def advance(self, config: SamplingConfig, guided: bool) -> None:
        """Read the last code and sample the next one."""
        self._graph(config, guided)()

    def _allocate(self, rows: int) -> KVCache:
        if self._cache is None or self._cache.keys.shape[1] < rows:
            self._cache = None  # frees it before a larger one is allocated
            self._graphs.clear()  # footgun: captured graphs hold pointers into the old cache
            self._cache = KVCache.allocate(self.gpt.config, rows, self.device, self.dtype)
        return self._cache

    def _sample(self, logits: Tensor, config: SamplingConfig) -> None:
        scale = self._scales.gather(0, self._step.view(1))[0]
        # Inductor cannot generate a cumulative sum over 16,384 codes (PyTorch 2.11), which top-p needs.
        choose = next_code if config.top_p < 1.0 else self._next_code
        code, broken = choose(logits, config, scale, self._seeds, self._indices, self._step, self._counters)
        self.codes.scatter_(1, self._step.expand(self.batch_size, 1), code[:, None])
        self.broken.logical_or_(broken)  # stays on the device, and is read once a batch
        self._step.add_(1)

    def _one_step(self, config: SamplingConfig, guided: bool) -> None:
        last = self.codes.gather(1, (self._step - 1).expand(self.batch_size, 1))[:, 0]
        x = F.embedding(torch.cat([last, last]) if guided else last, self._embedding)
        self._sample(self.logits(x.float()), config)
        self._position.add_(1)

    def _graph(self, config: SamplingConfig, guided: bool) -> Callable[[], None]:
        key = (guided, config.temperature, config.top_k, config.top_p)
        graph = self._graphs.pop(key, None) or self._capture(config, guided)
        self._graphs[key] = graph  # the last one of the dict is the one used last
        while len(self._graphs) > MAX_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        return graph

    def _capture(self, config: SamplingConfig, guided: bool) -> Callable[[], None]:
        state = [(tensor, tensor.clone()) for tensor in (self.codes, self.broken, self._step, self._position)]
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with _compiling():
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):  # compiles
                    self._step.fill_(1)
                    self._position.fill_(self.gpt.config.condition_length)
                    self._one_step(config, guided)
            torch.cuda.current_stream(self.device).wait_stream(stream)
            # thread_local: other threads, which fetch images or pin batches, may use CUDA during the capture.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self._one_step(config, guided)
        for tensor, value in state:
            tensor.copy_(value)
        return graph.replay


class GPUDecodeState(DecodeState):
    """State of a call of :class:`GPUCodeDecoder`; its tensors are those that the graphs read and write."""

    def __init__(self, gpt: GPT, request: SamplingRequest, graphs: StepGraphs) -> None:
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
            return self._graphs.logits(self.gpt.cls_embedding(condition, dropped)[:, 0].float())
        with self._precision():
            logits = self.gpt(
                None, condition, caption_lengths=self.caption_lengths, drop_condition=dropped, cache=self.cache
            )
        return cast(Tensor, logits[:, -1])

    def decode(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Not available: a captured step reads its own last code, at the next position in raster order.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "compiled sampling on a GPU decodes one code at a time in raster order; sample without compiling"
        )

    def start_windows(self) -> None:
        """Not available, like :meth:`decode`."""

    def move_row(self, source: int, target: int) -> None:
        """Not available, like :meth:`decode`."""

    def read_windows(self, tokens: Array, rows: list[int], starts: Array) -> Tensor:
        """Not available, like :meth:`decode`."""
        raise NotImplementedError("windows")

    def draw(self, logits: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Not available, like :meth:`decode`."""
        raise NotImplementedError("windows")

    def read(self, tokens: Tensor) -> None:
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
