"""LoRA: trained low-rank adapters next to the linear layers of a frozen GPT (arXiv 2106.09685).

``peft`` provides the adapted layers. Reading and merging adapters needs only this file, not ``peft``.

Shapes: N outputs and K inputs of a layer, R rank of its adapter.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llamagen.distributed.full_tensor import copy_full_, init_full_
from llamagen.models.gpt import GPT
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
    """

    source: str
    checksum: str
    averaged: bool


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
    smallest = min(min(module.weight.shape) for name, module in gpt.named_modules() if _is_target(name, module))
    if config.rank > smallest:
        raise ValueError(f"lora.rank is {config.rank}, but the smallest layer has a width of {smallest}; choose less")
    options: dict[str, Any] = {"r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout}
    inject_adapter_in_model(LoraConfig(**options, target_modules=list(TARGETS)), gpt)
    gpt.requires_grad_(False)
    for name, parameter in gpt.named_parameters():
        parameter.requires_grad_(name.endswith((DOWN, UP)) or (train_classes and name == CLASS_TABLE))
    gpt.adapters = adapters  # type: ignore[assignment]  # a plain attribute
    reset_adapters(gpt)


def _is_target(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and name.rpartition(".")[2] in TARGETS


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
    """Compute ``base + scale * up @ down``, (N, K), in the wider dtype of base and factors.

    Args:
        base: (N, K).
        down: (R, K), A.
        up: (N, R), B.
        scale: factor of the product.
    """
    return base + scale * (up @ down)


@torch.no_grad()
def merged_entries(base: Mapping[str, Tensor], trained: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Weights of a model without adapters that computes the same.

    Args:
        base: entries of the frozen model.
        trained: entries of :func:`saved_entries`.
        scale: factor of the adapters.

    Returns:
        Entries of ``base``, with merged weights and, if they were trained, other class embeddings; in the wider dtype
        of both.

    Raises:
        ValueError: in one line, if an adapter belongs to no weight, or has another shape.
    """
    state = dict(base)
    for name, tensor in trained.items():
        if name.endswith(DOWN):
            layer = name.removesuffix(DOWN)
            weight, up = base.get(f"{layer}weight"), trained.get(layer + UP)
            if weight is None or up is None or weight.shape != (len(up), tensor.shape[1]):
                raise ValueError(f"the adapter of {layer.removesuffix('.')} does not fit the base weights")
            state[f"{layer}weight"] = merge_factors(weight, tensor, up, scale)
        elif not name.endswith(UP):
            state[name] = tensor
    wide = {tensor.dtype for tensor in state.values()}
    dtype = torch.float32 if len(wide) > 1 else next(iter(wide))
    return {name: tensor.to(dtype) for name, tensor in state.items()}


@torch.no_grad()
def merged_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by the names of a model without adapters, which are merged. Sharded ones stay sharded."""
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    if adapters_of(model) is None:
        return parameters
    return {
        name.removesuffix(BASE) + "weight" if name.endswith(BASE) else name: (
            merged_weight(model.get_submodule(name.removesuffix("." + BASE))) if name.endswith(BASE) else value
        )
        for name, value in parameters.items()
        if not name.endswith((DOWN, UP))
    }
