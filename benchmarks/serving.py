"""Throughput and latency of a server, for each engine, compared with the published way, one static batch after another.

    python -m benchmarks.serving --vllm-python PATH [--out benchmarks/results/serving_cpu.json]
    python -m benchmarks.serving --vllm-python PATH --part eight   # seconds for 8 images of 384 px, as in the paper
    python -m benchmarks.serving --table docs/serving.md           # instead: write the tables from the records
    python -m benchmarks.serving --models tiny --pixels 32 --backend eager --seconds 1 --rounds 1 --batch-size 4 \
        --engines embedded published --out /tmp/try.json           # a dry run

Each engine generates single images of 256 px with guidance 4 and top-k 2000, in bfloat16, from models with random
weights of the real shapes. The servers run in processes of their own and are called over HTTP; the published loop
(``benchmarks/plain_sampling.py``, compiled with ``torch.compile``) has a queue in this process. Every round starts
each engine once, in turn:

1. Saturation: twice the maximum number of images is outstanding, so that the queue is never empty.
2. Latency: requests arrive at random (Poisson) at 30, 60 and 90 % of the engine's own rate at saturation. Latency
   counts from the planned arrival to the complete image. Every fourth request asks for rows, whose previews take some
   of the engine's time: the first row counts to its report. The published loop reports none.

The record is written after each part, so an interrupted run keeps what it has measured.
"""

import argparse
import asyncio
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llamagen.cores import share_cores

share_cores()  # footgun: before torch is imported, when OpenMP reads its settings

import torch
from tqdm import tqdm

from benchmarks.plain_sampling import COMPILED, STATIC
from benchmarks.serving_model import write_model
from benchmarks.serving_report import plot, summarize, write_tables
from benchmarks.serving_targets import BODY, ROOT, PublishedLoop, Server, serve
from benchmarks.serving_traffic import arrivals, open_loop, saturate, summary
from benchmarks.sizes import size_names
from benchmarks.timing import machine, spread
from llamagen.command import run_command
from llamagen.files import atomic_file
from llamagen.parser_errors import OneLineParser

