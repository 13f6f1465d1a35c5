"""Sizes of the paper's autoregressive models (arXiv 2406.06525, table 1), and recognition of a size by its weights."""

from collections.abc import Mapping
from math import prod
from typing import Any

from torch import Tensor

from llamagen.checkpoints.adaptation import ADDED, code_factors_of
from llamagen.models.gpt_config import GPTConfig

SIZES: dict[str, dict[str, Any]] = {
    "B": {"n_layer": 12, "n_head": 12, "dim": 768},
    "L": {"n_layer": 24, "n_head": 16, "dim": 1024},
    "XL": {"n_layer": 36, "n_head": 20, "dim": 1280},
    "XXL": {"n_layer": 48, "n_head": 24, "dim": 1536},
    "XXXL": {"n_layer": 48, "n_head": 40, "dim": 2560},
    "1B": {"n_layer": 22, "n_head": 32, "dim": 2048},
    "3B": {"n_layer": 24, "n_head": 32, "dim": 3200},
    "7B": {"n_layer": 32, "n_head": 32, "dim": 4096},
}
"""Layers, heads and width by name, as in ``configs/argen/size``."""


def is_gpt(state: Mapping[str, Tensor]) -> bool:
    """Whether weights without a description are those of an autoregressive model."""
    return "tok_embeddings.weight" in state or code_factors_of(state) is not None


def infer_gpt_config(state: Mapping[str, Tensor], resolution: int, source: str) -> GPTConfig:
    """Infer the configuration of a model of one of :data:`SIZES` from the shapes of its weights.

    Args:
        state: weights of a published file, which has no configuration.
        resolution: side of its images in pixels. It changes no shape.
        source: name of the weights for the message.

    Raises:
        ValueError: in one line, if the model has none of these sizes.
    """
    factors, dim = code_factors_of(state), state["output.weight"].shape[1]
    vocabulary = len(state["tok_embeddings.weight"]) if factors is None else prod(factors)
    layers = len({name.split(".")[1] for name in state if name.startswith("layers.")})
    size = next((size for size in SIZES.values() if (size["dim"], size["n_layer"]) == (dim, layers)), None)
    if size is None:
        raise ValueError(
            f"{source}: a model of {layers} layers of width {dim} has none of the published sizes, and the file does "
            "not describe it; export it with python -m llamagen.checkpoints.export, as .safetensors"
        )
    options: dict[str, Any] = {"vocab_size": vocabulary, "block_size": (resolution // 16) ** 2, "code_factors": factors}
    if (table := state.get("cls_embedding.embedding_table.weight")) is not None:
        options |= {"num_classes": len(table) - 1}
    elif (unconditional := state.get("cls_embedding.uncond_embedding")) is not None:
        length, width = unconditional.shape
        options |= {"condition": "text", "caption_length": length, "caption_dim": width}
    options |= {name: True for name, weight in ADDED.items() if weight in state}
    return GPTConfig(**size, **options)
