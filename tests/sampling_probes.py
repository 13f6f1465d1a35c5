"""Callbacks that record the codes of a sampling command, or kill it. Tests add them on its command line."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np


class KeepCodes(pl.Callback):
    """Write the codes of each image into a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *place: int
    ) -> None:
        self.folder.mkdir(exist_ok=True)
        for index, codes in zip(outputs["index"].tolist(), outputs["codes"].numpy(), strict=True):
            np.save(self.folder / f"{index}.npy", codes)


class PullThePlug(pl.Callback):
    """Kill all processes of the command when ``rank`` has reached ``batch`` and an image exists."""

    def __init__(self, rank: int, batch: int) -> None:
        self.rank, self.batch = rank, batch

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, *place: int
    ) -> None:
        if trainer.global_rank == self.rank and batch_idx >= self.batch:
            end = time.monotonic() + 60
            # Threads write the images. A fast model has sampled all of them before the first one is written.
            while not any(Path(trainer.default_root_dir).glob("images/*/*.png")) and time.monotonic() < end:
                os.sched_yield()
            os.killpg(0, signal.SIGKILL)


def with_probe(probe: type[pl.Callback], **options: Any) -> str:
    """The argument that adds a probe to a command."""
    values = ", ".join(f"{name}: {value}" for name, value in options.items())
    return f"--trainer.callbacks+={{class_path: {probe.__module__}.{probe.__name__}, init_args: {{{values}}}}}"
