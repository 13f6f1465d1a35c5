"""A run that is told to stop ends at a whole step, is put back into the queue, and goes on as if nothing had been."""

import os
import signal
import stat
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from callbacks import Requeue
from tests.lightning_modules.runs import argen_module, state_of, train
from tests.pipeline import Pipeline
from tests.ranks import ended, succeeds


class Kill(pl.Callback):
    """Sends the signal while a batch is being worked on."""

    def __init__(self, batch: int, rank: int = 0) -> None:
        self.batch, self.rank = batch, rank

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch and trainer.global_rank == self.rank:
            os.kill(os.getpid(), signal.SIGUSR1)


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A SLURM that writes down what it is told."""
    command = tmp_path / "bin/scontrol"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path / "told"}\n')
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    return tmp_path / "told"


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_stopped_run_goes_on_to_the_same_weights(
    accumulate: int, pipeline: Pipeline, tmp_path: Path, scontrol: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate, "max_epochs": 2}
    alone = argen_module()
    wanted = state_of(alone, train(alone, pipeline, tmp_path / "alone", **options))
    first = argen_module()
    trainer = train(first, pipeline, tmp_path / "run", Requeue(), Kill(2), **options)
    assert trainer.global_step == (3 if accumulate == 1 else 2)  # batches 0, 1, 2 and, to complete its step, 3
    assert scontrol.read_text() == "requeue 4711\n"
    second = argen_module()
    last = tmp_path / "run/checkpoints/last.ckpt"
    found = state_of(second, train(second, pipeline, tmp_path / "run", Requeue(), ckpt_path=last, **options))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())
    assert scontrol.read_text() == "requeue 4711\n"


def test_a_task_of_an_array_is_put_back_by_its_number(
    pipeline: Pipeline, tmp_path: Path, scontrol: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("SLURM_JOB_ID", "4713"), ("SLURM_ARRAY_JOB_ID", "4711"), ("SLURM_ARRAY_TASK_ID", "2")):
        monkeypatch.setenv(name, value)
    train(argen_module(), pipeline, tmp_path / "run", Requeue(), Kill(0), max_epochs=1)
    assert scontrol.read_text() == "requeue 4711_2\n"


def test_without_slurm_a_run_ends_and_the_signal_means_again_what_it_meant(
    pipeline: Pipeline, tmp_path: Path, scontrol: Path
) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    trainer = train(argen_module(), pipeline, tmp_path / "run", Requeue(), Kill(4), max_epochs=1)
    assert trainer.global_step == 5
    assert (tmp_path / "run/checkpoints/last.ckpt").exists()
    assert signal.getsignal(signal.SIGUSR1) == before
    assert not scontrol.exists()


def test_a_queue_that_does_not_answer_is_a_warning(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.warns(UserWarning, match="job 4711 could not be put back"):
        train(argen_module(), pipeline, tmp_path / "run", Requeue(), Kill(0), max_epochs=1)


SCRIPT = """
from pathlib import Path
from callbacks import Requeue
from tests.callbacks.test_requeue import Kill
from tests.lightning_modules.runs import argen_module, train
from tests.pipeline import Pipeline

folder = Path({folder!r})
pipeline = Pipeline(Path({pipeline!r}))
trainer = train(
    argen_module(), pipeline, folder, Requeue(), Kill(1, rank=1), max_epochs=1, devices=2, strategy="ddp",
    batch_size=100, use_distributed_sampler=False,
)
(folder / f"rank{{trainer.global_rank}}").write_text(str(trainer.global_step))
"""


def test_a_signal_to_one_rank_stops_all_at_the_same_step(pipeline: Pipeline, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(folder=str(tmp_path), pipeline=str(pipeline.root)))
    succeeds(ended(["env", f"PYTHONPATH={Path.cwd()}", sys.executable, str(script)]))
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(2)] == ["2", "2"]


def test_a_signal_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="signal is 'SIGSTOPP'; it must be the name of a signal"):
        Requeue("SIGSTOPP")
