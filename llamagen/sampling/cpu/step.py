"""The decode step on CPUs: ``step.cpp`` and ``sampling.cpp``, called with tensors. B batch, V vocabulary."""

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


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("batch", "span", "start", "cache_rows", "capacity", "threads")),
        *((name, ctypes.c_void_p) for name in ("first", "x", "keys", "values", "logits", "scratch")),
    ]


class _Draw(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("batch", "vocabulary", "guided", "top_k", "threads")),
        *((name, ctypes.c_float) for name in ("scale", "temperature", "top_p")),
        *((name, ctypes.c_uint64) for name in ("seed", "step")),
        *((name, ctypes.c_void_p) for name in ("index", "logits", "scratch", "codes")),
        ("stride", ctypes.c_int64),
        ("broken", ctypes.c_void_p),
    ]


class CPUStep:
    """Passes of a GPT over new positions, with a cache.

    A row's logits are the same bits whatever the batch and the number of threads.

    Args:
        weights: on the CPU, in float32 or bfloat16, with or without int8.

    Raises:
        ValueError: if there is no C++ compiler or it fails, or for another dtype.
    """

    def __init__(self, weights: DecodeWeights) -> None:
        if weights.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"on CPUs sampling is compiled for float32 and bfloat16, not for {weights.dtype}")
        self.weights, config = weights, weights.config  # the weights own the memory that is pointed to
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
        self._scratch = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._drawn = torch.empty(0, dtype=torch.float32, device="cpu")

    def __call__(self, x: Tensor, cache: KVCache, first: Tensor | None, logits: Tensor) -> None:
        """Compute the logits behind the last of some new positions, and extend the cache.

        Args:
            x: (B, T, D) float32, contiguous: the embedded positions. Overwritten.
            cache: of B rows; B may be fewer than it was allocated for, see :meth:`KVCache.first_rows`.
            first: (B,) int32, the first position of each row that is not padding; None without padding.
            logits: (B, V) float32, contiguous; written to.
        """
        batch, span, _ = x.shape
        _, rows, _, capacity, _ = cache.keys.shape
        threads = torch.get_num_threads()
        needed = self._library.scratch_bytes(ctypes.byref(self._model), batch * span, threads, capacity)
        if len(self._scratch) < needed:
            self._scratch = torch.empty(needed, dtype=torch.uint8, device="cpu")
        call = _Call(
            batch,
            span,
            cache.length,
            cache.keys.stride(0) // cache.keys.stride(1),
            capacity,
            threads,
            None if first is None else first.data_ptr(),
            x.data_ptr(),
            cache.keys.data_ptr(),
            cache.values.data_ptr(),
            logits.data_ptr(),
            self._scratch.data_ptr(),
        )
        # The compiled code trusts what it is given.
        assert rows >= batch <= len(logits)
        assert cache.length + span <= capacity
        _must_be(torch.float32, x, logits)
        _must_be(self.weights.dtype, cache.keys, cache.values)
        _must_be(torch.int32, *([] if first is None else [first]))
        self._library.forward(ctypes.byref(self._model), ctypes.byref(call))
        cache.advance(span)

    def draw(
        self,
        logits: Tensor,
        config: SamplingConfig,
        scale: float,
        seed: int,
        indices: Tensor,
        step: int,
        codes: Tensor,
        broken: Tensor,
    ) -> None:
        """Draw a code for each sample, as :func:`~llamagen.sampling.logits.draw` does.

        Args:
            logits: (B, V) or, where guided, (2 B, V) float32, contiguous.
            config: temperature, top-k and top-p.
            scale: of the guidance.
            seed: of the run.
            indices: (B,) int64, number of each sample within the run.
            step: number of the code.
            codes: (B, L) int64; column ``step`` is written.
            broken: (B,) bool; set where logits are not finite.
        """
        batch, vocabulary = len(codes), logits.shape[1]
        _must_be(torch.float32, logits)
        _must_be(torch.int64, indices, codes)
        _must_be(torch.bool, broken)
        assert len(broken) == batch
        if self._drawn.numel() < batch * 2 * vocabulary:
            self._drawn = torch.empty(batch, 2, vocabulary, dtype=torch.float32, device="cpu")
        call = _Draw(
            batch,
            vocabulary,
            len(logits) > batch,
            min(config.top_k, vocabulary),
            torch.get_num_threads(),
            scale,
            config.temperature,
            config.top_p,
            seed % 2**64,
            step,
            indices.data_ptr(),
            logits.data_ptr(),
            self._drawn.data_ptr(),
            codes[:, step].data_ptr(),
            codes.stride(0),
            broken.data_ptr(),
        )
        self._library.draw(ctypes.byref(call))


def _must_be(dtype: torch.dtype, *tensors: Tensor) -> None:
    for tensor in tensors:
        assert tensor.dtype is dtype, (tensor.dtype, dtype)
        assert tensor.device.type == "cpu", tensor.device
        assert tensor.dim() > 2 or tensor.is_contiguous()
