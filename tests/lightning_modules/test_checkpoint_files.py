"""Checkpoints and metrics.csv with a full disk or a killed process; files replace folders and the reverse."""

import csv
import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lightning_modules import CheckpointFiles, ShardedStrategy, resolve_checkpoint, use_metrics_logger
from lightning_modules.checkpoint_files import local_path, tensor_bytes
from lightning_modules.metrics_file import MetricsLogger
from llamagen.checkpoints.contents import read_checkpoint
from llamagen.full_disk import DiskFullError
from tests.lightning_modules.runs import argen_module, train
from tests.lightning_modules.test_latest_checkpoint import checkpoint
from tests.pipeline import Pipeline


@pytest.fixture
def limit_file_size() -> Iterator[Any]:
    """Sets a limit for the size of files, which acts like a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, before)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("writer", [CheckpointFiles, ShardedStrategy], ids=["one file", "sharded"])
def test_a_full_disk_is_a_one_line_error_and_keeps_the_previous_checkpoint(
    writer: Any, tmp_path: Path, limit_file_size: Any
) -> None:
    path = tmp_path / "last.ckpt"
    writer().save_checkpoint(checkpoint(10), path)
    limit_file_size(10_000)
    with pytest.raises(DiskFullError) as error:
        writer().save_checkpoint(checkpoint(20), path)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"{path} was not written: ")
    assert "it needs 20,036 bytes" in str(error.value)
    assert names(tmp_path) == ["last.ckpt"]
    limit_file_size(-1)
    assert read_checkpoint(path)["global_step"] == 10
    writer().save_checkpoint(checkpoint(20), path)
    assert read_checkpoint(path)["global_step"] == 20


def test_a_checkpoint_is_streamed_into_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, places = torch.save, list[str]()

    def note(content: Any, file: Any, *more: Any) -> None:
        places.append(os.path.dirname(file.name))
        save(content, file, *more)

    monkeypatch.setattr(torch, "save", note)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    for address in (tmp_path / "a/last.ckpt", f"file://{tmp_path}/b/last.ckpt"):
        CheckpointFiles().save_checkpoint(checkpoint(10), address)
        assert CheckpointFiles().load_checkpoint(address)["global_step"] == 10
        assert names(local_path(address).parent) == ["last.ckpt"]
        CheckpointFiles().remove_checkpoint(address)
        assert names(local_path(address).parent) == []
    assert places == [str(tmp_path / "a"), str(tmp_path / "b")]


def test_remote_addresses_are_left_to_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []
    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", lambda self, content, path, options: said.append(path))
    monkeypatch.setattr(TorchCheckpointIO, "remove_checkpoint", lambda self, path: said.append(path))
    CheckpointFiles().save_checkpoint({}, "s3://bucket/last.ckpt")
    CheckpointFiles().remove_checkpoint("s3://bucket/last.ckpt")
    assert said == ["s3://bucket/last.ckpt"] * 2


def test_a_file_replaces_a_sharded_checkpoint_and_the_reverse(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    sharded, one_file = ShardedStrategy(), ShardedStrategy(save_distributed_checkpoint=False)
    for step, strategy in enumerate((sharded, one_file, sharded)):
        strategy.save_checkpoint(checkpoint(step), path)
        assert path.is_dir() is (strategy is sharded)
        assert read_checkpoint(path)["global_step"] == step
        assert names(tmp_path) == ["last.ckpt"]
    other = tmp_path / "mine"
    other.mkdir()
    with pytest.raises(IsADirectoryError):
        one_file.save_checkpoint(checkpoint(1), other)
    assert other.is_dir()


def test_tensor_bytes_counts_each_storage_once() -> None:
    shared = torch.zeros(100)
    content = {"a": shared, "b": [shared[:10], (torch.zeros(5, dtype=torch.int64), "text", 3)]}
    assert tensor_bytes(content) == 400 + 40


def test_a_run_with_a_full_disk_keeps_its_checkpoints_and_can_be_resumed(
    pipeline: Pipeline, tmp_path: Path, limit_file_size: Any
) -> None:
    """Lightning removes the previous best only after the new one is written."""
    from lightning.pytorch.plugins.environments import LightningEnvironment

    class Fill(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
            if trainer.global_step == 3:
                limit_file_size(20_000)

    options: dict[str, Any] = {"every": 2, "plugins": [CheckpointFiles(), LightningEnvironment()]}
    with pytest.raises(DiskFullError) as error:
        train(argen_module(), pipeline, tmp_path, Fill(), max_steps=6, **options)
    limit_file_size(-1)
    assert "epoch=0-step=4.ckpt was not written" in str(error.value)
    folder = tmp_path / "checkpoints"
    assert names(folder) == ["epoch=0-step=2.ckpt", "last.ckpt"]
    assert [read_checkpoint(path)["global_step"] for path in folder.iterdir()] == [2, 2]
    trainer = pl.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    assert resolve_checkpoint("last", trainer, "fit") == str(folder / "last.ckpt")


def logged(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def metrics_logger(folder: Path) -> MetricsLogger:
    trainer = pl.Trainer(accelerator="cpu", logger=CSVLogger(folder, "logs", prefix="p"))
    use_metrics_logger(trainer)
    logger = trainer.logger
    assert isinstance(logger, MetricsLogger)
    assert isinstance(logger, CSVLogger)
    return logger


def test_a_kill_while_a_column_is_added_loses_no_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = metrics_logger(tmp_path)
    logger.log_hyperparams({"lr": 0.1})
    path = tmp_path / "logs/version_0/metrics.csv"
    logger.log_metrics({"loss": 1.0}, 1)
    logger.save()
    logger.log_metrics({"loss": 0.5}, 2)
    logger.save()
    logger.log_metrics({"val": 7.0}, 2)
    with monkeypatch.context() as patch:  # killed before the rename
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            logger.save()
    assert [row["p-loss"] for row in logged(path)] == ["1.0", "0.5"]
    logger.save()
    logger.finalize("success")
    assert [(row["step"], row["p-loss"], row["p-val"]) for row in logged(path)] == [
        ("1", "1.0", ""),
        ("2", "0.5", ""),
        ("2", "", "7.0"),
    ]
    assert names(path.parent) == ["hparams.yaml", "metrics.csv"]
    assert "lr: 0.1" in (path.parent / "hparams.yaml").read_text()


def test_a_full_disk_leaves_no_half_row(tmp_path: Path, limit_file_size: Any) -> None:
    logger = metrics_logger(tmp_path)
    path = tmp_path / "logs/version_0/metrics.csv"
    logger.log_metrics({"loss": 1.0}, 1)
    logger.save()
    before = path.read_text()
    logger.log_metrics({"loss": 2.0}, 2)
    limit_file_size(len(before) + 3)
    with pytest.raises(DiskFullError, match=r"metrics\.csv was not written"):
        logger.save()
    assert path.read_text() == before
    with pytest.warns(UserWarning, match=r"metrics\.csv was not written"):  # the run's own error is raised
        logger.finalize("failed")
    limit_file_size(sys.maxsize)
    logger.finalize("success")
    assert [row["p-loss"] for row in logged(path)] == ["1.0", "2.0"]
