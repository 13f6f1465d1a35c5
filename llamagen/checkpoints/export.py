"""Export the weights of a checkpoint: ``python -m llamagen.checkpoints.export CHECKPOINT OUT [--raw] [--overwrite]``.

CHECKPOINT is anything that :func:`~llamagen.checkpoints.weights.read_weights` reads. The suffix of OUT sets the
format:

- ``.pt``: ``{"model": state_dict}`` with the published names, like published checkpoints. For a tokenizer with a custom
  quantiser also architecture and configuration, under ``llamagen``.
- ``.safetensors``: the same entries; architecture and configuration are in the metadata, as JSON under ``llamagen``.
"""

import json
from pathlib import Path
from typing import Any

import torch

from llamagen.checkpoints.contents import build_model, describe
from llamagen.checkpoints.weights import ENTRY, Weights, read_weights
from llamagen.command import run_command
from llamagen.files import atomic_file
from llamagen.full_disk import DiskFullError
from llamagen.models.gpt import GPT
from llamagen.models.vqgan import VQGAN
from llamagen.output_paths import check_output
from llamagen.parser_errors import OneLineParser

SUFFIXES = (".pt", ".safetensors")


def export(checkpoint: Path | str, out: Path | str, averaged: bool = True, overwrite: bool = False) -> None:
    """Write the weights of a checkpoint, in their dtype, and print one line.

    The weights are first loaded into their model, which checks them.

    Args:
        checkpoint: file of weights, published name or ``hf://`` address.
        out: file to write, ``.pt`` or ``.safetensors``; complete or absent, even if the process is killed.
        averaged: take averaged (EMA) weights if the checkpoint has them.
        overwrite: replace ``out`` if it exists.

    Raises:
        ValueError: in one line, if the checkpoint is invalid or ``out`` cannot be written.
    """
    out = Path(out)
    if out.suffix not in SUFFIXES:
        raise ValueError(f"{out} would be of an unknown format; name it {' or '.join('*' + s for s in SUFFIXES)}")
    check_output(out, remedy="choose another place")
    if out.is_dir() or (out.exists() and not overwrite):
        raise ValueError(f"{out} exists already; choose another name, or give --overwrite to replace a file")
    weights = read_weights(checkpoint, averaged)
    model = build_model(weights)
    # Cloned, because tensors may be views, share storage or have another memory format, which torch.save would keep.
    state = {name: weights.state[name].clone(memory_format=torch.contiguous_format) for name in model.state_dict()}
    from safetensors import SafetensorError  # imported here because the import is slow
    from safetensors.torch import save_file

    try:
        with atomic_file(out, sum(tensor.nbytes for tensor in state.values())) as temporary:
            if out.suffix == ".pt":
                with temporary.open("wb") as file:  # its errors name the reason; torch.save's own writer hides it
                    torch.save({"model": state} | _entry_of_quantizer(model), file)
            else:
                save_file(state, temporary, _metadata(model, weights))
    except DiskFullError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{out} cannot be written ({reason}); choose another place") from error
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{out}: {type(model).__name__} of {count:,} parameters, from {weights.source}")


def _entry_of_quantizer(model: GPT | VQGAN) -> dict[str, Any]:
    """For a ``.pt`` file, the configuration of a tokenizer if it cannot be inferred from the shapes of its weights."""
    if not isinstance(model, VQGAN) or model.config.quantizer is None:
        return {}
    return {ENTRY: describe(model, prefix="")}


def _metadata(model: GPT | VQGAN, weights: Weights) -> dict[str, str]:
    """Metadata of a safetensors file."""
    description = describe(model, prefix="")
    entry: dict[str, Any] = {key: description[key] for key in ("architecture", "config")}
    entry["averaged"] = weights.averaged
    if weights.captions is not None:
        entry["captions"] = weights.captions
    if weights.tokenizer is not None:
        entry["tokenizer"] = weights.tokenizer
    if weights.classes is not None:
        entry["classes"] = weights.classes
    return {ENTRY: json.dumps(entry)}


def main(args: list[str] | None = None) -> None:
    """Run the command.

    Args:
        args: arguments; None for those of the command line.
    """
    parser = OneLineParser("python -m llamagen.checkpoints.export", "Write the weights of a checkpoint to a file.")
    parser.add_argument(
        "checkpoint",
        help="a run's .ckpt, a published .pt, .safetensors, a published name, or hf://owner/repository/file",
    )
    parser.add_argument("out", type=Path, help=".pt as published, or .safetensors with its configuration")
    parser.add_argument("--raw", action="store_true", help="take raw weights even if the checkpoint has averages (EMA)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    options = parser.parse_args(args)
    try:
        export(options.checkpoint, options.out, not options.raw, options.overwrite)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    run_command(main)
