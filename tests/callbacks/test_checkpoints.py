"""Checkpoint callbacks: they write into the run's folder, and resume runs that Lightning's ModelCheckpoint saved."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

import main
from callbacks import EMA, BestCheckpoint, LastCheckpoint, StepCheckpoint
from tests.lightning_modules.runs import argen_module, train
from tests.pipeline import Pipeline


def ours() -> list[pl.Callback]:
    return [BestCheckpoint(), LastCheckpoint(), StepCheckpoint(every_n_train_steps=3)]


def lightnings(folder: Path) -> list[pl.Callback]:
    """Lightning's callbacks with the options that configurations used before."""
    named: dict[str, Any] = {"filename": "step_{step:07d}", "auto_insert_metric_name": False}
    best = {**named, "filename": "best_{step:07d}", "monitor": "val/loss", "save_on_train_epoch_end": True}
    steps = {**named, "monitor": "step", "mode": "max", "save_top_k": 2, "save_last": "link", "every_n_train_steps": 3}
    return [
        ModelCheckpoint(folder / "checkpoints", **best),
        ModelCheckpoint(folder / "checkpoints", **named, save_last=True, save_on_train_epoch_end=True),
        ModelCheckpoint(folder / "checkpoints/steps", **steps),
    ]


def run(pipeline: Pipeline, folder: Path, saving: list[pl.Callback], **options: Any) -> pl.Trainer:
    return train(argen_module(), pipeline, folder, callbacks=[EMA(0.9), *saving], **{"max_epochs": 1, **options})


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.ckpt")}


def test_defaults_write_the_best_the_last_and_recent_checkpoints(pipeline: Pipeline, tmp_path: Path) -> None:
    run(pipeline, tmp_path, ours(), max_epochs=2)
    assert files(tmp_path / "checkpoints") == {
        "best_0000016.ckpt",
        "step_0000016.ckpt",
        "last.ckpt",
        "steps/step_0000012.ckpt",
        "steps/step_0000015.ckpt",
        "steps/last.ckpt",
    }
    assert (tmp_path / "checkpoints/last.ckpt").readlink() == Path("step_0000016.ckpt")
    assert (tmp_path / "checkpoints/steps/last.ckpt").readlink() == Path("step_0000015.ckpt")


def test_state_is_stored_under_the_key_of_lightnings_callback(tmp_path: Path) -> None:
    assert [each.state_key for each in ours()] == [each.state_key for each in lightnings(tmp_path)]


def test_a_run_saved_by_lightnings_callback_resumes_with_its_best_checkpoint(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    folder, last = tmp_path / "lightnings", tmp_path / "lightnings/checkpoints/last.ckpt"
    best, *_ = saved_by = lightnings(folder)
    run(pipeline, folder, saved_by)
    # Ours write the same files.
    run(pipeline, tmp_path / "ours", ours())
    assert files(tmp_path / "ours") == files(folder) != set()
    assert not last.is_symlink()

    # With nothing left to train.
    resumed, *_ = resuming = ours()
    run(pipeline, folder, resuming, ckpt_path=last)
    for old, new in zip(saved_by, resuming, strict=True):
        assert isinstance(old, ModelCheckpoint)
        assert isinstance(new, ModelCheckpoint)
        assert (new.dirpath, new.best_model_path) == (old.dirpath, old.best_model_path)
        assert new.best_k_models.keys() == old.best_k_models.keys()
    assert isinstance(best, ModelCheckpoint)
    assert isinstance(resumed, BestCheckpoint)
    assert torch.equal(resumed.best_model_score, best.best_model_score)  # type: ignore[arg-type]

    # The second file of an old run is replaced by a link.
    run(pipeline, folder, ours(), ckpt_path=last, max_epochs=2)
    assert last.readlink() == Path("step_0000016.ckpt")
    assert len(list((folder / "checkpoints").glob("best_*.ckpt"))) == 1


def test_a_given_folder_is_kept(pipeline: Pipeline, tmp_path: Path) -> None:
    run(pipeline, tmp_path / "run", [LastCheckpoint(tmp_path / "elsewhere", save_last=False)])
    assert files(tmp_path) == {"elsewhere/step_0000008.ckpt"}


def test_a_remote_folder_gets_a_second_file_instead_of_a_link() -> None:
    last = LastCheckpoint()
    last.resolve_folder(pl.Trainer(accelerator="cpu", logger=False, default_root_dir="memory://run"))
    assert (last.dirpath, last.save_last) == ("memory://run/checkpoints", True)


def test_the_command_line_refuses_a_folder_with_checkpoints_of_another_run(
    pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "checkpoints.yaml"
    config.write_text(
        yaml.safe_dump({"trainer": {"callbacks": [{"class_path": "EMA"}, {"class_path": "LastCheckpoint"}]}})
    )
    arguments = ["fit", *pipeline.argen_arguments(tmp_path / "run"), f"--config={config}"]
    arguments += [f"--data.init_args.root={pipeline.codes}", "--trainer.max_steps=1"]
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/step_0000001.ckpt").touch()
    with pytest.raises((SystemExit, ValueError)) as caught:
        main.main(arguments)
    assert "already holds checkpoints of another run" in f"{caught.value}{capsys.readouterr().err}"
