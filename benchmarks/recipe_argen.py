"""Recipes of the autoregressive model in benchmarks/recipes.py: preparation of the data, training, evaluation."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from benchmarks.guidance_sweep import metrics_of, value_of
from benchmarks.recipe_plots import plot_curves
from benchmarks.recipe_runs import (
    Column,
    Preparation,
    Recipe,
    Stage,
    curve,
    logged,
    pack,
    run,
    train_classifier,
)
from lightning_modules import ARGenModule
from lightning_modules.generation_order import generation_orders
from llamagen.files import atomic_file
from llamagen.losses import heads_cross_entropy

ORDER = "'--model.init_args.order={random_until: 0.5, raster_from: 0.75}'"
QK_NORM = "--model.init_args.net.qk_norm=true"
EVALUATION = ("--config", "configs/argen/evaluate.yaml", "--config", "docs/runs/evaluation_cifar10/compiled.yaml")


@dataclass(frozen=True)
class Autoregressive(Stage):
    """Images, their tokenizer and how samples are measured.

    Attributes:
        data: name of the overlay in ``benchmarks/recipe_data``.
        tokenizer: options of the tokenizer's training.
        epochs: epochs of the classifier whose features FID uses; 0 measures no FID, because there are too few
            images of each class to train one.
        per_class: samples of each class for FID.
    """

    data: str
    tokenizer: tuple[str, ...]
    epochs: int
    per_class: int
    base = ("--config", "configs/argen/base.yaml")
    recipes = (
        "paper=",
        f"RAR={ORDER}",
        f"QK-norm={QK_NORM}",
        f"RAR and QK-norm={ORDER} {QK_NORM}",
        "adaptive norms=--model.init_args.net.adaptive_norm=true",
    )
    columns: ClassVar[dict[str, Column]] = {
        "val_loss": Column("validation loss, nats", "min"),
        "gfid": Column("gFID", "min"),
        "val_loss_random_order": Column("in random orders, nats"),
    }

    def preparations(self, images: Path, work: Path, classifier: Path | None) -> list[Preparation]:
        """Pack the images, train the tokenizer, encode the images, train the classifier, compute the reference."""
        packed, codes, tokenizer = work / "images", work / "codes", work / "tokenizer"
        training = [
            *("--config", "configs/vqgan/base.yaml", "--config", "configs/vqgan/small.yaml"),
            *(
                f"--data.init_args.root={packed}",
                "--data.init_args.num_workers=0",
                "--data.init_args.random_crop=false",
            ),
            *("--model.init_args.loss.perceptual_weight=0", "--trainer.max_epochs=-1", *self.tokenizer),
        ]
        checkpoint = tokenizer / "checkpoints/last.ckpt"
        fit = ["main.py", "fit", *training, f"--trainer.default_root_dir={tokenizer}"]
        encode = ["main.py", "predict", *training, "--config", "configs/vqgan/extract.yaml"]
        encode += [f"--ckpt_path={checkpoint}", f"--trainer.default_root_dir={codes}"]
        steps = [
            pack(images, packed, 0.1),
            Preparation("train the tokenizer", checkpoint, fit),
            Preparation("encode the images", codes / "meta.json", encode),
        ]
        if self.epochs:
            features, out = work / "classifier.safetensors", work / "reference.npz"
            reference = ["reference", str(packed), str(out), "--split", "train", "--image_size", "32"]
            reference += ["--features", "Classifier", "--features.weights", str(features)]
            steps += [
                train_classifier(packed, features, self.epochs),
                Preparation("compute the reference", out, ["-m", "evaluation", *reference]),
            ]
        return steps

    def is_prepared(self, work: Path) -> bool:
        """Whether the codes are complete."""
        return (work / "codes/meta.json").is_file()

    def perform(self, recipe: Recipe, work: Path, seed: int, lpips: Path | None) -> None:
        """Train one model, or resume it; then sample from it and measure FID."""
        folder = self.run_folder(work, recipe, seed)
        given = recipe.arguments(self)
        if not (folder / "finished").exists():
            options = [*given, *self.training_paths(work, folder), f"--seed_everything={seed}", "--ckpt_path=last"]
            run(["main.py", "fit", *options], folder.with_suffix(".log"))
            with atomic_file(folder / "finished") as temporary:
                temporary.write_text("")
        if not self.epochs or (folder / "report/metrics.json").exists():
            return
        options = [
            *(*given, *EVALUATION, f"--model.init_args.tokenizer={work / 'tokenizer/checkpoints/last.ckpt'}"),
            *(f"--trainer.default_root_dir={folder}", f"--ckpt_path={folder / 'checkpoints/last.ckpt'}"),
            *(f"--data.init_args.per_class={self.per_class}", "--data.init_args.batch_size=250"),
            f"--trainer.callbacks.reference={work / 'reference.npz'}",
            *(
                "--trainer.callbacks.features=Classifier",
                f"--trainer.callbacks.features.weights={work / 'classifier.safetensors'}",
            ),
        ]
        run(["main.py", "test", *options], folder.with_suffix(".log"))

    def results(self, recipe: Recipe, work: Path, seed: int) -> dict[str, Any]:
        """Validation losses over the steps, and the metrics of the samples."""
        folder = self.run_folder(work, recipe, seed)
        rows = logged(folder, "val/loss")
        losses = curve(rows, "val/loss")
        found: dict[str, Any] = {"val_loss": losses[-1][1], "curve": losses}
        if rows[-1].get("val/loss_random_order"):
            found["val_loss_random_order"] = float(rows[-1]["val/loss_random_order"])
        if (folder / "report/metrics.json").exists():
            metrics = metrics_of(folder / "report")
            found |= {name: value_of(metrics, name) for name in ("gfid", "precision", "recall")}
        return found

    def training_paths(self, work: Path, folder: Path) -> list[str]:
        """Options of ``fit`` that name the codes, the tokenizer and the folder of the run."""
        tokenizer = work / "tokenizer/checkpoints/last.ckpt"
        return [
            *(f"--data.init_args.root={work / 'codes'}", f"--model.init_args.tokenizer={tokenizer}"),
            f"--trainer.default_root_dir={folder}",
        ]

    def training_step(self, cli: Any) -> Callable[[], None]:
        """A step on codes of a fixed batch."""
        return Step(cli.model, cli.datamodule.batch_size)

    def plot(self, record: dict[str, Any], path: Path) -> None:
        """Validation loss over the steps, and final loss and FID of each seed."""
        plot_curves(record, self.columns, "raster order, averaged weights", path)


class Step:
    """A training step on codes of a fixed batch: orders, forward, loss, backward, clipping, AdamW, in bf16.

    Without what all recipes share, such as data and EMA, and without activation checkpointing and compilation.
    """

    def __init__(self, module: ARGenModule, batch_size: int) -> None:
        config = module.gpt.config
        self.module = module.train()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        module.to(self.device)
        self.codes = torch.randint(config.vocab_size, (batch_size, config.block_size), device=self.device)
        self.labels = torch.randint(config.num_classes, (batch_size,), device=self.device)
        self.optimizer = torch.optim.AdamW(module.gpt.parameters(), fused=True)

    def __call__(self) -> None:
        """One step. A random order for half of the examples: the cost does not depend on how many have one."""
        gpt, codes, order, terms = self.module.gpt, self.codes, None, self.module.loss_config
        if self.module.order is not None:
            order = generation_orders(torch.arange(len(codes), device=self.device), 0, 0, 0.5, codes.shape[1])
            codes = codes.gather(1, order)
        with torch.autocast(self.device.type, torch.bfloat16):
            positions = None if order is None else order[:, :-1]
            hidden = gpt.features(codes[:, :-1], self.labels, positions=positions, targets=order)
            heads = gpt.head_terms(hidden.flatten(0, 1), codes.flatten())
            loss, _ = heads_cross_entropy(heads, terms.label_smoothing, terms.z_loss)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


DATA = {
    "cifar10": Autoregressive(
        "cifar10",
        (
            *("--data.init_args.image_size=32", "--data.init_args.batch_size=32", "--trainer.max_steps=900"),
            "--model.init_args.net.channel_multipliers=[1, 2, 2]",
        ),
        epochs=6,
        per_class=250,
    ),
    "imagenet64": Autoregressive(
        "imagenet64", ("--data.init_args.batch_size=16", "--trainer.max_steps=700"), epochs=0, per_class=0
    ),
}
