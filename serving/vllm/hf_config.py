"""``config.json`` of an exported model, as transformers and vLLM read it."""

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from llamagen.models.gpt_config import GPTConfig
from llamagen.pretrained.exported_config import MODEL_TYPE

HEAD_WIDTHS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Widths of heads that vLLM's attention kernels have. Others are padded in the cache: GPT-3B has 100."""


class LlamaGenConfig(PretrainedConfig):  # type: ignore[misc, unused-ignore]
    """Configuration of an exported autoregressive model.

    Args:
        gpt: fields of :class:`~llamagen.models.gpt_config.GPTConfig`.
        guided: whether there is an unconditional branch.
        kwargs: other entries of the file.
    """

    model_type = MODEL_TYPE

    def __init__(self, gpt: Mapping[str, Any] | None = None, guided: bool = True, **kwargs: Any) -> None:
        self.gpt, self.guided = dict(gpt or {}), guided
        if kwargs.get("dtype") == "mixed":  # ours: float32 weights, most operations in bfloat16
            kwargs["dtype"] = "bfloat16"
        if self.gpt:  # transformers also builds an empty one, for its defaults
            kwargs.update(vllm_sizes(GPTConfig(**self.gpt), guided))
        super().__init__(**kwargs)
        for name, value in kwargs.items():
            if not hasattr(self, name):
                setattr(self, name, value)


def vllm_sizes(config: GPTConfig, guided: bool) -> dict[str, Any]:
    """The sizes that vLLM allocates memory by. Both branches are heads of one sequence.

    Args:
        config: the model.
        guided: whether there is an unconditional branch.

    Raises:
        ValueError: in one line, if a head is too wide, or the model has adaptive norms or factorised prediction.
    """
    for given, what in ((config.adaptive_norm, "adaptive norms"), (config.code_factors, "code_factors")):
        if given:
            raise ValueError(
                f"the model has {what}, which do not run in vLLM; serve it with python -m serving.server, without "
                "--engine vllm"
            )
    branches = 2 if guided else 1
    sizes: dict[str, Any] = {
        "hidden_size": branches * config.dim,
        "num_attention_heads": branches * config.n_head,
        "num_key_value_heads": branches * config.kv_heads,
        "head_dim": padded_head(config.head_dim),
        "num_hidden_layers": config.n_layer,
        # One more than codes: see not_finite_code. Labels are token ids, too.
        "vocab_size": max(config.vocab_size + 1, config.num_classes + 1 if config.condition == "class" else 0),
        "max_position_embeddings": config.condition_length + config.block_size,
        "tie_word_embeddings": False,
    }
    if config.condition == "text":
        # Captions differ in length, but the grid of codes begins at a fixed position. With M-RoPE vLLM asks the model
        # for the positions of a request's tokens.
        sizes["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1]}
    return sizes


def not_finite_code(config: GPTConfig) -> int:
    """The token that stands for "the logits are not finite": V, one more than the largest code."""
    return config.vocab_size


def padded_head(width: int) -> int:
    """Width of a head in the cache.

    Raises:
        ValueError: in one line, if no kernel has heads of this width.
    """
    for size in HEAD_WIDTHS:
        if size >= width:
            return size
    raise ValueError(f"heads of width {width} are too wide for vLLM, which has at most {HEAD_WIDTHS[-1]}")
