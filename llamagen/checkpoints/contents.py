"""The description of a model in its checkpoint, and building the model from it. Plain torch, primitives only.

A training checkpoint of this project is a Lightning checkpoint with one more entry: ``checkpoint["llamagen"]`` holds
the architecture (``"VQGAN"`` or ``"GPT"``), its configuration and the prefix of its weights in ``state_dict``. With EMA
it also holds the names of the averaged parameters in the optimizer's order: the averages are in the optimizer's state.
The checkpoint of a run with LoRA holds adapters only, see :mod:`llamagen.checkpoints.adapters`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llamagen.checkpoints.adaptation import FUNCTION, OFF, options_of
from llamagen.checkpoints.adapters import LORA, check_adapters, describe_adapters
from llamagen.checkpoints.sharded import not_moments
from llamagen.checkpoints.weights import (
    CODES_OF,
    ENTRY,
    Weights,
    check_finite_weights,
    infer_vqgan_config,
    load_weights,
    read_torch_file,
    read_weights,
    strip_prefix,
)
from llamagen.hub.download import local_file
from llamagen.models.gpt import GPT, GPTConfig
from llamagen.models.lora import adapters_of, merged_parameters, saved_entries
from llamagen.models.quantizer import build_quantizer
from llamagen.models.vqgan import VQGAN, VQGANConfig
from llamagen.state_dicts import differences, tensors_checksum


def describe(model: GPT | VQGAN, prefix: str) -> dict[str, Any]:
    """Describe a model for the ``"llamagen"`` entry of its checkpoint.

    Args:
        model: the trained model.
        prefix: prefix of its weights in the ``state_dict``, for example ``"gpt."``.

    Returns:
        Architecture, configuration and prefix, adapters, and :attr:`VQGAN.codes_of`: primitives only, so that the
        checkpoint loads with ``weights_only``.
    """
    config = options_of(model.config)
    adapters = adapters_of(model)
    lora = {} if adapters is None else {LORA: describe_adapters(adapters)}
    lineage = {CODES_OF: dict(model.codes_of)} if isinstance(model, VQGAN) and model.codes_of is not None else {}
    return {"architecture": architecture_of(model), "config": config, "prefix": prefix, **lora, **lineage}


def architecture_of(model: GPT | VQGAN) -> str:
    """Name of the model's class. footgun: sharding replaces ``type(model)`` by a generated subclass."""
    return "GPT" if isinstance(model, GPT) else "VQGAN"


def read_checkpoint(path: str | Path, wanted: Callable[[str], bool] = not_moments) -> dict[str, Any]:
    """Read a training checkpoint of this project. Tensors of a file are memory-mapped: read when they are used.

    Args:
        path: the file, or the folder of a sharded checkpoint, or ``hf://owner/repository/file[@revision]``.
        wanted: selects tensors of a sharded checkpoint by name, see
            :func:`~llamagen.checkpoints.sharded.read_sharded`.

    Returns:
        The checkpoint, on the CPU.

    Raises:
        ValueError: in one line, if the file does not exist or is not such a checkpoint.
    """
    path = local_file(path)
    if not path.exists():
        raise ValueError(f"checkpoint {path} does not exist; give the .ckpt file of a run")
    checkpoint = read_torch_file(path, wanted)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(ENTRY), dict):
        raise ValueError(f"{path} was not written by a training run of this project; give the .ckpt file of a run")
    return checkpoint


def holds_only_weights(path: str | Path) -> bool:
    """Whether a file holds weights without the state of a training run, as published and exported files do.

    Args:
        path: the file, or its published name or ``hf://`` address; a file that does not exist does not hold weights.

    Raises:
        ValueError: in one line, if the file is damaged or could not be downloaded.
    """
    path = local_file(path)
    if path.suffix == ".safetensors" or not path.exists():
        return path.exists()
    content = read_torch_file(path, wanted=lambda _: False)
    return isinstance(content, dict) and ("model" in content or not isinstance(content.get(ENTRY), dict))


