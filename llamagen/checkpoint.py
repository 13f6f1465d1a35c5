"""What a checkpoint says of its model, and how to get the model out of it again. Plain torch, primitives only.

A training checkpoint of this project is Lightning's, with one entry more: ``checkpoint["llamagen"]`` holds the
architecture (``"VQGAN"`` or ``"GPT"``), its configuration, the prefix of its weights in ``state_dict`` and, if weights
were averaged, the names of the averaged parameters in the order of the optimizer, which keeps the averages in its
state.
"""

import hashlib
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from llamagen.models.gpt import GPT
from llamagen.models.vqgan import VQGAN, VQGANConfig

ENTRY = "llamagen"
EMA_STATE = "ema"


def describe(model: GPT | VQGAN, prefix: str) -> dict[str, Any]:
    """The entry of a checkpoint that says what its weights are.

    Args:
        model: the model that was trained.
        prefix: where its weights are in the ``state_dict``, for example ``"gpt."``.

    Returns:
        Primitives only, so that the checkpoint loads with ``weights_only``.
    """
    config = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(model.config).items()}
    return {"architecture": type(model).__name__, "config": config, "prefix": prefix}


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A training checkpoint of this project; tensors are read from the file when they are used.

    Args:
        path: its file.

    Returns:
        The checkpoint, on the CPU.

    Raises:
        ValueError: in one line, if there is no such file or it is something else.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist; give the .ckpt file of a run")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, UnpicklingError) as error:
        raise ValueError(f"{path} cannot be read as a checkpoint ({type(error).__name__})") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(ENTRY), dict):
        raise ValueError(f"{path} was not written by a training run of this project; give the .ckpt file of a run")
    return checkpoint


def check_fits(checkpoint: dict[str, Any], model: GPT | VQGAN) -> None:
    """Refuse a checkpoint whose weights are not those of a model of this shape.

    Args:
        checkpoint: as loaded.
        model: where its weights are to go.

    Raises:
        ValueError: in one line, with what differs.
    """
    entry = checkpoint.get(ENTRY)
    wanted = type(model).__name__
    if not isinstance(entry, dict):
        raise ValueError(f"the checkpoint was not written by this project's {wanted} training; choose another file")
    if entry["architecture"] != wanted:
        raise ValueError(
            f"the checkpoint holds a {entry['architecture']}, but a {wanted} is to be loaded; choose the checkpoint of "
            f"a {wanted} run"
        )
    weights = {
        key.removeprefix(entry["prefix"]): tuple(value.shape)
        for key, value in checkpoint["state_dict"].items()
        if key.startswith(entry["prefix"])
    }
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if weights != shapes:
        differing = sorted(set(weights.items()) ^ set(shapes.items()))[0][0]
        raise ValueError(
            f"the checkpoint's {wanted} has another shape: {differing} is {weights.get(differing, 'missing')} there "
            f"and {shapes.get(differing, 'missing')} here; use the configuration that it was trained with"
        )


def averaged_weights(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Averaged (EMA) parameters of a training checkpoint by their name in ``state_dict``; empty if there are none."""
    names = checkpoint.get(ENTRY, {}).get("ema_names")
    averages: dict[str, Tensor] = {}
    if names is None:  # or of a run that went on without averaging
        return averages
    for optimizer in checkpoint.get("optimizer_states", []):
        for index, state in optimizer["state"].items():
            if EMA_STATE in state:
                averages[names[int(index)]] = state[EMA_STATE]
    return averages


def load_vqgan(path: str | Path) -> VQGAN:
    """The image tokenizer of a training checkpoint: averaged weights if it has them, in evaluation mode, frozen.

    Args:
        path: checkpoint file of a tokenizer run.

    Returns:
        The model, on the CPU.

    Raises:
        ValueError: if there is no such file or it holds something else.
    """
    checkpoint = read_checkpoint(path)
    entry = checkpoint[ENTRY]
    if entry["architecture"] != "VQGAN":
        raise ValueError(f"{path} holds a {entry['architecture']}, not a VQGAN; give the checkpoint of a tokenizer run")
    vqgan = VQGAN(VQGANConfig(**entry["config"]))
    check_fits(checkpoint, vqgan)
    weights = {**checkpoint["state_dict"], **averaged_weights(checkpoint)}
    prefix = entry["prefix"]
    vqgan.load_state_dict({key.removeprefix(prefix): weights[key] for key in weights if key.startswith(prefix)})
    return vqgan.eval().requires_grad_(False)


def weights_checksum(model: nn.Module) -> str:
    """SHA-256 over names and values of all parameters: the same weights give the same sum, wherever they come from."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
