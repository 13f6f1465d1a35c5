"""Images to evaluate, in folders and files."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from llamagen.metrics import extract
from llamagen.metrics.classifier import ENTRY, SmallClassifier
from tests.metrics.extractors import SIZE, Everything, random_images

EVERYTHING = "--features=tests.metrics.extractors.Everything"
FAKE_INCEPTION = "--features=tests.evaluation.sets.FakeInception"
ADM_FILE = "VIRTUAL_imagenet256_labeled.npz"


class FakeInception(Everything):
    """An extractor named Inception, as ADM's references assume."""

    name = "inception"


def rows_last(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) → (B, H, W, 3)."""
    array: np.ndarray = images.permute(0, 2, 3, 1).contiguous().numpy()
    return array


def write_npz(path: Path, count: int, seed: int, labels: np.ndarray | None = None) -> Path:
    """An ``.npz`` of samples."""
    arrays = {} if labels is None else {"arr_1": labels}
    np.savez(path, arr_0=rows_last(random_images(count, seed)), **arrays)
    return path


def write_folder(folder: Path, count: int, seed: int) -> Path:
    """The same images as files."""
    folder.mkdir(parents=True)
    for number, image in enumerate(rows_last(random_images(count, seed))):
        Image.fromarray(image).save(folder / f"{number:05d}.png")
    return folder


def write_adm(folder: Path, count: int = 20, seed: int = 5, row: bool = False, dtype: type = np.float64) -> Path:
    """A file like ADM's references: statistics that are not those of its few images."""
    extractor = FakeInception().eval()
    many = extract(extractor, random_images(60, seed + 1))
    assert many.spatial is not None
    arrays = {}
    for end, rows in (("", many.pool.numpy()), ("_s", many.spatial.numpy())):
        mean = rows.mean(0, dtype=np.float64).astype(dtype)
        arrays[f"mu{end}"] = mean[None] if row else mean
        arrays[f"sigma{end}"] = np.cov(rows, rowvar=False).astype(dtype)
    np.savez(folder / ADM_FILE, arr_0=rows_last(random_images(count, seed)), arr_1=np.arange(count), **arrays)
    return folder / ADM_FILE


def write_classifier(path: Path, seed: int) -> Path:
    """An untrained classifier named ``shapes``."""
    options = {"num_classes": 3, "image_size": SIZE, "width": 8}
    torch.manual_seed(seed)
    save_file(SmallClassifier(**options).state_dict(), path, {ENTRY: json.dumps({"name": "shapes", **options})})
    return path
