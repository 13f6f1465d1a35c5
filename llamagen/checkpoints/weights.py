"""Weights out of any file that holds them, and into a model. Plain torch; no code of a file is ever run.

Read are published ``.pt`` files and training checkpoints, training checkpoints of this project, and safetensors.
"""

import argparse
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llamagen.checkpoints.sharded import META_FILE, is_sharded_checkpoint, not_moments, read_sharded
from llamagen.distributed.full_tensor import copy_full_
from llamagen.finite import is_finite
from llamagen.models.vqgan import VQGANConfig
from llamagen.state_dicts import differences, listed

ENTRY = "llamagen"
EMA_STATE = "ema"
LAYOUTS = ("model", "module", "state_dict")
PARALLEL, COMPILED = "module.", "_orig_mod."
"""What DDP puts in front of names, and torch.compile in front of those of a compiled module."""
DERIVED = "freqs_cis"
"""The rotary table, which some published files store."""
ZIP = b"PK\x03\x04"


class Weights(NamedTuple):
    """What a file of weights holds.

    Attributes:
        state: the generator's entries by their published names.
        discriminator: entries of its discriminator, if there is one.
        config: configuration of the architecture, if the file says it.
        architecture: ``"VQGAN"`` or ``"GPT"``, if the file says it.
        source: which weights of which file these are, for a message.
        averaged: these are known to be averages (EMA).
        captions: what is known of the features that a text model was trained on, see
            :meth:`llamagen.text.CaptionEncoder.metadata`.
    """

    state: dict[str, Tensor]
    discriminator: dict[str, Tensor] | None
    config: dict[str, Any] | None
    architecture: str | None
    source: str
    averaged: bool = False
    captions: dict[str, Any] | None = None


def read_weights(path: str | Path, averaged: bool = True) -> Weights:
    """Weights of a file, whoever wrote it; tensors are read when they are used.

    Args:
        path: published ``.pt``, ``.pth`` or ``.bin`` (under ``model``, ``module`` or ``state_dict``, or bare), a
            published training checkpoint, a training checkpoint of this project (a sharded one is a folder), or
            ``.safetensors``. The prefixes of DDP and ``torch.compile`` and a stored rotary table are removed.
        averaged: take averages (EMA) where the file has them; otherwise, or without them, the raw weights.

    Returns:
        The weights, on the CPU, in the dtype of the file.

    Raises:
        ValueError: in one line, if there is no such file, it is damaged, needs code to be read, or holds no weights.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise ValueError(f"{path} does not exist; give a file of weights")
    if path.suffix == ".safetensors":
        return _read_safetensors(path, averaged)
    content = read_torch_file(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not weights by name; give a file of weights")
    exported = content[ENTRY] if "model" in content and isinstance(content.get(ENTRY), dict) else {}
    if isinstance(content.get(ENTRY), dict) and not exported:
        return _of_our_run(path, content, averaged)
    layout = next((key for key in LAYOUTS if isinstance(content.get(key), dict)), None)
    with_averages = isinstance(content.get("ema"), dict) and bool(content["ema"])
    if with_averages and averaged:
        state = content["ema"]
    elif layout is not None:
        state = content[layout]
    elif any(isinstance(value, Tensor) for value in content.values()):
        state = content
    else:
        found = listed(str(key) for key in content) or "nothing"
        raise ValueError(f"{path} holds no weights under {', '.join(LAYOUTS)}, but {found}; give another file")
    discriminator = content.get("discriminator") if state is not content else None
    return Weights(
        _entries(state, path),
        _entries(discriminator, path) if discriminator not in (None, {}) else None,
        config=exported.get("config"),
        architecture=exported.get("architecture"),
        source=_source(path, averaged, with_averages),
        averaged=averaged and with_averages,
    )


def read_torch_file(path: Path, wanted: Callable[[str], bool] = not_moments) -> Any:
    """What ``torch.save`` wrote: tensors, primitives and ``argparse.Namespace``, mapped from the file if possible.

    Args:
        path: the file, or the folder of a sharded checkpoint.
        wanted: which tensors of the latter to read.

    Raises:
        ValueError: in one line, if the file is damaged, something else, or needs other code to be read.
    """
    if path.is_dir():
        if not is_sharded_checkpoint(path):
            raise ValueError(
                f"{path} is a folder, but no sharded checkpoint that was written to its end; give the .ckpt of a run, "
                "or a file of weights"
            )
        return read_sharded(path, read_torch_file(path / META_FILE), wanted)
    try:
        with path.open("rb") as file:
            zipped = file.read(len(ZIP)) == ZIP  # written before torch 1.6 if not: cannot be mapped
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a damaged pickle can raise anything
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise ValueError(
                f"{path} is refused: it needs {refused[1]}, and code that a file names is not run; "
                "save its tensors alone, as a dict"
            ) from error
        raise ValueError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}); it is damaged or something else, "
            "get it once more"
        ) from error


def _of_our_run(path: Path, checkpoint: dict[str, Any], averaged: bool) -> Weights:
    """A training checkpoint of this project."""
    entry, state = checkpoint[ENTRY], checkpoint.get("state_dict")
    if (
        not isinstance(state, dict)
        or not isinstance(entry.get("prefix"), str)
        or not {"architecture", "config"} <= entry.keys()
    ):
        raise ValueError(f"{path} lacks a part of a training checkpoint; give a .ckpt file as a run wrote it")
    averages = averaged_weights(checkpoint)
    weights = {**state, **averages} if averaged else state
    prefix = entry["prefix"]
    discriminator = strip_prefix("discriminator.", weights)
    return Weights(
        _entries(strip_prefix(prefix, weights), path),
        _entries(discriminator, path) if discriminator else None,
        entry["config"],
        entry["architecture"],
        _source(path, averaged, bool(averages)),
        averaged and bool(averages),
        entry.get("captions"),
    )


def _read_safetensors(path: Path, averaged: bool) -> Weights:
    """A ``.safetensors`` file; one of :mod:`llamagen.checkpoints.export` says what it holds."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        entry = json.loads(metadata.get(ENTRY, "{}"))
        config, architecture, averages = entry.get("config"), entry.get("architecture"), bool(entry.get("averaged"))
    except (SafetensorError, OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} cannot be read as safetensors ({type(error).__name__}); it is damaged or something else, "
            "get it once more"
        ) from error
    source = f"{path}, EMA weights" if averages else _source(path, averaged, False)
    return Weights(_entries(state, path), None, config, architecture, source, averages, entry.get("captions"))


