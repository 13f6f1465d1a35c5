r"""FID, precision and recall of samples against the guidance scale: ``main.py test`` for each scale, and a plot.

All arguments after ``--`` are passed to ``python main.py test``. ``--line NAME=FILE`` adds a horizontal line at the FID
in the ``metrics.json`` of another report, such as that of ``python -m evaluation compare --report``. Scales that
already have a report are not measured again.

    python -m benchmarks.guidance_sweep docs/runs/evaluation_digits runs/sweep --scales 1 1.5 2 3 4 \
        --line "real test images=runs/real/metrics.json" -- --config configs/argen/base.yaml …
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from llamagen.files import atomic_file
from llamagen.grids import figure_image, save_png
from llamagen.output_paths import check_output


def metrics_of(folder: Path) -> dict[str, float]:
    """Metrics of a report by name."""
    numbers: dict[str, float] = json.loads((folder / "metrics.json").read_text())["metrics"]
    return numbers


def value_of(numbers: dict[str, float], prefix: str) -> float:
    """The value of the metric of this name, with any extractor and reference."""
    return next(value for name, value in numbers.items() if name.replace("/", "_").startswith(f"{prefix}_"))


def plot(points: dict[float, dict[str, float]], lines: dict[str, float]) -> Figure:
    """FID in the upper plot, precision and recall in the lower one."""
    figure = Figure(figsize=(6, 6), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    scales = sorted(points)
    above.plot(scales, [value_of(points[scale], "gfid") for scale in scales], "o-", label="samples")
    for place, (name, value) in enumerate(lines.items()):
        above.axhline(value, color=f"C{place + 1}", linestyle="--", label=f"{name}: {value:.3g}")
    name = next(key for key in points[scales[0]] if key.startswith("gfid"))
    above.set(ylabel=name, yscale="log")
    above.legend()
    for each in ("precision", "recall"):
        below.plot(scales, [value_of(points[scale], each) for scale in scales], "o-", label=each)
    below.set(xlabel="guidance scale", ylim=(0, 1))
    below.legend()
    return figure


def main() -> None:
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, help="folder for sweep.json and sweep.png")
    parser.add_argument("runs", type=Path, help="folder for the runs of main.py test")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0, 4.0])
    parser.add_argument(
        "--line", action="append", default=[], help="NAME=metrics.json: a line at the FID of that report"
    )
    options = parser.parse_args(arguments[:split])
    try:
        check_output(options.out / "sweep.json", "out")
        check_output(options.runs / "guidance_1", "runs")
    except ValueError as error:
        parser.error(str(error))
    for each in options.line:
        if not Path(each.partition("=")[2]).is_file():
            parser.error(f"--line is {each}; give NAME=metrics.json, a file that exists")
    points: dict[float, dict[str, float]] = {}
    for scale in options.scales:
        folder = options.runs / f"guidance_{scale:g}"
        if not (folder / "report").is_dir():
            scaled = [f"--model.init_args.sampling.guidance_scale={scale}", f"--trainer.default_root_dir={folder}"]
            command = [sys.executable, "main.py", "test", *arguments[split + 1 :], *scaled]
            if status := subprocess.run(command, check=False).returncode:
                parser.exit(status, f"guidance_scale {scale:g} failed, see above\n")
        points[scale] = metrics_of(folder / "report")
    lines: dict[str, float] = {}
    for each in options.line:
        name, _, path = each.partition("=")
        numbers = metrics_of(Path(path).parent)
        lines[name] = next(value for key, value in numbers.items() if key.startswith(("gfid", "rfid")))
    options.out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"arguments": arguments, "scales": points, "lines": lines}
    with atomic_file(options.out / "sweep.json") as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n")
    save_png(figure_image(plot(points, lines)), options.out / "sweep.png")
    for scale, numbers in points.items():
        print(f"guidance {scale:g}: FID {value_of(numbers, 'gfid'):.3f}")


if __name__ == "__main__":
    main()
