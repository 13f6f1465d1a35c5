"""Configuration of the autoregressive model."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isqrt
from typing import Literal

from llamagen.option_checks import check_integer


@dataclass(frozen=True)
class GPTConfig:
    """Shape, dropout and rotary embedding of a :class:`~llamagen.models.gpt.GPT`.

    The defaults are those of the paper (arXiv 2406.06525, section 2.2) and its published checkpoints at 256 px.

    Args:
        dim: width of the residual stream.
        n_layer: number of transformer blocks.
        n_head: number of query heads; ``dim / n_head`` must be a multiple of 4.
        n_kv_head: number of key-value heads for grouped-query attention; ``n_head`` if not given.
        multiple_of: the feed-forward width is rounded up to a multiple of this.
        ffn_dim_multiplier: factor on the feed-forward width of 8/3 ``dim``, before rounding.
        rope_base: wavelength base of the rotary embedding.
        norm_eps: added to the mean square in RMSNorm.
        vocab_size: number of codes of the image tokenizer.
        block_size: number of codes of an image, a square number (256 for 16 × 16).
        condition: ``"class"`` for labels, ``"text"`` for caption features.
        num_classes: number of labels; the embedding table has one more row, for "no class".
        caption_dim: width of the caption features (2048 for FLAN-T5-XL).
        caption_length: number of caption tokens.
        condition_dropout: probability of training an example without its condition, for classifier-free guidance.
        token_dropout: dropout on the embedded sequence, including the condition.
        resid_dropout: dropout on the output of attention.
        ffn_dropout: dropout on the output of the feed-forward layer.
        attn_dropout: dropout on the attention weights.
        drop_path: probability of skipping a residual branch in the last block; it rises linearly from 0 in the first.
        rope_condition: rotation of the condition positions, see :func:`~llamagen.models.rope.rope_table`.
            Published checkpoints need ``"zero"``.
        qk_norm: normalise each query and key head by its root mean square, with a learned gain, before the rotation
            (arXiv 2302.05442, section 2.2).
        adaptive_norm: scale and shift each normalised input and scale each residual branch by linear functions of the
            class embedding (adaLN-Zero, arXiv 2212.09748, section 3.2). Class-conditional models only.
        target_aware: add a learned embedding of the position that is predicted next to each input (arXiv 2411.00776,
            section 3.3). Models that are trained in random orders need it.
        code_factors: V1 and V2, whose product is ``vocab_size``, for factorised prediction (arXiv 2409.04410): the code
            a * V2 + b has a sum of two embeddings as input, and two heads in sequence predict a, then b given a.
    """

    dim: int
    n_layer: int
    n_head: int
    n_kv_head: int | None = None
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    vocab_size: int = 16384
    block_size: int = 256
    condition: Literal["class", "text"] = "class"
    num_classes: int = 1000
    caption_dim: int = 2048
    caption_length: int = 120
    condition_dropout: float = 0.1
    token_dropout: float = 0.1
    resid_dropout: float = 0.1
    ffn_dropout: float = 0.1
    attn_dropout: float = 0.0
    drop_path: float = 0.0
    rope_condition: Literal["zero", "identity"] = "zero"
    qk_norm: bool = False
    adaptive_norm: bool = False
    target_aware: bool = False
    code_factors: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: if an option is out of range, or options contradict each other.
        """
        for name in (
            "dim",
            "n_layer",
            "n_head",
            "multiple_of",
            "vocab_size",
            "block_size",
            "num_classes",
            "caption_dim",
            "caption_length",
        ):
            check_integer(name, getattr(self, name))
        if self.n_kv_head is not None and self.n_kv_head >= 1:
            check_integer("n_kv_head", self.n_kv_head)
        if self.ffn_dim_multiplier is not None and not 0 < self.ffn_dim_multiplier < inf:
            raise ValueError(f"ffn_dim_multiplier is {self.ffn_dim_multiplier}; it must be positive, or null")
        if self.ffn_dim < 1:
            raise ValueError(f"ffn_dim_multiplier is {self.ffn_dim_multiplier}; it gives a feed-forward width of 0")
        if not 0 < self.rope_base < inf or not 0 <= self.norm_eps < inf:
            raise ValueError(
                f"rope_base is {self.rope_base} and norm_eps {self.norm_eps}; they must be > 0 and ≥ 0, and finite"
            )
        if self.dim % self.n_head or self.head_dim % 4:
            raise ValueError(
                f"dim {self.dim} over n_head {self.n_head} gives heads of width {self.dim / self.n_head:g}; "
                "choose them so that the width is a multiple of 4, as the 2-D rotary embedding needs"
            )
        if not self.kv_heads >= 1 or self.n_head % self.kv_heads:
            raise ValueError(f"n_kv_head {self.n_kv_head} must divide n_head {self.n_head}")
        if self.grid_size**2 != self.block_size:
            raise ValueError(
                f"block_size {self.block_size} is not a square number; it is grid × grid, for example 16 × 16 = 256"
            )
        if self.condition not in ("class", "text"):
            raise ValueError(f"condition is {self.condition!r}; it must be 'class' or 'text'")
        if self.rope_condition not in ("zero", "identity"):
            raise ValueError(f"rope_condition is {self.rope_condition!r}; it must be 'zero' or 'identity'")
        for name in ("qk_norm", "adaptive_norm", "target_aware"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be true or false")
        if self.adaptive_norm and self.condition != "class":
            raise ValueError("adaptive_norm needs a class embedding, but condition is 'text'; set it to false")
        if self.code_factors is not None:
            object.__setattr__(self, "code_factors", checked_factors(self.code_factors, self.vocab_size))
        for name in (
            "condition_dropout",
            "token_dropout",
            "resid_dropout",
            "ffn_dropout",
            "attn_dropout",
            "drop_path",
        ):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; a probability must be at least 0 and below 1")

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.dim // self.n_head

    @property
    def kv_heads(self) -> int:
        """Number of key-value heads."""
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def grid_size(self) -> int:
        """Height and width of the code grid."""
        return isqrt(self.block_size)

    @property
    def condition_length(self) -> int:
        """Number of positions before the first code."""
        return 1 if self.condition == "class" else self.caption_length

    @property
    def ffn_dim(self) -> int:
        """Inner width of the SwiGLU feed-forward layer: 8/3 ``dim``, scaled and rounded up."""
        width = int(2 * 4 * self.dim / 3)
        if self.ffn_dim_multiplier is not None:
            width = int(self.ffn_dim_multiplier * width)
        return -(-width // self.multiple_of) * self.multiple_of


def checked_factors(factors: Sequence[int], vocab_size: int) -> tuple[int, int]:
    """Check the two factors of the vocabulary.

    Args:
        factors: two integers; lists come from YAML and from files of weights.
        vocab_size: number of codes.

    Raises:
        ValueError: in one line, if they are not two integers from 2 on whose product is the number of codes.
    """
    if (
        isinstance(factors, list | tuple)
        and len(factors) == 2
        and all(isinstance(factor, int) and factor >= 2 for factor in factors)
        and factors[0] * factors[1] == vocab_size
    ):
        return factors[0], factors[1]
    first = next((factor for factor in range(isqrt(vocab_size), 1, -1) if vocab_size % factor == 0), None)
    remedy = "leave it out" if first is None else f"for example, set it to [{first}, {vocab_size // first}]"
    given = list(factors) if isinstance(factors, list | tuple) else factors
    raise ValueError(
        f"code_factors is {given!r}; it must be two integers, at least 2, whose product is vocab_size {vocab_size}; "
        f"{remedy}"
    )
