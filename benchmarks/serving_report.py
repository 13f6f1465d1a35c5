"""Summaries, plot and Markdown tables of the serving benchmarks."""

import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.timing import spread
from llamagen.files import atomic_file

NAMES = {
    "embedded": "server, embedded engine",
    "vllm": "server, vLLM engine",
    "published": "published loop, `torch.compile`",
    "published_eager": "published loop, eager",
}
PAPER = {"B": (7.80, 2.39), "L": (13.72, 3.48), "XL": (19.76, 4.84), "XXL": (26.38, 6.36), "3B": (14.73, 6.26)}
"""Seconds for 8 images of 384 px on an A100, of the published loop and of vLLM: arXiv 2406.06525, the table of vLLM's
speed."""
FILES = {
    "cpu": "serving_cpu.json",
    "gpu": "serving_gpu.json",
    "eight": "serving_eight_gpu.json",
    "load": "serving_load.json",
}
NOT_MEASURED = "Not measured yet."
NONE = "–"
SIZE = "B"
"""Size of the models in the table of purposes."""


def summarize(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Median and quartiles over the rounds of an engine.

    Returns:
        ``images_s`` at saturation; for each load of ``points`` its rate, the requests and errors of all rounds, and the
        50th and 95th percentile of latency and first row in seconds.
    """
    found: dict[str, Any] = {}
    if rates := [each["saturation"]["images_s"] for each in rounds if "saturation" in each]:
        found["images_s"] = spread(rates)
    points: dict[str, Any] = {}
    for share in dict.fromkeys(share for each in rounds for share in each.get("points", {})):
        entries = [each["points"][share] for each in rounds if share in each.get("points", {})]
        point: dict[str, Any] = {"rate": entries[0]["rate"]}
        for name in ("requests", "errors"):
            point[name] = sum(entry[name] for entry in entries)
        for name in ("latency", "first_row"):
            for percentile in ("p50", "p95"):
                values = [entry[f"{name}_s"][percentile] for entry in entries if entry[f"{name}_s"]]
                if values:
                    point[f"{name}_{percentile}"] = spread(values)
        points[share] = point
    if points:
        found["points"] = points
    return found


def plot(record: dict[str, Any], path: Path) -> None:
    """Plot latency against load: a panel for each model, the median as a line and the 95th percentile dashed.

    Args:
        record: record of ``benchmarks/serving.py``.
        path: the PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = record["models"]
    figure, axes = pyplot.subplots(1, len(models), figsize=(6 * len(models), 4.5), layout="constrained", squeeze=False)
    for axis, (model, engines) in zip(axes[0], models.items(), strict=True):
        for number, (engine, results) in enumerate(engines.items()):
            points = [point for point in results.get("points", {}).values() if "latency_p50" in point]
            label = NAMES[engine].replace("`", "")
            for percentile, style in (("p50", "-"), ("p95", "--")):
                values = [point[f"latency_{percentile}"]["median"] for point in points]
                name = f"{label}, {percentile}"
                axis.plot(
                    [point["rate"] for point in points], values, style, marker="o", color=f"C{number}", label=name
                )
            if "images_s" in results:
                axis.axvline(results["images_s"]["median"], color=f"C{number}", alpha=0.3)
        axis.set_title(f"GPT-{model}, {record['settings']['pixels']} px, {record['settings']['dtype']}")
        axis.set_xlabel("load, images/s (vertical lines: saturation)")
        axis.set_ylabel("latency, s")
        axis.set_ylim(bottom=0)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=6, loc="upper right", framealpha=0.2)
    figure.suptitle(record["hardware"], fontsize=9)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)
    pyplot.close(figure)


def write_tables(page: Path, results: Path) -> None:
    """Replace the tables of a page by those of the records; see :func:`replace_tables`."""
    text = replace_tables(page.read_text(), read_records(results))
    with atomic_file(page) as temporary:
        temporary.write_text(text)
    print(f"{page}: tables written from the records in {results}")


def read_records(results: Path) -> dict[str, Any]:
    """The records of :data:`FILES` that exist."""
    return {key: json.loads((results / name).read_text()) for key, name in FILES.items() if (results / name).exists()}


def replace_tables(text: str, records: dict[str, Any]) -> str:
    """A page with its tables written again, each between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``.

    Raises:
        ValueError: if a table has no place.
    """
    tables = {
        "purposes": purposes(records),
        "rates": rates(records),
        "eight": eight(records),
        "load": load(records),
    }
    for name, table in tables.items():
        pattern = rf"(<!-- begin {name} -->\n).*?(\n<!-- end {name} -->)"
        text, count = re.subn(pattern, lambda match, table=table: match[1] + table + match[2], text, flags=re.DOTALL)  # type: ignore[misc]
        if count != 1:
            raise ValueError(
                f"the page has {count} places for the table {name}; it needs one <!-- begin {name} --> line"
            )
    return text


