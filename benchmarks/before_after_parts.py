"""The workloads of ``benchmarks/before_after.py``, for any checkout: they use only names that do not change.

    PYTHONPATH=CHECKOUT python -P benchmarks/before_after_parts.py IMAGES [PART …]

Prints one line of JSON: the path of the package that was imported, and the seconds of each repetition of each part.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

import llamagen
from callbacks import EMA
from datamodules import ImageDataModule
from lightning_modules import AdamWConfig, ARGenModule, VQGANLossConfig, VQGANModule
from llamagen.models.gpt import GPT, GPTConfig
from llamagen.models.vqgan import VQGANConfig
from llamagen.sampling import Sampler, SamplingConfig

BATCH = 4


def timed(run: Callable[[], Any], repeats: int, warm_up: int = 1) -> list[float]:
    """Seconds of each repetition. Warm-up repetitions are not counted."""
    times = []
    for _ in range(warm_up + repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times[warm_up:]


class StepTimes(pl.Callback):
    """Seconds of each training step."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._start = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        """Start."""
        self._start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop."""
        self.times.append(time.perf_counter() - self._start)


def train(module: pl.LightningModule, batch: dict[str, torch.Tensor], steps: int, warm_up: int = 3) -> list[float]:
    """Seconds of each training step with EMA and clipping in bfloat16. Warm-up steps are not counted."""
    watch, batches = StepTimes(), [batch] * (warm_up + steps)
    trainer = pl.Trainer(
        accelerator="cpu",
        precision="bf16-mixed",
        max_epochs=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[EMA(), watch],
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return watch.times[warm_up:]


def sample(compiled: bool, codes: int, repeats: int) -> list[float]:
    """Seconds that GPT-B with random weights takes to generate the codes of a guided batch."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(dim=768, n_layer=12, n_head=12, block_size=codes)).to(torch.bfloat16).eval()
    sampler, config = Sampler(gpt, BATCH, compiled=compiled), SamplingConfig(guidance_scale=4.0, top_k=2000)
    sampler.prepare(config)
    labels = torch.arange(BATCH)
    return timed(lambda: sampler(labels, config), repeats)


def train_gpt() -> list[float]:
    """Seconds of a training step of a GPT of 8 layers and width 512 on 8 × 64 codes."""
    torch.manual_seed(0)
    net = GPTConfig(dim=512, n_layer=8, n_head=8, vocab_size=4096, block_size=64)
    batch = {"codes": torch.randint(4096, (8, 64)), "condition": torch.randint(1000, (8,))}
    return train(ARGenModule(net, AdamWConfig()), batch, steps=15)


def train_tokenizer() -> list[float]:
    """Seconds of a training step of VQ-16 without LPIPS on images of 64 × 64 pixels."""
    torch.manual_seed(0)
    module = VQGANModule(VQGANConfig(), loss=VQGANLossConfig(perceptual_weight=0, adversarial_start=0))
    return train(module, {"images": torch.randn(BATCH, 3, 64, 64).tanh()}, steps=10)


def load_images(folder: str) -> list[float]:
    """Seconds of an epoch of training images of 128 × 128 pixels from a folder, in this process."""
    data = ImageDataModule(folder, 128, 16, num_workers=0)
    data.setup("fit")
    loader = data.train_dataloader()
    return timed(lambda: sum(len(batch["images"]) for batch in loader), repeats=5)


def main() -> None:
    folder, *chosen = sys.argv[1:]
    parts: dict[str, Callable[[], list[float]]] = {
        "sampling, compiled": lambda: sample(compiled=True, codes=64, repeats=5),
        "sampling, eager": lambda: sample(compiled=False, codes=16, repeats=4),
        "autoregressive training step": train_gpt,
        "tokenizer training step": train_tokenizer,
        "image loading, an epoch": lambda: load_images(folder),
    }
    times = {name: part() for name, part in parts.items() if not chosen or name in chosen}
    print(json.dumps({"package": llamagen.__file__, "seconds": times}))


if __name__ == "__main__":
    main()
