"""Whether a server with the embedded engine holds a load, and what HTTP costs: one server, five tests.

    python -m benchmarks.serving_load [--out benchmarks/results/serving_load.json]
    python -m benchmarks.serving_load --model tiny --pixels 32 --batch-size 4 --seconds 5 --overload-seconds 3 \
        --clients 20 --rounds 2 --out /tmp/load.json              # a dry run

- ``in_process``: images a second through HTTP with a full queue, compared with the samplers in this process, in turns:
  ``ImageSampler`` (codes and pixels, as the server) and ``Sampler`` (codes only), at the same batch.
- ``steady``: ten minutes of Poisson arrivals at 90 % of saturation: no error, memory of front and worker over time.
- ``overload``: arrivals at five times saturation: refusals at once with ``Retry-After``; what is accepted is answered.
- ``leavers``: clients that leave half-way, streaming or not: nothing runs, waits or stays open afterwards.
- ``kill``: the worker is killed (SIGKILL) under load: it is replaced, and every request is answered or refused.

All traffic goes to a server of this benchmark on 127.0.0.1, and is bounded in number and time. The record is written
after each test. The exit code is 1 if a test failed.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from llamagen.cores import share_cores

share_cores()  # footgun: before torch is imported, when OpenMP reads its settings

import torch
from tqdm import tqdm

from benchmarks.serving_model import write_model
from benchmarks.serving_processes import descendants, largest, resources, watch_memory
from benchmarks.serving_report import plot_memory, slope
from benchmarks.serving_targets import BODY, SETTINGS, Answer, Server, serve
from benchmarks.serving_traffic import arrivals, open_loop, percentiles, saturate, summary
from benchmarks.sizes import size_names
from benchmarks.timing import machine, spread
from llamagen import LlamaGen
from llamagen.command import run_command
from llamagen.files import atomic_file
from llamagen.parser_errors import OneLineParser

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUEUE = 256
"""Images that may wait, the server's default."""
ROWS = 8
"""One of so many requests of the steady load asks for rows, whose previews take some of the engine's time."""
REPEATED = 32
"""Seeds of the steady load, which repeat: images of one seed must be equal, whatever batch they shared."""
SETTLE = 0.2
"""Share of the steady load that may raise the memory: caches and allocators fill first."""
FLAT = 1.0
"""MiB a minute that count as flat: allocators keep moving by some pages."""
AT_ONCE = 1.0
"""Seconds within which 95 % of refusals must arrive: the machine's cores are busy with generating."""
PATIENCE = 600.0
"""Time limit for answers; a request without one hangs."""


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    shape = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser("python -m benchmarks.serving_load", __doc__ or "", formatter_class=shape)
    parser.add_argument("--tests", nargs="+", choices=list(TESTS), default=list(TESTS), help="default all")
    parser.add_argument("--model", default="B", choices=size_names())
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--batch-size", type=int, default=16 if DEVICE == "cpu" else 64)
    parser.add_argument("--rounds", type=int, default=5, help="turns of in_process")
    parser.add_argument("--seconds", type=float, default=600.0, help="length of the steady load")
    parser.add_argument("--overload-seconds", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=200, help="clients that leave")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/serving_load.json")
    return parser.parse_args(given)


class Bench:
    """What the tests have in common.

    Args:
        options: options of the command.
        server: the server.
        source: folder of its model.
    """

    def __init__(self, options: argparse.Namespace, server: Server, source: Path) -> None:
        self.options, self.server, self.source = options, server, source
        self.saturation = 0.0

    async def peak(self) -> float:
        """Images a second at saturation, measured once."""
        if not self.saturation:
            self.saturation = float(
                (await saturate(self.server, self.options.batch_size, 0.0, 2, PATIENCE))["images_s"]
            )
        return self.saturation

    async def answers(self, seeds: Sequence[int]) -> list[Answer]:
        """Request images together; a request that hangs gets the status −1."""

        async def one(seed: int) -> Answer:
            try:
                return await asyncio.wait_for(self.server.image(seed), PATIENCE)
            except TimeoutError:
                return Answer(-1, PATIENCE)

        return list(await asyncio.gather(*(one(seed) for seed in seeds)))

    async def wait_until(self, condition: Callable[[dict[str, Any]], bool], seconds: float) -> float | None:
        """Seconds until the server's load satisfies a condition; None if it does not within a time limit."""
        start = time.monotonic()
        while not condition(await self.server.load()):
            if time.monotonic() - start > seconds:
                return None
            await asyncio.sleep(0.1)
        return round(time.monotonic() - start, 2)


