"""SIGTERM and SIGINT end a run after a complete step and a checkpoint; a second signal ends it at once."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import main
from callbacks import EMA, StopOnSignal
from tests.lightning_modules.runs import argen_module, state_of, train
from tests.pipeline import Pipeline
from tests.ranks import ended, main_ended


class Signal(pl.Callback):
    """Sends a signal in a hook, a given number of times."""

    def __init__(self, hook: str, number: int, batch: int = 0, times: int = 1, rank: int = 0) -> None:
        self.number, self.batch, self.times, self.rank = number, batch, times, rank
        setattr(self, hook, self._send)

    def _send(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any, **kwargs: Any) -> None:
        if trainer.global_rank == self.rank and (len(args) < 2 or args[-1] == self.batch):
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


def run(pipeline: Pipeline, folder: Path, *more: pl.Callback, module: Any = None, **options: Any) -> pl.Trainer:
    saving = ModelCheckpoint(folder / "checkpoints", save_last=True, save_on_train_epoch_end=True)
    return train(module or argen_module(), pipeline, folder, callbacks=[EMA(0.9), saving, *more], **options)


def test_a_stopped_run_resumes_to_the_same_weights(pipeline: Pipeline, tmp_path: Path) -> None:
    before, alone, second = handlers(), argen_module(), argen_module()
    wanted = state_of(alone, run(pipeline, tmp_path / "alone", module=alone, max_epochs=2))
    for number in (signal.SIGTERM, signal.SIGINT):
        stop, sending = StopOnSignal(), Signal("on_train_batch_start", number, batch=2)
        trainer = run(pipeline, tmp_path / str(number), stop, sending, max_epochs=2)
        assert (trainer.global_step, stop.received) == (3, number)
        assert handlers() == before
    # Which signal it was makes no difference for the checkpoint.
    last = tmp_path / str(signal.SIGTERM) / "checkpoints/last.ckpt"
    found = state_of(second, run(pipeline, last.parents[1], module=second, ckpt_path=last, max_epochs=2))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())


def test_a_running_validation_is_finished_and_the_epoch_saved(pipeline: Pipeline, tmp_path: Path) -> None:
    stop, sending = StopOnSignal(), Signal("on_validation_epoch_start", signal.SIGTERM)
    trainer = run(pipeline, tmp_path / "run", stop, sending, max_epochs=3)
    assert (trainer.global_step, trainer.current_epoch, stop.received) == (8, 1, signal.SIGTERM)
    assert "val/loss" in trainer.callback_metrics
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 8


def test_saves_a_checkpoint_if_no_other_callback_does(pipeline: Pipeline, tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=100)
    sending = Signal("on_train_batch_start", signal.SIGTERM, batch=2)
    train(argen_module(), pipeline, tmp_path, callbacks=[saving, StopOnSignal(), sending], max_epochs=2)
    checkpoint = torch.load(tmp_path / "checkpoints/stopped_0000003.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 3


@pytest.mark.parametrize(
    ("hook", "times", "number", "error", "code"),
    [
        ("on_train_batch_start", 2, signal.SIGTERM, SystemExit, 143),
        ("on_sanity_check_start", 1, signal.SIGTERM, SystemExit, 143),
        ("on_sanity_check_start", 1, signal.SIGINT, SystemExit, 1),  # Lightning's, after KeyboardInterrupt
    ],
)
def test_a_second_signal_or_one_before_training_ends_the_run_at_once(
    hook: str, times: int, number: int, error: type[BaseException], code: int, pipeline: Pipeline, tmp_path: Path
) -> None:
    before, stop = handlers(), StopOnSignal()
    with pytest.raises(error) as caught:
        run(pipeline, tmp_path, stop, Signal(hook, number, times=times), max_epochs=2, num_sanity_val_steps=1)
    assert caught.value.code == code  # type: ignore[attr-defined]
    assert code != 1 or isinstance(caught.value.__context__, KeyboardInterrupt)
    assert not (tmp_path / "checkpoints").exists()
    signal.raise_signal(signal.SIGCONT)  # runs any handler that Lightning has restored
    assert [handler for handler in handlers() if handler != stop._handle] == [
        handler for handler, now in zip(before, handlers(), strict=True) if now != stop._handle
    ]
    for each, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
        signal.signal(each, handler)


def sends_sigterm(hook: str, rank: int = 0) -> list[str]:
    """Arguments that add :class:`Signal` to a command."""
    return [
        *("--trainer.callbacks+=tests.callbacks.test_stopping.Signal", f"--trainer.callbacks.hook={hook}"),
        *(f"--trainer.callbacks.number={int(signal.SIGTERM)}", f"--trainer.callbacks.rank={rank}"),
    ]


def test_sigterm_sets_the_exit_code_and_leaves_no_archive(pipeline: Pipeline, tmp_path: Path) -> None:
    data = f"--data.init_args.root={pipeline.codes}"
    fit = ["fit", *pipeline.argen_arguments(tmp_path / "run"), data]
    done = main_ended([*fit, *sends_sigterm("on_train_batch_start")])
    assert done.returncode == 143, done.stderr[-2000:]
    assert "SIGTERM: saving at the end of this step" in done.stderr
    assert "Traceback" not in done.stderr
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 1
    sample = [*pipeline.sample_arguments(tmp_path / "samples"), f"--ckpt_path={pipeline.argen}"]
    done = main_ended([*sample, *sends_sigterm("on_predict_batch_start")])
    assert done.returncode == 143, done.stderr[-2000:]
    assert not (tmp_path / "samples/samples.npz").exists()
    main.main(sample)  # the same command resumes
    assert (tmp_path / "samples/samples.npz").exists()


@pytest.mark.slow
def test_two_ranks_end_with_the_exit_code_of_the_signal(pipeline: Pipeline, tmp_path: Path) -> None:
    arguments = [*pipeline.argen_arguments(tmp_path / "run"), f"--data.init_args.root={pipeline.codes}"]
    more = ["--trainer.devices=2", "--trainer.strategy=ddp", *sends_sigterm("on_train_batch_start", rank=1)]
    done = ended([sys.executable, "main.py", "fit", *arguments, *more])  # ranks that Lightning starts
    assert done.returncode == 143, done.stderr[-2000:]
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 1
