"""Codes of one batch on an NVIDIA GPU: a step is one CUDA graph, and nothing waits for the device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from llamagen.models.gpt import GPT
from llamagen.models.kv_cache import KVCache
from llamagen.sampling.config import SamplingConfig
from llamagen.sampling.decode_weights import DecodeWeights
from llamagen.sampling.decoder import Decoder, next_code
from llamagen.sampling.gpu.step import GPUStep
from llamagen.sampling.noise import code_counters

WARM_UP = 3


@contextmanager
def _compiling() -> Iterator[None]:
    """Compile, where the model itself must not be, and as many settings as there are."""
    with torch.compiler.set_stance("default"), torch._dynamo.config.patch(recompile_limit=1000):
        yield


class GPUDecoder(Decoder):
    """Draws codes by Triton kernels, captured with the draw in one graph for guided codes and one for the others.

    What changes from code to code and from call to call (position, seed, scale) are tensors that the graphs read.

    Args:
        gpt: the model, on the GPU.
        batch_size: images B of every batch.
        dtype: of products and cache.
        int8: keep the weights as int8.

    Raises:
        ValueError: if Triton is not installed.
    """

    full_batches = True

    def __init__(self, gpt: GPT, batch_size: int, dtype: torch.dtype, int8: bool = False) -> None:
        super().__init__(gpt, batch_size, dtype)
        if torch.version.hip or find_spec("triton") is None:
            raise ValueError(
                "on GPUs sampling is compiled by Triton for CUDA, which is not here; sample without compiling"
            )
        self.weights = DecodeWeights.from_gpt(gpt, dtype, int8)
        self.gpu_step = GPUStep(self.weights, 2 * batch_size)
        self._embedding = gpt.tok_embeddings.weight  # kept, because graphs read its memory
        self._compiled = torch.compile(next_code, fullgraph=True, dynamic=False)
        self._graphs: dict[tuple[object, ...], Callable[[], None]] = {}
        shape, length = (self.batch_size, gpt.config.block_size), gpt.config.block_size
        self._codes = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self._broken = torch.zeros(batch_size, dtype=torch.bool, device=self.device)
        self._indices = torch.zeros(batch_size, dtype=torch.int64, device=self.device)
        self._counters = code_counters(gpt.config.vocab_size, self.device)
        self._scales = torch.ones(length, dtype=torch.float32, device=self.device)
        self._seed, self._step, self._position = torch.zeros(3, dtype=torch.int64, device=self.device).unbind()
        text = gpt.config.condition == "text"
        self._first = torch.zeros(2 * batch_size, dtype=torch.int32, device=self.device) if text else None

    def prepare(self, config: SamplingConfig) -> None:
        """Allocate the cache and capture the graphs."""
        length = self.gpt.config.block_size
        guided = config.guided_steps(length)
        self.config = config
        self._allocate(guided > 0)
        if guided > 1:
            self._graph(True)
        if guided < length > 1:
            self._graph(False)

    def _allocate(self, guided: bool) -> KVCache:
        before = self._memory
        memory = super()._allocate(guided)
        if memory is not before:
            self._graphs.clear()
        return memory

    def _new_codes(self) -> Tensor:
        return self._codes

    def _new_flags(self) -> Tensor:
        return self._broken

    def _begin(self, config: SamplingConfig, seed: int, indices: Tensor) -> None:
        self.prepare(config)
        self._seed.fill_((seed + 2**63) % 2**64 - 2**63)
        self._indices.copy_(indices)
        scales = torch.tensor(config.guidance_scales(self.gpt.config.block_size), dtype=torch.float32, device="cpu")
        self._scales.copy_(scales, non_blocking=True)
        self._broken.zero_()
        self._step.zero_()
        self._position.zero_()
        if self._first is not None:
            lengths, length = self.caption_lengths, self.gpt.config.condition_length
            if lengths is None:
                self._first.zero_()
            else:
                self._first[: len(lengths)].copy_(length - lengths)

    def _prefill(self, condition: Tensor, dropped: Tensor) -> Tensor:
        if self.gpt.config.condition == "class":
            x = self.gpt.cls_embedding(condition, dropped)[:, 0].float()
            return self._logits(x)
        with torch.autocast("cuda", self.dtype, enabled=self.dtype is not self.gpt.output.weight.dtype):
            return super()._prefill(condition, dropped)

    def _logits(self, x: Tensor) -> Tensor:
        assert self._memory is not None
        first = None if self._first is None else self._first[: len(x)]
        return self.gpu_step(x, self._position, first, self._memory.keys, self._memory.values)

    def _draw(self, logits: Tensor, step: int) -> None:
        """The first code, behind the condition; the others are drawn within the graphs."""
        with _compiling():
            self._write(logits)
        self._position.fill_(self.gpt.config.condition_length)

    def _write(self, logits: Tensor) -> None:
        scale = self._scales.gather(0, self._step.view(1))[0]
        # Inductor cannot generate a cumulative sum over 16,384 codes (PyTorch 2.11), which top-p needs.
        choose = next_code if self.config.top_p < 1.0 else self._compiled
        code, broken = choose(logits, self.config, scale, self._seed, self._indices, self._step, self._counters)
        self._codes.scatter_(1, self._step.expand(self.batch_size, 1), code[:, None])
        self._broken.logical_or_(broken)  # within the graph; looked at once a batch
        self._step.add_(1)

    def _one_step(self, guided: bool) -> None:
        last = self._codes.gather(1, (self._step - 1).expand(self.batch_size, 1))[:, 0]
        x = F.embedding(torch.cat([last, last]) if guided else last, self._embedding)
        self._write(self._logits(x.float()))
        self._position.add_(1)

    def _advance(self, step: int, guided: bool) -> None:
        self._graph(guided)()

    def _graph(self, guided: bool) -> Callable[[], None]:
        config = self.config
        key = (guided, config.temperature, config.top_k, config.top_p)
        if key not in self._graphs:
            self._graphs[key] = self._capture(guided)
        return self._graphs[key]

    def _capture(self, guided: bool) -> Callable[[], None]:
        state = [(tensor, tensor.clone()) for tensor in (self._codes, self._broken, self._step, self._position)]
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with _compiling():
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):  # compiles
                    self._step.fill_(1)
                    self._position.fill_(self.gpt.config.condition_length)
                    self._one_step(guided)
            torch.cuda.current_stream(self.device).wait_stream(stream)
            # Other threads, which fetch images or pin batches, may go on meanwhile.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self._one_step(guided)
        for tensor, value in state:
            tensor.copy_(value)
        return graph.replay
