"""A run that a signal stops ends after a complete step, is requeued, and resumes exactly."""

import os
import signal
import stat
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks import EMA, Requeue
from tests.lightning_modules.runs import argen_module, state_of, train
from tests.pipeline import Pipeline
from tests.ranks import run_on_ranks


class Kill(pl.Callback):
    """Sends the signal during a training step."""

    def __init__(self, batch: int, rank: int = 0) -> None:
        self.batch, self.rank = batch, rank

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch and trainer.global_rank == self.rank:
            os.kill(os.getpid(), signal.SIGUSR1)


def run(pipeline: Pipeline, folder: Path, *more: pl.Callback, module: Any = None, **options: Any) -> pl.Trainer:
    """Train, and save at the end of an epoch and of the run."""
    saving = ModelCheckpoint(folder / "checkpoints", save_last=True, save_on_train_epoch_end=True)
    return train(module or argen_module(), pipeline, folder, callbacks=[EMA(0.9), saving, *more], **options)


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stub of SLURM's command that records its arguments."""
    command = tmp_path / "bin/scontrol"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path / "calls"}\n')
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    return tmp_path / "calls"


def test_a_stopped_run_resumes_to_the_same_weights(
    pipeline: Pipeline, tmp_path: Path, scontrol: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "max_epochs": 2}
    alone = argen_module()
    wanted = state_of(alone, run(pipeline, tmp_path / "alone", module=alone, **options))
    trainer = run(pipeline, tmp_path / "run", Requeue(), Kill(2), **options)
    assert trainer.global_step == 2  # batches 0, 1, 2 and, to complete its step, 3
    assert scontrol.read_text() == "requeue 4711\n"
    second = argen_module()
    last = tmp_path / "run/checkpoints/last.ckpt"
    found = state_of(second, run(pipeline, tmp_path / "run", Requeue(), module=second, ckpt_path=last, **options))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())
    assert scontrol.read_text() == "requeue 4711\n"


def test_no_validation_runs_before_the_checkpoint_is_saved(pipeline: Pipeline, tmp_path: Path) -> None:
    validated: list[int] = []

    class Watch(pl.Callback):
        def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            validated.append(trainer.global_step)

    best = ModelCheckpoint(tmp_path / "best", monitor="val/loss", save_on_train_epoch_end=True)
    trainer = run(pipeline, tmp_path / "run", Requeue(), Kill(4), Watch(), best, max_epochs=1, val_check_interval=3)
    assert validated == [3]
    assert trainer.limit_val_batches == 1
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 5


def test_requeues_a_task_of_a_job_array(
    pipeline: Pipeline, tmp_path: Path, scontrol: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("SLURM_JOB_ID", "4713"), ("SLURM_ARRAY_JOB_ID", "4711"), ("SLURM_ARRAY_TASK_ID", "2")):
        monkeypatch.setenv(name, value)
    run(pipeline, tmp_path / "run", Requeue(), Kill(0), max_epochs=1)
    assert scontrol.read_text() == "requeue 4711_2\n"


def test_without_slurm_the_run_ends_and_the_handler_is_restored(
    pipeline: Pipeline, tmp_path: Path, scontrol: Path
) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    trainer = run(pipeline, tmp_path / "run", Requeue(), Kill(4), max_epochs=1)
    assert trainer.global_step == 5
    assert (tmp_path / "run/checkpoints/last.ckpt").exists()
    assert signal.getsignal(signal.SIGUSR1) == before
    assert not scontrol.exists()


def test_warns_if_requeueing_fails(pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.warns(UserWarning, match="job 4711 could not be put back"):
        run(pipeline, tmp_path / "run", Requeue(), Kill(0), max_epochs=1)


def stopped_by_second_rank(rank: int, pipeline: Pipeline, folder: Path) -> torch.Tensor:
    """Train on two ranks; the number of optimizer steps of this rank."""
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0")  # ranks that Lightning need not start
    trainer = run(
        pipeline, folder, Requeue(), Kill(1, rank=1), max_epochs=1, devices=2, strategy="ddp",
        batch_size=100, use_distributed_sampler=False,
    )  # fmt: skip
    return torch.tensor(trainer.global_step)


def test_a_signal_to_one_rank_stops_all_ranks_at_the_same_step(pipeline: Pipeline, tmp_path: Path) -> None:
    steps = run_on_ranks(stopped_by_second_rank, tmp_path, pipeline, tmp_path)
    assert [int(step) for step in steps] == [2, 2]


def test_rejects_a_run_that_would_not_be_saved(pipeline: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"add LastCheckpoint to trainer.callbacks"):
        train(argen_module(), pipeline, tmp_path, Requeue(), max_epochs=1)


def test_rejects_an_unknown_signal() -> None:
    with pytest.raises(ValueError, match="signal is 'SIGSTOPP'; it must be the name of a signal"):
        Requeue("SIGSTOPP")
