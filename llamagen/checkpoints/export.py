"""Export the weights of a checkpoint to a file, or a whole model to a folder or to the hub.

``python -m llamagen.checkpoints.export CHECKPOINT OUT [--raw] [--overwrite]``: CHECKPOINT is anything that
:func:`~llamagen.checkpoints.weights.read_weights` reads. The suffix of OUT sets the format:

- ``.pt``: ``{"model": state_dict}`` with the published names, like published checkpoints. For a tokenizer with a custom
  quantiser or a fine-tuned decoder also architecture and configuration, under ``llamagen``.
- ``.safetensors``: the same entries; architecture and configuration are in the metadata, as JSON under ``llamagen``.

``python -m llamagen.checkpoints.export CHECKPOINT --to FOLDER|hf://owner/repository``: CHECKPOINT is anything that
``LlamaGen.from_pretrained`` loads, see :mod:`llamagen.pretrained.export_folder`.
"""

from pathlib import Path
from typing import Any

from llamagen.checkpoints.contents import build_model
from llamagen.checkpoints.weights import read_weights
from llamagen.checkpoints.writing import SUFFIXES, write_weights
from llamagen.command import run_command
from llamagen.output_paths import check_output
from llamagen.parser_errors import OneLineParser

FOLDER_OPTIONS = ("tokenizer", "text_encoder", "name", "license", "samples", "conditions", "unguided")
"""Options that only an export to a folder has."""


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
        raise ValueError(
            f"{out} would be of an unknown format; name it {' or '.join('*' + s for s in SUFFIXES)}, or give --to "
            "to write a folder"
        )
    check_output(out, remedy="choose another place")
    if out.is_dir() or (out.exists() and not overwrite):
        raise ValueError(f"{out} exists already; choose another name, or give --overwrite to replace a file")
    weights = read_weights(checkpoint, averaged)
    model = build_model(weights)
    write_weights(model, weights, out)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{out}: {type(model).__name__} of {count:,} parameters, from {weights.source}")


def main(args: list[str] | None = None) -> None:
    """Run the command.

    Args:
        args: arguments; None for those of the command line.
    """
    parser = OneLineParser(
        "python -m llamagen.checkpoints.export",
        "Write the weights of a checkpoint to a file, or a model with its tokenizer and card to a folder.",
    )
    parser.add_argument(
        "checkpoint",
        help="a run's .ckpt, a published .pt, .safetensors, a published name, or hf://owner/repository/file; with --to "
        "also a folder",
    )
    parser.add_argument("out", nargs="?", help=".pt as published, or .safetensors with its configuration")
    parser.add_argument("--to", help="write a folder, or upload it: hf://owner/repository")
    parser.add_argument("--raw", action="store_true", help="take raw weights even if the checkpoint has averages (EMA)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT, or an exported folder, if it exists")
    folder = parser.add_argument_group("with --to")
    folder.add_argument("--tokenizer", help="the model's tokenizer, if it is not where the run expects it")
    folder.add_argument("--text-encoder", help="name on the hub of a text model's encoder, if the run used a folder")
    folder.add_argument("--name", help="name of the model; by default that of the folder or repository")
    folder.add_argument("--license", help="licence of the weights, as the hub names it: mit, apache-2.0, other, …")
    folder.add_argument("--samples", type=int, help="number of sample images in the model card; 8 by default")
    folder.add_argument("--conditions", nargs="+", help="classes or prompts of the sample images")
    folder.add_argument(
        "--unguided",
        action="store_true",
        default=None,
        help="for use without guidance: vLLM computes one branch instead of two (docs/vllm.md)",
    )
    options = parser.parse_args(args)
    try:
        given = {name: value for name in FOLDER_OPTIONS if (value := getattr(options, name)) is not None}
        if (options.out is None) is (options.to is None):
            raise ValueError("give either OUT, the file to write, or --to, the folder or repository")
        if options.to is not None:
            _export_model(options.checkpoint, options.to, not options.raw, options.overwrite, given)
        elif given:
            raise ValueError(f"--{next(iter(given)).replace('_', '-')} needs --to; a file holds nothing but weights")
        else:
            export(options.checkpoint, options.out, not options.raw, options.overwrite)
    except ValueError as error:
        parser.error(str(error))


def _export_model(checkpoint: str, to: str, averaged: bool, overwrite: bool, options: dict[str, Any]) -> None:
    # The one import from here into llamagen.pretrained, which builds on this folder: both forms of the export are one
    # command. Nothing in llamagen.pretrained imports this module, so that the imports form no circle.
    from llamagen.pretrained.export_folder import Export, export_model

    conditions = tuple(options.pop("conditions", ()))
    export_model(Export(checkpoint, averaged=averaged, conditions=conditions, **options), to, overwrite)


if __name__ == "__main__":
    run_command(main)
