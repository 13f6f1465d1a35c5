"""Devices that share a model: whether they can, and the memory of the cache on each. No vLLM here."""

from llamagen.models.gpt_config import GPTConfig
from serving.vllm.hf_config import vllm_sizes

BLOCK = 128
"""Tokens of a block of vLLM's cache on CPUs; on GPUs they are smaller."""


def check_ranks(ranks: int, config: GPTConfig) -> None:
    """Check that so many devices can share a model.

    Raises:
        ValueError: in one line, if they cannot.
    """
    if config.n_head % ranks or (config.kv_heads % ranks and ranks % config.kv_heads):
        raise ValueError(
            f"tensor_parallel is {ranks}, which does not fit the model's {config.n_head} heads and {config.kv_heads} "
            "key-value heads; choose a divisor of both"
        )
    if config.ffn_dim % ranks:
        raise ValueError(
            f"tensor_parallel is {ranks}, which does not divide the width {config.ffn_dim} of the model's feed-forward "
            "layers; choose a divisor"
        )


def cache_bytes(config: GPTConfig, guided: bool, capacity: int, ranks: int, itemsize: int) -> int:
    """Bytes of keys and values on each device, so that no image is preempted.

    Args:
        config: the model.
        guided: whether there is an unconditional branch.
        capacity: maximum number of images at a time.
        ranks: number of devices that share the model.
        itemsize: bytes of a value.
    """
    sizes = vllm_sizes(config, guided)
    blocks = capacity * -(-sizes["max_position_embeddings"] // BLOCK) + 1
    # With more devices than key-value heads each has a copy of one head, of both branches.
    heads = sizes["num_key_value_heads"] // config.kv_heads * max(1, config.kv_heads // ranks)
    return int(2 * config.n_layer * blocks * BLOCK * heads * sizes["head_dim"] * itemsize)
