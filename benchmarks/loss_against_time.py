"""Plot the loss of recorded runs of the autoregressive model against time.

    python -m benchmarks.loss_against_time RUN … OUT

RUN is a folder with the ``metrics.csv`` of a run with the ``Throughput`` callback, OUT a PNG file. A validation loss is
plotted at the time of the last training step before it.
"""

import csv
import math
import sys
from pathlib import Path

from matplotlib.figure import Figure

from llamagen.files import atomic_file


def read(path: Path) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Hours and losses of training and of validation."""
    train, val, hours = [], [], 0.0
    with path.open() as file:
        for row in csv.DictReader(file):
            if row.get("train/hours"):
                hours = float(row["train/hours"])
            if row.get("train/loss"):
                train.append((hours, float(row["train/loss"])))
            if row.get("val/loss"):
                val.append((hours, float(row["val/loss"])))
    return train, val


def main() -> None:
    *runs, out = map(Path, sys.argv[1:])
    figure = Figure(figsize=(5 * len(runs), 4), layout="constrained")
    for place, run in enumerate(runs):
        train, val = read(run / "metrics.csv")
        axes = figure.add_subplot(1, len(runs), place + 1)
        axes.axhline(math.log(16384), color="black", linestyle="--", label="ln 16384")
        for points, label, marker in ((train, "train", None), (val, "val, averaged weights", "o")):
            axes.plot(*zip(*[(60 * hours, loss) for hours, loss in points], strict=True), label=label, marker=marker)
        axes.set_title(f"{run.name}: {train[0][1]:.4f} → {train[-1][1]:.2f} nats a code")
        axes.set_xlabel("minutes")
        axes.legend()
    with atomic_file(out) as temporary:
        figure.savefig(temporary, format=out.suffix.removeprefix("."), dpi=80)


if __name__ == "__main__":
    main()
