"""Recipes of the tokenizer in benchmarks/recipes.py: preparation of the images, training and evaluation."""

import filecmp
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from benchmarks.recipe_plots import plot_sizes
from benchmarks.recipe_runs import Column, Preparation, Recipe, Stage, curve, logged, pack, run, train_classifier
from benchmarks.recipe_tokenizer_run import METRICS
from lightning_modules import VQGANModule
from lightning_modules.generator_loss import generator_loss
from llamagen.files import atomic_file

QUANTIZER = "--model.init_args.net.quantizer"
LEVELS = {512: [8] * 3, 4096: [8] * 4, 16384: [8, 8, 8, 8, 4], 65536: [8, 8, 8, 8, 4, 4]}
"""Levels of FSQ by number of codes."""


def recipes_of(codes: int) -> tuple[str, ...]:
    """Recipes with the same number of codes, the paper's first."""

    def quantizer(name: str, **arguments: Any) -> str:
        spec = {"class_path": f"llamagen.models.quantizers.{name}", "init_args": arguments}
        overlay = f"configs/vqgan/quantizer/{name.lower()}.yaml"  # with the weights of its losses
        return f"{name} {codes}={overlay} '{QUANTIZER}={json.dumps(spec)}'"

    own = f"--model.init_args.net.codebook_size={codes}"
    return (
        f"VQ {codes}={own}",
        f"VQ with revival {codes}={own} --model.init_args.revive_codes_every=50",
        quantizer("FSQ", levels=LEVELS[codes]),
        quantizer("LFQ", bits=codes.bit_length() - 1),
        quantizer("IBQ", codebook_size=codes, codebook_dim=8),
        quantizer("SimVQ", codebook_size=codes, codebook_dim=8),
    )


@dataclass(frozen=True)
class Tokenizer(Stage):
    """Images, and how reconstructions are measured.

    Attributes:
        data: name of the overlay in ``benchmarks/recipe_data``.
        images: folder of the packed images in the bench's folder.
        val_share: share of the images that is held out.
        count: held-out images that are measured. FID needs more of them than the classifier has features, 128.
        epochs: epochs of the classifier whose features FID uses; 0 if there are too few images to train one.
    """

    data: str
    images: str
    val_share: float
    count: int
    epochs: int
    suffix = "_tokenizer"
    base = ("--config", "configs/vqgan/base.yaml", "--config", "benchmarks/recipe_data/pixel_loss.yaml")
    recipes = tuple(recipe for codes in LEVELS for recipe in recipes_of(codes))
    columns: ClassVar[dict[str, Column]] = {
        "rfid": Column("rFID", "min"),
        "psnr": Column("PSNR, dB", "max"),
        "ssim": Column("SSIM"),
        "lpips": Column("LPIPS", "min"),
        "usage": Column("usage of the codes"),
        "perplexity": Column("perplexity"),
        "entropy": Column("entropy, bits"),
    }

    def preparations(self, images: Path, work: Path, classifier: Path | None) -> list[Preparation]:
        """Pack the images, and train the classifier or copy it.

        Raises:
            ValueError: if there are too few images to train a classifier and none is given, or the folder has another.
        """
        packed, features = work / self.images, work / "classifier.safetensors"
        if classifier is not None:
            if not classifier.is_file():
                raise ValueError(f"--classifier is {classifier}, which does not exist; give a trained classifier")
            if features.exists() and not filecmp.cmp(classifier, features, shallow=False):
                raise ValueError(
                    f"--classifier is {classifier}, but {features} is another one, with which runs may be measured; "
                    "leave --classifier out, or give another folder"
                )
            if not features.exists():
                work.mkdir(parents=True, exist_ok=True)
                with atomic_file(features) as temporary:
                    shutil.copyfile(classifier, temporary)
        if not self.epochs and not features.exists():
            raise ValueError(
                f"{self.data} has too few images to train a classifier; give --classifier FILE, such as "
                "classifier.safetensors in the folder of the bench with cifar10"
            )
        return [pack(images, packed, self.val_share), train_classifier(packed, features, self.epochs)]

    def is_prepared(self, work: Path) -> bool:
        """Whether images and classifier are there."""
        return (work / self.images / "meta.json").is_file() and (work / "classifier.safetensors").is_file()

    def perform(self, recipe: Recipe, work: Path, seed: int, lpips: Path | None) -> None:
        """Train one tokenizer, or resume it, and measure it."""
        folder = self.run_folder(work, recipe, seed)
        if (folder / METRICS).exists():
            return
        own = [str(folder), f"--classifier={work / 'classifier.safetensors'}", f"--count={self.count}"]
        own += [] if lpips is None else [f"--lpips={lpips}"]
        options = [*recipe.arguments(self), *self.training_paths(work, folder), f"--seed_everything={seed}"]
        options += ["--ckpt_path=last"]
        run(["-m", "benchmarks.recipe_tokenizer_run", *own, "--", *options], folder.with_suffix(".log"))

    def results(self, recipe: Recipe, work: Path, seed: int) -> dict[str, Any]:
        """Metrics of the trained tokenizer, and PSNR and squared error over the steps."""
        folder = self.run_folder(work, recipe, seed)
        found: dict[str, Any] = json.loads((folder / METRICS).read_text())
        rows = logged(folder, "val/psnr")
        return found | {"curve": curve(rows, "val/psnr"), "reconstruction": curve(rows, "val/reconstruction")}

    def training_paths(self, work: Path, folder: Path) -> list[str]:
        """Options of ``fit`` that name the images and the folder of the run."""
        return [f"--data.init_args.root={work / self.images}", f"--trainer.default_root_dir={folder}"]

    def training_step(self, cli: Any) -> Callable[[], None]:
        """A step on a fixed batch."""
        return Step(cli.model, cli.datamodule, cli.trainer.precision_plugin.forward_context)

    def group_of(self, cli: Any) -> int | None:
        """Number of codes of the tokenizer."""
        return int(cli.model.vqgan.quantize.size)

    def plot(self, record: dict[str, Any], path: Path) -> None:
        """Metrics against the number of codes, and PSNR over the steps."""
        plot_sizes(record, self.columns, path)


class Step:
    """A training step on images of a fixed batch: forward, loss, backward, clipping, AdamW.

    Without what all recipes share, such as data and EMA, and without a discriminator.
    """

    def __init__(self, module: VQGANModule, data: Any, autocast: Callable[[], Any]) -> None:
        self.module, self.autocast = module.train(), autocast
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        module.to(device)
        generator = torch.Generator().manual_seed(0)
        side = data.image_size
        self.images = torch.rand(data.batch_size, 3, side, side, generator=generator).to(device) * 2 - 1
        self.optimizer = torch.optim.AdamW(module.vqgan.parameters(), fused=True)

    def __call__(self) -> None:
        """One step."""
        with self.autocast():
            loss, _ = generator_loss(self.module.loss_config, self.images, self.module(self.images), None)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.vqgan.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


DATA = {
    "cifar10": Tokenizer("cifar10", "images", val_share=0.1, count=2000, epochs=6),
    "imagenet64": Tokenizer("imagenet64", "images_tokenizer", val_share=0.4, count=200, epochs=0),
}