def purposes(records: dict[str, Any]) -> str:
    """What each way to run a model is for, with images a second of GPT-B on a CPU."""
    engines = records.get("cpu", {}).get("models", {}).get(SIZE, {})
    in_process = records.get("load", {}).get("in_process", {}).get("image_sampler", {})
    http = records.get("load", {}).get("in_process", {}).get("http_over_image_sampler", {})
    ratio = f" ({http['median']:.0%} of `LlamaGen`'s)" if http else ""
    rows = [
        (
            "[`LlamaGen`](pretrained.md)",
            "scripts, notebooks, many images at once",
            "nothing to run or to secure",
            "`LlamaGen.from_pretrained(MODEL)`",
            _number(in_process.get("median")),
        ),
        (
            "[server](#start-and-call), embedded engine",
            "one machine: a laptop, a GPU, several GPUs",
            "OpenAI's interface, rows as they are finished, the images of `LlamaGen`",
            "`python -m serving.server MODEL`",
            _rate(engines.get("embedded")) + ratio,
        ),
        (
            "[Ray Serve](ray.md)",
            "several machines, or a load that changes",
            "the same interface and images; replicas that start, stop and are replaced",
            "`python -m serving.ray_serve MODEL`",
            "not measured separately",
        ),
        (
            "[server](vllm.md), vLLM engine",
            "models larger than a GPU; short waiting times under load",
            "the same interface; continuous batching, tensor parallelism",
            "`python -m serving.server MODEL --engine vllm`",
            _rate(engines.get("vllm")),
        ),
        (
            "[stock vLLM](vllm.md)",
            "a vLLM that runs already, next to language models",
            "codes instead of images, vLLM's own interface",
            "`vllm.LLM(model=FOLDER)`",
            NONE,
        ),
    ]
    head = ("", "for", "gives", "command", f"images/s, GPT-{SIZE}")
    captions = [_caption(records, "cpu")]
    if in_process and "cpu" in records:  # the row of LlamaGen is of another measurement
        captions.append("\n\n`LlamaGen`: " + _caption(records, "load").strip())
    return _table(head, rows) + "".join(captions)


def rates(records: dict[str, Any]) -> str:
    """Saturation and latency of each engine, on a CPU and a GPU."""
    parts = [_rates_of(records[kind]) + _caption(records, kind) for kind in ("cpu", "gpu") if kind in records]
    return "\n\n".join(parts) or NOT_MEASURED


def _rates_of(record: dict[str, Any]) -> str:
    shares = list(dict.fromkeys(share for _, _, result in _results(record) for share in result.get("points", {})))
    latencies = [f"latency at {float(share):.0%}" for share in shares]
    head = ("model", "engine", "images/s at saturation", "compared with the published loop", *latencies, "first row")
    rows = []
    for model, engine, result in _results(record):
        base = record["models"][model].get("published", {}).get("images_s", {}).get("median")
        ours = result.get("images_s", {}).get("median")
        factor = f"{ours / base:.2f} times" if ours and base else NONE
        if engine == "vllm" and model in PAPER and ours and base:
            factor += f" (paper, A100, 384 px: {PAPER[model][0] / PAPER[model][1]:.2f} times)"
        points = [result.get("points", {}).get(share, {}) for share in shares]
        cells = [_pair(point, "latency") for point in points]
        middle = points[len(points) // 2] if points else {}
        rows.append((model, NAMES[engine], _rate(result, quartiles=True), factor, *cells, _pair(middle, "first_row")))
    return _table(head, rows)


def _results(record: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [(model, engine, each) for model, engines in record["models"].items() for engine, each in engines.items()]


def eight(records: dict[str, Any]) -> str:
    """Seconds for 8 images next to the paper's."""
    head = ("model", *(f"{NAMES[name]}, s" for name in NAMES), "paper: published loop → vLLM, s")
    engines = records.get("eight", {}).get("models", {})
    rows = []
    for model in dict.fromkeys([*engines, *PAPER]):
        found = [engines.get(model, {}).get(name, {}).get("rounds", [{}])[-1] for name in NAMES]
        cells = [_number(each.get("seconds_for_eight", {}).get("median")) for each in found]
        paper = "{:.2f} → {:.2f} ({:.2f} times)".format(*PAPER[model], PAPER[model][0] / PAPER[model][1])
        rows.append((model, *cells, paper if model in PAPER else NONE))
    return _table(head, rows) + _caption(records, "eight")


def load(records: dict[str, Any]) -> str:
    """What the load test found: a row for each part."""
    if "load" not in records:
        return NOT_MEASURED
    return _table(("test", "result"), list(records["load"]["findings"].items())) + _caption(records, "load")


def _caption(records: dict[str, Any], key: str) -> str:
    """Machine, settings and file of a record."""
    if key not in records:
        return f"\n\nThis implementation: {NOT_MEASURED.lower()}"
    record = records[key]
    settings = record["settings"]
    return (
        f"\n\n{record['hardware']}; {settings['pixels']} px, {settings['dtype']}, guidance "
        f"{settings['guidance_scale']:g}, top-k {settings['top_k']}, at most {settings['batch_size']} images at a time "
        f"([record](../benchmarks/results/{FILES[key]}))."
    )


def _rate(result: dict[str, Any] | None, quartiles: bool = False) -> str:
    if not result or "images_s" not in result:
        return NONE
    rate = result["images_s"]
    return _number(rate["median"]) + (f" ({_number(rate['q1'])} to {_number(rate['q3'])})" if quartiles else "")


def _pair(point: dict[str, Any], name: str) -> str:
    if f"{name}_p50" not in point:
        return NONE
    return " / ".join(_number(point[f"{name}_{percentile}"]["median"]) for percentile in ("p50", "p95"))


def _number(value: float | None) -> str:
    """Three digits or more."""
    if value is None:
        return NONE
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def slope(points: list[tuple[float, float]]) -> float:
    """Slope of a straight line through points (x, y), by least squares; 0 with fewer than two."""
    if len(points) < 2:
        return 0.0
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def plot_memory(series: list[dict[str, Any]], path: Path) -> None:
    """Plot the memory of a server's processes over time.

    Args:
        series: entries ``seconds``, ``front`` and ``workers`` (MiB).
        path: the PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 4), layout="constrained")
    for name in ("front", "workers"):
        axis.plot([entry["seconds"] / 60 for entry in series], [entry[name] for entry in series], label=name)
    axis.set_xlabel("minutes")
    axis.set_ylabel("resident memory, MiB")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend()
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)
    pyplot.close(figure)
