"""Table of benchmarks/recipes.py."""

import statistics
from typing import Any

from benchmarks.recipe_runs import Column

CODES = "codes"


def interval(values: list[float]) -> str:
    """Mean, and the range over the seeds."""
    if not values:
        return "—"
    digits = 3 if max(values) < 10 else 2 if max(values) < 1000 else 0
    mean = f"{statistics.mean(values):,.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):,.{digits}f} – {max(values):,.{digits}f})"


def values_of(entry: dict[str, Any], name: str) -> list[float]:
    """A metric of a recipe, one value for each seed."""
    return [seed[name] for seed in entry["seeds"].values() if name in seed]


def codes_of(entry: dict[str, Any]) -> int | None:
    """Number of codes of a recipe's tokenizers; None if it is not one of tokenizers."""
    return next((int(seed[CODES]) for seed in entry["seeds"].values() if CODES in seed), None)


def groups(record: dict[str, Any]) -> list[list[str]]:
    """Names of the recipes that are compared with each other, the baseline first: those with equally many codes."""
    found: dict[int | None, list[str]] = {}
    for name, entry in record["recipes"].items():
        found.setdefault(codes_of(entry), []).append(name)
    return list(found.values())


def verdict(record: dict[str, Any], names: list[str], metric: str, better: str) -> list[str]:
    """Recipes with the seeds of the first one whose worst seed beats its best.

    Args:
        record: the record.
        names: recipes that are compared, the baseline first.
        metric: name of the metric.
        better: ``min`` or ``max``.
    """
    sign = 1 if better == "min" else -1
    values = {name: [sign * value for value in values_of(record["recipes"][name], metric)] for name in names}
    seeds = {name: set(record["recipes"][name]["seeds"]) for name in names}
    first, *others = names
    if len(values[first]) < 2:
        return []
    best = min(values[first])
    return [each for each in others if seeds[each] == seeds[first] and max(values[each], default=best) < best]


def table(record: dict[str, Any], columns: dict[str, Column]) -> str:
    """Markdown table: one row for each recipe."""
    times = record.get("seconds_a_step", {})
    recipes = record["recipes"]
    shown = {name: each for name, each in columns.items() if any(values_of(entry, name) for entry in recipes.values())}
    with_codes = any(codes_of(entry) for entry in recipes.values())
    titles = ["recipe", *[CODES] * with_codes, "seeds", *(column.title for column in shown.values())]
    titles += ["seconds a step, median (quartiles)", "ratio"]
    lines = [
        f"Mean and range over the seeds, after {_steps(record):,} steps.",
        "",
        f"| {' | '.join(titles)} |",
        "|" + " --- |" * len(titles),
    ]
    for recipe, entry in recipes.items():
        time = times.get(recipe)
        codes = [f"{codes_of(entry) or 0:,}"] if with_codes else []
        cells = [recipe, *codes, str(len(entry["seeds"])), *(interval(values_of(entry, name)) for name in shown)]
        cells += (
            [f"{time['median']:.3f} ({time['q1']:.3f} – {time['q3']:.3f})", f"{time['ratio']:.2f}"]
            if time
            else ["—"] * 2
        )
        lines.append(f"| {' | '.join(cells)} |")
    for name, column in shown.items():
        for group in groups(record) if column.better else ():
            if len(group) == 1:
                continue
            found = ", ".join(verdict(record, group, name, column.better or "")) or "none"
            lines += ["", f"Better than every seed of “{group[0]}” with every seed, by {column.title}: {found}."]
    return "\n".join(lines) + "\n"


def _steps(record: dict[str, Any]) -> int:
    entry = next(iter(record["recipes"].values()))
    return int(next(iter(entry["seeds"].values()))["curve"][-1][0])