async def in_process(bench: Bench) -> dict[str, Any]:
    """Throughput through HTTP and in this process, in turns."""
    options, batch = bench.options, bench.options.batch_size
    model = LlamaGen.from_pretrained(bench.source, dtype=options.dtype, batch_size=batch, compile=True)
    model.prepare(**BODY)
    labels = list(range(batch))

    def timed(call: Callable[..., object]) -> float:
        start = time.monotonic()
        for seed in range(2):
            call(labels, seed=seed, progress=False, **BODY)
        return float(2 * batch / (time.monotonic() - start))

    timed(model.generate)
    rates: dict[str, list[float]] = {"http": [], "image_sampler": [], "sampler": []}
    for _ in range(options.rounds):
        rates["http"].append((await saturate(bench.server, batch, 0.0, 2, PATIENCE))["images_s"])
        rates["image_sampler"].append(timed(model.generate))
        rates["sampler"].append(timed(model.generate_codes))
    ratios = {
        f"http_over_{name}": spread([ours / theirs for ours, theirs in zip(rates["http"], rates[name], strict=True)])
        for name in ("image_sampler", "sampler")
    }
    bench.saturation = spread(rates["http"])["median"]
    found = {**{name: spread(values) for name, values in rates.items()}, **ratios}
    share = ratios["http_over_image_sampler"]["median"]
    finding = (
        f"{found['http']['median']:.2f} images/s; `ImageSampler` in process {found['image_sampler']['median']:.2f}: "
        f"{share:.0%}. `Sampler`, codes without pixels: {found['sampler']['median']:.2f}"
    )
    return {**found, "passed": share >= 0.9, "finding": finding}


async def steady(bench: Bench) -> dict[str, Any]:
    """Poisson arrivals at 90 % of saturation."""
    rate, series = 0.9 * await bench.peak(), list[dict[str, Any]]()
    texts: dict[int, set[str]] = {}
    times = arrivals(rate, bench.options.seconds, seed=0)

    async def call(number: int) -> Answer:
        answer = await bench.server.image(number % REPEATED, rows=number % ROWS == 0)
        if answer.status == 200:
            texts.setdefault(number % REPEATED, set()).add(answer.text)
        return answer

    watch = asyncio.create_task(watch_memory(bench.server.process.pid, series, max(1.0, bench.options.seconds / 200)))
    with tqdm(total=len(times), unit="image", desc="steady", leave=False) as bar:
        answers = await open_loop(call, times, bar.update)
    watch.cancel()
    late = [entry for entry in series if entry["seconds"] >= SETTLE * series[-1]["seconds"]]
    slopes = {
        f"{name}_mib_per_minute": round(60 * slope([(entry["seconds"], entry[name]) for entry in late]), 3)
        for name in ("front", "workers")
    }
    different = sum(len(images) > 1 for images in texts.values())
    statuses = {str(status): count for status, count in Counter(answer.status for answer in answers).items()}
    found = {
        "rate": rate,
        **summary(answers),
        "by_status": statuses,
        **slopes,
        "seeds_with_different_images": different,
        "memory": series,
    }
    flat = all(value <= FLAT for value in slopes.values())
    finding = (
        f"{len(answers)} requests in {bench.options.seconds:.0f} s, {found['errors']} errors; memory of front and "
        f"workers {slopes['front_mib_per_minute']:+.2f} and {slopes['workers_mib_per_minute']:+.2f} MiB a minute; "
        f"images of equal seeds {'differ' if different else 'are equal'}"
    )
    return {**found, "passed": flat and not found["errors"] and not different, "finding": finding}


async def overload(bench: Bench) -> dict[str, Any]:
    """Arrivals at five times saturation."""
    peak = await bench.peak()
    seconds = max(bench.options.overload_seconds, 1.5 * QUEUE / (4 * peak))  # the queue must become full
    times = arrivals(5 * peak, seconds, seed=1)
    answers = await asyncio.wait_for(open_loop(bench.server.image, times), PATIENCE + seconds)
    refused = [answer for answer in answers if answer.status == 429]
    counts = Counter(answer.status for answer in answers)
    found: dict[str, Any] = {
        "requests": len(answers),
        "by_status": {str(status): count for status, count in sorted(counts.items())},
        "refusals_without_retry_after": sum(not (answer.retry_after or "").isdecimal() for answer in refused),
        "refusal_s": percentiles([answer.seconds for answer in refused]),
        "accepted": summary([answer for answer in answers if answer.status != 429]),
    }
    refusal = found["refusal_s"] or {"p50": 0.0, "p95": 0.0}
    finding = (
        f"{len(answers)} requests: {counts[200]} answered, {counts[429]} refused with 429 and `Retry-After` "
        f"(after {1e3 * refusal['p50']:.0f} ms, 95 % within {1e3 * refusal['p95']:.0f} ms), "
        f"{len(answers) - counts[200] - counts[429]} others"
    )
    passed = set(counts) <= {200, 429} and bool(refused) and not found["refusals_without_retry_after"]
    return {**found, "passed": passed and refusal["p95"] <= AT_ONCE, "finding": finding}


