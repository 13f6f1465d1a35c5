"""The autoregressive recipe keeps the best, the last and periodic checkpoints."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import main
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


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """The base configuration, with a checkpoint every three steps."""
    tree = yaml.safe_load(Path("configs/argen/base.yaml").read_text())
    (periodic,) = [each for each in tree["trainer"]["callbacks"] if each["class_path"] == "StepCheckpoint"]
    periodic["init_args"] = {"every_n_train_steps": 3}
    tree["trainer"]["callbacks"][0]["init_args"]["decay"] = 0.5
    path = tmp_path / "base.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def load(path: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    return checkpoint


def test_keeps_the_best_the_last_and_the_newest_periodic_checkpoints(
    pipeline: Pipeline, recipe: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    module = main.main(arguments(pipeline, folder, recipe, 17)).model  # two epochs of 8 batches and one more batch
    steps = sorted(path.name for path in (folder / "checkpoints/steps").iterdir())
    assert steps == ["last.ckpt", "step_0000012.ckpt", "step_0000015.ckpt"]
    assert os.readlink(folder / "checkpoints/steps/last.ckpt") == "step_0000015.ckpt"
    (best,) = (folder / "checkpoints").glob("best_*.ckpt")
    history = load(best)["callbacks"]["LearningCurves"]["history"]["val/loss"]
    assert best.name == "best_0000016.ckpt"
    assert history[-1][1] == min(value for _, value in history)
    assert os.readlink(folder / "checkpoints/last.ckpt") == "step_0000017.ckpt"
    assert load(folder / "checkpoints/last.ckpt")["global_step"] == 17
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir() if not path.is_dir())
    assert kept == ["best_0000016.ckpt", "last.ckpt", "step_0000017.ckpt"]
    assert module.global_step == 17


def test_resuming_takes_the_newest_checkpoint(pipeline: Pipeline, recipe: Path, tmp_path: Path) -> None:
    uninterrupted, resumed = tmp_path / "uninterrupted", tmp_path / "resumed"
    main.main(arguments(pipeline, uninterrupted, recipe, 13))
    main.main(arguments(pipeline, resumed, recipe, 13))
    # Simulate a kill after step 12: remove everything that was written later.
    assert {path.name for path in resumed.rglob("*.ckpt") if load(path)["global_step"] > 12} == {
        "last.ckpt",
        "step_0000013.ckpt",
    }
    for name in ("last.ckpt", "step_0000013.ckpt"):
        (resumed / "checkpoints" / name).unlink()
    main.main(arguments(pipeline, resumed, recipe, 13))
    one, two = (load(folder / "checkpoints/last.ckpt") for folder in (uninterrupted, resumed))
    assert one["global_step"] == two["global_step"] == 13
    for name, value in one["state_dict"].items():
        assert torch.equal(two["state_dict"][name], value), name
