"""Two ranks, each with half of the batch, match one process with the full batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import main
from llamagen.models.vqgan import VQGAN, VQGANConfig
from tests.lightning_modules.runs import assert_moved_alike
from tests.pipeline import TOKENIZER_NET, Pipeline
from tests.ranks import succeeds, two_processes

STEPS, BATCH = 6, 32  # later a latent between two codes takes one here and the other there
LR = 1e-3
CASES = {
    "fixed weight": [],
    "adaptive weight": ["--model.init_args.loss.adaptive_weight=true"],
    "LeCAM and accumulation": [
        "--model.init_args.loss.adaptive_weight=true",
        "--model.init_args.loss.adversarial=non_saturating",
        "--model.init_args.loss.lecam_weight=0.5",
        "--trainer.accumulate_grad_batches=2",
    ],
    "EMA codebook": [
        "--model.init_args.net.quantizer.class_path=llamagen.models.quantizers.EMAVectorQuantizer",
        "--model.init_args.net.quantizer.init_args.codebook_size=32",
        "--model.init_args.net.quantizer.init_args.codebook_dim=4",
        "--trainer.accumulate_grad_batches=2",
    ],
    "frozen encoder and codebook": ["--model.init_args.freeze=[encoder,quantizer]"],
}
START = 2
"""Start of the discriminator: the runs cover steps before and after it."""


def arguments(pipeline: Pipeline, folder: Path, batch_size: int, *more: str) -> list[str]:
    return [
        *("fit", *pipeline.tokenizer_arguments(folder)),
        "--model.init_args.net.channels=64",
        f"--model.init_args.loss.adversarial_start={START}",
        f"--model.init_args.optimizer.lr={LR}",
        f"--data.init_args.batch_size={batch_size}",
        f"--trainer.max_steps={STEPS}",
        *more,
    ]


def checkpoint(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert content["global_step"] == STEPS
    return content


@pytest.mark.parametrize(
    "case", [case if "LeCAM" in case else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_two_ranks_train_to_the_weights_of_one_process(case: str, pipeline: Pipeline, tmp_path: Path) -> None:
    options = CASES[case]
    if "frozen" in case:
        torch.manual_seed(1)
        initial = VQGAN(VQGANConfig(**{**TOKENIZER_NET, "channels": 64}))
        torch.save({"model": initial.state_dict()}, tmp_path / "initial.pt")
        options = [*options, f"--model.init_args.init_from={tmp_path / 'initial.pt'}"]
    main.main(arguments(pipeline, tmp_path / "one", BATCH, *options))
    succeeds(two_processes(arguments(pipeline, tmp_path / "two", BATCH // 2, *options)))
    one, two = (checkpoint(tmp_path / name) for name in ("one", "two"))
    assert any("discriminator" in name for name in one["state_dict"])
    untrained = arguments(pipeline, tmp_path / "start", BATCH, *options, "--trainer.max_steps=0")
    start = main.main(untrained).model.state_dict()
    assert_moved_alike(start, one["state_dict"], two["state_dict"])


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_nan_loss_on_one_rank_stops_all_ranks(rank: int, pipeline: Pipeline, tmp_path: Path) -> None:
    checkpoints = {"dirpath": str(tmp_path / "run/checkpoints"), "save_last": True, "every_n_train_steps": 2}
    callbacks = [
        {"class_path": "ModelCheckpoint", "init_args": checkpoints},
        {"class_path": "tests.lightning_modules.poison.Poison", "init_args": {"batch": 3, "rank": rank}},
    ]
    (tmp_path / "callbacks.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    overlay = f"--config={tmp_path / 'callbacks.yaml'}"
    done = two_processes(arguments(pipeline, tmp_path / "run", BATCH // 2, overlay))
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert all("reconstruction" in error and "not finite at step 3" in error for error in errors)
    last = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 2
    assert all(value.isfinite().all() for value in last["state_dict"].values())
