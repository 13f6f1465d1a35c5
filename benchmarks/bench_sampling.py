"""Codes per second of sampling, compared with the Llama of transformers and with the limit of the memory bandwidth.

    python -m benchmarks.bench_sampling --device cpu --dtypes fp32 bf16 --sizes B L --batches 1 4 16 64 --codes 256 576
    python -m benchmarks.bench_sampling --device cuda --dtypes bf16 --sizes B L XL XXL 3B --batches 1 4 16 64
    python -m benchmarks.bench_sampling --device cuda --dtypes bf16 --sides compiled static static_graphs
    python -m benchmarks.bench_sampling --dtypes bf16 --sizes B L --batches 4 16 64 --sides compiled static_compiled

For each size, dtype and batch, these run in alternation in one process: (a) the eager engine, (b) the compiled engine,
(c) ``generate`` of a transformers Llama of the same shape, with guidance by a logits processor and both branches in one
batch, so that it reads its weights once per step like ours, (d) the same Llama with its own ``guidance_scale``, which
runs the branches one after the other, (e) on request, the loop of the published code with a static cache, in the four
ways of ``benchmarks/plain_sampling.py``: the last command puts the compiled engine side by side with that loop under
``torch.compile`` on a CPU. All use a guidance scale of 4.0 and top-k 2000. Prints medians and quartiles.
Ratios of times are taken within each turn, and their median and quartiles recorded.

The memory limit is the number of bytes that the steps must read (all weights but the embeddings, and the filled part
of the cache) divided by the bandwidth of a copy, which is measured in the same run. Prints tables, then a line of JSON,
and saves a plot. ``transformers`` is in the extra ``benchmark``.
"""

import argparse
import gc
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.plain_sampling import COMPILED, STATIC, WAYS, StaticSampler
from benchmarks.sampling_peer import Peer
from benchmarks.sampling_plot import plot
from benchmarks.sampling_start import first_image, images_a_second
from benchmarks.sizes import TINY, gpt_shape, size_names
from benchmarks.timing import machine, spread, synchronize, timed
from llamagen.files import atomic_file
from llamagen.models.gpt import GPT, GPTConfig
from llamagen.sampling import Sampler, SamplingConfig
from llamagen.sampling.decoder import DecodeState
from llamagen.sampling.inputs import SamplingRequest

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CONFIG = SamplingConfig(guidance_scale=4.0, top_k=2000)
SLOW = (STATIC, COMPILED)
"""Sides that wait for the host, which launches every kernel. All of their steps cost the same."""
SIDES = ("compiled", "compiled_int8", "eager", "peer", "peer_two_passes", *WAYS)


class Side(NamedTuple):
    """One of the implementations that are compared, ready to run.

    Attributes:
        run: samples the codes of a batch.
        codes: number of codes that it samples for each image.
        ready_s: seconds of its preparation.
        gib: memory that it holds on the GPU besides the weights, in GiB.
        note: how it differs on this device, or empty.
    """

    run: Callable[[], Any]
    codes: int
    ready_s: float
    gib: float
    note: str = ""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--sizes", nargs="+", default=["B"], choices=size_names())
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=list(DTYPES))
    parser.add_argument("--batches", nargs="+", type=int, default=[4])
    parser.add_argument("--codes", nargs="+", type=int, default=[256])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--once-above", type=float, default=60.0, help="do not repeat runs that take more seconds than this"
    )
    parser.add_argument("--case-seconds", type=float, default=math.inf, help="start no further turn after this time")
    parser.add_argument(
        "--sides", nargs="+", default=["eager", "compiled", "peer", "peer_two_passes"], choices=list(SIDES)
    )
    parser.add_argument(
        "--static-codes",
        type=int,
        help="codes that static and static_compiled sample; their time is scaled, as all steps cost the same",
    )
    parser.add_argument(
        "--backend", default="inductor", help="of torch.compile in the static loops; eager for dry runs"
    )
    parser.add_argument("--brief", action="store_true", help="without the time by position and without the plot")
    parser.add_argument("--int8", action="store_true", help="also measure the compiled engine with int8 weights")
    parser.add_argument("--warm", type=int, default=0, help="number of processes that compile GPU kernels in advance")
    parser.add_argument(
        "--first", action="store_true", help="also measure the time to the first image in a new process"
    )
    parser.add_argument(
        "--ranks", nargs="*", type=int, default=[], help="also measure images/s with these numbers of processes"
    )
    parser.add_argument("--out", type=Path, help="path of the JSON file and the plot, without extension")
    return parser.parse_args()


