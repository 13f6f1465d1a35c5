"""Two ranks with half of the batch each train the autoregressive model like one process, also in random orders."""

from pathlib import Path
from typing import Any

import torch

import main
from tests.lightning_modules.runs import assert_moved_alike
from tests.pipeline import GPT_NET, Pipeline
from tests.ranks import succeeds, two_processes

DROPOUTS = ("token_dropout", "resid_dropout", "ffn_dropout", "condition_dropout")
STEPS = 10
NET = {**GPT_NET, "target_aware": True}
RANDOM_ORDERS = ("--model.init_args.order.random_until=3", "--model.init_args.order.raster_from=8")


def arguments(pipeline: Pipeline, folder: Path, batch_size: int) -> list[str]:
    kept = [item for item in pipeline.argen_arguments(folder) if not item.startswith("--trainer.max_steps")]
    return [
        *("fit", *kept, f"--data.init_args.root={pipeline.codes}", f"--data.init_args.batch_size={batch_size}"),
        *(f"--model.init_args.net.{name}=0.0" for name in DROPOUTS),
        *RANDOM_ORDERS,
        *(f"--trainer.max_steps={STEPS}", "--trainer.accumulate_grad_batches=2", "--trainer.gradient_clip_val=0.1"),
        *(
            "--trainer.val_check_interval=null",
            "--trainer.check_val_every_n_epoch=2",
            "--data.init_args.remainder=drop",
        ),
    ]


def load(folder: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == STEPS
    return checkpoint


def averages(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    states = checkpoint["optimizer_states"][0]["state"]
    return {name: states[index]["ema"] for index, name in enumerate(checkpoint["llamagen"]["ema_names"])}


def test_two_ranks_reach_the_weights_and_averages_of_one(pipeline: Pipeline, tmp_path: Path) -> None:
    start = arguments(pipeline, tmp_path / "start", 200)
    module = main.main([*start, "--trainer.max_steps=0"]).model
    before = {name: value.clone() for name, value in module.state_dict().items() if name.startswith("gpt.")}
    main.main(arguments(pipeline, tmp_path / "one", 200))
    succeeds(two_processes(arguments(pipeline, tmp_path / "two", 100)))
    one, two = load(tmp_path / "one"), load(tmp_path / "two")
    assert_moved_alike(before, *({name: each["state_dict"][name] for name in before} for each in (one, two)))
    parameters = {name: before[name] for name in averages(one)}
    assert_moved_alike(parameters, averages(one), averages(two))
