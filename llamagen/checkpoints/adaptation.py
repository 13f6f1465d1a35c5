"""Weights of an autoregressive model as the start of one with a longer sequence or other classes, on purpose."""

from collections.abc import Collection
from dataclasses import asdict

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from llamagen.checkpoints.weights import Weights
from llamagen.models.gpt import GPT

ADAPTABLE = ("block_size", "num_classes")
TABLE = "cls_embedding.embedding_table.weight"
# What changes the function, but no shape.
FUNCTION = ("n_head", "n_kv_head", "rope_base", "rope_condition", "norm_eps", "condition")


def adapt_to(gpt: GPT, weights: Weights, adapt: Collection[str] = ()) -> dict[str, Tensor]:
    """The entries of a file as far as they need to be changed for a model.

    Another ``block_size`` changes no weight: the rotary table is derived. With another ``num_classes`` the rows of the
    classes are those of the new model, as it was initialised, and the row for "no class" is that of the file.

    Args:
        gpt: where they are to go; it is not changed.
        weights: of a file. One without a configuration, as published ones are, cannot be compared in what leaves no
            trace in shapes.
        adapt: what may differ on purpose, of :data:`ADAPTABLE`.

    Returns:
        Entries for :func:`~llamagen.checkpoints.weights.load_weights`.

    Raises:
        ValueError: in one line, if something differs that may not.
    """
    if unknown := sorted(set(adapt) - set(ADAPTABLE)):
        raise ValueError(f"{unknown[0]} cannot be adapted; only {' and '.join(ADAPTABLE)} can")
    if weights.architecture not in (None, "GPT"):
        raise ValueError(f"{weights.source}: these are of a {weights.architecture}, not of a GPT; give another file")
    here = asdict(gpt.config)
    for name, there in (weights.config or {}).items():
        if name not in here or there == here[name] or name in adapt:
            continue
        differing = f"{weights.source}: their {name} is {there}, here it is {here[name]}"
        if name in ADAPTABLE:
            raise ValueError(f"{differing}; if that is meant, give init_adapt [{name}]")
        if name in FUNCTION:
            raise ValueError(f"{differing}; set {name} to {there}")
    state = dict(weights.state)
    table, own = state.get(TABLE), gpt.state_dict().get(TABLE)
    if table is None or own is None or len(table) == len(own) or table.shape[1:] != own.shape[1:]:
        return state
    if "num_classes" not in adapt:
        raise ValueError(
            f"{weights.source}: they know {len(table) - 1} classes, here there are {len(own) - 1}; set num_classes to "
            f"{len(table) - 1}, or, if new classes are meant, give init_adapt [num_classes]"
        )
    if isinstance(own, DTensor) and not own.is_meta:  # spread over ranks
        own = own.full_tensor()
    state[TABLE] = torch.cat([own[:-1], table[-1:].to(own)])
    return state
