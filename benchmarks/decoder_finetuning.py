"""Decoder fine-tuning: what training the decoder further gains, with encoder and codebook frozen.

    python -m benchmarks.decoder_finetuning WORK --recipe "VQ with revival 512" --out RECORD.json

WORK is a folder of ``benchmarks.recipes run cifar10 WORK --stage tokenizer``. For each of its seeds, the tokenizer of
the recipe is fine-tuned by ``configs/vqgan/finetune_decoder.yaml``, with the pixel loss of that bench. The record has
the metrics on the same held-out images before and after, and how many codes of all held-out images differ.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import main
from benchmarks.recipe_tokenizer import DATA
from benchmarks.recipe_tokenizer_run import measure
from benchmarks.timing import machine
from llamagen.checkpoints.contents import load_vqgan
from llamagen.command import run_command
from llamagen.files import atomic_file
from llamagen.metrics.classifier import Classifier
from llamagen.models.vqgan import VQGAN
from llamagen.parser_errors import OneLineParser


def finetune(run: Path, folder: Path, steps: int, lr: float) -> Any:
    """Fine-tune the decoder of a run. Returns the CLI, with module and data."""
    options = [
        *("fit", "--config", str(run / "fit.yaml"), "--config", "configs/vqgan/finetune_decoder.yaml"),
        *("--config", "benchmarks/recipe_data/pixel_loss.yaml"),
        f"--model.init_args.init_from={run / 'checkpoints/last.ckpt'}",
        *(f"--model.init_args.optimizer.lr={lr}", "--model.init_args.optimizer.warmup_steps=50"),
        *("--trainer.max_epochs=-1", f"--trainer.max_steps={steps}", f"--trainer.default_root_dir={folder}"),
        "--trainer.callbacks=[{class_path: EMA, init_args: {decay: 0.99}}, {class_path: LastCheckpoint}]",
        "--ckpt_path=null",
    ]
    return main.main(options)


@torch.no_grad()
def differing_codes(one: VQGAN, other: VQGAN, batches: Any) -> tuple[int, int]:
    """Number of codes of all images that differ, and number of codes."""
    differing = total = 0
    for batch in batches:
        codes = one.encode(batch["images"]).codes
        differing += int((codes != other.encode(batch["images"]).codes).sum())
        total += codes.numel()
    return differing, total


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = OneLineParser("python -m benchmarks.decoder_finetuning", "Fine-tune decoders of tokenizers.")
    parser.add_argument("work", type=Path, help="folder of benchmarks.recipes with cifar10 and --stage tokenizer")
    parser.add_argument("--recipe", default="VQ 512", help="name of the recipe (default: VQ 512)")
    parser.add_argument("--steps", type=int, default=400, help="steps of fine-tuning (default: 400)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate (default: 1e-3)")
    parser.add_argument("--out", type=Path, required=True, help="record, JSON")
    options = parser.parse_args()
    options.runs = sorted((options.work / "runs_tokenizer" / options.recipe).glob("seed_*/fit.yaml"))
    if not options.runs:
        raise ValueError(f"{options.work} has no run of {options.recipe!r}; give the folder and a recipe of a bench")
    return options


def command() -> None:
    """Fine-tune, measure, and write the record."""
    options = parse_arguments()
    classifier, record = Classifier(options.work / "classifier.safetensors"), {}
    for run in tqdm([file.parent for file in options.runs], desc="seeds"):
        folder = options.work / "decoders" / options.recipe / run.name
        cli = finetune(run, folder, options.steps, options.lr)
        cli.datamodule.setup("validate")
        before, after = (load_vqgan(each / "checkpoints/last.ckpt").eval() for each in (run, folder))
        found: dict[str, Any] = {}
        for name, vqgan in (("before", before), ("after", after)):
            cli.model.vqgan = vqgan
            batches = cli.datamodule.val_dataloader()
            found[name] = measure(cli.model, batches, DATA["cifar10"].count, classifier, classifier.image_size, None)
        found["differing_codes"], found["codes"] = differing_codes(before, after, cli.datamodule.val_dataloader())
        record[run.name] = found
        print(json.dumps({run.name: found}), flush=True)
    content = {"recipe": options.recipe, "steps": options.steps, "lr": options.lr, "machine": machine("cpu")}
    with atomic_file(options.out) as temporary:
        temporary.write_text(json.dumps(content | {"seeds": record}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(command)
