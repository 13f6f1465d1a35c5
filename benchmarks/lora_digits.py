"""LoRA: the quickstart's model learns two new classes, handwritten 6s and 9s that lie on their side.

The images are those digits of scikit-learn, rotated by 90°. The stages run with the usual commands: codes by the
quickstart's tokenizer, training of adapters and class embeddings, images. A support vector machine, trained on all real
digits and all rotated ones (20 classes), measures how many images show the requested class. Prints a table, then one
JSON line.

    python -m benchmarks.lora_digits runs/quickstart runs/lora_digits --figure docs/images/lora.png
"""

import argparse
import hashlib
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import cross_val_score
from sklearn.svm import SVC

from benchmarks.digits_accuracy import features
from datamodules.digits import VALIDATION_EVERY
from llamagen.grids import save_png

ROOT = Path(__file__).resolve().parents[1]
DIGITS = (6, 9)
"""The digits that the quickstart's tokenizer, trained on upright ones, decodes best when they lie on their side."""
EPOCHS = 60


def write_images(root: Path) -> None:
    """Write the rotated digits into class folders. Every sixth digit is for validation."""
    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        if label in DIGITS:
            split = "val" if number % VALIDATION_EVERY == 0 else "train"
            pixels = (np.rot90(image) * 255 / 16).round().astype(np.uint8)
            large = Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC).convert("RGB")
            save_png(large, root / split / f"rotated {label}" / f"{number:06d}.png")


def commands(quickstart: Path, root: Path, per_class: int, seed: int) -> dict[str, list[str]]:
    """Arguments of main.py by stage, in the order of the stages. The seed is that of the training."""
    tokenizer, base = (quickstart / f"{name}/checkpoints/last.ckpt" for name in ("tokenizer", "argen"))
    return {
        "codes": [
            *("predict", "--config", "configs/vqgan/base.yaml", "--config", "configs/vqgan/digits.yaml"),
            *("--config", "configs/vqgan/extract.yaml", "--data.class_path=ImageDataModule"),
            *(f"--data.init_args.root={root / 'images'}", "--data.init_args.image_size=32"),
            *(f"--trainer.default_root_dir={root / 'codes'}", f"--ckpt_path={tokenizer}"),
        ],
        "training": [
            *("fit", "--config", "configs/argen/base.yaml", "--config", "configs/argen/digits.yaml"),
            *("--config", "configs/finetune.yaml", "--config", "configs/argen/finetune_lora.yaml"),
            *(f"--model.init_args.tokenizer={tokenizer}", f"--model.init_args.init_from={base}"),
            *(f"--data.init_args.root={root / 'codes'}", "--data.init_args.batch_size=16"),
            *("--model.init_args.optimizer.lr=5e-3", f"--trainer.max_epochs={EPOCHS}"),
            *("--trainer.check_val_every_n_epoch=20", f"--trainer.default_root_dir={root / 'argen'}"),
            f"--seed_everything={seed}",
        ],
        "images": [
            *("predict", "--config", str(root / "argen/fit.yaml"), "--config", "configs/argen/sample.yaml"),
            *(f"--data.init_args.per_class={per_class}", "--data.init_args.batch_size=100"),
            *(f"--ckpt_path={root / 'argen/checkpoints/last.ckpt'}", f"--trainer.default_root_dir={root / 'samples'}"),
        ],
    }


def measure(images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Share of images recognised as their class among 20: the ten digits, and the ten rotated ones.

    Args:
        images: (N, H, W, 3) uint8.
        labels: (N,), index into :data:`DIGITS`.
    """
    digits = load_digits()
    both = np.concatenate([digits.images, np.rot90(digits.images, axes=(1, 2))]).reshape(-1, 64)
    targets = np.concatenate([digits.target, digits.target + 10])
    classifier = SVC(gamma=0.001, C=10)
    real = cross_val_score(classifier, both, targets, cv=5).mean()
    wanted = np.array(DIGITS)[labels] + 10
    recognised = classifier.fit(both, targets).predict(features(images)) == wanted
    result = {f"rotated {digit}": float(recognised[labels == each].mean()) for each, digit in enumerate(DIGITS)}
    return {**result, "all": float(recognised.mean()), "real digits (5-fold)": float(real)}


def checksum(file: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def save_figure(images: np.ndarray, labels: np.ndarray, file: Path, columns: int = 12) -> None:
    """Write a grid with one row for each class, twice as large."""
    rows = [np.concatenate(list(images[labels == each][:columns]), axis=1) for each in range(len(DIGITS))]
    grid = Image.fromarray(np.concatenate(rows))
    save_png(grid.resize((2 * grid.width, 2 * grid.height), Image.Resampling.NEAREST), file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("quickstart", type=Path, help="folder of the quickstart's runs")
    parser.add_argument("root", type=Path, help="folder for all results; must not exist")
    parser.add_argument("--per_class", type=int, default=100, help="images of each class")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training")
    parser.add_argument("--figure", type=Path, help="PNG file of a grid to write")
    options = parser.parse_args()
    base = options.quickstart / "argen/checkpoints/last.ckpt"
    if options.root.exists() or min(options.per_class, options.seed + 1) < 1 or not base.exists():
        parser.error(f"{base} must exist, {options.root} must not, --per_class be at least 1, and --seed 0")
    before, root = checksum(base), options.root.absolute()
    write_images(root / "images")
    seconds = {}
    for stage, arguments in commands(options.quickstart.absolute(), root, options.per_class, options.seed).items():
        start = time.perf_counter()
        code = subprocess.run(
            [sys.executable, "main.py", *arguments], cwd=ROOT, stdout=sys.stderr, check=False
        ).returncode
        if code:  # main.py has said why
            sys.exit(code)
        seconds[stage] = round(time.perf_counter() - start, 1)
    with np.load(root / "samples/samples.npz") as archive:
        images, labels = archive["arr_0"], archive["arr_1"]
    accuracy = measure(images, labels)
    if options.figure is not None:
        save_figure(images, labels, options.figure)
    adapters = torch.load(root / "argen/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    print(f"{'class':>22} | recognised")
    for name, value in accuracy.items():
        print(f"{name:>22} | {value:10.3f}")
    record = {
        "benchmark": "lora_digits",
        "seed": options.seed,
        "training_images": len(list((root / "images/train").rglob("*.png"))),
        "images": len(images),
        "accuracy": accuracy,
        "trained_parameters": sum(value.numel() for value in adapters.values()),
        "base_file_unchanged": checksum(base) == before,
        "seconds": seconds,
        "hardware": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "command": "python -m benchmarks.lora_digits runs/quickstart runs/lora_digits --figure docs/images/lora.png",
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