@torch.no_grad()
def build(size: str, codes: int, device: str, dtype: torch.dtype, layers: int | None = None) -> GPT:
    """A GPT with random weights, whose distributions spread over many codes."""
    net = gpt_shape(size)
    net["n_layer"] = layers or net["n_layer"]
    with torch.device("meta"):
        gpt = GPT(GPTConfig(**net, block_size=codes)).to(dtype)
    gpt.to_empty(device=device).eval()
    for parameter in gpt.parameters():
        parameter.normal_(0, 0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
    return gpt


def copy_bandwidth(device: str, size: str = "") -> float:
    """Bytes per second that a large copy reads and writes: the median of nine copies; a small copy for ``tiny``."""
    source = torch.randn(2**20 if size == TINY else 2**28, device=device)
    target, times = torch.empty_like(source), []
    for _ in range(9):
        synchronize()
        start = time.perf_counter()
        target.copy_(source)
        synchronize()
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / sorted(times)[len(times) // 2]


def bytes_read(gpt: GPT, dtype: torch.dtype, batch: int, int8: bool = False) -> float:
    """Bytes that all steps of a guided batch must read: the weights, and the filled part of the cache."""
    config = gpt.config
    matrices = [p for name, p in gpt.named_parameters() if p.dim() > 1 and "embed" not in name]
    weights = sum(p.numel() * (1 if int8 else dtype.itemsize) + (4 * len(p) if int8 else 0) for p in matrices)
    place = 2 * config.n_layer * config.kv_heads * config.head_dim * dtype.itemsize
    positions = sum(range(config.condition_length, config.condition_length + config.block_size))
    return weights * config.block_size + 2 * batch * place * positions


def gpu_gib(peak: bool = False) -> float:
    """Memory of tensors on the GPU in GiB, now or at most since the last reset; 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0.0
    return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 2**30


def makers(options: argparse.Namespace, gpt: GPT, batch: int) -> dict[str, Callable[[], tuple[Callable[[], Any], str]]]:
    """For each side that was asked for, a function that prepares it and returns what to time, and a note."""
    labels = torch.arange(batch, device=options.device) % 1000

    def ours(compiled: bool, int8: bool = False) -> tuple[Callable[[], Any], str]:
        sampler = Sampler(gpt, batch, compiled=compiled, int8=int8)
        sampler.prepare(CONFIG)
        return lambda: sampler(labels, CONFIG), ""

    def peer(method: str) -> tuple[Callable[[], Any], str]:
        return partial(getattr(Peer(gpt, CONFIG), method), labels), ""

    def static(way: str) -> tuple[Callable[[], Any], str]:
        sampler = StaticSampler(gpt, batch, CONFIG, way, options.backend)
        return lambda: sampler(labels, options.static_codes if way in SLOW else None), sampler.note

    known: dict[str, Callable[[], tuple[Callable[[], Any], str]]] = {
        "eager": lambda: ours(False),
        "compiled": lambda: ours(True),
        "compiled_int8": lambda: ours(True, True),
        "peer": lambda: peer("one_batch"),
        "peer_two_passes": lambda: peer("two_passes"),
        **{way: partial(static, way) for way in WAYS},
    }
    wanted = {*options.sides, *(["compiled_int8"] if options.int8 else [])}
    return {name: known[name] for name in known if name in wanted}


def prepare(options: argparse.Namespace, gpt: GPT, batch: int, codes: int) -> tuple[dict[str, Side], dict[str, str]]:
    """The sides by name, and the errors of those that could not be prepared."""
    found, failed = {}, {}
    for name, make in makers(options, gpt, batch).items():
        start, before = time.perf_counter(), gpu_gib()
        try:
            run, note = make()
        except Exception as error:  # one side must not cost the measurements of the others
            failed[name] = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            continue
        synchronize()
        count = options.static_codes if name in SLOW and options.static_codes else codes
        found[name] = Side(run, count, round(time.perf_counter() - start, 3), gpu_gib() - before, note)
    return found, failed


def run_in_turns(
    options: argparse.Namespace, runs: dict[str, Side], codes: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of each side for all codes, turn by turn, and the GiB that a run takes for a while."""
    end = time.perf_counter() + options.case_seconds
    first, peak = {}, {}
    for name, side in runs.items():
        before = gpu_gib()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        first[name] = timed(side.run) * codes / side.codes
        peak[name] = gpu_gib(peak=True) - before
    times: dict[str, list[float]] = {}
    for _ in range(options.repeats):
        if time.perf_counter() > end:
            break
        for name, side in runs.items():
            if first[name] < options.once_above:
                times.setdefault(name, []).append(timed(side.run) * codes / side.codes)
    return {name: times.get(name, [first[name]]) for name in runs}, peak


def measure(options: argparse.Namespace, size: str, kind: str, batch: int, codes: int) -> dict[str, Any]:
    """Time all sides at one size, dtype and batch."""
    dtype = DTYPES[kind]
    gc.collect()  # compiled modules of the case before refer to themselves
    gpt = build(size, codes, options.device, dtype)
    runs, failed = prepare(options, gpt, batch, codes)
    bandwidth = copy_bandwidth(options.device, size)
    times, peak = run_in_turns(options, runs, codes)
    entry: dict[str, Any] = {"size": size, "dtype": kind, "batch": batch, "codes": codes}
    entry["ready_s"] = {name: side.ready_s for name, side in runs.items()}
    entry["copy_gb_s"] = round(bandwidth / 1e9, 2)
    weights = sum(parameter.nbytes for parameter in gpt.parameters()) / 2**30
    for name, side in runs.items():
        limit = bytes_read(gpt, dtype, batch, "int8" in name) / bandwidth
        median = spread(times[name])["median"]
        entry[name] = {
            **spread(times[name]),
            "codes_s": round(batch * codes / median, 1),
            "images_s": round(batch / median, 4),
            "ms_a_step": round(median / codes * 1e3, 4),
            "of_limit": round(limit / median, 3),
            "repeats": len(times[name]),
            **({"timed_codes": side.codes} if side.codes != codes else {}),
            **({"gib": round(weights + side.gib + peak[name], 3)} if options.device == "cuda" else {}),
            **({"note": side.note} if side.note else {}),
        }
    if failed:
        entry["failed"] = failed
    compare(entry, times)
    print(line(entry), flush=True)
    return entry


def compare(entry: dict[str, Any], times: dict[str, list[float]]) -> None:
    """Add the ratios of the other sides' times to those of the compiled engine."""
    for name in times if "compiled" in times else ():
        if not name.startswith("compiled"):
            entry[f"times_{name}"] = round(entry[name]["median"] / entry["compiled"]["median"], 2)
            turns = zip(times[name], times["compiled"], strict=False)  # a slow side has fewer
            entry.setdefault("ratios", {})[name] = spread([other / ours for other, ours in turns])


def line(entry: dict[str, Any]) -> str:
    """One row of the table."""
    head = f"{entry['size']:5}{entry['dtype']:6}{entry['batch']:4}{entry['codes']:5}"
    cells = [
        f"{name} {entry[name]['codes_s']:.0f}/s {entry[name]['ms_a_step']:.2f} ms {entry[name]['of_limit']:.0%}"
        for name in SIDES
        if name in entry
    ]
    ratios = [f"{name[6:]} × {entry[name]}" for name in entry if name.startswith("times_")]
    failed = "".join(f"\n  {name} failed: {reason}" for name, reason in entry.get("failed", {}).items())
    return f"{head}  {' | '.join(cells)}  {', '.join(ratios)}{failed}"


def growth(options: argparse.Namespace, size: str, kind: str, batch: int, codes: int) -> dict[str, Any]:
    """Time of a compiled step against the position."""
    gpt = build(size, codes, options.device, DTYPES[kind])
    sampler, marks = Sampler(gpt, batch, compiled=True), []
    start = sampler.decoder.start

    @contextmanager
    def timed(request: SamplingRequest) -> Iterator[DecodeState]:
        with start(request) as state:
            advance = state.advance

            def advance_and_mark(step: int) -> None:
                advance(step)
                synchronize()
                marks.append(time.perf_counter())

            state.advance = advance_and_mark  # type: ignore[method-assign]
            yield state

    sampler.decoder.start = timed  # type: ignore[method-assign]
    labels = torch.arange(batch, device=options.device)
    steps = []
    for _ in range(4):
        marks.clear()
        sampler(labels, CONFIG)
        steps.append([later - earlier for earlier, later in pairwise(marks)])
    middle = [sorted(times)[len(times) // 2] for times in zip(*steps[1:], strict=True)]
    part = max(len(middle) // 8, 1)
    windows = [middle[start : start + part] for start in range(0, part * 8, part)]
    points = [[start * part + part // 2, round(sum(w) / len(w) * 1e3, 4)] for start, w in enumerate(windows) if w]
    return {"size": size, "dtype": kind, "batch": batch, "codes": codes, "position_ms": points}


def warm(options: argparse.Namespace) -> None:
    """Fill the caches of compiled code with several processes, each with a model of one layer."""
    cases = [
        (s, b, c, d) for s in options.sizes for b in options.batches for c in options.codes[:1] for d in options.dtypes
    ]
    compiled = [name for name in options.sides if name in ("compiled", COMPILED)]
    changes = {"out": None, "case_seconds": 0.0, "static_codes": 1, "sides": compiled}
    running: list[subprocess.Popen[bytes]] = []
    for size, batch, codes, kind in cases:
        code = (
            "import argparse; from benchmarks.bench_sampling import *;"
            f"o = argparse.Namespace(**{vars(options) | changes});"
            f"prepare(o, build({size!r}, {codes}, o.device, DTYPES[{kind!r}], 1), {batch}, {codes})"
        )
        while len([p for p in running if p.poll() is None]) >= options.warm:
            time.sleep(0.1)
        running.append(subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL))
    if broken := sum(process.wait() != 0 for process in running):
        print(f"{broken} of {len(running)} processes failed to compile in advance")


def save(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Write the results so far."""
    if options.out:
        with atomic_file(options.out.with_suffix(".json")) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    options = arguments()
    if options.ranks and options.device != "cpu":
        raise SystemExit("--ranks is for processes that share a CPU; leave it out with --device cuda")
    if options.warm:
        print(f"compiled in advance in {timed(lambda: warm(options)):.0f} s", flush=True)
    result: dict[str, Any] = {
        "benchmark": "bench_sampling",
        "command": " ".join(["python -m benchmarks.bench_sampling", *sys.argv[1:]]),
        "machine": machine(options.device),
        "torch": torch.__version__,
        "copy_gb_s": round(copy_bandwidth(options.device, options.sizes[0]) / 1e9, 2),
        "cases": [],
        "growth": [],
    }
    print(f"{result['machine']}: a copy moves {result['copy_gb_s']} GB/s\nsize dtype batch codes", flush=True)
    for size in options.sizes:
        for kind in options.dtypes:
            for codes in options.codes:
                for batch in options.batches:
                    result["cases"].append(measure(options, size, kind, batch, codes))
                    save(options, result)
            if not options.brief:
                result["growth"].append(growth(options, size, kind, options.batches[0], max(options.codes)))
    for size in options.sizes[:1]:
        for kind in options.dtypes:
            if options.first:
                first = first_image("benchmarks.bench_sampling", size, kind, options.device)
                result.setdefault("first_image_s", {})[f"{size} {kind}"] = first
                print(f"first image, {size} {kind}: {first}", flush=True)
            for ranks in options.ranks:
                gpt = build(size, 256, options.device, DTYPES[kind])
                rates = sorted(images_a_second(gpt, ranks, 8, CONFIG) for _ in range(3))
                result.setdefault("images_s_by_ranks", {})[f"{size} {kind}, {ranks}"] = [round(r, 3) for r in rates]
                print(f"{size} {kind}, {ranks} processes: {rates[1]:.3f} images/s", flush=True)
    save(options, result)
    if options.out and not options.brief:
        plot(result, options.out.with_suffix(".png"))
    print("\n" + json.dumps(result))
    if any("failed" in case for case in result["cases"]):
        raise SystemExit("some sides failed, see above")


if __name__ == "__main__":
    main()
