"""Table and plot of benchmarks/recipes.py."""

import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from llamagen.files import atomic_file

COLUMNS = {
    "val_loss": "validation loss, nats",
    "gfid": "gFID",
    "val_loss_random_order": "in random orders, nats",
}


def interval(values: list[float]) -> str:
    """Mean, and the range over the seeds."""
    if not values:
        return "—"
    digits = 3 if max(values) < 10 else 2
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} – {max(values):.{digits}f})"


def values_of(entry: dict[str, Any], name: str) -> list[float]:
    """A metric of a recipe, one value for each seed."""
    return [seed[name] for seed in entry["seeds"].values() if name in seed]


def verdict(record: dict[str, Any], name: str) -> list[str]:
    """Recipes with the seeds of the first one whose worst seed beats its best, by a metric of which less is better."""
    first, *others = record["recipes"].values()
    names = list(record["recipes"])[1:]
    best = min(values_of(first, name), default=None)
    if best is None or len(values_of(first, name)) < 2:
        return []
    return [
        each
        for each, entry in zip(names, others, strict=True)
        if set(entry["seeds"]) == set(first["seeds"]) and max(values_of(entry, name), default=best) < best
    ]


def table(record: dict[str, Any]) -> str:
    """Markdown table: one row for each recipe."""
    times = record.get("seconds_a_step", {})
    shown = [name for name in COLUMNS if any(values_of(entry, name) for entry in record["recipes"].values())]
    lines = [
        f"Mean and range over the seeds, after {_steps(record):,} steps.",
        "",
        "| recipe | seeds | "
        + " | ".join(COLUMNS[name] for name in shown)
        + " | seconds a step, median (quartiles) | ratio |",
        "| --- |" + " --- |" * (len(shown) + 3),
    ]
    for recipe, entry in record["recipes"].items():
        time = times.get(recipe)
        cells = [interval(values_of(entry, name)) for name in shown]
        cells += (
            [f"{time['median']:.3f} ({time['q1']:.3f} – {time['q3']:.3f})", f"{time['ratio']:.2f}"]
            if time
            else ["—"] * 2
        )
        lines.append(f"| {recipe} | {len(entry['seeds'])} | " + " | ".join(cells) + " |")
    for name in shown[:2]:
        found = verdict(record, name)
        first = next(iter(record["recipes"]))
        better = ", ".join(found) or "none"
        lines += ["", f"Better than every seed of “{first}” with every seed, by {COLUMNS[name]}: {better}."]
    return "\n".join(lines) + "\n"


def _steps(record: dict[str, Any]) -> int:
    entry = next(iter(record["recipes"].values()))
    return int(next(iter(entry["seeds"].values()))["curve"][-1][0])


def plot(record: dict[str, Any], path: Path) -> None:
    """Validation loss over the steps (mean and range over the seeds), and final loss and FID of each seed."""
    recipes = record["recipes"]
    metrics = [name for name in ("val_loss", "gfid") if any(values_of(entry, name) for entry in recipes.values())]
    figure = Figure(figsize=(5.5 + 3.2 * len(metrics), 4), layout="constrained")
    curves, *panels = figure.subplots(1, 1 + len(metrics), width_ratios=[1.7] + [1.0] * len(metrics))
    for place, (recipe, entry) in enumerate(recipes.items()):
        runs = [dict(map(tuple, seed["curve"])) for seed in entry["seeds"].values()]
        steps = sorted(set.intersection(*(set(run) for run in runs)))
        losses = [[run[step] for run in runs] for step in steps]
        curves.plot(steps, [statistics.mean(each) for each in losses], "o-", color=f"C{place}", label=recipe)
        curves.fill_between(steps, [min(e) for e in losses], [max(e) for e in losses], color=f"C{place}", alpha=0.2)
    curves.set(xlabel="steps", ylabel=COLUMNS["val_loss"], title="raster order, averaged weights")
    curves.legend()
    for axes, name in zip(panels, metrics, strict=True):
        for place, entry in enumerate(recipes.values()):
            values = values_of(entry, name)
            axes.plot([place] * len(values), values, "o", color=f"C{place}", alpha=0.6)
            axes.plot([place - 0.25, place + 0.25], [statistics.mean(values)] * 2, color=f"C{place}")
        axes.set_xticks(range(len(recipes)), list(recipes), rotation=20, ha="right")
        axes.set(title=COLUMNS[name], xlim=(-0.6, len(recipes) - 0.4))
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)
