"""The small training run that :mod:`benchmarks.kills` stops: its images, its configuration and its process."""

import os
import resource
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import yaml
from PIL import Image

import main as command_line
from llamagen.command import run_command
from llamagen.files import atomic_file

EVERY = 4
"""Steps from one checkpoint to the next."""
STEPS = 60
PATIENCE = 300.0
"""Seconds after which a process counts as hanging."""


class ReportSteps(pl.Callback):
    """Report to a pipe the step from which a run resumes, and each finished step.

    Args:
        pipe: file descriptor of the pipe.
    """

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report the step from which the run resumes."""
        os.write(self.pipe, f"resumed {trainer.global_step}\n".encode())

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Report a finished step."""
        os.write(self.pipe, f"step {trainer.global_step}\n".encode())


def make_images(folder: Path) -> None:
    """Write four classes of ten images of 20 × 20 pixels."""
    numbers = np.random.default_rng(0)
    for label in range(4):
        (folder / f"class{label}").mkdir(parents=True, exist_ok=True)
        for index in range(10):
            coarse = Image.fromarray(numbers.integers(0, 256, (5, 5, 3), dtype=np.uint8))
            with atomic_file(folder / f"class{label}/{index}.png") as temporary:
                coarse.resize((20, 20), Image.Resampling.BICUBIC).save(temporary, format="png")


def write_config(path: Path) -> None:
    """Write the overlay that is trained on top of the base recipe."""
    saving = {
        "dirpath": "${trainer.default_root_dir}/checkpoints",
        "filename": "step_{step:07d}",
        "auto_insert_metric_name": False,
        "save_last": True,
        "every_n_train_steps": EVERY,
    }
    callbacks = [
        {"class_path": "EMA", "init_args": {"decay": 0.9}},
        {"class_path": "ModelCheckpoint", "init_args": saving},
        {"class_path": "ReconstructionGrid"},
        {"class_path": "LearningCurves"},
    ]
    silent = {"enable_progress_bar": False, "enable_model_summary": False}
    net = {"channels": 32, "channel_multipliers": [1, 2], "num_res_blocks": 1, "z_channels": 32, "codebook_size": 64}
    content = {
        "trainer": {
            **{"accelerator": "cpu", "precision": "32-true", "max_steps": STEPS, "max_epochs": -1},
            **{"log_every_n_steps": 1, "callbacks": callbacks, **silent},
        },
        "model": {
            "init_args": {
                "net": net,
                "loss": {"perceptual_weight": 0, "adversarial_start": 20},
                "discriminator": {"init_args": {"channels": 16, "num_layers": 1}},
                "channels_last": False,
            }
        },
        "data": {"init_args": {"image_size": 16, "batch_size": 4, "num_workers": 0}},
    }
    with atomic_file(path) as temporary:
        temporary.write_text(yaml.safe_dump(content))


class Run:
    """A training process, started with the same command each time.

    Args:
        work: folder with the images, the configuration and the log.
        folder: folder of the run.
        limit: largest size of a file in bytes; None for no limit.
    """

    def __init__(self, work: Path, folder: Path, limit: int | None = None) -> None:
        self.folder, self.log = folder, work / "log.txt"
        self.resumed, self.step = -1, -1
        self.started = time.monotonic()
        reading, writing = os.pipe()
        arguments = [
            *("fit", "--config", "configs/vqgan/base.yaml", "--config", str(work / "kills.yaml")),
            f"--data.init_args.root={work / 'images'}",
            f"--trainer.default_root_dir={folder}",
            f"--trainer.callbacks+={{class_path: benchmarks.kills_run.ReportSteps, init_args: {{pipe: {writing}}}}}",
            "--ckpt_path=last",
        ]
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reading)
            os._exit(_train(arguments, self.log, limit))
        os.close(writing)
        os.set_blocking(reading, False)
        self._pipe, self._text = reading, ""
        self.status: int | None = None

    def poll(self) -> bool:
        """Read what the process reported. Returns whether it still runs."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        with suppress(BlockingIOError):
            while part := os.read(self._pipe, 65536):
                self._text += part.decode()
        *lines, self._text = self._text.split("\n")
        for line in lines:
            kind, number = line.split()
            self.step = int(number)
            if kind == "resumed":
                self.resumed = int(number)
        return self.status is None

    def wait(self) -> int:
        """Wait for the end of the process. Returns its exit code."""
        while self.poll():
            time.sleep(0.01)
            if time.monotonic() - self.started > PATIENCE:
                os.kill(self.pid, signal.SIGKILL)
        os.close(self._pipe)
        assert self.status is not None
        return self.status

    def kill(self) -> float:
        """Kill the process. Returns the seconds since its start."""
        moment = time.monotonic() - self.started
        os.kill(self.pid, signal.SIGKILL)
        self.wait()
        return round(moment, 3)

    def saved_bytes(self) -> int:
        """Bytes written so far of the checkpoint that is being saved; −1 if none is."""
        with suppress(FileNotFoundError):
            for entry in os.scandir(self.folder / "checkpoints"):
                if f"-{self.pid}-" in entry.name and entry.name.endswith(".tmp"):
                    return entry.stat().st_size
        return -1


def _train(arguments: list[str], log: Path, limit: int | None) -> int:
    """Run the command in the child process. Returns the exit code that the command line would have."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        run_command(lambda: command_line.main(arguments))
    except SystemExit as end:
        return int(end.code or 0)
    return 0
