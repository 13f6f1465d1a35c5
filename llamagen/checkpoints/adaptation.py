"""Initialise an autoregressive model from one with another sequence length or other classes."""

from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from llamagen.checkpoints.weights import Weights
from llamagen.models.gpt import GPT, GPTConfig
from llamagen.models.vqgan import VQGANConfig

ADAPTABLE = ("block_size", "num_classes")
TABLE = "cls_embedding.embedding_table.weight"
# Options that change the model's function: some change no shape, the others add weights.
FUNCTION = (
    "n_head",
    "n_kv_head",
    "rope_base",
    "rope_condition",
    "norm_eps",
    "condition",
    "qk_norm",
    "adaptive_norm",
    "target_aware",
    "code_factors",
)
ADDED = {
    "qk_norm": "layers.0.attention.q_norm.weight",
    "adaptive_norm": "adaptive_norm.linear.weight",
    "target_aware": "target_embeddings.weight",
}
"""Options that files of earlier versions and published files do not name, each with a weight that it adds."""
OFF = {**dict.fromkeys(ADDED, False), "code_factors": None}
"""Values of options that a file does not name."""


def options_of(config: GPTConfig | VQGANConfig) -> dict[str, Any]:
    """Options of a model as a file holds them: primitives, with lists instead of tuples."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}


def code_factors_of(state: Mapping[str, Tensor]) -> list[int] | None:
    """The option ``code_factors``, recognised by the weights of a model."""
    tables = [state.get(f"tok_embeddings.{factor}.weight") for factor in ("first", "second")]
    return [len(table) for table in tables if table is not None] or None


def adapt_to(gpt: GPT, weights: Weights, adapt: Collection[str] = ()) -> dict[str, Tensor]:
    """Adapt the weights of a file to a model.

    Another ``block_size`` changes no weight, because the rotary table is derived. With another ``num_classes``, the
    class embeddings stay as the model was initialised; only the embedding of "no class" is taken from the file.

    Args:
        gpt: destination; it is not changed.
        weights: weights of a file. Published files have no configuration; then options that do not affect any shape
            cannot be compared.
        adapt: options of :data:`ADAPTABLE` that may differ.

    Returns:
        Entries for :func:`~llamagen.checkpoints.weights.load_weights`.

    Raises:
        ValueError: in one line, if another option differs.
    """
    if unknown := sorted(set(adapt) - set(ADAPTABLE)):
        raise ValueError(f"{unknown[0]} cannot be adapted; only {' and '.join(ADAPTABLE)} can")
    if weights.architecture not in (None, "GPT"):
        raise ValueError(f"{weights.source}: weights of a {weights.architecture}, not of a GPT; give another file")
    expected, given = options_of(gpt.config), weights.config or {}
    recognised: dict[str, Any] = {name: weight in weights.state for name, weight in ADDED.items()}
    recognised["code_factors"] = code_factors_of(weights.state)
    for name, loaded in {**recognised, **given}.items():
        if name not in expected or loaded == expected[name] or name in adapt:
            continue
        difference = f"{weights.source}: {name} is {loaded}, but the model's is {expected[name]}"
        if name in ADAPTABLE:
            raise ValueError(f"{difference}; if that is intended, set init_adapt to [{name}]")
        if name in FUNCTION:
            order = " and leave out order, which needs it" if name == "target_aware" and not loaded else ""
            raise ValueError(f"{difference}; set {name} to {loaded}{order}")
    state = dict(weights.state)
    table, own = state.get(TABLE), gpt.state_dict().get(TABLE)
    if table is None or own is None or len(table) == len(own) or table.shape[1:] != own.shape[1:]:
        return state
    if "num_classes" not in adapt:
        raise ValueError(
            f"{weights.source}: num_classes is {len(table) - 1}, but the model's is {len(own) - 1}; set num_classes to "
            f"{len(table) - 1} or, if new classes are intended, set init_adapt to [num_classes]"
        )
    if isinstance(own, DTensor) and not own.is_meta:
        own = own.full_tensor()
    state[TABLE] = torch.cat([own[:-1], table[-1:].to(own)])
    return state
