"""Conversion and checks of a sampling request: condition, settings, seed and indices."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llamagen.models.gpt import GPT
from llamagen.models.inputs import is_integer, to_tensor
from llamagen.sampling.config import SamplingConfig
from llamagen.sampling.noise import seed_tensor
from llamagen.sampling.order import check_order, ordered_settings

Condition = Tensor | np.ndarray | Sequence[Any] | int
"""Class labels (or one), or caption features."""
Numbers = Tensor | np.ndarray | Sequence[int]


@dataclass(frozen=True)
class SamplingRequest:
    """Arguments of one sampling call for B images, checked and on the model's device.

    Attributes:
        condition: (B,) int64 labels, or (B, C, caption_dim) caption features padded on the left.
        config: settings of sampling.
        caption_lengths: (B,) int64, number of real caption tokens; None if no caption is padded.
        seeds: (B,) int64, seed of each image, see :func:`~llamagen.sampling.noise.seed_tensor`.
        indices: (B,) int64, index of each sample within the run.
        kept: (B, K) int64 with K from 1 to L, the first K codes of each image in the order of generation, which are not
            sampled; None to sample all codes.
        order: (B, L) int64, the raster position of each code in the order of generation; None for raster order.
    """

    condition: Tensor
    config: SamplingConfig
    caption_lengths: Tensor | None
    seeds: Tensor
    indices: Tensor
    kept: Tensor | None = None
    order: Tensor | None = None

    @classmethod
    def from_inputs(
        cls,
        gpt: GPT,
        condition: Condition,
        config: SamplingConfig | Mapping[str, Any] | None,
        caption_lengths: Numbers | None,
        seed: int | Numbers,
        indices: Numbers | None,
        kept: Numbers | None = None,
        order: Numbers | None = None,
    ) -> "SamplingRequest":
        """Convert and check the arguments of a :class:`~llamagen.sampling.sampler.Sampler`.

        Raises:
            ValueError: in one line, if types, shapes or values do not fit the model.
        """
        config = as_config(config)
        condition = as_condition(gpt, condition)
        caption_lengths = as_integers(caption_lengths, "caption_lengths", condition.device)
        given = as_integers(indices, "indices", condition.device)
        indices = torch.arange(len(condition), device=condition.device) if given is None else given
        codes = as_integers(kept, "kept", condition.device)
        if codes is not None:
            _check_kept(gpt, codes, len(condition))
            codes = codes if codes.shape[1] else None
        orders = as_integers(order, "order", condition.device)
        if orders is not None:
            orders, config = check_order(gpt, orders, len(condition)), ordered_settings(config)
        seeds = as_seeds(seed, len(condition), condition.device)
        request = cls(condition, config, caption_lengths, seeds, indices, codes, orders)
        request._check(gpt)
        return request

    def __len__(self) -> int:
        """Number of images B."""
        return len(self.condition)

    @property
    def kept_count(self) -> int:
        """Number K of codes of each image that are kept."""
        return 0 if self.kept is None else self.kept.shape[1]

    def rows(self, rows: Tensor | slice) -> "SamplingRequest":
        """The request for some of the images."""
        lengths = None if self.caption_lengths is None else self.caption_lengths[rows]
        kept = None if self.kept is None else self.kept[rows]
        order = None if self.order is None else self.order[rows]
        condition, seeds, indices = self.condition[rows], self.seeds[rows], self.indices[rows]
        return SamplingRequest(condition, self.config, lengths, seeds, indices, kept, order)

    def _check(self, gpt: GPT) -> None:
        """Check shapes and values once per call. Checks at each code would have to wait for the device."""
        batch, config, lengths = len(self), gpt.config, self.caption_lengths
        if self.indices.shape != (batch,):
            raise ValueError(
                f"indices must have shape ({batch},), one for each condition, not {tuple(self.indices.shape)}"
            )
        shape = () if config.condition == "class" else (config.caption_length, config.caption_dim)
        if self.condition.shape[1:] != shape:
            kind = "class labels" if config.condition == "class" else "caption features"
            expected = ", ".join(["B", *map(str, shape)]) + ("" if shape else ",")
            raise ValueError(f"{kind} must have shape ({expected}), not {tuple(self.condition.shape)}")
        if lengths is not None and (config.condition == "class" or lengths.shape != (batch,)):
            raise ValueError(
                f"caption_lengths must have shape ({batch},) and belongs to a text-conditional model; it has shape "
                f"{tuple(lengths.shape)} and the model's condition is {config.condition!r}"
            )
        if batch and config.condition == "class":
            lowest, highest = int(self.condition.min()), int(self.condition.max())
            if lowest < 0 or highest >= config.num_classes:
                raise ValueError(
                    f"class {lowest if lowest < 0 else highest} was requested, but the model has classes 0 to "
                    f"{config.num_classes - 1}"
                )
        if batch and lengths is not None:
            lowest, highest = int(lengths.min()), int(lengths.max())
            if lowest < 1 or highest > config.condition_length:
                raise ValueError(
                    f"caption_lengths holds {lowest if lowest < 1 else highest}, not 1 to {config.condition_length}"
                )


def _check_kept(gpt: GPT, kept: Tensor, batch: int) -> None:
    length, vocabulary = gpt.config.block_size, gpt.config.vocab_size
    if kept.dim() != 2 or len(kept) != batch:
        raise ValueError(
            f"kept must have shape ({batch}, K), the first K codes of each image in raster order, not "
            f"{tuple(kept.shape)}"
        )
    if kept.shape[1] > length:
        raise ValueError(
            f"kept has {kept.shape[1]} codes for each image, but the model's images have {length}; keep at most "
            f"{length}"
        )
    if kept.numel() and (int(kept.min()) < 0 or int(kept.max()) >= vocabulary):
        wrong = int(kept.min()) if int(kept.min()) < 0 else int(kept.max())
        raise ValueError(
            f"kept holds code {wrong}, but the model has codes 0 to {vocabulary - 1}; encode the images with the "
            "tokenizer whose codes the model was trained on"
        )


def as_condition(gpt: GPT, condition: Condition) -> Tensor:
    """Convert a condition to a tensor on the model's device.

    Args:
        gpt: the model.
        condition: integer labels (N,) in a tensor, an array or a list, or one label; or caption features (N, C, W),
            or (C, W) for one caption.

    Raises:
        ValueError: in one line, if the model has another kind of condition.
    """
    config, device = gpt.config, gpt.output.weight.device
    if config.condition == "class":
        found = to_tensor(condition, "class labels")
        if not is_integer(found.dtype):
            kind = "caption features" if found.dim() == 3 else str(found.dtype)
            raise ValueError(f"this model needs class labels, integers of shape (N,), not {kind}")
        found = found.to(device, torch.int64)
        return found[None] if found.dim() == 0 else found
    shape = (config.caption_length, config.caption_dim)
    expected = f"caption features, floats of shape (N, {shape[0]}, {shape[1]}) of a llamagen.text.CaptionEncoder"
    if isinstance(condition, str) or (
        isinstance(condition, list | tuple) and condition and isinstance(condition[0], str)
    ):
        raise ValueError(f"this model needs {expected}, not texts; encode them first")
    found = to_tensor(condition, "caption features")
    if found.dtype.is_floating_point and found.dim():
        return found.to(device)[None] if found.shape == shape else found.to(device)
    if not found.numel() and found.dim() == 1:
        return torch.empty((0, *shape), device=device)
    raise ValueError(f"this model needs {expected}, not {tuple(found.shape)} of {found.dtype}")


def as_integers(values: Numbers | None, name: str, device: torch.device) -> Tensor | None:
    """Convert integers to an int64 tensor. None stays None.

    Args:
        values: integers in a tensor, an array or a list.
        name: name of the argument in messages.
        device: target device.

    Raises:
        ValueError: if they are not integers.
    """
    if values is None:
        return None
    found = to_tensor(values, name)
    if not is_integer(found.dtype):
        raise ValueError(f"{name} must be integers, not {found.dtype}")
    return found.to(device, torch.int64)


def as_seeds(seed: int | Numbers, count: int, device: torch.device) -> Tensor:
    """Convert a seed, or one for each image, to an int64 tensor (N,), modulo 2⁶⁴.

    Args:
        seed: any integer, or N integers.
        count: N, number of images.
        device: target device.

    Raises:
        ValueError: if they are not integers, or not N.
    """
    if isinstance(seed, Tensor | np.ndarray) and seed.ndim:
        seed = as_integers(seed, "seed", torch.device("cpu")).tolist()  # type: ignore[union-attr]
    if not isinstance(seed, Sequence) or isinstance(seed, str):
        return seed_tensor(as_int(seed, "seed"), device).expand(count)
    if len(seed) != count:
        raise ValueError(f"seed has {len(seed)} integers for {count} images; give one integer, or one for each image")
    seeds = [int(seed_tensor(as_int(each, "seed"))) for each in seed]
    return torch.tensor(seeds, dtype=torch.int64, device=device)


def as_config(config: SamplingConfig | Mapping[str, Any] | None) -> SamplingConfig:
    """Convert settings of sampling: a mapping has the fields of :class:`SamplingConfig`, None means the defaults.

    Raises:
        ValueError: for another type or an unknown field.
    """
    if config is None:
        return SamplingConfig()
    if isinstance(config, SamplingConfig):
        return config
    if not isinstance(config, Mapping):
        raise ValueError(f"config must be a SamplingConfig or a mapping of its fields, not {config!r:.60}")
    names = [field.name for field in fields(SamplingConfig)]
    if unknown := [name for name in config if name not in names]:
        raise ValueError(f"config has no {unknown[0]!r}; it has {', '.join(names)}")
    return SamplingConfig(**config)


def as_int(value: Any, name: str) -> int:
    """Convert any integer type to int.

    Raises:
        ValueError: if it is not an integer.
    """
    try:
        return index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r:.40}; it must be an integer") from None
