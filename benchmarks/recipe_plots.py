"""Plots of benchmarks/recipes.py."""

import re
import statistics
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.recipe_report import codes_of, values_of
from benchmarks.recipe_runs import Column
from llamagen.files import atomic_file


def plot_curves(record: dict[str, Any], columns: dict[str, Column], title: str, path: Path) -> None:
    """Validation loss over the steps (mean and range over the seeds), and final loss and FID of each seed."""
    recipes = record["recipes"]
    judged = [name for name, column in columns.items() if column.better]
    metrics = [name for name in judged if any(values_of(entry, name) for entry in recipes.values())]
    figure = Figure(figsize=(5.5 + 3.2 * len(metrics), 4), layout="constrained")
    curves, *panels = figure.subplots(1, 1 + len(metrics), width_ratios=[1.7] + [1.0] * len(metrics))
    for place, (recipe, entry) in enumerate(recipes.items()):
        _add_curve(curves, entry, f"C{place}", recipe)
    curves.set(xlabel="steps", ylabel=columns[judged[0]].title, title=title)
    curves.legend()
    for axes, name in zip(panels, metrics, strict=True):
        for place, entry in enumerate(recipes.values()):
            values = values_of(entry, name)
            axes.plot([place] * len(values), values, "o", color=f"C{place}", alpha=0.6)
            axes.plot([place - 0.25, place + 0.25], [statistics.mean(values)] * 2, color=f"C{place}")
        axes.set_xticks(range(len(recipes)), list(recipes), rotation=20, ha="right")
        axes.set(title=columns[name].title, xlim=(-0.6, len(recipes) - 0.4))
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)


def plot_sizes(record: dict[str, Any], columns: dict[str, Column], path: Path) -> None:
    """Metrics against the number of codes, and the curves of each number; mean and range over the seeds.

    A line joins recipes whose names differ only in a number at the end, such as “VQ 512” and “VQ 4096”.
    """
    recipes = record["recipes"]
    sizes = sorted({codes_of(entry) or 0 for entry in recipes.values()})
    kinds = list(dict.fromkeys(map(_kind, recipes)))
    colours = {kind: f"C{place}" for place, kind in enumerate(kinds)}
    shown = [name for name in columns if name in ("rfid", "psnr", "perplexity")]
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    rows = figure.subfigures(2, 1, squeeze=False, height_ratios=[1.25, 1.0])
    upper, lower = rows[:, 0]
    for axes, metric in zip(upper.subplots(1, len(shown)), shown, strict=True):
        for place, kind in enumerate(kinds):
            entries = sorted((e for name, e in recipes.items() if _kind(name) == kind), key=lambda e: codes_of(e) or 0)
            # shifted a little, so that the ranges do not hide each other
            at = [(codes_of(entry) or 0) * 2 ** (0.12 * (place - (len(kinds) - 1) / 2)) for entry in entries]
            values = [values_of(entry, metric) for entry in entries]
            means = [statistics.mean(each) for each in values]
            below = [mean - min(each) for mean, each in zip(means, values, strict=True)]
            above = [max(each) - mean for mean, each in zip(means, values, strict=True)]
            axes.errorbar(at, means, [below, above], fmt="o-", capsize=3, color=colours[kind], label=kind)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.minorticks_off()
        if metric == "perplexity":
            axes.set_yscale("log")
        arrow = {"min": " (less is better)", "max": " (more is better)", None: " of the codes"}[columns[metric].better]
        axes.set(xlabel="codes", title=columns[metric].title + arrow)
        axes.grid(alpha=0.3)
    upper.legend(*upper.axes[0].get_legend_handles_labels(), loc="outside right center")
    panels = lower.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    for axes, size in zip(panels, sizes, strict=True):
        for name, entry in recipes.items():
            if codes_of(entry) == size:
                _add_curve(axes, entry, colours[_kind(name)], name)
        axes.set(xlabel="steps", title=f"{size:,} codes")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("validation PSNR, dB")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)


def _kind(recipe: str) -> str:
    return re.sub(r"\s+[\d.,]+k?$", "", recipe)


def _add_curve(axes: Axes, entry: dict[str, Any], colour: str, label: str) -> None:
    runs = [dict(map(tuple, seed["curve"])) for seed in entry["seeds"].values()]
    steps = sorted(set.intersection(*(set(run) for run in runs)))
    values = [[run[step] for run in runs] for step in steps]
    axes.plot(steps, [statistics.mean(each) for each in values], "o-", color=colour, label=label)
    axes.fill_between(steps, [min(e) for e in values], [max(e) for e in values], color=colour, alpha=0.2)
