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
        *((name, ctypes.c_void_p) for name in ("first", "positions", "x", "keys", "values", "logits", "scratch")),
    ]


class _Sampling(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("batch", "vocabulary", "guided", "top_k", "threads")),
        *((name, ctypes.c_float) for name in ("scale", "temperature", "top_p")),
        ("step", ctypes.c_uint64),
        *((name, ctypes.c_void_p) for name in ("seed", "index", "logits", "scratch", "codes")),
        ("stride", ctypes.c_int64),
        ("broken", ctypes.c_void_p),
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
    ) -> None:
        """Compute the logits after new tokens, and append the tokens to the cache.

        Args:
            x: (B, T, D) float32, contiguous: the embedded tokens. Overwritten.
            cache: cache of at least B rows, see :meth:`KVCache.first_rows`.
            first: (B,) int32, index of the first token of each row that is not padding; None without padding.
            logits: (B, V) float32 for the logits after the last token, or (B, K, V) for those after the last K tokens;
                contiguous, written to.
            scratch: memory of this call.
            positions: (B, T) int32, contiguous: the row of the rotary table for each token; None for the next T rows.
        """
        batch, span, _ = x.shape
        _, rows, _, capacity, _ = cache.keys.shape
        outputs, threads = 1 if logits.dim() == 2 else logits.shape[1], torch.get_num_threads()
        needed = self._library.scratch_bytes(ctypes.byref(self._model), batch * span, threads, capacity)
        arguments = _Pass(
            batch,
            span,
            outputs,
            cache.length,
            cache.keys.stride(0) // cache.keys.stride(1),
            capacity,
            threads,
            None if first is None else first.data_ptr(),
            None if positions is None else positions.data_ptr(),
            x.data_ptr(),
            cache.keys.data_ptr(),
            cache.values.data_ptr(),
            logits.data_ptr(),
            scratch.pointer(needed),
        )
        # footgun: the compiled code checks nothing; a wrong shape or dtype would read or write other memory.
        assert rows >= batch <= len(logits)
        assert outputs <= span
        assert cache.length + span <= capacity
        assert positions is None or positions.shape == (batch, span)
        assert x.is_contiguous()
        assert logits.is_contiguous()
        _must_be(torch.float32, x, logits)
        _must_be(self.weights.dtype, cache.keys, cache.values)
        _must_be(torch.int32, *(given for given in (first, positions) if given is not None))
        self._library.forward(ctypes.byref(self._model), ctypes.byref(arguments))
        cache.advance(span)

    def sample_codes(
        self,
        logits: Tensor,
        config: SamplingConfig,
        scale: float,
        seeds: Tensor,
        indices: Tensor,
        step: int,
        codes: Tensor,
        broken: Tensor,
        scratch: Scratch,
    ) -> None:
        """Sample a code for each of B images, with the result of :func:`~llamagen.sampling.logits.sample_codes`.

        Args:
            logits: (B, V), or (2 B, V) with guidance; float32, contiguous.
            config: temperature, top-k and top-p.
            scale: guidance scale.
            seeds: (B,) int64, seed of each image.
            indices: (B,) int64, index of each sample within the run.
            step: index of the code.
            codes: (B, L) int64; column ``step`` is written.
            broken: (B,) bool; set to True where logits are not finite.
            scratch: memory of this call.
        """
        batch, vocabulary = len(codes), logits.shape[1]
        _must_be(torch.float32, logits)
        _must_be(torch.int64, seeds, indices, codes)
        _must_be(torch.bool, broken)
        assert len(broken) == batch
        arguments = _Sampling(
            batch,
            vocabulary,
            len(logits) > batch,
            min(config.top_k, vocabulary),
            torch.get_num_threads(),
            scale,
            config.temperature,
            config.top_p,
            step,
            seeds.data_ptr(),
            indices.data_ptr(),
            logits.data_ptr(),
            scratch.pointer(4 * batch * 2 * vocabulary),
            codes[:, step].data_ptr(),
            codes.stride(0),
            broken.data_ptr(),
        )
        self._library.sample_codes(ctypes.byref(arguments))


def _must_be(dtype: torch.dtype, *tensors: Tensor) -> None:
    for tensor in tensors:
        assert tensor.dtype is dtype, (tensor.dtype, dtype)
        assert tensor.device.type == "cpu", tensor.device
        assert tensor.dim() > 2 or tensor.is_contiguous()
