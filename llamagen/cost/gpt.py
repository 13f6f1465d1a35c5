"""Parameters, operations and bytes of an autoregressive model, computed from its shape and tested against real ones."""

from dataclasses import dataclass
from typing import NamedTuple

from llamagen.losses.linear_cross_entropy import block_rows
from llamagen.models.gpt_config import GPTConfig
from llamagen.models.kv_cache import BLOCK_VECTORS, LAST_VECTORS

PRECISIONS = {"32-true": (4, 4), "bf16-mixed": (4, 2), "bf16-true": (2, 2)}
"""Precisions of Lightning: bytes of a parameter or residual stream entry, and bytes of an operand of a product."""


def head_sizes(config: GPTConfig) -> tuple[int, ...]:
    """Number of outputs of each head: the vocabulary, or its two factors."""
    return (config.vocab_size,) if config.code_factors is None else config.code_factors


def head_parameters(config: GPTConfig) -> int:
    """Number of weights of the head, or of both with ``code_factors``."""
    return sum(head_sizes(config)) * config.dim


def second_factor_parameters(config: GPTConfig) -> int:
    """Number of weights in the matrices between the two heads, which are those of a feed-forward layer; else 0."""
    return 0 if config.code_factors is None else 3 * config.dim * config.ffn_dim


def block_parameters(config: GPTConfig) -> int:
    """Number of weights in the matrices of one block."""
    attention = config.dim * (config.n_head + 2 * config.kv_heads) * config.head_dim + config.dim**2
    return attention + 3 * config.dim * config.ffn_dim


def caption_parameters(config: GPTConfig) -> int:
    """Number of weights of the caption projection; 0 for a class-conditional model."""
    return 0 if config.condition == "class" else (config.caption_dim + config.dim) * config.dim


def adaptive_parameters(config: GPTConfig) -> int:
    """Number of weights, without biases, of the adaptive norms of all blocks and of the last norm; 0 without them."""
    vectors = BLOCK_VECTORS * config.n_layer + LAST_VECTORS
    return vectors * config.dim**2 if config.adaptive_norm else 0


def whole_block_parameters(config: GPTConfig) -> int:
    """Number of all parameters of one block: its matrices, gains of norms, and its adaptive norms with their biases."""
    gains = 2 * config.dim + (2 * config.head_dim if config.qk_norm else 0)
    adaptive = BLOCK_VECTORS * (config.dim + 1) * config.dim if config.adaptive_norm else 0
    return block_parameters(config) + gains + adaptive


def parameters(config: GPTConfig) -> int:
    """Exact number of parameters of a :class:`~llamagen.models.gpt.GPT`."""
    labels = (config.num_classes + 1) * config.dim if config.condition == "class" else 0
    targets = config.block_size * config.dim if config.target_aware else 0
    last_norm = config.dim + (LAST_VECTORS * (config.dim + 1) * config.dim if config.adaptive_norm else 0)
    embeddings = labels + targets + sum(head_sizes(config)) * config.dim
    blocks = config.n_layer * whole_block_parameters(config)
    between = second_factor_parameters(config)
    if config.code_factors is not None:  # the embedding of the first factor, and two norms
        between += (config.code_factors[0] + 2) * config.dim
    return embeddings + caption_parameters(config) + blocks + last_norm + between + head_parameters(config)


def positions(config: GPTConfig) -> int:
    """Length of a training sequence: the condition and all codes but the last."""
    return config.condition_length + config.block_size - 1


def flops_per_sequence(config: GPTConfig) -> float:
    """Floating-point operations of one training step for one image. A multiplication and an addition count as two.

    These are operations of the model, not of the hardware: recomputed blocks do not count, so that utilization (MFU,
    PaLM, arXiv 2204.02311, appendix B) measures useful work. With T tokens, L codes and C condition tokens, the sum is

    - ``6 T`` for each weight of the blocks' matrices (2 in the forward pass, 4 in the backward pass), ``6 L`` for each
      weight of the head, which reads only the last of the condition tokens, and with ``code_factors`` of both heads and
      the feed-forward layer between them, ``6`` for each weight of adaptive norms, which read one vector, and for text
      ``6 C`` for each weight of the caption projection. Embeddings are lookups and do not count.
    - ``12 n_layer dim T S`` for attention, where S is the mean number of tokens to which a token attends (the products
      of queries and keys, and of weights and values, take ``4 dim S`` in the forward pass). Attention is causal, so
      S = (T + 1) / 2; operations of a kernel on masked tokens do not count. PaLM's convention is S = T.

    Norms, rotation, softmax, SwiGLU's product and the optimizer are not counted, as usual.
    """
    length = positions(config)
    matrices = (
        length * config.n_layer * block_parameters(config)
        + config.block_size * (head_parameters(config) + second_factor_parameters(config))
        + config.condition_length * caption_parameters(config)
        + adaptive_parameters(config)
    )
    attention = 12 * config.n_layer * config.dim * length * (length + 1) / 2
    return float(6 * matrices + attention)


