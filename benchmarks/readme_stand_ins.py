"""Small stand-ins for the data and weights that the commands of README.md name.

Weights are random. Published files are in a cache of the hub, which the commands use without a network.
``c2i_B_256.pt`` and the tokenizers have the shapes of the published files, so their commands run without any change;
the others are smaller.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from benchmarks.small_t5 import save_small_t5
from llamagen.files import atomic_file, atomic_folder
from llamagen.hub.published import PUBLISHED
from llamagen.metrics.inception import InceptionNet
from llamagen.models.gpt import GPT, GPTConfig
from llamagen.models.vqgan import VQGAN, VQGANConfig

CLASSES = 10
WIDTH = 64
"""Of the small autoregressive models, and of the T5."""
HUB = "hub_home"
"""Folder that replaces the hub's, ``HF_HOME``."""
COMMIT = "0" * 40


def save_images(folder: Path, per_class: int, side: int) -> None:
    """Class folders of smooth random images, slightly wider than high."""
    random = np.random.default_rng(0)
    with atomic_folder(folder) as temporary:
        for label in range(CLASSES):
            (temporary / f"class_{label}").mkdir()
            for number in range(per_class):
                levels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                image = Image.fromarray(levels).resize((side + 20, side), Image.Resampling.BICUBIC)
                image.save(temporary / f"class_{label}" / f"{number}.jpg")


def save_reference(path: Path, count: int, side: int) -> None:
    """Images in a file like those of ADM, without statistics."""
    levels = np.random.default_rng(1).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    images = [np.asarray(Image.fromarray(each).resize((side, side), Image.Resampling.BICUBIC)) for each in levels]
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, np.stack(images))


def save_weights(path: Path, model: nn.Module) -> None:
    """The published layout: the entry ``model`` of a file of torch.save."""
    with atomic_file(path) as temporary:
        torch.save({"model": model.state_dict()}, temporary)


def cached_file(home: Path, name: str) -> Path:
    """Place of a published file in the hub's cache, at a commit that is the newest of its branch."""
    model = PUBLISHED[name]
    repository = home / "hub" / f"models--{model.repository.replace('/', '--')}"
    with atomic_file(repository / "refs/main") as temporary:
        temporary.write_text(COMMIT)
    return repository / "snapshots" / COMMIT / model.file


def make_stand_ins(folder: Path) -> None:
    """Write all stand-ins that are missing in a folder."""
    if not (folder / "data/mine").exists():
        save_images(folder / "data/mine", per_class=3, side=300)
    if not (folder / "data/imagenet").exists():
        save_images(folder / "data/imagenet/train", per_class=2, side=400)
        save_images(folder / "data/imagenet/val", per_class=1, side=400)
    if not (folder / "VIRTUAL_imagenet256_labeled.npz").exists():
        save_reference(folder / "VIRTUAL_imagenet256_labeled.npz", count=40, side=256)
    if not (folder / "small-t5").exists():
        save_small_t5(folder / "small-t5", ["a", "corgi", "in", "field", "of", "sunflowers"], WIDTH)
    torch.manual_seed(0)
    small: dict[str, Any] = {"dim": WIDTH, "n_layer": 2, "n_head": 2}
    models = {
        "c2i_B_256": lambda: GPT(GPTConfig(dim=768, n_layer=12, n_head=12)),
        "c2i_L_384": lambda: GPT(GPTConfig(**small, block_size=576)),
        "t2i_XL_stage1_256": lambda: GPT(GPTConfig(**small, condition="text", caption_dim=WIDTH)),
        "vq_ds16_c2i": lambda: VQGAN(VQGANConfig()),
        "vq_ds16_t2i": lambda: VQGAN(VQGANConfig()),
    }
    for name, build in models.items():
        if not (path := cached_file(folder / HUB, name)).exists():
            save_weights(path, build())
    if not (folder / "inception.pth").exists():
        with atomic_file(folder / "inception.pth") as temporary:
            torch.save(InceptionNet().state_dict(), temporary)
