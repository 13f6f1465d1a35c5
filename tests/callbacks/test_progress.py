"""The progress bar of sampling."""

import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from tqdm import tqdm

import main
from callbacks import EMA, ImageWriter, SamplingProgress, progress
from datamodules import ClassRequestDataModule
from tests.lightning_modules.runs import argen_module
from tests.pipeline import Pipeline
from tests.ranks import succeeds, two_processes


def command(pipeline: Pipeline, folder: Path, *more: str) -> list[str]:
    """Sample 30 images in batches of 7, with a progress bar."""
    arguments = [item for item in pipeline.sample_arguments(folder) if "enable_progress_bar" not in item]
    return [*arguments, f"--ckpt_path={pipeline.argen}", *more]


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The bars that were shown; their clocks are fixed at two seconds after the start."""
    made: list[Any] = []

    class Recorded(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)
            self.seen: list[int] = []

        def update(self, n: float | None = 1) -> bool | None:
            result = super().update(n)
            self.seen.append(int(self.n))
            return result

        @property
        def format_dict(self) -> Any:
            return {**super().format_dict, "elapsed": 2.0}

    monkeypatch.setattr(progress, "tqdm", Recorded)
    return made


def test_shows_images_speed_and_remaining_time(
    pipeline: Pipeline, tmp_path: Path, bars: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    main.main(command(pipeline, tmp_path, "--trainer.limit_predict_batches=2"))
    (bar,) = bars
    assert bar.seen == [7, 14, 14]
    assert "14/30 [00:02<00:02,  7.00 images/s]" in str(bar)
    shown = capsys.readouterr()
    assert "sampling" in shown.err
    assert "Predicting" not in shown.out + shown.err  # Lightning's


def sample(pipeline: Pipeline, folder: Path, per_class: int = 3, **options: Any) -> pl.Trainer:
    """Do the same as :func:`command`, without the command line."""
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
        default_root_dir=folder, callbacks=[EMA(), ImageWriter(), SamplingProgress()], **options,
    )  # fmt: skip
    module, requests = argen_module(tokenizer=pipeline.tokenizer), ClassRequestDataModule(10, per_class, batch_size=7)
    trainer.predict(module, requests, ckpt_path=pipeline.argen, return_predictions=False)
    return trainer


def test_a_resumed_run_counts_all_images_and_measures_its_own_speed(
    pipeline: Pipeline, tmp_path: Path, bars: list[Any]
) -> None:
    sample(pipeline, tmp_path, limit_predict_batches=2)
    sample(pipeline, tmp_path)
    bar = bars[1]
    assert (bar.initial, bar.total) == (14, 30)
    assert bar.seen == [21, 28, 30, 30]
    assert "30/30 [00:02<00:00,  8.00 images/s]" in str(bar)


def test_shows_nothing_if_progress_bars_are_disabled(
    pipeline: Pipeline, tmp_path: Path, bars: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    sample(pipeline, tmp_path, enable_progress_bar=False)
    assert all(bar.disable for bar in bars)
    shown = capsys.readouterr()
    assert "images/s" not in shown.out + shown.err
    assert "image/s" not in shown.out + shown.err
    assert (tmp_path / "samples.npz").exists()


def test_enables_lightnings_bar_again(pipeline: Pipeline, tmp_path: Path) -> None:
    trainer = sample(pipeline, tmp_path, per_class=1)
    assert trainer.progress_bar_callback is not None
    assert trainer.progress_bar_callback.is_enabled


def test_the_bar_of_two_processes_counts_the_images_of_both(pipeline: Pipeline, tmp_path: Path) -> None:
    done = two_processes(command(pipeline, tmp_path, "--data.init_args.batch_size=4"))
    succeeds(done)
    counts = [int(count) for count in re.findall(r"sampling:.*?(\d+)/30 \[", done.stderr)]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, 30)
    assert "Predicting" not in done.stdout + done.stderr
