"""Cost of fine-tuning with LoRA: parameters, operations and memory of a model with frozen weights and adapters."""

from llamagen.cost.gpt import block_parameters, caption_parameters, flops_per_sequence, head_parameters, positions
from llamagen.models.gpt_config import GPTConfig
from llamagen.models.lora import LoRAConfig


def adapter_widths(config: GPTConfig) -> int:
    """Sum of inputs and outputs of the adapted layers of one block."""
    qkv = (config.n_head + 2 * config.kv_heads) * config.head_dim
    return (config.dim + qkv) + 2 * config.dim + 3 * (config.dim + config.ffn_dim)


def adapter_parameters(config: GPTConfig, lora: LoRAConfig) -> int:
    """Exact number of parameters of the adapters: those of blocks and, for text models, of the caption projection."""
    caption = 0 if config.condition == "class" else config.caption_dim + 3 * config.dim
    return lora.rank * (config.n_layer * adapter_widths(config) + caption)


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
    frozen = length * config.n_layer * block_parameters(config) + config.block_size * head_parameters(config)
    frozen += captions * caption_parameters(config)
    caption = 0 if config.condition == "class" else config.caption_dim + 3 * config.dim
    adapters = lora.rank * (length * config.n_layer * adapter_widths(config) + captions * caption)
    return flops_per_sequence(config) - 2 * frozen + 6 * adapters
