"""What an autoregressive model costs by its shape: parameters, operations, bytes. Checked against measured ones."""

from dataclasses import dataclass
from typing import NamedTuple

from llamagen.losses.linear_cross_entropy import MAX_LOGITS
from llamagen.models.gpt_config import GPTConfig

PRECISIONS = {"32-true": (4, 4), "bf16-mixed": (4, 2), "bf16-true": (2, 2)}
"""Of Lightning: bytes of a parameter and of an entry of the residual stream, and of an operand of a matrix product."""


def head_parameters(config: GPTConfig) -> int:
    """Weights of the head."""
    return config.vocab_size * config.dim


def block_parameters(config: GPTConfig) -> int:
    """Weights of one block that take part in matrix products."""
    attention = config.dim * (config.n_head + 2 * config.kv_heads) * config.head_dim + config.dim**2
    return attention + 3 * config.dim * config.ffn_dim


def caption_parameters(config: GPTConfig) -> int:
    """Weights of the projection of caption features; 0 for a class-conditional model."""
    return 0 if config.condition == "class" else (config.caption_dim + config.dim) * config.dim


def parameters(config: GPTConfig) -> int:
    """All parameters of a :class:`~llamagen.models.gpt.GPT`, exactly."""
    labels = (config.num_classes + 1) * config.dim if config.condition == "class" else 0
    norms = (2 * config.n_layer + 1) * config.dim
    embeddings = labels + config.vocab_size * config.dim
    matrices = config.n_layer * block_parameters(config) + head_parameters(config) + caption_parameters(config)
    return embeddings + norms + matrices


def positions(config: GPTConfig) -> int:
    """Positions of a training sequence: the condition and all codes but the last, which nothing follows."""
    return config.condition_length + config.block_size - 1


def flops_per_sequence(config: GPTConfig) -> float:
    """Floating-point operations of one training step for one image, a multiplication and an addition being two.

    Of the model, not of the hardware: blocks that are recomputed do not count, so that a share of the peak (MFU, PaLM,
    arXiv 2204.02311, appendix B) is one of useful work. With T positions, L codes and C condition positions:

    - ``6 T`` for each weight of the blocks' matrices (2 in the forward pass, 4 in the backward pass), ``6 L`` for each
      of the head, which sees no caption positions but the last, and for text ``6 C`` for each of the caption
      projection. Embeddings are looked up and do not count.
    - ``12 n_layer dim T S`` for attention, S being the mean number of positions that one attends to (queries by keys
      and weights by values are ``4 dim S`` in the forward pass). It is causal: S = (T + 1) / 2, and what a kernel does
      for masked positions is no work of the model. PaLM's convention is S = T.

    Norms, rotation, softmax, SwiGLU's product and the optimizer are left out, as is usual.
    """
    length = positions(config)
    matrices = (
        length * config.n_layer * block_parameters(config)
        + config.block_size * head_parameters(config)
        + config.condition_length * caption_parameters(config)
    )
    attention = 12 * config.n_layer * config.dim * length * (length + 1) / 2
    return float(6 * matrices + attention)


def flops_per_token(config: GPTConfig) -> float:
    """:func:`flops_per_sequence` over the number of codes.

    For class-conditional models, which have as many positions as codes, it is ``6`` times the weights of matrices plus
    ``12 n_layer dim (L + 1) / 2``.
    """
    return flops_per_sequence(config) / config.block_size


def gpu_days(config: GPTConfig, images: float, mfu: float, peak_tflops: float) -> float:
    """Days of one GPU: ``images * flops_per_sequence / (mfu * peak * 86400)``.

    Args:
        config: of the model.
        images: to train on, counted as often as they are seen.
        mfu: share of the peak that is reached.
        peak_tflops: of the GPU, in 10¹² operations a second.
    """
    return images * flops_per_sequence(config) / (mfu * peak_tflops * 1e12 * 86400)


def cache_bytes_per_token(config: GPTConfig, precision: str) -> int:
    """Bytes of keys and values that sampling keeps for each position of each sequence (twice as many with guidance)."""
    return 2 * config.n_layer * config.kv_heads * config.head_dim * PRECISIONS[precision][1]


@dataclass(frozen=True)
class Activations:
    """What a training step keeps between its forward and its backward pass, in bytes.

    Attributes:
        kept: by the embedding, the blocks and the last norm.
        recomputed: of one block, for a moment in the backward pass; 0 if nothing is recomputed.
        narrow_weights: bfloat16 copies of the weights, which autocast makes once a step and keeps.
    """

    kept: int
    recomputed: int
    narrow_weights: int


