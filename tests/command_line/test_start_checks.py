"""Checks at the start of a run: monitored metrics, writable folders, space on the disk."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import main
from callbacks import FIDMonitor
from command_line import start_checks
from command_line.start_checks import checkpoint_bytes
from llamagen import output_paths
from tests.lightning_modules.runs import argen_module, train, vqgan_module
from tests.pipeline import Pipeline
from tests.saved_runs import again


def fit_argen(pipeline: Pipeline, folder: Path, *more: str) -> None:
    main.main([*again("fit", pipeline.root / "argen", folder), *more])


@pytest.mark.parametrize("callback", ["ModelCheckpoint", "EarlyStopping"])
def test_rejects_a_metric_that_is_not_logged_and_suggests_names(
    callback: str, pipeline: Pipeline, tmp_path: Path
) -> None:
    more = [f"--trainer.callbacks+={callback}", "--trainer.callbacks.monitor=val/los"]
    with pytest.raises(ValueError, match=rf"{callback}\.monitor is 'val/los', .* for example val/loss") as error:
        fit_argen(pipeline, tmp_path / "run", *more)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_every_metric_logged_at_validations_may_be_monitored(pipeline: Pipeline, tmp_path: Path) -> None:
    for module, options in ((argen_module(), {}), (vqgan_module(), {"image_size": 8})):
        trainer = train(
            module, pipeline, tmp_path / type(module).__name__, max_steps=1, val_check_interval=1, **options
        )
        logged = {name for name in trainer.callback_metrics if name.startswith("val")}
        assert logged == set(module.metric_names())


def test_rejects_the_metric_of_another_reference_before_training(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FIDMonitor, "setup", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(FIDMonitor, "metric_names", lambda self: ["gfid/imagenet256"])
    monitor = ["--trainer.callbacks+=FIDMonitor", "--trainer.callbacks+=ModelCheckpoint"]
    with pytest.raises(ValueError, match=r"monitor is 'gfid/imagenet', .* for example gfid/imagenet256"):
        fit_argen(pipeline, tmp_path / "run", *monitor, "--trainer.callbacks.monitor=gfid/imagenet")


def test_rejects_folders_that_cannot_be_written(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        fit_argen(pipeline, tmp_path / "file/run")
    message = f"{tmp_path}/file/run cannot be written: {tmp_path}/file is not a folder; change its permissions, or set"
    assert message in capsys.readouterr().err

    def read_only(dir: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(output_paths.tempfile, "TemporaryFile", read_only)
    with pytest.raises(SystemExit):
        fit_argen(pipeline, tmp_path / "run")
    assert f"{tmp_path} does not allow it (read-only file system); change its permissions" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_rejects_a_disk_without_space_for_a_checkpoint(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start_checks.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match=r"a checkpoint needs about \d[\d,]+ bytes, but .* has 1,000 bytes free"):
        fit_argen(pipeline, tmp_path / "run")


def test_the_size_of_a_checkpoint_is_predicted(pipeline: Pipeline, tmp_path: Path) -> None:
    module = argen_module()
    train(module, pipeline, tmp_path, max_steps=1)
    checkpoint = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    tensors = [*checkpoint["state_dict"].values()]
    tensors += [each for state in checkpoint["optimizer_states"][0]["state"].values() for each in state.values()]
    actual = sum(each.numel() * each.element_size() for each in tensors if each.numel() > 1)
    assert checkpoint_bytes(module, averaged=True) == pytest.approx(actual, rel=0.01)
