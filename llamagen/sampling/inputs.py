"""What people pass to be sampled: labels, caption features, seeds and settings, as the decoders want them."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llamagen.models.gpt import GPT
from llamagen.models.inputs import is_integer, to_tensor
from llamagen.sampling.config import SamplingConfig

Condition = Tensor | np.ndarray | Sequence[Any] | int
"""Class labels (or one), or caption features."""
Numbers = Tensor | np.ndarray | Sequence[int]


def as_condition(gpt: GPT, condition: Condition) -> Tensor:
    """What to sample, on the model's device.

    Args:
        gpt: the model.
        condition: labels (N,) of any whole type, in a tensor, an array or a list, or one label; or caption features
            (N, C, W), or (C, W) of one caption.

    Raises:
        ValueError: in one line, if it is not what this model is conditioned on.
    """
    config, device = gpt.config, gpt.output.weight.device
    if config.condition == "class":
        found = to_tensor(condition, "class labels")
        if not is_integer(found.dtype):
            kind = "caption features" if found.dim() == 3 else str(found.dtype)
            raise ValueError(f"this model wants class labels, whole numbers of shape (N,), not {kind}")
        found = found.to(device, torch.int64)
        return found[None] if found.dim() == 0 else found
    shape = (config.caption_length, config.caption_dim)
    wanted = f"caption features, floats of shape (N, {shape[0]}, {shape[1]}) of a llamagen.text.CaptionEncoder"
    if isinstance(condition, str) or (
        isinstance(condition, list | tuple) and condition and isinstance(condition[0], str)
    ):
        raise ValueError(f"this model wants {wanted}, not texts; encode them first")
    found = to_tensor(condition, "caption features")
    if found.dtype.is_floating_point and found.dim():
        return found.to(device)[None] if found.shape == shape else found.to(device)
    if not found.numel() and found.dim() == 1:
        return torch.empty((0, *shape), device=device)
    raise ValueError(f"this model wants {wanted}, not {tuple(found.shape)} of {found.dtype}")


def as_numbers(values: Numbers | None, what: str, device: torch.device) -> Tensor | None:
    """Whole numbers, int64; None stays.

    Args:
        values: to take.
        what: they are called in a message.
        device: where they go.

    Raises:
        ValueError: if they are no whole numbers.
    """
    if values is None:
        return None
    found = to_tensor(values, what)
    if not is_integer(found.dtype):
        raise ValueError(f"{what} must be whole numbers, not {found.dtype}")
    return found.to(device, torch.int64)


def as_config(config: SamplingConfig | Mapping[str, Any] | None) -> SamplingConfig:
    """Settings of sampling; a mapping has the fields of :class:`SamplingConfig`, and None is the default.

    Raises:
        ValueError: if it is something else, or has another field.
    """
    if config is None:
        return SamplingConfig()
    if isinstance(config, SamplingConfig):
        return config
    if not isinstance(config, Mapping):
        raise ValueError(f"config must be a SamplingConfig or a mapping of its fields, not {config!r:.60}")
    known = [field.name for field in fields(SamplingConfig)]
    if unknown := [name for name in config if name not in known]:
        raise ValueError(f"config has no {unknown[0]!r}; it has {', '.join(known)}")
    return SamplingConfig(**config)


def as_int(value: Any, name: str) -> int:
    """A whole number, of any type that is one.

    Raises:
        ValueError: if it is none.
    """
    try:
        return index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r:.40}; it must be a whole number") from None