WAYS = {"published": COMPILED, "published_eager": STATIC}
ENGINES = ("embedded", "vllm", *WAYS)
EIGHT, EIGHT_PIXELS, EIGHT_REPEATS = 8, 384, 5
"""Images, their side, and repeats of the paper's measurement."""
MIN_BATCHES = 3
ROWS = 4
"""One of so many requests asks for rows."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH = {"cpu": 16, "cuda": 64}
RESULTS = Path(__file__).parent / "results"


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    shape = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser("python -m benchmarks.serving", __doc__ or "", formatter_class=shape)
    parser.add_argument("--part", choices=["load", "eight"], default="load", help="what to measure, default load")
    parser.add_argument("--models", nargs="+", default=["B", "L"], choices=size_names(), help="default B L")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES[:3]), choices=ENGINES)
    parser.add_argument("--vllm-python", help="interpreter of an environment with vLLM, for the engine vllm")
    parser.add_argument("--pixels", type=int, help="side of the images; by default 256, and 384 for eight")
    parser.add_argument("--batch-size", type=int, help="maximum number of images at a time; default 16, on a GPU 64")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of each measurement in a round")
    parser.add_argument("--max-seconds", type=float, default=900.0, help="bound on a measurement of saturation")
    parser.add_argument("--min-images", type=int, default=20, help="arrivals at each load in a round, at least")
    parser.add_argument(
        "--points", nargs="*", type=float, default=[0.3, 0.6, 0.9], help="loads, as shares of saturation"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backend", default="inductor", help="of torch.compile in the published loop; eager to try it")
    parser.add_argument("--work", type=Path, help="keep the models in this folder; by default they are deleted")
    parser.add_argument("--out", type=Path, help="the record, .json; the plot gets the same name")
    parser.add_argument("--table", type=Path, metavar="PAGE", help="measure nothing: write the tables of a page")
    options = parser.parse_args(given)
    if options.part == "eight" and options.batch_size is not None:
        parser.error(
            f"--batch-size {options.batch_size} is for --part load; leave it out, eight has batches of {EIGHT}"
        )
    if "vllm" in options.engines and options.vllm_python is None and options.table is None:
        parser.error("the engine vllm needs --vllm-python; give it, or name other --engines")
    options.pixels = options.pixels or (EIGHT_PIXELS if options.part == "eight" else 256)
    options.batch_size = EIGHT if options.part == "eight" else options.batch_size or BATCH[DEVICE]
    kind = "cpu" if DEVICE == "cpu" else "gpu"
    options.out = options.out or RESULTS / f"serving_{'eight_' if options.part == 'eight' else ''}{kind}.json"
    return options


@asynccontextmanager
async def started(options: argparse.Namespace, engine: str, source: Path) -> AsyncIterator[Server | PublishedLoop]:
    """A running engine with a loaded model, which ends with the context."""
    if engine in WAYS:
        loop = PublishedLoop(source, options.batch_size, WAYS[engine], options.dtype, options.backend)
        try:
            yield loop
        finally:
            await loop.idle()
            loop.close()
        return
    how = ["--batch-size", str(options.batch_size), "--dtype", options.dtype, "--queue", "2000", "--timeout", "3600"]
    python = options.vllm_python if engine == "vllm" else sys.executable
    async with serve(source, *how, "--engine", engine, python=python) as server:
        yield server


def vllm_version(python: str) -> str:
    """Version of vLLM in another environment.

    Raises:
        ValueError: in one line, if it has none.
    """
    code = "from serving.vllm.versions import installed_version; print(installed_version() or '')"
    try:
        done = subprocess.run([python, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        done = None
    if done is None or not (found := done.stdout.strip()):
        raise ValueError(f"--vllm-python {python} is no interpreter with vLLM; see docs/vllm.md")
    return found


class Record:
    """The results so far, which are written after each part.

    Args:
        options: options of the command.
        command: the command.
        bar: progress of the parts.
    """

    def __init__(self, options: argparse.Namespace, command: str, bar: "tqdm[Any]") -> None:
        self.out, self.bar = options.out, bar
        versions = {name: version(name) for name in ("torch", "fastapi", "uvicorn", "aiohttp")}
        if "vllm" in options.engines:
            versions["vllm"] = vllm_version(options.vllm_python)
        self.content: dict[str, Any] = {
            "benchmark": "serving",
            "part": options.part,
            "hardware": machine(DEVICE),
            "versions": {"python": platform.python_version(), **versions},
            "command": command,
            "settings": {**BODY, "dtype": options.dtype, "pixels": options.pixels, "batch_size": options.batch_size},
            "complete": False,
            "models": {},
        }

    def rounds(self, model: str, engine: str) -> list[dict[str, Any]]:
        """The rounds of an engine so far."""
        rounds: list[dict[str, Any]] = (
            self.content["models"].setdefault(model, {}).setdefault(engine, {"rounds": []})["rounds"]
        )
        return rounds

    def write(self) -> None:
        """Write the record with its summaries."""
        for engines in self.content["models"].values():
            for results in engines.values():
                results.update(summarize(results["rounds"]))
        with atomic_file(self.out) as temporary:
            temporary.write_text(json.dumps(self.content, indent=1) + "\n")


async def measure_load(options: argparse.Namespace, record: Record, model: str, engine: str, source: Path) -> None:
    """One round of an engine: saturation, then latencies."""
    rounds = record.rounds(model, engine)
    entry: dict[str, Any] = {"points": {}}
    rounds.append(entry)
    try:
        async with started(options, engine, source) as target:
            entry["start_seconds"] = round(target.start_seconds, 1)
            entry["saturation"] = await saturate(
                target, options.batch_size, options.seconds, MIN_BATCHES, options.max_seconds
            )
            record.write()
            record.bar.update()
            peak = rounds[0].get("saturation", entry["saturation"])["images_s"]
            for number, share in enumerate(options.points):
                rate = share * peak
                seconds = max(options.seconds, options.min_images / rate)
                times = arrivals(rate, seconds, seed=100 * len(rounds) + number)
                answers = await open_loop(lambda n: target.image(n, n % 1000, rows=n % ROWS == 0), times)
                entry["points"][str(share)] = {"rate": round(rate, 4), **summary(answers)}
                await target.idle()
                record.write()
                record.bar.update()
    except ValueError as error:  # one engine must not cost the measurements of the others
        entry["failed"] = " ".join(str(error).split())[:1000]
        tqdm.write(f"{model}, {engine}: {entry['failed']}")
        record.write()


async def measure_eight(options: argparse.Namespace, record: Record, model: str, engine: str, source: Path) -> None:
    """Seconds until 8 requests that arrive together are answered, as often as the rounds say, after one to warm up."""
    entry: dict[str, Any] = {}
    record.rounds(model, engine).append(entry)
    try:
        async with started(options, engine, source) as target:
            times = []
            for _ in range(1 + EIGHT_REPEATS):
                start = time.monotonic()
                answers = await asyncio.gather(*(target.image(seed, 100 * seed) for seed in range(EIGHT)))
                if failed := [answer.text for answer in answers if answer.status != 200]:
                    raise ValueError(f"{len(failed)} of {EIGHT} requests failed: {failed[0]}")
                times.append(time.monotonic() - start)
            entry["seconds_for_eight"] = spread(times[1:])
    except ValueError as error:
        entry["failed"] = " ".join(str(error).split())[:1000]
        tqdm.write(f"{model}, {engine}: {entry['failed']}")
    record.write()
    record.bar.update()


def measure(options: argparse.Namespace, folder: Path, command: str) -> None:
    """All rounds of all engines and models."""
    eight = options.part == "eight"
    rounds, parts = (1, 1) if eight else (options.rounds, 1 + len(options.points))
    total = rounds * parts * len(options.models) * len(options.engines)
    with tqdm(total=total, unit="part") as bar:
        record = Record(options, command, bar)
        for model in options.models:
            source = write_model(folder, model, options.pixels)
            for number in range(rounds):
                for engine in options.engines:
                    bar.set_description(f"{model}, {engine}, round {number + 1}")
                    asyncio.run((measure_eight if eight else measure_load)(options, record, model, engine, source))
        record.content["complete"] = True
        record.write()
    if not eight:
        plot(record.content, options.out.with_suffix(".png"))
    print(f"The record is {options.out}.")


def main() -> None:
    options = arguments()
    if options.table is not None:
        write_tables(options.table, RESULTS)
        return
    command = " ".join(["python -m benchmarks.serving", *sys.argv[1:]])
    if options.work is not None:
        options.work.mkdir(parents=True, exist_ok=True)
        measure(options, options.work, command)
        return
    with tempfile.TemporaryDirectory() as folder:
        measure(options, Path(folder), command)


if __name__ == "__main__":
    run_command(main)
