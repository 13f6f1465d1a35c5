"""Seconds of a training step of each recipe of benchmarks/recipes.py, all in one process and in turn."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

import main
from benchmarks.recipe_runs import Data, Recipe, training_paths
from benchmarks.timing import spread, timed
from lightning_modules import ARGenModule
from lightning_modules.generation_order import generation_orders
from llamagen.losses import heads_cross_entropy

WARM_UP, STEPS = 3, 5


class Step:
    """A training step on codes of a fixed batch: orders, forward, loss, backward, clipping, AdamW, in bf16.

    Without what all recipes share, such as data and EMA, and without activation checkpointing and compilation.
    """

    def __init__(self, module: ARGenModule, batch_size: int) -> None:
        config = module.gpt.config
        self.module = module.train()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        module.to(self.device)
        self.codes = torch.randint(config.vocab_size, (batch_size, config.block_size), device=self.device)
        self.labels = torch.randint(config.num_classes, (batch_size,), device=self.device)
        self.optimizer = torch.optim.AdamW(module.gpt.parameters(), fused=True)

    def __call__(self) -> None:
        """One step. A random order for half of the examples: the cost does not depend on how many have one."""
        gpt, codes, order, terms = self.module.gpt, self.codes, None, self.module.loss_config
        if self.module.order is not None:
            order = generation_orders(torch.arange(len(codes), device=self.device), 0, 0, 0.5, codes.shape[1])
            codes = codes.gather(1, order)
        with torch.autocast(self.device.type, torch.bfloat16):
            positions = None if order is None else order[:, :-1]
            hidden = gpt.features(codes[:, :-1], self.labels, positions=positions, targets=order)
            heads = gpt.head_terms(hidden.flatten(0, 1), codes.flatten())
            loss, _ = heads_cross_entropy(heads, terms.label_smoothing, terms.z_loss)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def measure(recipes: Sequence[Recipe], data: Data, work: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Time steps: in each round a few of each recipe.

    Returns:
        By recipe: median and quartiles of the seconds of a step, and ``ratio``, the median over the rounds of its
        seconds divided by those of the first recipe in the same round.
    """
    steps, times = {}, {recipe.name: list[float]() for recipe in recipes}
    for recipe in recipes:
        with tempfile.TemporaryDirectory() as folder:
            options = [*recipe.arguments(data), *training_paths(work, Path(folder)), "--trainer.max_steps=0"]
            cli = main.main(["fit", *options, "--trainer.logger=false", "--trainer.callbacks=[]"])
        steps[recipe.name] = Step(cli.model, cli.datamodule.batch_size)
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    for _ in tqdm(range(rounds), desc="times"):
        for name, step in steps.items():
            times[name].append(timed(lambda step=step: [step() for _ in range(STEPS)]) / STEPS)  # type: ignore[misc]
    first = times[recipes[0].name]
    ratios = {name: sorted(own / base for own, base in zip(each, first, strict=True)) for name, each in times.items()}
    return {name: {**spread(each), "ratio": round(ratios[name][rounds // 2], 3)} for name, each in times.items()}