def activations(
    config: GPTConfig, batch_size: int, precision: str, checkpointing: bool = False, cuda: bool = True
) -> Activations:
    """Bytes that are kept for the backward pass, storage by storage, without those of the head.

    Of each position, with r bytes an entry of the residual stream, c of an operand of a matrix product, D width, F
    feed-forward width, H and G query and key-value heads of width E, a block keeps

    - for each of its two norms ``(4 + r) D + 4``: the input in float32 (which is the residual stream itself, unless
      that is bfloat16), the normalised one, and the factor;
    - ``c D`` for the input of wqkv, and for that of w1 and w3, which under autocast are two copies;
    - ``c (H + 2 G) E`` for the output of wqkv, which the values are a part of, ``c (H + G) E`` for the turned queries
      and keys, ``c D`` for attention's output, which is also the input of wo, and ``4 H`` for its logsumexp
      (but not where :mod:`~llamagen.models.causal_attention` has a kernel of its own);
    - ``4 c F`` for w1's output, its SiLU, w3's output, and the product, which is the input of w2;
    - ``D`` for each dropout's mask, if there is any.

    Fused attention is assumed; on GPUs it pads heads to a multiple of 8 and copies queries, keys and values for that,
    and dropout within it keeps no mask. A mask for padded captions is c bytes for each pair of positions. Blocks that
    are recomputed keep their input, ``r D``, alone, and share one mask of a byte. Drop path keeps next to nothing.

    Args:
        config: of the model.
        batch_size: sequences on this GPU.
        precision: one of :data:`PRECISIONS`.
        checkpointing: blocks are recomputed.
        cuda: on a GPU; else on a CPU, where attention dropout is not accounted for.
    """
    residual, compute = PRECISIONS[precision]
    autocast = residual != compute
    dim, length, codes = config.dim, positions(config), config.block_size
    heads, head_dim = config.n_head + config.kv_heads, config.head_dim

    def mask(probability: float) -> int:
        return dim if probability else 0

    norm = (4 + residual) * dim + 4
    attention = compute * (dim + heads * head_dim)
    if cuda or compute == 4 or config.condition == "text" or config.kv_heads != config.n_head:
        attention += 4 * config.n_head  # which causal_attention does without
    if cuda and head_dim % 8:
        padded = -(-head_dim // 8) * 8
        attention += compute * (heads + config.kv_heads + config.n_head) * padded - compute * heads * head_dim
    else:
        attention += compute * (heads + config.kv_heads) * head_dim
    inputs = compute * dim * (3 if autocast else 2)
    masks = mask(config.resid_dropout) + mask(config.ffn_dropout)
    block = length * (2 * norm + inputs + attention + 4 * compute * config.ffn_dim + masks)
    ends = 8 * codes + length * mask(config.token_dropout)
    if config.condition == "text":
        block += compute * length**2
        ends += length**2 if checkpointing else 0
        ends += compute * config.caption_length * (config.caption_dim + 2 * dim)
    else:
        ends += 8
    # The last norm keeps what predicts a code, which in float32 is a part of the whole stream.
    ends += 4 * (length if residual == 4 else codes) * dim + codes * (residual * dim + 4)
    if checkpointing:
        kept, recomputed = config.n_layer * residual * length * dim + ends, block
    else:
        kept, recomputed = config.n_layer * block + ends, 0
    matrices = config.n_layer * block_parameters(config) + caption_parameters(config)
    return Activations(batch_size * kept, batch_size * recomputed, compute * matrices if autocast else 0)


class Head(NamedTuple):
    """Bytes of :func:`~llamagen.losses.linear_cross_entropy`.

    Attributes:
        kept: gradients of what the head reads, as an operand of a matrix product, and of its weights, in float32.
        moment: what it reads, its weights as an operand, and the logits at hand in float32 and as an operand.
    """

    kept: int
    moment: int


def head(config: GPTConfig, batch_size: int, precision: str) -> Head:
    """Memory of the loss, which holds at most ``MAX_LOGITS`` logits at a time.

    Args:
        config: of the model.
        batch_size: sequences on this GPU.
        precision: one of :data:`PRECISIONS`.
    """
    residual, compute = PRECISIONS[precision]
    rows = batch_size * config.block_size
    logits = min(rows, max(1, MAX_LOGITS // config.vocab_size)) * config.vocab_size
    narrow = compute * head_parameters(config) if residual != compute else 0
    at_once = rows * config.vocab_size <= MAX_LOGITS
    kept = compute * rows * config.dim + (compute if at_once else 4) * head_parameters(config)
    return Head(kept, residual * rows * config.dim + narrow + logits * (4 if compute == 4 else 4 + compute))
