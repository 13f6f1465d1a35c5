"""Sampling with a static key-value cache, which ``benchmarks/bench_sampling.py`` compares with ours.

This is the loop of the published code: both branches of guidance run in one batch, the cache has its full length from
the start, and every step attends to all of it under a mask. So every step costs the same. Where the published code
wastes time, this one does not: cache, mask and rotary table are built once, no probabilities are kept, and sampling
does not wait for the GPU. Four ways to run a step:

- ``static``: eager, as in the published script.
- ``static_compiled``: ``torch.compile`` of the blocks and of the choice of a code, in the default mode. The blocks
  share one compilation, which takes seconds instead of a minute.
- ``static_graphs``: the same, with the whole step in one CUDA graph.
- ``static_reduce_overhead``: ``torch.compile`` of the whole step with ``mode="reduce-overhead"``, which captures CUDA
  graphs. It may fuse operators of neighbouring blocks, and compiles much longer.

Shapes: B images, R = 2 B rows, P tokens, D width, H heads, E head width, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.plain_gpt import PlainBlock, PlainGPT
from llamagen.models.gpt import GPT
from llamagen.models.rope import rotate
from llamagen.sampling import SamplingConfig

STATIC, COMPILED, GRAPHS, REDUCE_OVERHEAD = WAYS = (
    "static",
    "static_compiled",
    "static_graphs",
    "static_reduce_overhead",
)
WARM_UP = 3


class StaticLayer(nn.Module):
    """A block with its cache. Each call reads one token of each row.

    Args:
        block: the block.
        rows: R.
        positions: P, the length of the cache.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, block: PlainBlock, rows: int, positions: int) -> None:
        super().__init__()
        self.block = block
        shape = (rows, block.config.n_head, positions, block.config.head_dim)
        weight = block.attention["wo"].get_parameter("weight")
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(shape, dtype=weight.dtype, device=weight.device), persistent=False)

    def forward(self, x: Tensor, rope: Tensor, mask: Tensor, position: Tensor) -> Tensor:
        """(R, 1, D) → (R, 1, D); ``mask`` is (1, P) and ``position`` (1,)."""
        block, heads = self.block, self.block.config.n_head
        q, k, v = (
            part.unflatten(-1, (heads, -1))
            for part in block.attention["wqkv"](block.attention_norm(x)).chunk(3, dim=-1)
        )
        q, k = rotate(q, rope), rotate(k, rope)
        self.keys[:, :, position] = k.transpose(1, 2)
        self.values[:, :, position] = v.transpose(1, 2)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), self.keys, self.values, mask)
        x = x + block.attention["wo"](y.transpose(1, 2).flatten(2))
        y, ffn = block.ffn_norm(x), block.feed_forward
        result: Tensor = x + ffn["w2"](F.silu(ffn["w1"](y)) * ffn["w3"](y))
        return result


class StaticStep(nn.Module):
    """Everything that a step reads and writes. A call samples the next code of each image.

    Args:
        gpt: a class-conditional model; its weights are shared, except the embeddings.
        batch: B.
        config: guidance scale, temperature and top-k.

    Attributes:
        tokens: (R,) the next token of each row: a code, or the vocabulary size plus a class.
        position: (1,) the position of these tokens.
        codes: (B, P) the codes sampled so far.
    """

    tokens: Tensor
    position: Tensor
    codes: Tensor
    rope: Tensor
    mask: Tensor

    def __init__(self, gpt: GPT, batch: int, config: SamplingConfig) -> None:
        super().__init__()
        self.config, self.vocabulary, self.no_class = config, gpt.config.vocab_size, gpt.config.num_classes
        with torch.device("meta"):
            plain = PlainGPT(gpt.config)
        plain.load_state_dict(gpt.state_dict(), assign=True)
        positions = gpt.config.block_size
        classes = plain.cls_embedding["embedding_table"].get_parameter("weight")
        self.embedding = nn.Embedding.from_pretrained(torch.cat([plain.tok_embeddings.weight, classes]).detach())
        self.layers = nn.ModuleList(StaticLayer(block, 2 * batch, positions) for block in plain.layers)  # type: ignore[arg-type]
        self.norm, self.output = plain.norm, plain.output
        device = gpt.output.weight.device
        buffers = {
            "tokens": torch.zeros(2 * batch, dtype=torch.int64),
            "position": torch.zeros(1, dtype=torch.int64),
            "codes": torch.zeros(batch, positions, dtype=torch.int64),
            "mask": torch.ones(positions, positions, dtype=torch.bool).tril(),
            "rope": gpt.rope[:positions],
        }
        for name, value in buffers.items():
            self.register_buffer(name, value.to(device), persistent=False)
        self.choose: Callable[[Tensor, SamplingConfig], Tensor] = choose

    def start(self, labels: Tensor) -> None:
        """Begin with the classes (B,); the other branch has no class."""
        without = torch.full_like(labels, self.no_class)
        self.tokens.copy_(torch.cat([labels, without]) + self.vocabulary)
        self.position.zero_()

    def forward(self) -> None:
        """Read one token of each row, and sample the next code of each image."""
        rope, mask = self.rope[self.position], self.mask[self.position]
        x = self.embedding(self.tokens)[:, None]
        for layer in self.layers:
            x = layer(x, rope, mask, self.position)
        code = self.choose(self.output(self.norm(x))[:, 0], self.config)
        self.codes.index_copy_(1, self.position, code[:, None])
        self.tokens.copy_(torch.cat([code, code]))
        self.position.add_(1)


