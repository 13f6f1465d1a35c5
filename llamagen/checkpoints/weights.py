"""Read weights from files and load them into models. Plain torch; code from a file is never run.

Supports published ``.pt`` files and training checkpoints, training checkpoints of this project, and safetensors.
"""

import argparse
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llamagen.checkpoints.adapters import LORA, merge_adapters
from llamagen.checkpoints.sharded import META_FILE, is_sharded_checkpoint, not_moments, read_sharded
from llamagen.distributed.full_tensor import copy_full_
from llamagen.finite import is_finite
from llamagen.hub.download import local_file
from llamagen.hub.errors import remedy_for_damage
from llamagen.hub.published import TEXT_FILES
from llamagen.models.lora import base_entries
from llamagen.models.vqgan import VQGANConfig
from llamagen.state_dicts import differences, listed

ENTRY = "llamagen"
EMA_STATE = "ema"
CODES_OF = "codes_of"
"""Key of :attr:`VQGAN.codes_of` in the description of a tokenizer."""
LAYOUTS = ("model", "module", "state_dict")
PARALLEL, COMPILED = "module.", "_orig_mod."
"""Prefixes that DDP and torch.compile add to names."""
DERIVED = "freqs_cis"
"""The rotary table, which some published files contain."""
ZIP = b"PK\x03\x04"


class Weights(NamedTuple):
    """Content of a file of weights.

    Attributes:
        state: the model's entries by their published names.
        discriminator: entries of the discriminator, if the file has one.
        config: configuration of the architecture, if the file has one.
        architecture: ``"VQGAN"`` or ``"GPT"``, if the file names it.
        source: name of the weights for messages: file, and whether they are averages.
        averaged: whether they are known to be averages (EMA).
        captions: description of the caption features that a text model was trained on, see
            :meth:`llamagen.text.CaptionEncoder.metadata`.
        tokenizer: checksum of the tokenizer whose codes an autoregressive model was trained on, if known.
        classes: names of the classes that a class model was trained on, by number, if they are known.
        codes_of: the tokenizer whose codes a tokenizer writes, if the file names one; see
            :mod:`llamagen.checkpoints.lineage`.
    """

    state: dict[str, Tensor]
    discriminator: dict[str, Tensor] | None
    config: dict[str, Any] | None
    architecture: str | None
    source: str
    averaged: bool = False
    captions: dict[str, Any] | None = None
    tokenizer: str | None = None
    classes: list[str] | None = None
    codes_of: dict[str, str] | None = None


def read_weights(path: str | Path, averaged: bool = True, merge: bool = True) -> Weights:
    """Read the weights of a file in any supported format. Tensors are memory-mapped: read when they are used.

    Args:
        path: published ``.pt``, ``.pth`` or ``.bin`` (a state dict, or one under ``model``, ``module`` or
            ``state_dict``), a published training checkpoint, a training checkpoint of this project (a folder if it is
            sharded), or ``.safetensors``; a published name or ``hf://owner/repository/file[@revision]``, see
            :func:`~llamagen.hub.download.local_file`. Prefixes of DDP and ``torch.compile`` and a stored rotary table
            are removed.
        averaged: take averaged (EMA) weights if the file has them; False for the raw weights.
        merge: merge LoRA adapters into their base weights, which are read, too. False accepts only complete weights.

    Returns:
        The weights, on the CPU, in the dtype of the file.

    Raises:
        ValueError: in one line, if the file does not exist, is damaged, needs code to be read, holds no weights, could
            not be downloaded, or holds adapters that cannot be or are not to be merged.
    """
    path = local_file(path)
    if not path.exists():
        raise ValueError(
            f"{path} does not exist; give a file of weights, a published name or hf://owner/repository/file"
        )
    if path.suffix == ".safetensors":
        return _read_safetensors(path, averaged)
    content = read_torch_file(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not weights by name; give a file of weights")
    exported = content[ENTRY] if "model" in content and isinstance(content.get(ENTRY), dict) else {}
    if isinstance(content.get(ENTRY), dict) and not exported:
        return _from_own_checkpoint(path, content, averaged, merge)
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
        raise ValueError(f"{path} has no weights under {', '.join(LAYOUTS)}; it holds {found}; give another file")
    discriminator = content.get("discriminator") if state is not content else None
    return Weights(
        _entries(state, path),
        _entries(discriminator, path) if discriminator not in (None, {}) else None,
        config=exported.get("config"),
        architecture=exported.get("architecture"),
        source=_source(path, averaged, with_averages),
        averaged=averaged and with_averages,
        captions={"cleaned": "published"} if path.name in TEXT_FILES else None,
        codes_of=codes_of_entry(exported),
    )


def read_torch_file(path: Path, wanted: Callable[[str], bool] = not_moments) -> Any:
    """Read a file written by ``torch.save``: tensors, primitives, ``argparse.Namespace``; memory-mapped if possible.

    Args:
        path: the file, or the folder of a sharded checkpoint.
        wanted: selects tensors of a sharded checkpoint by name.

    Raises:
        ValueError: in one line, if the file is damaged, is not a checkpoint, or needs other code to be read.
    """
    if path.is_dir():
        if not is_sharded_checkpoint(path):
            raise ValueError(
                f"{path} is a folder, but not a complete sharded checkpoint; give the .ckpt of a run, or a file of "
                "weights"
            )
        return read_sharded(path, read_torch_file(path / META_FILE), wanted)
    try:
        with path.open("rb") as file:
            zipped = file.read(len(ZIP)) == ZIP  # the format before torch 1.6 cannot be memory-mapped
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a damaged pickle can raise anything
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise ValueError(
                f"{path} is refused: it needs {refused[1]}, and code named by a file is never run; save only its "
                "tensors, as a dict"
            ) from error
        raise ValueError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}); it is damaged or another kind of file; "
            f"{remedy_for_damage(path, 'get it again')}"
        ) from error


