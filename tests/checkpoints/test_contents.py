"""The autoregressive recipe keeps the best, the last and periodic checkpoints."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import main
from callbacks import LearningCurves
from tests.pipeline import GPT_NET, Pipeline


def arguments(pipeline: Pipeline, folder: Path, recipe: Path, steps: int) -> list[str]:
    return [
        *("fit", "--config", str(recipe), "--trainer.accelerator=cpu", "--trainer.precision=32-true"),
        *(f"--model.init_args.net.{key}={value}" for key, value in GPT_NET.items()),
        *(
            f"--data.init_args.root={pipeline.codes}",
            "--data.init_args.batch_size=200",
            "--data.init_args.num_workers=0",
        ),
        *(
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
            f"--trainer.max_steps={steps}",
        ),
        *(f"--trainer.default_root_dir={folder}", "--ckpt_path=last", "--trainer.log_every_n_steps=1"),
    ]


STEPS = 17
"""Two epochs of 8 batches and one more batch."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base configuration, with a checkpoint every three steps."""
    tree = yaml.safe_load(Path("configs/argen/base.yaml").read_text())
    (periodic,) = [each for each in tree["trainer"]["callbacks"] if each["class_path"] == "StepCheckpoint"]
    periodic["init_args"] = {"every_n_train_steps": 3}
    tree["trainer"]["callbacks"][0]["init_args"]["decay"] = 0.5
    path = tmp_path_factory.mktemp("recipe") / "base.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module", autouse=True)
def no_figures() -> Iterator[None]:
    """Draw no curves: that takes longer than the training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LearningCurves, "_plot", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def finished(pipeline: Pipeline, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("finished")
    assert main.main(arguments(pipeline, folder, recipe, STEPS)).model.global_step == STEPS
    return folder


def load(path: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    return checkpoint


def test_keeps_the_best_the_last_and_the_newest_periodic_checkpoints(finished: Path) -> None:
    steps = sorted(path.name for path in (finished / "checkpoints/steps").iterdir())
    assert steps == ["last.ckpt", "step_0000012.ckpt", "step_0000015.ckpt"]
    assert os.readlink(finished / "checkpoints/steps/last.ckpt") == "step_0000015.ckpt"
    (best,) = (finished / "checkpoints").glob("best_*.ckpt")
    history = load(best)["callbacks"]["LearningCurves"]["history"]["val/loss"]
    assert best.name == "best_0000016.ckpt"
    assert history[-1][1] == min(value for _, value in history)
    assert os.readlink(finished / "checkpoints/last.ckpt") == "step_0000017.ckpt"
    assert load(finished / "checkpoints/last.ckpt")["global_step"] == STEPS
    kept = sorted(path.name for path in (finished / "checkpoints").iterdir() if not path.is_dir())
    assert kept == ["best_0000016.ckpt", "last.ckpt", "step_0000017.ckpt"]


def test_resuming_takes_the_newest_checkpoint(pipeline: Pipeline, recipe: Path, finished: Path, tmp_path: Path) -> None:
    # Simulate a kill after step 15: remove everything that was written later.
    resumed = tmp_path / "resumed"
    shutil.copytree(finished, resumed, symlinks=True)
    later = {path.name for path in resumed.glob("checkpoints/*.ckpt") if load(path)["global_step"] > 15}
    assert later == {"best_0000016.ckpt", "last.ckpt", "step_0000017.ckpt"}
    for name in later:
        (resumed / "checkpoints" / name).unlink()
    main.main(arguments(pipeline, resumed, recipe, STEPS))
    one, two = (load(folder / "checkpoints/last.ckpt") for folder in (finished, resumed))
    assert one["global_step"] == two["global_step"] == STEPS
    for name, value in one["state_dict"].items():
        assert torch.equal(two["state_dict"][name], value), name