def flops_per_token(config: GPTConfig) -> float:
    """:func:`flops_per_sequence` divided by the number of codes.

    For class-conditional models without adaptive norms, which have as many tokens as codes, it is ``6`` times the
    number of matrix weights plus ``12 n_layer dim (L + 1) / 2``.
    """
    return flops_per_sequence(config) / config.block_size


def gpu_days(config: GPTConfig, images: float, mfu: float, peak_tflops: float) -> float:
    """Days of one GPU: ``images * flops_per_sequence / (mfu * peak * 86400)``.

    Args:
        config: shape of the model.
        images: number of training images times epochs.
        mfu: model FLOPs utilization, a fraction of the peak.
        peak_tflops: peak of the GPU, in 10¹² operations per second.
    """
    return images * flops_per_sequence(config) / (mfu * peak_tflops * 1e12 * 86400)


def cache_bytes_per_token(config: GPTConfig, precision: str) -> int:
    """Bytes of keys and values of each token of each sequence in sampling (twice as many with guidance)."""
    return 2 * config.n_layer * config.kv_heads * config.head_dim * PRECISIONS[precision][1]


def cache_bytes_of_adaptive_norms(config: GPTConfig) -> int:
    """Bytes of each sequence in sampling that hold the vectors of adaptive norms, in float32; 0 without them."""
    return 4 * (BLOCK_VECTORS * config.n_layer + LAST_VECTORS) * config.dim if config.adaptive_norm else 0


@dataclass(frozen=True)
class Activations:
    """Bytes that a training step keeps from its forward to its backward pass.

    Attributes:
        kept: bytes of the embedding, the blocks, the last norm, and what is between two heads.
        recomputed: bytes of one block, temporarily in the backward pass; 0 without recomputation.
        narrow_weights: bytes of autocast's bfloat16 copies of the weights, which are made once per step.
    """

    kept: int
    recomputed: int
    narrow_weights: int