def _from_own_checkpoint(path: Path, checkpoint: dict[str, Any], averaged: bool, merge: bool) -> Weights:
    """Weights of a training checkpoint of this project."""
    entry, state = checkpoint[ENTRY], checkpoint.get("state_dict")
    if (
        not isinstance(state, dict)
        or not isinstance(entry.get("prefix"), str)
        or not {"architecture", "config"} <= entry.keys()
    ):
        raise ValueError(f"{path} is not a complete training checkpoint; give the .ckpt file of a run")
    averages = averaged_weights(checkpoint)
    weights = {**state, **averages} if averaged else state
    prefix = entry["prefix"]
    discriminator = strip_prefix("discriminator.", weights)
    entries = _entries(strip_prefix(prefix, weights), path)
    if LORA in entry:
        if not merge:
            raise ValueError(
                f"{path} holds LoRA adapters; set lora to null, which merges them, or merge them with python -m "
                "llamagen.checkpoints.export first"
            )
        entries = merge_adapters(path, entry[LORA], entries, read_weights)
    return Weights(
        entries,
        _entries(discriminator, path) if discriminator else None,
        entry["config"],
        entry["architecture"],
        _source(path, averaged, bool(averages)),
        averaged and bool(averages),
        entry.get("captions"),
        entry.get("tokenizer"),
        classes_of(entry),
        codes_of_entry(entry),
    )


def _read_safetensors(path: Path, averaged: bool) -> Weights:
    """Weights of a ``.safetensors`` file; files of :mod:`llamagen.checkpoints.export` also describe the model."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        entry = json.loads(metadata.get(ENTRY, "{}"))
        config, architecture, averages = entry.get("config"), entry.get("architecture"), bool(entry.get("averaged"))
    except (SafetensorError, OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} cannot be read as safetensors ({type(error).__name__}); it is damaged or another kind of file; "
            f"{remedy_for_damage(path, 'get it again')}"
        ) from error
    source = f"{path}, EMA weights" if averages else _source(path, averaged, False)
    return Weights(
        _entries(state, path),
        None,
        config,
        architecture,
        source,
        averages,
        captions=entry.get("captions"),
        tokenizer=entry.get("tokenizer"),
        classes=classes_of(entry),
        codes_of=codes_of_entry(entry),
    )


def codes_of_entry(entry: Mapping[str, Any]) -> dict[str, str] | None:
    """``codes_of`` in the description of a tokenizer; None if it has none."""
    found = entry.get(CODES_OF)
    if not isinstance(found, dict) or not all(isinstance(found.get(key), str) for key in ("tokenizer", "encoder")):
        return None
    return {key: found[key] for key in ("tokenizer", "encoder")}


def classes_of(entry: Mapping[str, Any]) -> list[str] | None:
    """Names of the classes in the description of a model; None if it has none."""
    classes = entry.get("classes")
    return classes if isinstance(classes, list) and classes and all(isinstance(each, str) for each in classes) else None


def averaged_weights(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Averaged (EMA) parameters of a training checkpoint by their names in ``state_dict``; empty if it has none."""
    names = checkpoint.get(ENTRY, {}).get("ema_names")
    averages: dict[str, Tensor] = {}
    if names is None:  # also if the run was resumed without averaging
        return averages
    for optimizer in checkpoint.get("optimizer_states", []):
        for index, state in optimizer["state"].items():
            if EMA_STATE in state:
                if int(index) >= len(names):
                    raise ValueError(
                        f"the checkpoint names {len(names)} averages but holds more; it is damaged, give another one"
                    )
                averages[names[int(index)]] = state[EMA_STATE]
    return averages


