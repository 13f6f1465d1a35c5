"""Adapters are trained, saved and resumed with DDP and with sharded parameters as in one process."""

import re
from pathlib import Path

import pytest
import torch

import main
from llamagen.checkpoints.weights import read_weights
from tests.lightning_modules.test_argen_ranks import STEPS
from tests.lightning_modules.test_sharding import assert_alike, command, everything
from tests.pipeline import Pipeline
from tests.ranks import succeeds, two_processes

pytestmark = pytest.mark.slow
HALF = STEPS // 2
SHARDED = ("--trainer.strategy=sharded", "--model.init_args.activation_checkpointing=true")
STRATEGIES = {"ddp": (), "sharded": SHARDED}


def run(pipeline: Pipeline, folder: Path, ranks: int, *more: str) -> Path:
    """Train adapters of the pipeline's model and new class embeddings, and return the last checkpoint."""
    lora = (
        *("--model.init_args.lora={rank: 4, alpha: 8}", f"--model.init_args.init_from={pipeline.argen}"),
        *("--model.init_args.init_adapt=[num_classes]", "--model.init_args.net.num_classes=11"),
        "--model.init_args.order=null",  # the base is a model of the raster order
    )
    arguments = command(pipeline, folder, ranks, *lora, *more)
    if ranks == 1:
        main.main(arguments)
    else:
        succeeds(two_processes(arguments))
    return folder / "checkpoints/last.ckpt"


@pytest.fixture(scope="module")
def one(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(pipeline, tmp_path_factory.mktemp("one"), 1)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_reach_the_adapters_moments_and_averages_of_one(
    strategy: str, pipeline: Pipeline, one: Path, tmp_path: Path
) -> None:
    two = run(pipeline, tmp_path, 2, *STRATEGIES[strategy])
    assert two.is_dir() is (strategy == "sharded")
    assert_alike(one, two)
    assert everything(two)["state_dict"].keys() == everything(one)["state_dict"].keys()
    for averaged in (True, False):
        wanted, found = (read_weights(path, averaged).state for path in (one, two))
        assert len(wanted["cls_embedding.embedding_table.weight"]) == 12
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ranks", [(1, 2), (2, 1)], ids=str)
def test_a_run_resumes_with_another_strategy(
    ranks: tuple[int, int], pipeline: Pipeline, one: Path, tmp_path: Path
) -> None:
    first, second = ((SHARDED if each == 2 else ()) for each in ranks)
    half = run(pipeline, tmp_path / "half", ranks[0], *first, f"--trainer.max_steps={HALF}")
    assert_alike(one, run(pipeline, tmp_path / "rest", ranks[1], *second, f"--ckpt_path={half}"))


def test_a_sharded_run_validates_with_the_averages_of_a_checkpoint(
    pipeline: Pipeline, one: Path, tmp_path: Path
) -> None:
    arguments = ["validate", "--config", str(one.parents[1] / "fit.yaml"), f"--ckpt_path={one}"]
    alone = main.main([*arguments, f"--trainer.default_root_dir={tmp_path}"]).trainer.callback_metrics["val/loss"]
    both = two_processes([*arguments, *SHARDED, f"--trainer.default_root_dir={tmp_path}"])
    succeeds(both)
    found = re.search(r"val/loss\W+([0-9.]+)", both.stdout)
    assert found is not None
    assert float(found[1]) == pytest.approx(float(alone), rel=1e-4)
