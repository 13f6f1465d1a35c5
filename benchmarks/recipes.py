"""Compare recipes: the same data, size, budget, seeds and evaluation for any list of overlays and options.

    python -m benchmarks.recipes prepare cifar10 IMAGES WORK
    python -m benchmarks.recipes run cifar10 WORK --recipe "paper=" --recipe "mine=my.yaml --model.init_args.x=1"
    python -m benchmarks.recipes times cifar10 WORK --recipe "paper=" --recipe "mine=my.yaml"
    python -m benchmarks.recipes report cifar10 WORK --out benchmarks/results/recipes_cifar10.json

``prepare`` packs the images (a folder of class folders), trains the tokenizer and the classifier of FID, and encodes
the images. ``run`` trains each recipe with each seed, samples and measures. ``times`` measures seconds of a training
step; run it on a quiet machine. ``prepare`` and ``run`` continue where they were stopped. ``report`` writes a record, a
table and a plot of what is there.

A recipe is NAME=PARTS. Overlays (``*.yaml``) are applied to configs/argen/base.yaml before the size and budget of the
data (``benchmarks/recipe_data/*.yaml``), options of ``main.py`` after them. The first recipe is the one that the others
are compared with. See "Try your own idea" in docs/recipes.md.
"""

import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.recipe_report import plot, table
from benchmarks.recipe_runs import DATA, Recipe, evaluate, prepare, results, train
from benchmarks.recipe_times import measure
from benchmarks.timing import machine
from llamagen.command import run_command
from llamagen.files import atomic_file
from llamagen.parser_errors import OneLineParser

ORDER = "'--model.init_args.order={random_until: 0.5, raster_from: 0.75}'"
QK_NORM = "--model.init_args.net.qk_norm=true"
RECIPES = (
    "paper=",
    f"RAR={ORDER}",
    f"QK-norm={QK_NORM}",
    f"RAR and QK-norm={ORDER} {QK_NORM}",
    "adaptive norms=--model.init_args.net.adaptive_norm=true",
)
RECORD = "recipes.json"


def main() -> None:
    """Run a command."""
    parser = OneLineParser("python -m benchmarks.recipes", "Compare recipes of the autoregressive model.")
    parser.add_argument("command", choices=["prepare", "run", "times", "report"])
    parser.add_argument("data", choices=list(DATA))
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="IMAGES WORK for prepare, else WORK")
    parser.add_argument(
        "--recipe", action="append", metavar="NAME=PARTS", help="repeatable; default: those of the docs"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=9, help="rounds of times (default: 9)")
    parser.add_argument("--out", type=Path, help=f"record of report (default: WORK/{RECORD}); .md and .png next to it")
    options = parser.parse_args()
    data, work = DATA[options.data], options.folders[-1]
    if len(options.folders) != (2 if options.command == "prepare" else 1):
        raise ValueError(f"{options.command} takes {'IMAGES WORK' if options.command == 'prepare' else 'WORK'}")
    if options.command == "prepare":
        if not options.folders[0].is_dir():
            raise ValueError(f"{options.folders[0]} is not a folder; give a folder of class folders of images")
        for step in prepare(data, options.folders[0], work):
            print(step, flush=True)
        return
    if not (work / "codes/meta.json").is_file():
        raise ValueError(
            f"{work} has no codes; run `python -m benchmarks.recipes prepare {data.name} IMAGES {work}` first"
        )
    recipes = [Recipe.parse(text) for text in options.recipe or RECIPES]
    record = _read(work / RECORD)
    if options.command == "run":
        for recipe in recipes:
            recipe.identify(data, work)
        runs = [(recipe, seed) for seed in options.seeds for recipe in recipes]
        with tqdm(runs, unit="run") as bar:
            for recipe, seed in bar:
                bar.set_postfix_str(f"{recipe.name}, seed {seed}")
                train(recipe, data, work, seed)
                evaluate(recipe, data, work, seed)
                entry = record.setdefault("recipes", {}).setdefault(recipe.name, {"seeds": {}})
                entry["parts"] = [*recipe.overlays, *recipe.options]
                entry["seeds"][str(seed)] = results(recipe, work, seed)
                _write(record, work / RECORD)
    if options.command == "times":
        record |= {"machine": machine("cpu"), "seconds_a_step": measure(recipes, data, work, options.rounds)}
        _write(record, work / RECORD)
    if not record.get("recipes"):
        raise ValueError(
            f"{work} has no finished run; start with `python -m benchmarks.recipes run {data.name} {work}`"
        )
    out = options.out or work / RECORD
    done = record["recipes"]
    named = [recipe.name for recipe in recipes if recipe.name in done]
    record |= {
        "data": data.name,
        "recipes": {name: done[name] for name in [*named, *(name for name in done if name not in named)]},
    }
    _write(record, out)
    with atomic_file(out.with_suffix(".md")) as temporary:
        temporary.write_text(table(record), encoding="utf-8")
    plot(record, out.with_suffix(".png"))
    print(table(record))


def _read(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return record


def _write(record: dict[str, Any], path: Path) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
