"""LoRA: trained low-rank adapters next to the linear layers of a frozen GPT (arXiv 2106.09685).

``peft`` provides the adapted layers. Reading and merging adapters needs only this file, not ``peft``.

Shapes: N outputs and K inputs of a layer, R rank of its adapter.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llamagen.distributed.full_tensor import copy_full_, init_full_
from llamagen.models.gpt import GPT
from llamagen.models.gpt_config import GPTConfig
from llamagen.option_checks import check_integer, check_positive

TARGETS = ("wqkv", "wo", "w1", "w2", "w3", "fc1", "fc2")
"""Adapted layers: all linear layers of attention, feed-forward and caption projection."""
CLASS_TABLE = "cls_embedding.embedding_table.weight"
NAME = "default"
"""Name of the adapter in each layer: peft's."""
BASE, DOWN, UP = "base_layer.weight", f"lora_A.{NAME}.weight", f"lora_B.{NAME}.weight"
"""Weights of an adapted layer: those of the base (N, K), and the two factors (R, K) and (N, R)."""


@dataclass(frozen=True)
class LoRAConfig:
    """Adapters of the linear layers: the weight W (N, K) acts as ``W + alpha / rank * B A``, and only A and B train.

    Args:
        rank: number of rows of A and of columns of B. Twice the rank has twice the parameters and the memory of them.
        alpha: strength of the adapters, relative to ``rank``.
        dropout: dropout on the input of A, for small datasets.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges of all values."""
        check_integer("lora.rank", self.rank)
        check_positive("lora.alpha", self.alpha)
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"lora.dropout is {self.dropout}; a probability must be at least 0 and below 1")

    @property
    def scale(self) -> float:
        """Factor of the product of B and A."""
        return self.alpha / self.rank


class BaseWeights(NamedTuple):
    """The weights that adapters belong to.

    Attributes:
        source: path, published name or ``hf://`` address.
        checksum: SHA-256 of the weights, see :func:`llamagen.state_dicts.tensors_checksum`.
        averaged: whether they are the averaged (EMA) weights of the file.
        file: absolute path of a local source without symbolic links; None on the hub.
    """

    source: str
    checksum: str
    averaged: bool
    file: str | None = None


class Adapters(NamedTuple):
    """The adapters of a model.

    Attributes:
        config: rank, strength, dropout.
        base: the frozen weights.
        seed: seed of the initial values.
    """

    config: LoRAConfig
    base: BaseWeights
    seed: int