def averaged_weights(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Averaged (EMA) parameters of a training checkpoint by their name in ``state_dict``; empty if there are none."""
    names = checkpoint.get(ENTRY, {}).get("ema_names")
    averages: dict[str, Tensor] = {}
    if names is None:  # or of a run that went on without averaging
        return averages
    for optimizer in checkpoint.get("optimizer_states", []):
        for index, state in optimizer["state"].items():
            if EMA_STATE in state:
                if int(index) >= len(names):
                    raise ValueError(f"the checkpoint names {len(names)} averages but holds more; it is damaged")
                averages[names[int(index)]] = state[EMA_STATE]
    return averages


def _source(path: Path, averaged: bool, with_averages: bool) -> str:
    if averaged and not with_averages:
        return f"{path}, raw weights (it has no separate EMA weights)"
    return f"{path}, {'EMA' if averaged else 'raw'} weights"


def strip_prefix(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _entries(state: Any, path: Path) -> dict[str, Tensor]:
    """Entries under their published names: without the prefix of a wrapper and the rotary table."""
    if not isinstance(state, dict) or not state or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{path} holds no weights by name where they are looked for; give another file")
    state = {name.replace(COMPILED, ""): value for name, value in state.items()}  # also of a compiled part alone
    while all(name.startswith(PARALLEL) for name in state):
        state = strip_prefix(PARALLEL, state)
    state = {name: value for name, value in state.items() if name != DERIVED}
    junk = [name for name, value in state.items() if not _is_dense(value)]
    if junk:
        raise ValueError(f"{path} holds something else than dense tensors among its weights: {listed(junk)}")
    return {name: value.detach() for name, value in state.items()}


def _is_dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and not (value.is_meta or value.is_quantized)


def load_weights(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy weights into a model, all or nothing; it keeps its dtype and device.

    Args:
        model: where they go.
        state: an entry for each of the model's ``state_dict``, and no other.
        source: what the weights are called in a message.

    Raises:
        ValueError: in one line, with every entry that differs, or those that are not finite; the model is as before.
    """
    here = model.state_dict()
    differing = differences(state, here)
    if differing:
        raise ValueError(f"{source}: they do not fit this {type(model).__name__}; {differing}")
    refuse_not_finite(state, here, source)
    for name, tensor in model.state_dict().items():
        copy_full_(tensor, state[name])


def refuse_not_finite(state: Mapping[str, Tensor], here: Mapping[str, Tensor], source: str) -> None:
    """See that weights are finite, in a pass over all of them; nothing is read for a model without memory.

    Args:
        state: entries of a file.
        here: entries of the model that they are for, in whose dtypes they must be finite, too.
        source: what the weights are called in a message.

    Raises:
        ValueError: in one line, with the names of those that are not.
    """
    broken = [name for name, value in here.items() if not (value.is_meta or is_finite(state[name], value.dtype))]
    if broken:
        dtype = str(here[broken[0]].dtype).removeprefix("torch.")
        raise ValueError(
            f"{source}: {'weights are' if len(broken) > 1 else 'a weight is'} not finite in {dtype} (NaN or infinity): "
            f"{listed(broken)}; the run that wrote them diverged or the file is damaged, give an earlier checkpoint "
            "or another file"
        )


def infer_vqgan_config(state: Mapping[str, Tensor], source: str = "these weights") -> VQGANConfig:
    """The configuration of an image tokenizer from the shapes of its weights, for files that do not say it.

    Args:
        state: its entries.
        source: what the weights are called in a message.

    Raises:
        ValueError: in one line, if they are not those of a tokenizer.
    """

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        if name not in state or state[name].dim() != dimensions:
            raise ValueError(f"{source}: not those of a VQGAN, whose {name} has {dimensions} dimensions; {advice}")
        return tuple(state[name].shape)

    advice = "give the weights of an image tokenizer"
    channels, *_ = shape("encoder.conv_in.weight", 4)
    widths: list[int] = []
    while not widths or f"encoder.conv_blocks.{len(widths)}.res.0.conv1.weight" in state:
        widths.append(shape(f"encoder.conv_blocks.{len(widths)}.res.0.conv1.weight", 4)[0])
    blocks = 1
    while f"encoder.conv_blocks.0.res.{blocks}.conv1.weight" in state:
        blocks += 1
    z_channels, *_ = shape("encoder.conv_out.weight", 4)
    codebook_size, codebook_dim = shape("quantize.embedding.weight", 2)
    if channels < 1 or any(width % channels for width in widths):
        raise ValueError(f"{source}: not those of a VQGAN of {channels} channels, its widths are {widths}; {advice}")
    return VQGANConfig(
        channels=channels,
        channel_multipliers=tuple(width // channels for width in widths),
        num_res_blocks=blocks,
        z_channels=z_channels,
        codebook_size=codebook_size,
        codebook_dim=codebook_dim,
    )