def choose(logits: Tensor, config: SamplingConfig) -> Tensor:
    """Guided logits (R, V) → codes (B,), by exponential noise: ``torch.multinomial`` would wait for the GPU."""
    conditional, unconditional = logits.float().chunk(2)
    logits = unconditional + config.guidance_scale * (conditional - unconditional)
    if config.temperature == 0.0:
        return logits.argmax(-1)
    logits = logits / config.temperature
    if 0 < config.top_k < logits.shape[-1]:
        least = logits.topk(config.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = logits.softmax(-1)
    return (probabilities / torch.empty_like(probabilities).exponential_(1.0)).argmax(-1)


def _graphs_skipped() -> int:
    """How often Inductor decided against CUDA graphs, which it only logs."""
    return int(torch._dynamo.utils.counters["inductor"]["cudagraph_skips"])


class StaticSampler:
    """Samples codes in one of the :data:`WAYS`, and is ready when it was built.

    Args:
        gpt: a class-conditional model without grouped queries.
        batch: number of images.
        config: guidance scale, temperature and top-k.
        way: one of :data:`WAYS`.
        backend: of ``torch.compile``; another one than ``inductor`` compiles nothing and is for dry runs.

    Attributes:
        note: what this device does not do, or empty.
    """

    @torch.no_grad()
    def __init__(self, gpt: GPT, batch: int, config: SamplingConfig, way: str, backend: str = "inductor") -> None:
        self.step, self.way, self.note = StaticStep(gpt, batch, config), way, ""
        cuda = gpt.output.weight.device.type == "cuda"
        torch._dynamo.config.recompile_limit = (
            1000  # a process measures many shapes; fullgraph makes a fallback an error
        )
        if way in (COMPILED, GRAPHS):
            for layer in self.step.layers:
                layer.compile(fullgraph=True, backend=backend, dynamic=False)
            self.step.choose = torch.compile(choose, fullgraph=True, backend=backend, dynamic=False)
        if way in (GRAPHS, REDUCE_OVERHEAD) and not cuda:
            self.note = "without CUDA graphs, which need a GPU"
        self._advance: Callable[[], None] = self.step
        if way == REDUCE_OVERHEAD:
            mode = {"mode": "reduce-overhead"} if cuda and backend == "inductor" else {}
            self._advance = torch.compile(self.step.forward, fullgraph=True, dynamic=False, backend=backend, **mode)  # type: ignore[call-overload]
        labels = torch.zeros(batch, dtype=torch.int64, device=gpt.output.weight.device)
        skips = _graphs_skipped()
        self(labels, WARM_UP)
        if _graphs_skipped() > skips:
            self.note = "torch.compile skipped its CUDA graphs"
        if way == GRAPHS and cuda:
            self.step.start(labels)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.step()
            self._advance = graph.replay
            self(labels, WARM_UP)

    @torch.no_grad()
    def __call__(self, labels: Tensor, count: int | None = None) -> Tensor:
        """Sample the first ``count`` codes for the classes (B,), by default all; (B, count) int64."""
        count = count or self.step.codes.shape[1]
        self.step.start(labels)
        for _ in range(count):
            if self.way == REDUCE_OVERHEAD:
                torch.compiler.cudagraph_mark_step_begin()
            self._advance()
        return self.step.codes[:, :count].clone()
