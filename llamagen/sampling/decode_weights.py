"""The weights of a GPT as a decode step reads them: in the dtype of the computation, or as int8.

Legend: N outputs, K inputs, D width, H heads, G key-value heads, E width of a head, F width of the feed-forward layer,
P positions, V vocabulary.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from llamagen.models.gpt import GPT, GPTConfig, RMSNorm, TransformerBlock


class Matrix(NamedTuple):
    """A linear layer without bias.

    Attributes:
        values: (N, K), contiguous; int8 if there is a scale.
        scale: (N,) float32 factor of each output, or None.
    """

    values: Tensor
    scale: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return self.values.nbytes + (0 if self.scale is None else self.scale.nbytes)


class LayerWeights(NamedTuple):
    """Weights of a block; the norms are float32 (D,)."""

    attention_norm: Tensor
    wqkv: Matrix
    wo: Matrix
    ffn_norm: Tensor
    w1: Matrix
    w3: Matrix
    w2: Matrix


@dataclass(frozen=True)
class DecodeWeights:
    """What a decode step reads, beside the cache.

    Weights that have the dtype already are those of the model and no copies; for the others see :meth:`refresh`.

    Attributes:
        config: shape of the model.
        dtype: of products and cache: float32, bfloat16 or float16.
        layers: one entry for each block.
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
        """Take the weights of a model.

        Args:
            gpt: the model.
            dtype: of products and cache.
            int8: round each row of each matrix to 255 levels between its largest magnitude and the negative of it.
                Embeddings and norms stay as they are.
        """

        def matrix(linear: nn.Linear) -> Matrix:
            return quantised(linear.weight) if int8 else Matrix(linear.weight.detach().to(dtype).contiguous(), None)

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
                )
            )
        return cls(gpt.config, dtype, tuple(layers), norm(gpt.norm), matrix(gpt.output), gpt.rope)

    @torch.no_grad()
    def refresh(self, gpt: GPT) -> None:
        """Take over changes of the model's weights, in the memory that is here."""
        fresh = DecodeWeights.from_gpt(gpt, self.dtype, self.head.scale is not None)
        for kept, new in zip(self._tensors(), fresh._tensors(), strict=True):
            if kept.data_ptr() != new.data_ptr():
                kept.copy_(new)

    def _tensors(self) -> list[Tensor]:
        parts = [part for layer in self.layers for part in layer] + [self.norm, self.head]
        pairs = [part if isinstance(part, Matrix) else (part,) for part in parts]
        return [tensor for pair in pairs for tensor in pair if tensor is not None]

    @property
    def nbytes(self) -> int:
        """Bytes that a step must read, whatever the batch; of the embeddings it reads single rows."""
        matrices = [m for layer in self.layers for m in layer if isinstance(m, Matrix)] + [self.head]
        return sum(matrix.nbytes for matrix in matrices)


def quantised(weight: Tensor) -> Matrix:
    """A weight (N, K) as int8 with a factor for each output."""
    wide = weight.detach().float()
    scale = wide.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return Matrix((wide / scale[:, None]).round().to(torch.int8), scale)
