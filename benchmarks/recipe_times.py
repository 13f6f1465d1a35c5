"""Seconds of a training step of each recipe of benchmarks/recipes.py, all in one process and in turn."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

import main
from benchmarks.recipe_runs import Recipe, Stage
from benchmarks.timing import spread, timed

WARM_UP, STEPS = 3, 5


def measure(recipes: Sequence[Recipe], stage: Stage, work: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Time steps: in each round a few of each recipe.

    Returns:
        By recipe: median and quartiles of the seconds of a step, and ``ratio``, the median over the rounds of its
        seconds divided by those of the first recipe in the same round; for tokenizers, of the first one with as many
        codes.
    """
    steps, times = {}, {recipe.name: list[float]() for recipe in recipes}
    baselines, firsts = dict[str, str](), dict[int | None, str]()
    for recipe in recipes:
        with tempfile.TemporaryDirectory() as folder:
            options = [*recipe.arguments(stage), *stage.training_paths(work, Path(folder)), "--trainer.max_steps=0"]
            cli = main.main(["fit", *options, "--trainer.logger=false", "--trainer.callbacks=[]"])
        steps[recipe.name] = stage.training_step(cli)
        baselines[recipe.name] = firsts.setdefault(stage.group_of(cli), recipe.name)
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    for _ in tqdm(range(rounds), desc="times"):
        for name, step in steps.items():
            times[name].append(timed(lambda step=step: [step() for _ in range(STEPS)]) / STEPS)  # type: ignore[misc]
    ratios = {
        name: sorted(own / base for own, base in zip(each, times[baselines[name]], strict=True))
        for name, each in times.items()
    }
    return {name: {**spread(each), "ratio": round(ratios[name][rounds // 2], 3)} for name, each in times.items()}