def activations(
    config: GPTConfig, batch_size: int, precision: str, checkpointing: bool = False, cuda: bool = True
) -> Activations:
    """Compute the bytes kept for the backward pass, without those of the head.

    With r bytes for an entry of the residual stream, c for an operand of a product, model width D, feed-forward width
    F, and H query and G key-value heads of width E, a block keeps for each token

    - ``(4 + r) D + 4`` for each of its two norms: the input in float32 (the residual stream itself, unless that is
      bfloat16), the normalised input, and the factor;
    - ``c D`` for the input of wqkv and ``c D`` for that of w1 and w3; under autocast w1 and w3 have separate copies;
    - ``c (H + 2 G) E`` for the output of wqkv, which contains the values, ``c (H + G) E`` for the rotated queries and
      keys, ``c D`` for the output of attention, which is the input of wo, and ``4 H`` for its logsumexp (not with the
      kernel of :mod:`~llamagen.models.causal_attention`);
    - ``4 c F`` for w1's output, its SiLU, w3's output and their product, which is the input of w2;
    - ``D`` for the mask of each dropout with a probability above 0;
    - with QK-norm, for the H + G heads of queries and keys: ``c E`` for the normalised head, 4 for its factor, and
      ``4 E`` for its input in float32, unless that is a part of the output of wqkv;
    - with adaptive norms, ``r D`` for the output of each of its two norms and ``c D`` for that of each branch.

    For each sequence, adaptive norms keep ``8 r + c`` vectors of width D in each block: six vectors, two gains plus 1,
    and their input. Random orders keep ``4 E`` for the rotation and 8 for the target of each token.

    With ``code_factors``, two norms and a feed-forward layer between the heads keep what those of a block keep, for
    each code. They are never recomputed.

    Attention is assumed to be fused. On GPUs it copies queries, keys and values if it has to pad heads to a multiple of
    8, and its dropout keeps no mask. A mask for padded captions takes c bytes for each pair of tokens. Recomputed
    blocks keep only their input, ``r D``, and share one mask with one byte per pair. Drop path keeps almost nothing.

    Args:
        config: shape of the model.
        batch_size: number of sequences on this GPU.
        precision: one of :data:`PRECISIONS`.
        checkpointing: whether blocks are recomputed.
        cuda: whether the device is a GPU. On a CPU the memory of attention dropout is not included.
    """
    residual, compute = PRECISIONS[precision]
    autocast = residual != compute
    dim, length, codes = config.dim, positions(config), config.block_size
    heads, head_dim = config.n_head + config.kv_heads, config.head_dim

    def mask(probability: float) -> int:
        return dim if probability else 0

    norm, forward = (4 + residual) * dim + 4, 4 * compute * config.ffn_dim + mask(config.ffn_dropout)
    attention = compute * (dim + heads * head_dim)
    if cuda or compute == 4 or config.condition == "text" or config.kv_heads != config.n_head:
        attention += 4 * config.n_head  # logsumexp, which causal_attention does not keep
    if cuda and head_dim % 8:
        padded = -(-head_dim // 8) * 8
        attention += compute * (heads + config.kv_heads + config.n_head) * padded - compute * heads * head_dim
    else:
        attention += compute * (heads + config.kv_heads) * head_dim
    inputs = compute * dim * (3 if autocast else 2)
    block = length * (2 * norm + inputs + attention + forward + mask(config.resid_dropout))
    ends = 8 * codes + length * mask(config.token_dropout)
    if config.qk_norm:
        block += length * heads * ((compute + (4 if compute == 2 else 0)) * head_dim + 4)
    if config.adaptive_norm:
        block += length * 2 * (residual + compute) * dim + (8 * residual + compute) * dim
        ends += codes * residual * dim + (2 * residual + compute) * dim
    if config.target_aware:
        ends += 8 * codes + 4 * length * head_dim
    if config.condition == "text":
        block += compute * length**2
        ends += length**2 if checkpointing else 0
        ends += compute * config.caption_length * (config.caption_dim + 2 * dim)
    else:
        ends += 8
    # The last norm keeps the tokens that predict a code. In float32 they are a view of the stream of all tokens.
    ends += 4 * (length if residual == 4 else codes) * dim + codes * (residual * dim + 4)
    if config.code_factors is not None:
        ends += codes * (2 * norm + compute * dim * (2 if autocast else 1) + forward)
        ends += 2 * 8 * (codes - 1)  # the codes before each code, split into the two factors
    if checkpointing:
        kept, recomputed = config.n_layer * residual * length * dim + ends, block
    else:
        kept, recomputed = config.n_layer * block + ends, 0
    matrices = config.n_layer * block_parameters(config) + caption_parameters(config) + adaptive_parameters(config)
    matrices += second_factor_parameters(config)
    return Activations(batch_size * kept, batch_size * recomputed, compute * matrices if autocast else 0)


class Head(NamedTuple):
    """Bytes of :func:`~llamagen.losses.linear_cross_entropy`.

    Attributes:
        kept: bytes of the gradients of the inputs of all heads, in the dtype of products, and of their weights, in
            float32.
        temporary: bytes of these inputs, and for the largest head, of its weights in the dtype of products, and of one
            block of logits in float32 and in the dtype of products.
    """

    kept: int
    temporary: int


def head(config: GPTConfig, batch_size: int, precision: str) -> Head:
    """Compute the memory of the loss, which holds the logits of ``block_rows`` rows at a time.

    Args:
        config: shape of the model.
        batch_size: number of sequences on this GPU.
        precision: one of :data:`PRECISIONS`.
    """
    residual, compute = PRECISIONS[precision]
    rows = batch_size * config.block_size
    kept, temporary = 0, 0
    for size in head_sizes(config):
        at_a_time = min(rows, block_rows(size))
        narrow = compute * size * config.dim if residual != compute else 0
        kept += compute * rows * config.dim + (compute if at_a_time == rows else 4) * size * config.dim
        temporary = max(temporary, narrow + at_a_time * size * (4 if compute == 4 else 4 + compute))
    return Head(kept, len(head_sizes(config)) * residual * rows * config.dim + temporary)