async def leavers(bench: Bench) -> dict[str, Any]:
    """Clients that leave before their image is finished."""
    server, batch, generator = bench.server, bench.options.batch_size, random.Random(2)
    reference = (await bench.answers([7]))[0]
    before = resources(server.process.pid)
    seconds_a_batch = batch / await bench.peak()
    places = asyncio.Semaphore(2 * batch)  # the queue must not refuse them
    finished: list[Answer] = []

    async def client(number: int) -> None:
        async with places:
            call = server.image(1000 + number, rows=number % 2 == 0)
            with suppress(TimeoutError):  # then the connection is closed
                finished.append(await asyncio.wait_for(call, generator.uniform(0.1, 0.6) * seconds_a_batch))

    await asyncio.gather(*(client(number) for number in range(bench.options.clients)))
    idle = await bench.wait_until(lambda load: not load.get("waiting") and not load.get("running"), 60)
    await asyncio.sleep(1.0)  # closed connections leave the front
    after, again = resources(server.process.pid), (await bench.answers([7]))[0]
    left = {name: after[name] - before[name] for name in ("processes", "threads", "files")}
    gone = bench.options.clients - len(finished)
    found = {
        "clients": bench.options.clients,
        "answered": len(finished),
        "seconds_until_idle": idle,
        "before": before,
        "after": after,
        "left": left,
        "same_image": reference.status == 200 and again.text == reference.text,
    }
    extra = ", ".join(f"{count:+d} {name}" for name, count in left.items())
    finding = f"{gone} of {bench.options.clients} clients left; idle {idle} s after the last one; afterwards {extra}"
    passed = gone > 0 and idle is not None and not any(count > 0 for count in left.values()) and found["same_image"]
    return {**found, "passed": passed, "finding": finding}


async def kill(bench: Bench) -> dict[str, Any]:
    """Kill the worker while it generates."""
    server, batch = bench.server, bench.options.batch_size
    seeds = range(2 * batch)
    expected = [answer.text for answer in await bench.answers(seeds)]
    seconds_a_batch = batch / await bench.peak()
    tasks = asyncio.create_task(bench.answers(seeds))
    await asyncio.sleep(0.4 * seconds_a_batch)
    victim = largest(descendants(server.process.pid))
    os.kill(victim, signal.SIGKILL)
    start = time.monotonic()
    answers = await tasks
    answered = round(time.monotonic() - start, 2)
    ready = await bench.wait_until(lambda load: load["status"] == 200, PATIENCE)
    counts = Counter(answer.status for answer in answers)
    wrong = sum(a.status == 200 and a.text != text for a, text in zip(answers, expected, strict=True))
    found = {
        "requests": len(answers),
        "by_status": {str(status): count for status, count in sorted(counts.items())},
        "different_images": wrong,
        "seconds_until_all_answered": answered,
        "seconds_from_then_until_ready": ready,
        "new_worker": largest(descendants(server.process.pid)) != victim,
    }
    finding = (
        f"{len(answers)} requests: {counts[200]} answered ({wrong} with another image), {counts[503]} refused, "
        f"{len(answers) - counts[200] - counts[503]} others; all within {answered:.0f} s of the kill"
    )
    passed = set(counts) <= {200, 503} and not wrong and ready is not None and found["new_worker"]
    return {**found, "passed": passed, "finding": finding}


TESTS: dict[str, Callable[[Bench], Awaitable[dict[str, Any]]]] = {
    "in_process": in_process,
    "steady": steady,
    "overload": overload,
    "leavers": leavers,
    "kill": kill,
}
TITLES = {
    "in_process": "throughput through HTTP",
    "steady": "90 % of saturation",
    "overload": "5 times saturation",
    "leavers": "clients that leave half-way",
    "kill": "`kill -9` of the worker under load",
}


async def run(options: argparse.Namespace, source: Path, record: dict[str, Any]) -> None:
    """Run the tests, and write the record after each of them."""
    how = ["--batch-size", str(options.batch_size), "--dtype", options.dtype, "--queue", str(QUEUE)]
    async with serve(source, *how, "--timeout", "3600") as server:
        record["start_seconds"] = round(server.start_seconds, 1)
        bench = Bench(options, server, source)
        for name in (bar := tqdm(options.tests, unit="test")):
            bar.set_description(name)
            record[name] = await TESTS[name](bench)
            await server.idle()
            record["server_still_runs"] = server.process.poll() is None
            record["findings"][TITLES[name]] = record[name]["finding"]
            state = "" if record[name]["passed"] else "FAILED: "
            tqdm.write(f"{name}: {state}{record[name]['finding']}")
            with atomic_file(options.out) as temporary:
                temporary.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    options = arguments()
    record: dict[str, Any] = {
        "benchmark": "serving_load",
        "hardware": machine(DEVICE),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "command": " ".join(["python -m benchmarks.serving_load", *sys.argv[1:]]),
        "model": options.model,
        "settings": {
            "guidance_scale": SETTINGS.guidance_scale,
            "top_k": SETTINGS.top_k,
            **{name: getattr(options, name) for name in ("dtype", "pixels", "batch_size")},
        },
        "findings": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        source = write_model(Path(folder), options.model, options.pixels)
        asyncio.run(run(options, source, record))
    if "steady" in record:
        plot_memory(record["steady"]["memory"], options.out.with_suffix(".png"))
    print(f"The record is {options.out}.")
    if not all(record[name]["passed"] for name in options.tests):
        raise SystemExit(1)


if __name__ == "__main__":
    run_command(main)
