"""The plot of ``benchmarks/bench_sampling.py``."""

from pathlib import Path
from typing import Any

from llamagen.files import atomic_file

NAMES = {
    "compiled": "compiled",
    "compiled_int8": "compiled, int8",
    "eager": "eager",
    "peer": "transformers, one batch",
    "peer_two_passes": "transformers, two passes",
    "static": "static cache",
    "static_compiled": "static cache, torch.compile",
    "static_graphs": "static cache, torch.compile, CUDA graph",
    "static_reduce_overhead": "static cache, reduce-overhead",
}


def plot(result: dict[str, Any], path: Path) -> None:
    """Plot codes per second of each side, the share of the memory limit, and time against position.

    Args:
        result: the record of the benchmark.
        path: the PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (speed, share, time) = pyplot.subplots(3, 1, figsize=(11, 13), layout="constrained")
    cases = result["cases"]
    labels = [f"{c['size']} {c['dtype']}\n{c['batch']} × {c['codes']}" for c in cases]
    shown = [name for name in NAMES if any(name in case for case in cases)]
    for number, name in enumerate(shown):
        places = [i + (number - len(shown) / 2) * 0.8 / len(shown) for i, case in enumerate(cases) if name in case]
        values = [case[name] for case in cases if name in case]
        speed.bar(places, [v["codes_s"] for v in values], 0.8 / len(shown), label=NAMES[name], align="edge")
        share.bar(places, [100 * v["of_limit"] for v in values], 0.8 / len(shown), align="edge")
    for axis, title in ((speed, "codes per second"), (share, "% of the memory limit")):
        axis.set_xticks(range(len(cases)), labels, fontsize=7)
        axis.set_ylabel(title)
        axis.grid(axis="y", alpha=0.3)
    speed.set_yscale("log")
    speed.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    speed.set_title(result["machine"])
    for curve in result["growth"]:
        name = f"{curve['size']} {curve['dtype']}, batch {curve['batch']}"
        time.plot(*zip(*curve["position_ms"], strict=True), marker="o", label=name)
    time.set_xlabel("position")
    time.set_ylabel("ms per step, compiled")
    time.set_ylim(bottom=0)
    time.grid(alpha=0.3)
    time.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix("."), dpi=90)
