"""Weights of a GPT in the form that compiled decode steps read: in the dtype of the computation, or as int8.

Shapes: N outputs and K inputs of a layer, D model width, E head width, P rows of the rotary table, V vocabulary size.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from llamagen.models.gpt import GPT, GPTConfig
from llamagen.models.lora import merged_weight
from llamagen.models.transformer_block import RMSNorm, TransformerBlock


class Matrix(NamedTuple):
    """Weight of a linear layer without bias.

    Attributes:
        values: (N, K), contiguous; int8 if there is a scale.
        scale: (N,) float32 scale of each output, or None.
    """

    values: Tensor
    scale: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes that a matrix product reads."""
        return self.values.nbytes + (0 if self.scale is None else self.scale.nbytes)


class LayerWeights(NamedTuple):
    """Weights of a block. The norms are float32 (D,); those of queries and keys (E,), or None without QK-norm."""

    attention_norm: Tensor
    wqkv: Matrix
    wo: Matrix
    ffn_norm: Tensor
    w1: Matrix
    w3: Matrix
    w2: Matrix
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


@dataclass(frozen=True)
class DecodeWeights:
    """All weights that a decode step reads.

    Weights of the right dtype are the model's own tensors. The others are copies, see :meth:`refresh`. Embeddings and
    adaptive norms are not here: engines call the model for them.

    Attributes:
        config: shape of the model.
        dtype: dtype of products and cache: float32, bfloat16 or float16.
        layers: weights of the blocks.
        norm: (D,) float32.
        head: (V, D).
        rope: (P, E / 2, 2) float32.
    """

    config: GPTConfig
    dtype: torch.dtype
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Matrix
    rope: Tensor

    @classmethod
    @torch.no_grad()
    def from_gpt(cls, gpt: GPT, dtype: torch.dtype, int8: bool = False) -> "DecodeWeights":
        """Collect the weights of a model, and convert those that need it.

        Args:
            gpt: the model.
            dtype: dtype of products and cache.
            int8: quantise each row of each matrix to 255 levels, symmetric around 0 and up to its largest magnitude.
                Embeddings and norms are not quantised.
        """

        def matrix(linear: nn.Linear) -> Matrix:
            weight = merged_weight(linear).detach()
            return quantize(weight) if int8 else Matrix(weight.to(dtype).contiguous(), None)

        def norm(module: RMSNorm) -> Tensor:
            return module.weight.detach().float()

        layers = []
        for block in cast(Iterable[TransformerBlock], gpt.layers):
            attention, ffn = block.attention, block.feed_forward
            layers.append(
                LayerWeights(
                    norm(block.attention_norm),
                    matrix(attention.wqkv),
                    matrix(attention.wo),
                    norm(block.ffn_norm),
                    matrix(ffn.w1),
                    matrix(ffn.w3),
                    matrix(ffn.w2),
                    None if attention.q_norm is None else norm(attention.q_norm),
                    None if attention.k_norm is None else norm(attention.k_norm),
                )
            )
        return cls(gpt.config, dtype, tuple(layers), norm(gpt.norm), matrix(gpt.output), gpt.rope)

    @torch.no_grad()
    def refresh(self, gpt: GPT) -> None:
        """Copy the model's weights again, into the same memory: compiled steps hold pointers to it."""
        current = DecodeWeights.from_gpt(gpt, self.dtype, self.head.scale is not None)
        for own, new in zip(self._tensors(), current._tensors(), strict=True):
            if own.data_ptr() != new.data_ptr():
                own.copy_(new)

    def _tensors(self) -> list[Tensor]:
        parts = [part for layer in self.layers for part in layer] + [self.norm, self.head]
        pairs = [part if isinstance(part, Matrix) else (part,) for part in parts]
        return [tensor for pair in pairs for tensor in pair if tensor is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices that each step reads. Embeddings are not counted: a step reads only a few rows."""
        matrices = [m for layer in self.layers for m in layer if isinstance(m, Matrix)] + [self.head]
        return sum(matrix.nbytes for matrix in matrices)


def quantize(weight: Tensor) -> Matrix:
    """Quantise a weight (N, K) to int8, with a scale for each output."""
    wide = weight.detach().float()
    scale = wide.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return Matrix((wide / scale[:, None]).round().to(torch.int8), scale)
