"""Fine-tuning with LoRA: adapters of a module's GPT, and checkpoints that hold only what is trained."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_modules.base import GenerativeModule
from llamagen.checkpoints.adapters import base_weights
from llamagen.checkpoints.weights import Weights
from llamagen.models.gpt import GPT
from llamagen.models.lora import Adapters, LoRAConfig, adapters_of, add_adapters, saved_entries


def adapt(
    gpt: GPT,
    lora: LoRAConfig,
    init_from: str | Path | None,
    weights: Weights | None,
    train_classes: bool,
    generator_state: Tensor,
) -> None:
    """Freeze a model that holds its initial weights, and add adapters.

    Args:
        gpt: the model, which may be on the meta device.
        lora: settings of the adapters.
        init_from: where the weights were read from.
        weights: the weights.
        train_classes: also train the class embeddings.
        generator_state: state of the CPU's random generator before the model was built. The adapters' initial values
            depend on it, so that they are those of the same seed with any strategy.

    Raises:
        ValueError: in one line, if there are no initial weights, or the adapters cannot be added.
    """
    if init_from is None or weights is None:
        raise ValueError("lora is given, but init_from is not; give the weights that the adapters are to adapt")
    generator = torch.Generator()
    generator.set_state(generator_state)
    seed = int(torch.randint(2**62, (), generator=generator))
    base = base_weights(init_from, weights.averaged, weights.state)
    add_adapters(gpt, Adapters(lora, base, seed), train_classes)


def keep_trained(checkpoint: dict[str, Any], module: GenerativeModule) -> None:
    """Remove the frozen weights from a checkpoint that is to be saved. Without adapters there are none."""
    if adapters_of(module.generator) is not None:
        names = {module.generator_prefix + name for name in saved_entries(module.generator)}
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in names}


def restore_frozen(checkpoint: dict[str, Any], module: GenerativeModule) -> None:
    """Add the module's frozen weights to a checkpoint that is to be loaded into it, so that it is complete."""
    if adapters_of(module.generator) is not None and "state_dict" in checkpoint:
        checkpoint["state_dict"] = {**module.state_dict(), **checkpoint["state_dict"]}