def add_adapters(gpt: GPT, adapters: Adapters, train_classes: bool) -> None:
    """Freeze a model, and add adapters to its linear layers, in place. They start without an effect.

    Args:
        gpt: the model, which may be on the meta device; then :func:`reset_adapters` initialises the adapters later.
        adapters: description of the adapters.
        train_classes: also train the class embeddings, in full.

    Raises:
        ValueError: in one line, if ``peft`` is not installed, or the rank is larger than a layer.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model  # imported here because the import is slow
    except ImportError as error:
        raise ValueError(f'lora needs peft ({error}); pip install -c constraints.txt -e ".[lora]"') from error
    config = adapters.config
    check_rank(gpt.config, config)
    options: dict[str, Any] = {"r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout}
    inject_adapter_in_model(LoraConfig(**options, target_modules=list(TARGETS)), gpt)
    gpt.requires_grad_(False)
    for name, parameter in gpt.named_parameters():
        parameter.requires_grad_(name.endswith((DOWN, UP)) or (train_classes and name == CLASS_TABLE))
    gpt.adapters = adapters  # type: ignore[assignment]  # a plain attribute
    reset_adapters(gpt)


def check_rank(net: GPTConfig, lora: LoRAConfig) -> None:
    """Check that adapters are no larger than the layers of a model.

    Args:
        net: shape of the model.
        lora: settings of the adapters.

    Raises:
        ValueError: in one line, if the rank is larger than inputs or outputs of a layer.
    """
    smallest = min(net.dim, net.ffn_dim, net.dim if net.condition == "class" else net.caption_dim)
    if lora.rank > smallest:
        raise ValueError(f"lora.rank is {lora.rank}, but the smallest layer has a width of {smallest}; choose less")


def adapters_of(model: nn.Module) -> Adapters | None:
    """The adapters of a model; None if it has none."""
    found = getattr(model, "adapters", None)
    return found if isinstance(found, Adapters) else None


def reset_adapters(gpt: nn.Module) -> None:
    """Initialise adapters: A uniform in ±1 / √K, as in ``peft``, and B zero. A model without adapters does not change.

    The values depend on the seed only, not on device or sharding.
    """
    adapters = adapters_of(gpt)
    if adapters is None:
        return
    generator = torch.Generator().manual_seed(adapters.seed)
    for name, parameter in gpt.named_parameters():
        if name.endswith(DOWN):
            bound = parameter.shape[1] ** -0.5
            copy_full_(parameter, torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
        elif name.endswith(UP):
            init_full_(parameter, nn.init.zeros_)


def base_entries(model: nn.Module) -> dict[str, Tensor]:
    """Entries of the state dict without adapters, by the names of a model without them."""
    state = model.state_dict()
    if adapters_of(model) is None:
        return state
    return {
        name.removesuffix(BASE) + "weight" if name.endswith(BASE) else name: value
        for name, value in state.items()
        if not name.endswith((DOWN, UP))
    }


def saved_entries(model: nn.Module) -> dict[str, Tensor]:
    """Entries of the state dict that a checkpoint has: those that are trained, for a model with adapters, or all."""
    state = model.state_dict()
    if adapters_of(model) is None:
        return state
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: value for name, value in state.items() if name in trained}


@torch.no_grad()
def merged_weight(linear: nn.Module) -> Tensor:
    """The weight (N, K) of a linear layer; of an adapted one, with its adapter merged into a new tensor."""
    if not hasattr(linear, "lora_A"):
        return linear.weight  # type: ignore[return-value]
    layer: Any = linear
    return merge_factors(
        layer.base_layer.weight, layer.lora_A[NAME].weight, layer.lora_B[NAME].weight, layer.scaling[NAME]
    )


def merge_factors(base: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Compute ``base + scale * up @ down``, (N, K), in the wider dtype of base and factors. Autocast has no effect.

    Args:
        base: (N, K).
        down: (R, K), A.
        up: (N, R), B.
        scale: factor of the product.
    """
    dtype = torch.promote_types(base.dtype, up.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    with torch.autocast(base.device.type, enabled=False):
        return (base.to(wide) + scale * (up.to(wide) @ down.to(wide))).to(dtype)


@torch.no_grad()
def merged_entries(base: Mapping[str, Tensor], trained: Mapping[str, Tensor], config: LoRAConfig) -> dict[str, Tensor]:
    """Weights of a model without adapters that computes the same.

    Args:
        base: entries of the frozen model.
        trained: entries of :func:`saved_entries`.
        config: settings of the adapters.

    Returns:
        Entries of ``base``, with merged weights and, if they were trained, other class embeddings; in the wider dtype
        of both.

    Raises:
        ValueError: in one line, if an adapter belongs to no weight, is incomplete, or has another shape or rank.
    """
    state = dict(base)
    for name, tensor in trained.items():
        if name.endswith(DOWN):
            layer = name.removesuffix(DOWN)
            weight, up = base.get(f"{layer}weight"), trained.get(layer + UP)
            if weight is None or up is None or weight.ndim != 2:
                raise ValueError(f"the adapter of {layer.removesuffix('.')} does not fit the base weights")
            shapes = (config.rank, weight.shape[1]), (len(weight), config.rank)
            if (tuple(tensor.shape), tuple(up.shape)) != shapes:
                raise ValueError(
                    f"the adapter of {layer.removesuffix('.')} has the shapes {tuple(tensor.shape)} and "
                    f"{tuple(up.shape)}, but base weights and rank {config.rank} need {shapes[0]} and {shapes[1]}"
                )
            state[f"{layer}weight"] = merge_factors(weight, tensor, up, config.scale)
        elif not name.endswith(UP):
            state[name] = tensor
    wide = {tensor.dtype for tensor in state.values()}
    dtype = torch.float32 if len(wide) > 1 else next(iter(wide))
    return {name: tensor.to(dtype) for name, tensor in state.items()}


def merged_parameters(model: nn.Module) -> Mapping[str, Tensor]:
    """Parameters by the names of a model without adapters.

    Adapters are merged when a weight is read, one layer at a time and on the CPU, so that the values are those of
    :func:`merged_entries`. If they are sharded over ranks, all ranks must read the same weights in the same order.
    """
    parameters = dict(model.named_parameters())
    adapters = adapters_of(model)
    return parameters if adapters is None else _MergedParameters(parameters, adapters.config.scale)


class _MergedParameters(Mapping[str, Tensor]):
    def __init__(self, parameters: Mapping[str, Tensor], scale: float) -> None:
        self._parameters, self._scale = parameters, scale
        self._names = [
            name.removesuffix(BASE) + "weight" if name.endswith(BASE) else name
            for name in parameters
            if not name.endswith((DOWN, UP))
        ]

    def __getitem__(self, name: str) -> Tensor:
        layer = name.removesuffix("weight")
        if layer + BASE not in self._parameters:
            return self._parameters[name]
        base, down, up = (_on_cpu(self._parameters[layer + each]) for each in (BASE, DOWN, UP))
        return merge_factors(base, down, up, self._scale)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _on_cpu(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()
