"""Small modules and trainings with the Trainer, for tests without the command line."""

from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from callbacks import EMA
from datamodules import CodeDataModule, DigitsDataModule
from lightning_modules import AdamWConfig, ARGenModule, VQGANLossConfig, VQGANModule
from lightning_modules.base import GenerativeModule
from llamagen.models.discriminator import PatchGAN
from llamagen.models.gpt import GPTConfig
from llamagen.models.vqgan import VQGANConfig
from tests.pipeline import GPT_NET, TOKENIZER_NET, Pipeline

State = dict[str, Tensor]

EXAMPLES, BATCH = 60, 8
"""Training examples and batch size: 8 batches per epoch, the last one smaller."""


def vqgan_module(seed: int = 0, options: dict[str, Any] | None = None, **loss: Any) -> VQGANModule:
    """A tokenizer with a discriminator that starts at step 3, without LPIPS; a function of the seed."""
    pl.seed_everything(seed, verbose=False)
    return VQGANModule(
        **{
            "net": VQGANConfig(**TOKENIZER_NET, dropout=0.1),
            "loss": VQGANLossConfig(**{"adversarial_start": 3, "perceptual_weight": 0.0, **loss}),
            "discriminator": PatchGAN(channels=8, num_layers=1),
            "optimizer": AdamWConfig(lr=1e-3, weight_decay=0.1, warmup_steps=4),
            **(options or {}),
        },
    )


def argen_module(seed: int = 0, tokenizer: Path | None = None, **net: Any) -> ARGenModule:
    """A GPT with all dropouts; a function of the seed."""
    pl.seed_everything(seed, verbose=False)
    return ARGenModule(GPTConfig(**{**GPT_NET, "drop_path": 0.1, **net}), AdamWConfig(lr=1e-3), tokenizer=tokenizer)


def datamodule_for(
    module: pl.LightningModule, pipeline: Pipeline, batch_size: int = 200, image_size: int = 8
) -> pl.LightningDataModule:
    """All digits for a tokenizer, all codes for a GPT."""
    if isinstance(module, VQGANModule):
        return DigitsDataModule(pipeline.digits, image_size=image_size, batch_size=batch_size)
    return CodeDataModule(pipeline.codes, batch_size=batch_size, num_workers=0)


def few_examples(module: pl.LightningModule, pipeline: Pipeline, image_size: int = 8) -> pl.LightningDataModule:
    """The same data with few training examples: 8 batches per epoch, the last one smaller."""
    data: Any = datamodule_for(module, pipeline, BATCH, image_size)
    whole = data.read_index
    data.read_index = lambda split: whole(split).select(np.arange(EXAMPLES)) if split == "train" else whole(split)
    return cast(pl.LightningDataModule, data)


def train(
    module: GenerativeModule,
    pipeline: Pipeline,
    folder: Path,
    *callbacks: pl.Callback,
    ckpt_path: Path | None = None,
    **options: Any,
) -> pl.Trainer:
    """Fit in one CPU process with EMA and a checkpoint every ``every`` steps, without output.

    ``options`` are those of the trainer, and ``batch_size`` and ``image_size`` of the data. Without ``batch_size`` an
    epoch has 8 small batches.
    """
    every = options.pop("every", None)
    data = {name: options.pop(name) for name in ("batch_size", "image_size") if name in options}
    checkpoint = ModelCheckpoint(folder / "checkpoints", save_last=True, every_n_train_steps=every)
    trainer = pl.Trainer(
        **{
            "accelerator": "cpu",
            "default_root_dir": folder,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "limit_val_batches": 1,
            "gradient_clip_val": 1.0,
            "callbacks": [EMA(0.9), checkpoint, *callbacks],
            **options,
        }
    )
    datamodule = (datamodule_for if "batch_size" in data else few_examples)(module, pipeline, **data)
    trainer.fit(module, datamodule, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def state_of(module: GenerativeModule, trainer: pl.Trainer) -> dict[str, Tensor]:
    """Weights, buffers, moments and averages after a run."""
    state = {name: value.clone() for name, value in module.state_dict().items()}
    for index, entries in trainer.optimizers[0].state_dict()["state"].items():
        state |= {f"{index}/{name}": torch.as_tensor(value).clone() for name, value in entries.items()}
    return state


def assert_moved_alike(start: State, one: State, other: State, tolerance: float = 1e-3) -> None:
    """Assert that two trainings from the same start agree, up to a fraction of the distance to the start.

    For networks without dropout and with at least two channels per group of the norms: with one channel, the loss does
    not depend on a bias before the norm, and its gradient is rounding.
    """
    assert start.keys() == one.keys() == other.keys()
    different = []
    for name, value in one.items():
        # Attention does not depend on the bias of its keys: its gradient is rounding, which Adam scales up to steps.
        if name.endswith(".k.bias"):
            continue
        distance = (value.float() - start[name].float()).norm()
        if (value.float() - other[name].float()).norm() > tolerance * distance + 1e-6:
            different.append(name)
    assert different == [], different


def evaluator(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """A trainer in one CPU process without files and output."""
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=list(callbacks),
        **options,
    )
