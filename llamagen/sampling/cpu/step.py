"""Python interface of ``step.cpp`` and ``sampling.cpp``: a pass over new tokens on a CPU, and the sampling of codes.

Shapes: B rows, T new tokens of a row, D model width, V vocabulary size.
"""

import ctypes

import torch
from torch import Tensor

from llamagen.models.kv_cache import KVCache
from llamagen.sampling.config import SamplingConfig
from llamagen.sampling.cpu.library import cpu_library
from llamagen.sampling.decode_weights import DecodeWeights, Matrix
from llamagen.sampling.draws import Draws

TYPES = {torch.float32: "float", torch.bfloat16: "uint16_t", torch.int8: "int8_t"}


class _Matrix(ctypes.Structure):
    _fields_ = [("values", ctypes.c_void_p), ("scale", ctypes.c_void_p)]

    @classmethod
    def from_matrix(cls, matrix: Matrix) -> "_Matrix":
        return cls(matrix.values.data_ptr(), None if matrix.scale is None else matrix.scale.data_ptr())


class _Layer(ctypes.Structure):
    _fields_ = [
        ("attention_norm", ctypes.c_void_p),
        ("wqkv", _Matrix),
        ("wo", _Matrix),
        ("ffn_norm", ctypes.c_void_p),
        ("w1", _Matrix),
        ("w3", _Matrix),
        ("w2", _Matrix),
        ("q_norm", ctypes.c_void_p),
        ("k_norm", ctypes.c_void_p),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_int32)
            for name in ("layers", "dim", "heads", "kv_heads", "head_dim", "ffn_dim", "vocabulary")
        ),
        ("eps", ctypes.c_float),
        ("rope", ctypes.c_void_p),
        ("layer", ctypes.POINTER(_Layer)),
        ("norm", ctypes.c_void_p),
        ("head", _Matrix),
    ]


class _Pass(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_int32)
            for name in ("batch", "span", "outputs", "start", "cache_rows", "capacity", "threads")
        ),
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("rows", "starts", "first", "positions", "adaptive"),
                *("x", "keys", "values", "logits", "scratch"),
            )
        ),
    ]


class _Sampling(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("count", "rows", "vocabulary", "padded", "top_k", "threads")),
        *((name, ctypes.c_float) for name in ("temperature", "top_p")),
        *(
            (name, ctypes.c_void_p)
            for name in ("logits", "conditional", "unconditional", "scale", "seed", "index", "step", "scratch")
        ),
        *((name, ctypes.c_void_p) for name in ("codes", "broken")),
    ]