def check_fits(checkpoint: dict[str, Any], model: GPT | VQGAN) -> None:
    """Check that a checkpoint can be loaded into a model, before anything is changed.

    Args:
        checkpoint: the loaded checkpoint.
        model: destination of its weights.

    Raises:
        ValueError: in one line with all differences, if architecture, configuration or shapes differ, or weights are
            not finite.
    """
    entry = checkpoint.get(ENTRY)
    architecture = architecture_of(model)
    if not isinstance(entry, dict):
        raise ValueError(
            f"the checkpoint was not written by this project's {architecture} training; choose another file"
        )
    if entry["architecture"] != architecture:
        raise ValueError(
            f"the checkpoint holds a {entry['architecture']}, but a {architecture} is expected; choose the checkpoint "
            f"of a {architecture} run"
        )
    expected = options_of(model.config)
    for name in (*FUNCTION, "block_size") if architecture == "GPT" else ():
        loaded = entry["config"].get(name, OFF.get(name, expected[name]))
        if loaded != expected[name]:
            own, wanted = ("null" if value is None else value for value in (expected[name], loaded))  # as in YAML
            raise ValueError(f"the checkpoint's {name} is {wanted}, but the model's is {own}; set {name} to {wanted}")
    if isinstance(model, VQGAN):
        check_quantizer(entry["config"], model, "the checkpoint")
    check_adapters(entry, adapters_of(model))
    if "state_dict" not in checkpoint:  # sharded: the weights are already in the model
        return
    loaded, own = strip_prefix(entry["prefix"], checkpoint["state_dict"]), saved_entries(model)
    differing = differences(loaded, own)
    if differing:
        raise ValueError(
            f"the checkpoint's {architecture} has another shape: {differing}; use the configuration that it was "
            "trained with"
        )
    check_finite_weights(loaded, own, "the checkpoint")


def check_quantizer(config: Mapping[str, Any] | None, model: VQGAN, source: str) -> None:
    """Check that weights belong to a tokenizer with the same quantiser. Their shapes may be equal even if it differs.

    Args:
        config: configuration from a file; None if it has none.
        model: destination of the weights.
        source: name of the weights for the message.

    Raises:
        ValueError: in one line, if the quantiser or one of its arguments differs.
    """
    loaded, expected = (config or {}).get("quantizer"), model.config.quantizer
    if config is not None and loaded != expected:
        raise ValueError(
            f"{source} has {loaded or 'the default'} as quantizer, but the model has {expected or 'the default'}; "
            f"set net.quantizer to {loaded or 'null'}"
        )


def build_model(
    weights: Weights, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> GPT | VQGAN:
    """Build the model of given weights, in evaluation mode and frozen. Each tensor is cast on its own.

    Args:
        weights: weights of a file. Without an architecture they must be those of a tokenizer, whose configuration is
            inferred from their shapes.
        device: device of the model.
        dtype: dtype of its weights.

    Returns:
        The model. The state of the random generator does not change.

    Raises:
        ValueError: in one line, if the weights are not those of a supported model.
    """
    with torch.device("meta"):
        model = _empty_model(weights)
    model = model.to(dtype).to_empty(device=device)
    if isinstance(model, VQGAN) and model.config.quantizer is not None:
        # footgun: buffers that are not in the state dict lost their values on the meta device.
        with torch.random.fork_rng(devices=[]):
            model.quantize = build_quantizer(model.config.quantizer).to(device, dtype)
    load_weights(model, weights.state, weights.source)
    if isinstance(model, VQGAN):
        model.codes_of = weights.codes_of
    return model.eval().requires_grad_(False)


def _empty_model(weights: Weights) -> GPT | VQGAN:
    if weights.architecture is None:
        return VQGAN(infer_vqgan_config(weights.state, weights.source))
    try:
        if weights.architecture == "VQGAN":
            return VQGAN(VQGANConfig(**(weights.config or {})))
        if weights.architecture == "GPT":
            return GPT(GPTConfig(**(weights.config or {})))
    except TypeError as error:
        raise ValueError(f"{weights.source}: the configuration in the file is invalid ({error})") from error
    raise ValueError(f"{weights.source}: the file holds a {weights.architecture}, which this version does not know")


def load_vqgan(path: str | Path) -> VQGAN:
    """Load an image tokenizer, with averaged (EMA) weights if the file has them, in evaluation mode and frozen.

    Args:
        path: checkpoint of a tokenizer run, published ``.pt``, or safetensors; a published name or
            ``hf://owner/repository/file[@revision]``.

    Returns:
        The model, on the CPU.

    Raises:
        ValueError: in one line, if the file does not exist or does not hold a tokenizer.
    """
    weights = read_weights(path)
    if weights.architecture not in (None, "VQGAN"):
        raise ValueError(f"{path} holds a {weights.architecture}, not a VQGAN; give the weights of a tokenizer")
    model = build_model(weights)
    assert isinstance(model, VQGAN)
    return model


def weights_checksum(model: nn.Module) -> str:
    """SHA-256 over names and values of all parameters; equal weights give equal checksums in any file format.

    Adapters are merged. If parameters are sharded over ranks, all ranks must call this.
    """
    return tensors_checksum(merged_parameters(model))
