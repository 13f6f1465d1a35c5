"""Cost of fine-tuning with LoRA: parameters, operations and memory of a model with frozen weights and adapters."""

from llamagen.cost.gpt import (
    PRECISIONS,
    Activations,
    Head,
    activations,
    adaptive_parameters,
    block_parameters,
    caption_parameters,
    flops_per_sequence,
    head,
    head_parameters,
    head_sizes,
    positions,
    second_factor_parameters,
)
from llamagen.models.gpt_config import GPTConfig
from llamagen.models.lora import LoRAConfig


def adapter_widths(config: GPTConfig) -> int:
    """Sum of inputs and outputs of the adapted layers of one block."""
    qkv = (config.n_head + 2 * config.kv_heads) * config.head_dim
    return (config.dim + qkv) + 2 * config.dim + 3 * (config.dim + config.ffn_dim)


def second_factor_widths(config: GPTConfig) -> int:
    """Sum of inputs and outputs of the adapted layers between two heads; 0 without ``code_factors``."""
    return 0 if config.code_factors is None else 3 * (config.dim + config.ffn_dim)


def adapter_parameters(config: GPTConfig, lora: LoRAConfig) -> int:
    """Exact number of parameters of the adapters: of blocks, caption projection (text), and between two heads."""
    caption = 0 if config.condition == "class" else config.caption_dim + 3 * config.dim
    return lora.rank * (config.n_layer * adapter_widths(config) + caption + second_factor_widths(config))


def trained_parameters(config: GPTConfig, lora: LoRAConfig, trains_classes: bool) -> int:
    """Number of parameters that are trained: the adapters and, if they are, the class embeddings."""
    table = (config.num_classes + 1) * config.dim if config.condition == "class" and trains_classes else 0
    return adapter_parameters(config, lora) + table


def training_flops(config: GPTConfig, lora: LoRAConfig | None = None) -> float:
    """Floating-point operations of a training step per image, see :func:`llamagen.cost.gpt.flops_per_sequence`.

    The weights that adapters belong to are frozen: no step computes their gradients, a third of the operations on
    them.

    Args:
        config: shape of the model.
        lora: settings of the adapters; None for full training.
    """
    if lora is None:
        return flops_per_sequence(config)
    length, captions = positions(config), config.condition_length
    frozen = length * config.n_layer * block_parameters(config)
    frozen += config.block_size * (head_parameters(config) + second_factor_parameters(config))
    frozen += captions * caption_parameters(config) + adaptive_parameters(config)
    caption = 0 if config.condition == "class" else config.caption_dim + 3 * config.dim
    adapters = lora.rank * (length * config.n_layer * adapter_widths(config) + captions * caption)
    adapters += lora.rank * config.block_size * second_factor_widths(config)
    return flops_per_sequence(config) - 2 * frozen + 6 * adapters


def adapter_activations(
    config: GPTConfig,
    lora: LoRAConfig,
    batch_size: int,
    precision: str,
    checkpointing: bool = False,
    cuda: bool = True,
) -> Activations:
    """Compute the bytes kept for the backward pass, without those of the head, if the class embeddings train, too.

    Compared with :func:`~llamagen.cost.gpt.activations`, norms keep no normalised input and embeddings no codes,
    because their weights are frozen. The inputs of linear layers are kept for A, and the output of A, R numbers for
    each token, for B; under autocast wo has a separate copy of its input. Dropout of adapters keeps a mask, and in
    32-true a second input of w1 and w3. It is an upper bound for models with QK-norm or adaptive norms.

    Args:
        config: shape of the model.
        lora: settings of the adapters.
        batch_size: number of sequences on this GPU.
        precision: one of :data:`~llamagen.cost.gpt.PRECISIONS`.
        checkpointing: whether blocks are recomputed.
        cuda: whether the device is a GPU. On a CPU the memory of dropout is not included.
    """
    residual, compute = PRECISIONS[precision]
    full = activations(config, batch_size, precision, checkpointing, cuda)
    token = 5 * compute * lora.rank - 2 * residual * config.dim
    if residual != compute:  # peft casts the input of wo to float32, and autocast casts it back into new memory
        token += compute * config.dim
    if lora.dropout and cuda:
        token += 4 * config.dim + config.ffn_dim + (compute * config.dim if residual == compute else 0)
    block = batch_size * positions(config) * token
    ends = -batch_size * config.block_size * (8 + residual * config.dim)
    if config.code_factors is not None:
        ends += batch_size * config.block_size * (3 * compute * lora.rank - 2 * residual * config.dim)
        ends -= batch_size * 2 * 8 * (config.block_size - 1)
        if lora.dropout and cuda:
            ends += batch_size * config.block_size * (2 * config.dim + config.ffn_dim)
    if config.condition == "text":
        ends += 2 * batch_size * config.caption_length * compute * lora.rank
    kept = full.kept + ends + (0 if checkpointing else config.n_layer * block)
    narrow = compute * adapter_parameters(config, lora) if residual != compute else 0
    return Activations(kept, full.recomputed + block if checkpointing else 0, full.narrow_weights + narrow)


def frozen_head(config: GPTConfig, batch_size: int, precision: str) -> Head:
    """Memory of the loss, see :func:`~llamagen.cost.gpt.head`, without the gradients of the head's weights."""
    full, (_, compute) = head(config, batch_size, precision), PRECISIONS[precision]
    return Head(len(head_sizes(config)) * compute * batch_size * config.block_size * config.dim, full.temporary)
