"""Time of passes over windows, and what they can save at most, next to the published loop's way.

    python -m benchmarks.bench_windows --device cuda --sizes B L XL XXL 3B --batches 1 8 --out windows.json

For each size and batch these run in alternation in one process, in bfloat16 with guidance 4 and top-k 2000: the
compiled engine with each window, and the loop of the published code with a static cache, ``torch.compile`` and CUDA
graphs (``benchmarks/plain_sampling.py``). The time of a pass does not depend on the weights, but the number of passes
does, and that of random weights says nothing about a trained model. So each window is measured twice: with random
weights, and with an output layer of zeros (``sure``), for which all codes follow from the noise and all guesses are
right: the most that a window can save. For a trained model, multiply its number of passes by the time of a pass.

Writes the record after each case, and prints a table. The prepared sampler of a batch is shared by all windows.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.bench_sampling import CONFIG, DTYPES, build
from benchmarks.gpu_table import sampling
from benchmarks.plain_sampling import WAYS, StaticSampler
from benchmarks.sizes import size_names
from benchmarks.timing import machine, spread, timed
from llamagen.files import atomic_file
from llamagen.sampling import Sampler
from llamagen.sampling.gpu.decoder import GPUCodeDecoder

Window = int | Literal["auto"]


def window_of(text: str) -> Window:
    """A number of codes, or ``auto``."""
    return "auto" if text == "auto" else int(text)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--sizes", nargs="+", default=["B"], choices=size_names())
    parser.add_argument("--dtype", default="bf16", choices=list(DTYPES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--codes", type=int, default=256)
    parser.add_argument("--windows", nargs="+", type=window_of, default=[1, 4, 8, 16, "auto"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, default="static_graphs", help="how the published loop runs a step")
    parser.add_argument("--backend", default="inductor", help="of torch.compile in that loop; eager for dry runs")
    parser.add_argument("--out", type=Path, help="path of the JSON file")
    return parser.parse_args()


def in_turns(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run, after one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            seconds = timed(run)
            if turn:
                times[name].append(seconds)
    return times


def measure(options: argparse.Namespace, size: str, batch: int) -> dict[str, Any]:
    """All windows of one size and batch, and the published loop."""
    dtype, codes = DTYPES[options.dtype], options.codes
    gpt = build(size, codes, options.device, dtype)
    labels = torch.arange(batch, device=options.device) % 1000
    start = time.perf_counter()
    sampler = Sampler(gpt, batch, compiled=True)
    # The widest first: graphs of narrower windows keep its workspaces.
    for window in sorted(options.windows, key=lambda window: (window != "auto", window == 1)):
        sampler.prepare(replace(CONFIG, window=window))
    entry: dict[str, Any] = {"size": size, "dtype": options.dtype, "batch": batch, "codes": codes}
    entry["ready_s"] = round(time.perf_counter() - start, 3)
    static = StaticSampler(gpt, batch, CONFIG, options.way, options.backend)
    passes: dict[str, int] = {}

    def ours(window: Window, name: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            found = sampler(labels, replace(CONFIG, window=window))
            if isinstance(sampler.decoder, GPUCodeDecoder) and window != 1:
                passes[name] = sampler.decoder.passes
            return found

        return run

    def add(name: str, times: list[float], count: int) -> None:
        median = spread(times)["median"]
        entry[name] = {
            **spread(times),
            "images_s": round(batch / median, 4),
            "ms_a_step": round(median / codes * 1e3, 4),
            "repeats": len(times),
            **({"passes": count, "ms_a_pass": round(median / count * 1e3, 4)} if count else {}),
        }

    runs: dict[str, Callable[[], Any]] = {
        f"window {window}": ours(window, f"window {window}") for window in options.windows
    }
    times = in_turns({**runs, options.way: lambda: static(labels)}, options.repeats)
    for name in times:
        add(name, times[name], passes.get(name, 0))
    reference = times[f"window {options.windows[0]}"]
    entry["ratios"] = {
        name: spread([mine / other for mine, other in zip(times[name], reference, strict=True)])
        for name in list(times)[1:]
    }
    with torch.no_grad():
        gpt.output.weight.zero_()
    sure = {f"sure, window {window}": ours(window, f"sure, window {window}") for window in options.windows}
    for name, seconds in in_turns(sure, options.repeats).items():
        add(name, seconds, passes.get(name, 0))
    print("\n".join(sampling(entry)), flush=True)
    return entry


def main() -> None:
    options = arguments()
    result: dict[str, Any] = {
        "benchmark": "bench_windows",
        "command": " ".join(["python -m benchmarks.bench_windows", *sys.argv[1:]]),
        "machine": machine(options.device),
        "torch": torch.__version__,
        "cases": [],
    }
    for size in options.sizes:
        for batch in options.batches:
            result["cases"].append(measure(options, size, batch))
            if options.out:
                with atomic_file(options.out) as temporary:
                    temporary.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