def _source(path: Path, averaged: bool, with_averages: bool) -> str:
    if averaged and not with_averages:
        return f"{path}, raw weights (it has no separate EMA weights)"
    return f"{path}, {'EMA' if averaged else 'raw'} weights"


def strip_prefix(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Select the entries whose names start with a prefix, and remove the prefix."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _entries(state: Any, path: Path) -> dict[str, Tensor]:
    """Check entries, remove the prefixes of wrappers from their names, and drop the rotary table."""
    if not isinstance(state, dict) or not state or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{path} holds no weights by name where they are expected; give another file")
    state = {name.replace(COMPILED, ""): value for name, value in state.items()}  # parts may be compiled
    while all(name.startswith(PARALLEL) for name in state):
        state = strip_prefix(PARALLEL, state)
    state = {name: value for name, value in state.items() if name != DERIVED}
    others = [name for name, value in state.items() if not _is_dense(value)]
    if others:
        raise ValueError(f"{path} holds weights that are not dense tensors: {listed(others)}; give another file")
    return {name: value.detach() for name, value in state.items()}


def _is_dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and not (value.is_meta or value.is_quantized)


def load_weights(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy weights into a model, which keeps its dtype, device and adapters.

    Args:
        model: destination.
        state: exactly the entries of the model's ``state_dict``, without those of adapters.
        source: name of the weights for messages.

    Raises:
        ValueError: in one line, with all entries that differ or are not finite, before the model is changed.
    """
    expected = base_entries(model)
    faults = differences(state, expected)
    if faults:
        raise ValueError(f"{source}: they do not fit this {type(model).__name__}; {faults}")
    check_finite_weights(state, expected, source)
    for name, tensor in expected.items():
        copy_full_(tensor, state[name])


def check_finite_weights(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    """Check that weights are finite, in the dtypes of the model. Entries of a model on the meta device are skipped.

    Args:
        state: entries of a file.
        expected: entries of the model; values that overflow in their dtypes are errors, too.
        source: name of the weights for messages.

    Raises:
        ValueError: in one line, with the names of weights that are not finite.
    """
    broken = [name for name, value in expected.items() if not (value.is_meta or is_finite(state[name], value.dtype))]
    if broken:
        dtype = str(expected[broken[0]].dtype).removeprefix("torch.")
        raise ValueError(
            f"{source}: {'weights are' if len(broken) > 1 else 'a weight is'} not finite in {dtype} (NaN or infinity): "
            f"{listed(broken)}; the run that wrote them diverged or the file is damaged, give an earlier checkpoint "
            "or another file"
        )


def infer_vqgan_config(state: Mapping[str, Tensor], source: str = "these weights") -> VQGANConfig:
    """Infer the configuration of a tokenizer with the default quantiser from the shapes of its weights.

    Args:
        state: entries of a file without a configuration.
        source: name of the weights for messages.

    Raises:
        ValueError: in one line, if the weights are not those of such a tokenizer.
    """

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        if name not in state or state[name].dim() != dimensions:
            raise ValueError(
                f"{source}: not the weights of a VQGAN: {name} must have {dimensions} dimensions; {remedy}"
            )
        return tuple(state[name].shape)

    remedy = "give the weights of an image tokenizer"
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
        raise ValueError(
            f"{source}: not the weights of a VQGAN: the channels {widths} are not multiples of {channels}; {remedy}"
        )
    return VQGANConfig(
        channels=channels,
        channel_multipliers=tuple(width // channels for width in widths),
        num_res_blocks=blocks,
        z_channels=z_channels,
        codebook_size=codebook_size,
        codebook_dim=codebook_dim,
    )
