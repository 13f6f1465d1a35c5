"""Share of generated digits that a classifier recognises as the requested class.

The classifier is a support vector machine, trained on the 8 × 8 pixels of scikit-learn's real digits alone. Prints a
table, then one JSON line.

    python benchmarks/digits_accuracy.py runs/quickstart/samples/samples.npz
"""

import argparse
import json
import platform
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import cross_val_score
from sklearn.svm import SVC

from evaluation.npz_images import ImageArchive

SIDE = 8


def features(images: np.ndarray) -> np.ndarray:
    """Images (N, H, W, 3) uint8 as the classifier's input: (N, 64) grey values in [0, 16]."""
    grey = images.mean(axis=-1).astype(np.float32)
    small = [np.array(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BOX)) for image in grey]
    return np.stack(small).reshape(len(small), -1) * 16 / 255


def measure(images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Share of images recognised as their label: per class, over all images, and of real digits in cross-validation."""
    digits = load_digits()
    classifier = SVC(gamma=0.001, C=10)
    real = cross_val_score(classifier, digits.data, digits.target, cv=5).mean()
    recognised = classifier.fit(digits.data, digits.target).predict(features(images)) == labels
    result = {str(label): float(recognised[labels == label].mean()) for label in np.unique(labels)}
    return {**result, "all": float(recognised.mean()), "real digits (5-fold)": float(real)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("archive", type=Path, help="samples.npz of a run")
    try:
        archive = ImageArchive(parser.parse_args().archive)
        images = next(archive.blocks(range(archive.count), archive.count))
    except ValueError as error:
        parser.error(str(error))
    if (labels := archive.labels) is None:
        parser.error(f"{archive.path} has no labels arr_1; give the samples.npz of a class-conditional run")
    accuracy = measure(images, labels)
    print(f"{'class':>22} | recognised")
    for name, value in accuracy.items():
        print(f"{name:>22} | {value:.3f}")
    record = {
        "benchmark": "digits_accuracy",
        "images": len(images),
        "accuracy": accuracy,
        "hardware": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
