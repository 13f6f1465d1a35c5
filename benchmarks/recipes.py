"""Compare recipes: the same data, size, budget, seeds and evaluation for any list of overlays and options.

    python -m benchmarks.recipes prepare cifar10 IMAGES WORK
    python -m benchmarks.recipes run cifar10 WORK --recipe "paper=" --recipe "mine=my.yaml --model.init_args.x=1"
    python -m benchmarks.recipes times cifar10 WORK --recipe "paper=" --recipe "mine=my.yaml"
    python -m benchmarks.recipes report cifar10 WORK --out benchmarks/results/recipes_cifar10.json

``--stage`` is what the recipes train: ``argen``, the autoregressive model, or ``tokenizer``. ``prepare`` packs the
images (a folder of class folders) and trains what the stage needs: the classifier of FID and, for ``argen``, the
tokenizer, whose codes it writes. ``run`` trains each recipe with each seed and measures. ``times`` measures seconds of
a training step; run it on a quiet machine. ``prepare`` and ``run`` continue where they were stopped. ``report`` writes
a record, a table and a plot of what is there.

A recipe is NAME=PARTS. Overlays (``*.yaml``) are applied to the base configuration before the size and budget of the
data (``benchmarks/recipe_data/*.yaml``), options of ``main.py`` after them. The recipe that was run first is the one
that the others are compared with; for tokenizers, the first one with as many codes. See "Try your own idea" in
docs/recipes.md and "Try your own tokenizer" in docs/tokenizer_recipes.md.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import recipe_argen, recipe_tokenizer
from benchmarks.recipe_report import table
from benchmarks.recipe_runs import Recipe, Stage, prepare
from benchmarks.recipe_times import measure
from benchmarks.timing import machine
from llamagen.command import run_command
from llamagen.files import atomic_file
from llamagen.parser_errors import OneLineParser

STAGES: dict[str, Mapping[str, Stage]] = {"argen": recipe_argen.DATA, "tokenizer": recipe_tokenizer.DATA}


def main() -> None:
    """Run a command."""
    parser = OneLineParser("python -m benchmarks.recipes", "Compare recipes.")
    parser.add_argument("command", choices=["prepare", "run", "times", "report"])
    parser.add_argument("data", choices=list(recipe_argen.DATA))
    parser.add_argument("--stage", choices=list(STAGES), default="argen", help="what recipes train (default: argen)")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="IMAGES WORK for prepare, else WORK")
    parser.add_argument(
        "--recipe", action="append", metavar="NAME=PARTS", help="repeatable; default: those of the docs"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=9, help="rounds of times (default: 9)")
    parser.add_argument("--classifier", type=Path, help="prepare tokenizer: a trained classifier for FID")
    parser.add_argument("--lpips", type=Path, help="run tokenizer: weights of LPIPS; without them it is not measured")
    parser.add_argument("--out", type=Path, help="record of report (default: in WORK); .md and .png next to it")
    options = parser.parse_args()
    stage, work = STAGES[options.stage][options.data], options.folders[-1]
    if len(options.folders) != (2 if options.command == "prepare" else 1):
        raise ValueError(f"{options.command} takes {'IMAGES WORK' if options.command == 'prepare' else 'WORK'}")
    for name, command in (("classifier", "prepare"), ("lpips", "run")):
        if getattr(options, name) is not None and (options.command, options.stage) != (command, "tokenizer"):
            raise ValueError(f"--{name} is only for {command} with --stage tokenizer; leave it out")
    if options.command == "prepare":
        if not options.folders[0].is_dir():
            raise ValueError(f"{options.folders[0]} is not a folder; give a folder of class folders of images")
        for step in prepare(stage, options.folders[0], work, options.classifier):
            print(step, flush=True)
        return
    named = f"{options.data} --stage {options.stage}"
    if not stage.is_prepared(work):
        raise ValueError(
            f"{work} is not prepared; run `python -m benchmarks.recipes prepare {named} IMAGES {work}` first"
        )
    recipes = [Recipe.parse(text) for text in options.recipe or stage.recipes]
    record = _read(work / stage.record)
    if options.command == "run":
        for recipe in recipes:
            recipe.identify(stage, work)
        runs = [(recipe, seed) for seed in options.seeds for recipe in recipes]
        with tqdm(runs, unit="run") as bar:
            for recipe, seed in bar:
                bar.set_postfix_str(f"{recipe.name}, seed {seed}")
                stage.perform(recipe, work, seed, options.lpips)
                entry = record.setdefault("recipes", {}).setdefault(recipe.name, {"seeds": {}})
                entry["parts"] = [*recipe.overlays, *recipe.options]
                entry["seeds"][str(seed)] = stage.results(recipe, work, seed)
                _write(record, work / stage.record)
    if options.command == "times":
        record |= {"machine": machine("cpu"), "seconds_a_step": measure(recipes, stage, work, options.rounds)}
        _write(record, work / stage.record)
    if not record.get("recipes"):
        raise ValueError(f"{work} has no finished run; start with `python -m benchmarks.recipes run {named} {work}`")
    out = options.out or work / stage.record
    record |= {"data": options.data}
    _write(record, out)
    with atomic_file(out.with_suffix(".md")) as temporary:
        temporary.write_text(table(record, stage.columns), encoding="utf-8")
    stage.plot(record, out.with_suffix(".png"))
    print(table(record, stage.columns))


def _read(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return record


def _write(record: dict[str, Any], path: Path) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
