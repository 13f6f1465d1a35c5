r"""FID, precision and recall of samples against the scale of guidance: ``main.py test`` for each scale, and a plot.

Everything behind ``--`` goes to ``python main.py test``. ``--line NAME=FILE`` draws the FID of a report's
``metrics.json``, also of ``python -m evaluation compare --report``, as a line to compare with. Scales that have a
report already are not drawn again.

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
    """Numbers of a report."""
    numbers: dict[str, float] = json.loads((folder / "metrics.json").read_text())["metrics"]
    return numbers


def value_of(numbers: dict[str, float], beginning: str) -> float:
    """The number whose name begins so, up to the extractor or the reference."""
    return next(value for name, value in numbers.items() if name.replace("/", "_").startswith(f"{beginning}_"))


def draw(points: dict[float, dict[str, float]], lines: dict[str, float]) -> Figure:
    """FID above, precision and recall below."""
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
    below.set(xlabel="scale of guidance", ylim=(0, 1))
    below.legend()
    return figure


def main() -> None:
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, help="folder of the record: sweep.json, sweep.png")
    parser.add_argument("runs", type=Path, help="folder of the runs")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0, 4.0])
    parser.add_argument("--line", action="append", default=[], help="NAME=metrics.json")
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
    save_png(figure_image(draw(points, lines)), options.out / "sweep.png")
    for scale, numbers in points.items():
        print(f"guidance {scale:g}: FID {value_of(numbers, 'gfid'):.3f}")


if __name__ == "__main__":
    main()