class Scratch:
    """Memory that the passes of one decode call overwrite. It grows as needed."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8, device="cpu")

    def pointer(self, size: int) -> int:
        """Address of at least ``size`` bytes, valid until the next call."""
        if len(self._bytes) < size:
            self._bytes = torch.empty(size, dtype=torch.uint8, device="cpu")
        return self._bytes.data_ptr()


class CPUStep:
    """Passes of a GPT over new tokens with a key-value cache.

    The logits of a row are bit-identical in any batch and on any number of threads. Several threads may call it at the
    same time: all memory that a pass writes to is an argument.

    Args:
        weights: weights on the CPU, in float32 or bfloat16, with or without int8.

    Raises:
        ValueError: if there is no working C++ compiler, or for another dtype.
    """

    def __init__(self, weights: DecodeWeights) -> None:
        if weights.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"on CPUs sampling is compiled for float32 and bfloat16, not for {weights.dtype}")
        self.weights, config = weights, weights.config  # keeps the memory alive that the pointers below refer to
        self._library = cpu_library(TYPES[weights.head.values.dtype], TYPES[weights.dtype])
        layers = [
            _Layer(
                layer.attention_norm.data_ptr(),
                _Matrix.from_matrix(layer.wqkv),
                _Matrix.from_matrix(layer.wo),
                layer.ffn_norm.data_ptr(),
                _Matrix.from_matrix(layer.w1),
                _Matrix.from_matrix(layer.w3),
                _Matrix.from_matrix(layer.w2),
                None if layer.q_norm is None else layer.q_norm.data_ptr(),
                None if layer.k_norm is None else layer.k_norm.data_ptr(),
            )
            for layer in weights.layers
        ]
        self._model = _Model(
            config.n_layer,
            config.dim,
            config.n_head,
            config.kv_heads,
            config.head_dim,
            config.ffn_dim,
            config.vocab_size,
            config.norm_eps,
            weights.rope.data_ptr(),
            (_Layer * len(layers))(*layers),
            weights.norm.data_ptr(),
            _Matrix.from_matrix(weights.head),
        )

    def __call__(
        self,
        x: Tensor,
        cache: KVCache,
        first: Tensor | None,
        logits: Tensor,
        scratch: Scratch,
        positions: Tensor | None = None,
        cache_rows: Tensor | None = None,
        starts: Tensor | None = None,
    ) -> None:
        """Compute the logits after new tokens, and append the tokens to the cache.

        Args:
            x: (B, T, D) float32, contiguous: the embedded tokens. Overwritten.
            cache: cache of at least B rows, see :meth:`KVCache.first_rows`. Its length grows by T, unless ``starts`` is
                given. The layout of keys and values is that of ``attention.h``, so only this class can read them. The
                vectors of adaptive norms must be in it, see :meth:`GPT.all_adaptive_vectors`.
            first: (B,) int32, index of the first token of each row that is not padding; None without padding.
            logits: (B, V) float32 for the logits after the last token, or (B, K, V) for those after the last K tokens;
                contiguous, written to.
            scratch: memory of this call.
            positions: (B, T) int32, contiguous: the row of the rotary table for each token; None for the next T rows.
            cache_rows: (B,) int32, distinct: the row of the cache for each row of ``x``; None for the first B.
            starts: (B,) int32, number of cached tokens of each row; None for the length of the cache.
        """
        batch, span, _ = x.shape
        _, rows, _, capacity, _ = cache.keys.shape
        cache_stride = cache.keys.stride(0) // cache.keys.stride(1)  # rows of the whole cache
        outputs, threads = 1 if logits.dim() == 2 else logits.shape[1], torch.get_num_threads()
        needed = self._library.scratch_bytes(ctypes.byref(self._model), batch * span, threads, capacity)
        arguments = _Pass(
            batch,
            span,
            outputs,
            cache.length,
            cache_stride,
            capacity,
            threads,
            *(
                None if given is None else given.data_ptr()
                for given in (cache_rows, starts, first, positions, cache.adaptive)
            ),
            x.data_ptr(),
            cache.keys.data_ptr(),
            cache.values.data_ptr(),
            logits.data_ptr(),
            scratch.pointer(needed),
        )
        # footgun: the compiled code checks nothing; a wrong shape or dtype would read or write other memory.
        assert rows >= batch <= logits.shape[0]
        assert outputs <= span
        assert (cache.length if starts is None else int(starts.max())) + span <= capacity
        assert cache_rows is None or int(cache_rows.max()) < rows
        assert positions is None or positions.shape == (batch, span)
        assert first is None or first.shape[0] >= batch
        assert all(given is None or given.shape == (batch,) for given in (cache_rows, starts))
        assert (cache.adaptive is not None) == self.weights.config.adaptive_norm
        assert cache.adaptive is None or cache.adaptive.stride() == (cache_stride * x.shape[2], x.shape[2], 1)
        assert cache.adaptive is None or cache.adaptive.dtype is torch.float32
        assert x.is_contiguous()
        assert logits.is_contiguous()
        _must_be(torch.float32, x, logits)
        _must_be(self.weights.dtype, cache.keys, cache.values)
        _must_be(torch.int32, *(given for given in (cache_rows, starts, first, positions) if given is not None))
        self._library.forward(ctypes.byref(self._model), ctypes.byref(arguments))
        if starts is None:
            cache.advance(span)

    def sample_codes(
        self, logits: Tensor, config: SamplingConfig, draws: Draws, scratch: Scratch
    ) -> tuple[Tensor, Tensor]:
        """Draw N codes, with the result of :func:`~llamagen.sampling.logits.sample_codes`.

        Args:
            logits: (rows, V) float32, contiguous.
            config: temperature, top-k and top-p.
            draws: what to draw from which rows.
            scratch: memory of this call.

        Returns:
            (N,) int64 codes, and (N,) bool: whether some logits of a draw are not finite.
        """
        count, threads, (rows, vocabulary) = draws.steps.shape[0], torch.get_num_threads(), logits.shape
        padded = (vocabulary + 15) // 16 * 16  # whole vectors of any processor
        codes = torch.empty(count, dtype=torch.int64, device="cpu")
        broken = torch.empty(count, dtype=torch.bool, device="cpu")
        conditional, unconditional = draws.conditional.contiguous(), draws.unconditional.contiguous()
        _must_be(torch.float32, logits, draws.scales)
        _must_be(torch.int64, conditional, unconditional, draws.seeds, draws.indices, draws.steps)
        assert logits.is_contiguous()
        assert all(field.shape == codes.shape for field in draws)
        arguments = _Sampling(
            count,
            rows,
            vocabulary,
            padded,
            min(config.top_k, vocabulary),
            threads,
            config.temperature,
            config.top_p,
            logits.data_ptr(),
            conditional.data_ptr(),
            unconditional.data_ptr(),
            draws.scales.data_ptr(),
            draws.seeds.data_ptr(),
            draws.indices.data_ptr(),
            draws.steps.data_ptr(),
            scratch.pointer(4 * threads * 2 * padded),
            codes.data_ptr(),
            broken.data_ptr(),
        )
        valid = self._library.sample_codes(ctypes.byref(arguments))
        assert valid, "a draw names a row that the logits do not have"
        return codes, broken


def _must_be(dtype: torch.dtype, *tensors: Tensor) -> None:
    for tensor in tensors:
        assert tensor.dtype is dtype, (tensor.dtype, dtype)
        assert tensor.is_cpu, tensor.device
        assert tensor.dim() > 2 or tensor.is_contiguous()
