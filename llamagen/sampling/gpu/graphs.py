"""Decode steps as CUDA graphs, one code of each image in each step.

B images, R rows, D model width, V vocabulary size.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from llamagen.models.gpt import GPT
from llamagen.models.kv_cache import KVCache
from llamagen.sampling.config import SamplingConfig
from llamagen.sampling.decode_weights import DecodeWeights
from llamagen.sampling.draws import next_code
from llamagen.sampling.gpu.step import GPUStep
from llamagen.sampling.inputs import SamplingRequest
from llamagen.sampling.noise import code_counters

WARM_UP = 3
MAX_GRAPHS = 88
"""Maximum number of graphs, so that a server whose clients vary the settings does not fill the memory.

Settings need up to 11 graphs if the window is ``auto``. Intermediate results share one pool of memory, so a further
graph takes only the memory of its list of kernels.
"""


class Graph(Protocol):
    """A captured pass."""

    def replay(self) -> None:
        """Run it again."""


@contextmanager
def compiling() -> Iterator[None]:
    """Allow compilation, which :func:`evaluation_mode` switches off, and without a limit on the number of settings."""
    with torch.compiler.set_stance("default"), torch._dynamo.config.patch(recompile_limit=1000):
        yield


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
        self._graphs: dict[Hashable, Graph] = {}
        self._weights = weights
        self._gpu_step, self._step_rows = GPUStep(weights, 2 * batch_size), 2 * batch_size
        self._embedding = gpt.get_parameter("tok_embeddings.weight")  # keeps the memory alive that the graphs read
        self._target_embedding = None if gpt.target_embeddings is None else gpt.target_embeddings.weight
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
        if config.window == 1:
            if guided > 1:
                self._step_graph(config, True)
            if guided < length > 1:
                self._step_graph(config, False)
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
        with compiling():
            self._sample(logits, config)
        self._position.fill_(self.gpt.config.condition_length)

    def skip_to(self, step: int) -> None:
        """Continue with code ``step``, after the earlier codes were given and all but the last of them were read."""
        self._step.fill_(step)
        self._position.fill_(self.gpt.config.condition_length + step - 1)

    def advance(self, config: SamplingConfig, guided: bool) -> None:
        """Read the last code and sample the next one."""
        self._step_graph(config, guided).replay()

    def _allocate(self, rows: int) -> KVCache:
        if self._cache is None or self._cache.keys.shape[1] < rows:
            self._cache = None  # frees it before a larger one is allocated
            self._graphs.clear()  # footgun: captured graphs hold pointers into the old cache
            self._cache = KVCache.allocate(self.gpt.config, rows, self.device, self.dtype)
        return self._cache

    def _reserve(self, rows: int) -> None:
        """Make room for passes over ``rows`` tokens."""
        if rows > self._step_rows:
            self._graphs.clear()  # footgun: captured graphs hold pointers into the old workspaces
            self._gpu_step, self._step_rows = GPUStep(self._weights, rows), rows

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
        if self._target_embedding is not None:  # each row predicts the code of this step
            x = x + F.embedding(self._step.view(1), self._target_embedding)
        self._sample(self.logits(x.float()), config)
        self._position.add_(1)

    def _step_graph(self, config: SamplingConfig, guided: bool) -> Graph:
        key = (guided, config.temperature, config.top_k, config.top_p)
        return self._graph(key, partial(self._one_step, config, guided))

    def _graph(self, key: Hashable, run: Callable[[], None]) -> Graph:
        """The graph of ``run``, captured if there is none yet."""
        graph = self._graphs.pop(key, None) or self._capture(run)
        self._graphs[key] = graph  # the last one of the dict is the one used last
        while len(self._graphs) > MAX_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        return graph

    def _state(self) -> list[Tensor]:
        """What a pass changes, except the cache."""
        return [self.codes, self.broken, self._step, self._position]

    def _rewind(self) -> None:
        """Continue with the second code."""
        self._step.fill_(1)
        self._position.fill_(self.gpt.config.condition_length)

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """Restore the state afterwards."""
        state = [(tensor, tensor.clone()) for tensor in self._state()]
        yield
        for tensor, value in state:
            tensor.copy_(value)

    def _capture(self, run: Callable[[], None]) -> Graph:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self.device)
        # All results are copied out of the memory of a graph, so graphs may share it.
        pools = [other.pool() for other in self._graphs.values() if isinstance(other, torch.cuda.CUDAGraph)]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with compiling(), self._restored():
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):  # compiles
                    self._rewind()
                    run()
            torch.cuda.current_stream(self.device).wait_stream(stream)
            # thread_local: other threads, which fetch images or pin batches, may use CUDA during the capture.
            with torch.cuda.graph(
                graph, pool=pools[0] if pools else None, stream=stream, capture_error_mode="thread_local"
            ):
                run()
        return graph
