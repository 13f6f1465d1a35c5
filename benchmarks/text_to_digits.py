"""Text to image from end to end on a CPU, without a network: captions of handwritten digits to new digits.

A small T5 encoder with random weights and a tokenizer of a few words replaces FLAN-T5-XL. The stages run with the usual
commands: tokenizer, codes, features of captions, training, images from prompts. A support vector machine trained on
real digits measures how many images show the digit that their prompt names. Prints a table, then one JSON line.

    python -m benchmarks.text_to_digits runs/text_digits
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.digits_accuracy import measure
from benchmarks.small_t5 import save_small_t5
from datamodules.digits import NAMES

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = [f"a handwritten {name}" for name in NAMES]
WIDTH = 64


def commands(root: Path, per_prompt: int) -> dict[str, list[str]]:
    """Arguments of main.py by stage, in the order of the stages."""
    tokenizer = [
        *("--config", "configs/vqgan/base.yaml", "--config", "configs/vqgan/digits.yaml"),
        *(f"--data.init_args.root={root / 'digits'}", "--data.init_args.captions=true"),
    ]
    model = [
        *("--config", "configs/argen/base.yaml", "--config", "configs/argen/digits.yaml"),
        *("--config", "configs/argen/text_digits.yaml", f"--model.init_args.text_encoder.name={root / 't5'}"),
        f"--model.init_args.tokenizer={root / 'tokenizer/checkpoints/last.ckpt'}",
    ]
    return {
        "tokenizer": ["fit", *tokenizer, f"--trainer.default_root_dir={root / 'tokenizer'}"],
        "codes": [
            *("predict", *tokenizer, "--config", "configs/vqgan/extract.yaml"),
            *(
                f"--trainer.default_root_dir={root / 'codes'}",
                f"--ckpt_path={root / 'tokenizer/checkpoints/last.ckpt'}",
            ),
        ],
        "features": [
            *("predict", "--config", "configs/text/extract.yaml", "--model.init_args.encoder.dtype=float32"),
            *(f"--model.init_args.encoder.name={root / 't5'}", "--model.init_args.caption_length=16"),
            *(f"--data.init_args.root={root / 'codes'}", "--data.init_args.num_workers=0"),
            f"--trainer.default_root_dir={root / 'features'}",
        ],
        "training": [
            *("fit", *model, f"--data.init_args.root={root / 'features'}"),
            f"--trainer.default_root_dir={root / 'argen'}",
        ],
        "images": [
            *("predict", *model, "--config", "configs/argen/prompts.yaml", f"--data.init_args.prompts={PROMPTS}"),
            *(f"--data.init_args.per_prompt={per_prompt}", "--data.init_args.batch_size=100"),
            *(f"--trainer.default_root_dir={root / 'samples'}", f"--ckpt_path={root / 'argen/checkpoints/last.ckpt'}"),
        ],
    }


def run(root: Path, per_prompt: int) -> tuple[dict[str, float], dict[str, float]]:
    """Run all stages in a new folder.

    Returns:
        Seconds of each stage, and the share of images recognised as the requested digit.
    """
    root.mkdir(parents=True)
    save_small_t5(root / "t5", ["a", "handwritten", *NAMES], WIDTH)
    seconds = {}
    for stage, arguments in commands(root, per_prompt).items():
        start = time.perf_counter()
        subprocess.run([sys.executable, "main.py", *arguments], cwd=ROOT, check=True, stdout=sys.stderr)
        seconds[stage] = round(time.perf_counter() - start, 1)
    with np.load(root / "samples/samples.npz") as archive:
        return seconds, measure(archive["arr_0"], archive["arr_1"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("root", type=Path, help="folder for all results; must not exist")
    parser.add_argument("--per_prompt", type=int, default=50, help="images of each digit")
    options = parser.parse_args()
    if options.root.exists() or options.per_prompt < 1:
        parser.error(f"root is {options.root} and per_prompt {options.per_prompt}; give a new folder, and at least 1")
    seconds, accuracy = run(options.root.absolute(), options.per_prompt)
    print(f"{'stage':>22} | seconds")
    for name, value in seconds.items():
        print(f"{name:>22} | {value:7.1f}")
    print(f"{'requested digit':>22} | recognised")
    for name, value in accuracy.items():
        print(f"{name:>22} | {value:10.3f}")
    record = {
        "benchmark": "text_to_digits",
        "images": options.per_prompt * len(PROMPTS),
        "accuracy": accuracy,
        "seconds": seconds,
        "hardware": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "command": "python -m benchmarks.text_to_digits runs/text_digits",
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
