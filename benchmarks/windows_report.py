"""Tables and plot of ``benchmarks/windows.py``."""

import re
from pathlib import Path
from typing import Any

from llamagen.files import atomic_file


def write_table(record: dict[str, Any], page: Path) -> None:
    """Replace the tables of a page, each between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``.

    Raises:
        ValueError: if a table has no place.
    """
    text = page.read_text()
    for name, table in tables(record).items():
        pattern = rf"(<!-- begin {name} -->\n).*?(\n<!-- end {name} -->)"
        text, count = re.subn(pattern, lambda match, table=table: match[1] + table + match[2], text, flags=re.DOTALL)  # type: ignore[misc]
        if count != 1:
            raise ValueError(f"{page} has {count} places for the table {name}; it needs one <!-- begin {name} --> line")
    with atomic_file(page) as temporary:
        temporary.write_text(text)
    print(f"{page}: tables written")


def tables(record: dict[str, Any]) -> dict[str, str]:
    """The tables by name."""
    found = {}
    if "passes" in record:
        found["window-passes"] = _passes(record["passes"])
    if "guesses" in record:
        found["window-guesses"] = _guesses(record["guesses"])
    if "times" in record:
        found["window-times"] = _times(record["times"])
    if "pass_times" in record:
        found["window-pass-times"] = _pass_times(record["pass_times"])
    return found


def _passes(part: dict[str, Any]) -> str:
    windows = list(next(iter(part.values()))[0]["passes"])
    rows = [
        [
            name,
            f"{entry['guidance_scale']:g}",
            str(entry["top_k"] or "off"),
            str(entry["codes"]),
            *(f"{entry['passes'][window]:.0f}" for window in windows),
        ]
        for name, entries in part.items()
        for entry in entries
    ]
    return _table(["model", "guidance", "top-k", "window 1", *windows], rows)


def _guesses(part: dict[str, Any]) -> str:
    windows = list(next(iter(next(iter(part.values())).values())))
    rows = [
        [name, way, *(f"{passes[window]:.0f}" for window in windows)]
        for name, ways in part.items()
        for way, passes in ways.items()
    ]
    return _table(["model", "guess", *(f"window {window}" for window in windows)], rows)


def _times(part: dict[str, Any]) -> str:
    windows = list(next(iter(next(iter(part.values())).values()))["seconds"])
    rows = [
        [
            name,
            batch,
            f"{entry['seconds']['1']['median']:.3g} s",
            *(_ratio(entry["times_faster"][window]) for window in windows if window != "1"),
        ]
        for name, batches in part.items()
        for batch, entry in batches.items()
    ]
    names = [window if window == "auto" else f"window {window}" for window in windows if window != "1"]
    return _table(["model", "images", "window 1", *names], rows)


def _pass_times(part: dict[str, Any]) -> str:
    windows = list(next(iter(next(iter(part.values())).values())))
    rows = [
        [f"GPT-{size}", batch, *(f"{1e3 * times[window]['median']:.1f}" for window in windows)]
        for size, batches in part.items()
        for batch, times in batches.items()
    ]
    return _table(["ms a pass", "images", *(f"window {window}" for window in windows)], rows)


def _ratio(spread: dict[str, float]) -> str:
    return f"{spread['median']:.2f} ({spread['q1']:.2f}–{spread['q3']:.2f})"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot(record: dict[str, Any], path: Path) -> None:
    """Plot passes against the window, and how much faster each window is, a line for each model.

    Args:
        record: the record of the benchmark.
        path: the PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for number, (name, entries) in enumerate(record.get("passes", {}).items()):
        for entry in entries:
            if entry["top_k"]:
                continue
            windows = [1, *map(int, entry["passes"])]
            shares = [1.0, *(value / entry["codes"] for value in entry["passes"].values())]
            style = {1.0: "-", 2.0: "--", 4.0: ":"}[entry["guidance_scale"]]
            left.plot(
                windows,
                shares,
                style,
                color=f"C{number}",
                marker="o",
                label=f"{name}, guidance {entry['guidance_scale']:g}",
            )
    left.set_xscale("log", base=2)
    left.set_xlabel("window")
    left.set_ylabel("passes / codes")
    left.set_ylim(0, 1.05)
    for number, (name, batches) in enumerate(record.get("times", {}).items()):
        for style, (batch, entry) in zip(("-", "--", ":", "-."), batches.items(), strict=False):
            faster = {window: value["median"] for window, value in entry["times_faster"].items()}
            fixed = [window for window in faster if window != "auto"]
            label = f"{name}, {batch} images (auto {faster['auto']:.2f})"
            right.plot(
                [int(window) for window in fixed],
                [faster[window] for window in fixed],
                style,
                color=f"C{number}",
                marker="o",
                label=label,
            )
    right.axhline(1.0, color="grey", linewidth=0.5)
    right.set_xscale("log", base=2)
    right.set_xlabel("window")
    right.set_ylabel("times as fast as window 1")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=6)
    figure.suptitle(record.get("machine", ""), fontsize=9)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    pyplot.close(figure)
