"""How much another program on one core slows down training steps and ``make quickstart``.

    python -m benchmarks.busy_machine [--steps_only]

The other program is an endless loop, pinned to one core. The quickstart's autoregressive model trains for 15 seconds
with each of three settings for waiting OpenMP threads: as in this project's commands
(``llamagen.cores.WAIT_SETTINGS``), sleeping immediately, and OpenMP's default. ``make quickstart`` runs in a clone of
this folder with this environment, without installing: with and without the loop, and without the loop also with
OpenMP's default. Prints tables and writes ``benchmarks/results/busy_machine.json``.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llamagen.cores import WAIT_SETTINGS

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks/results/busy_machine.json"
SECONDS = 15.0
LOOP = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"
POLICIES = {"as commands wait": WAIT_SETTINGS, "sleep at once": {"OMP_WAIT_POLICY": "PASSIVE"}, "OpenMP's default": {}}
ACTIVE = {"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "300000"}
"""OpenMP's default, written out: commands do not change what the user has set."""
STAGES = ("1/4 tokenizer", "2/4 codes", "3/4 autoregressive model", "4/4 samples")


@contextmanager
def endless_loop(wanted: bool) -> Iterator[None]:
    """Run a program that uses a whole core, the last one that this process may use."""
    if not wanted:
        yield
        return
    core = max(os.sched_getaffinity(0))
    with subprocess.Popen([sys.executable, "-c", LOOP, str(core)]) as loop:
        try:
            yield
        finally:
            loop.kill()


def measure_steps() -> None:
    """Train the quickstart's GPT in this process, and print the seconds of its steps."""
    import torch

    from llamagen.losses import linear_cross_entropy
    from llamagen.models.gpt import GPT, GPTConfig

    torch.manual_seed(0)
    net = GPTConfig(n_layer=4, n_head=4, dim=128, multiple_of=32, vocab_size=256, block_size=16, num_classes=10)
    gpt = GPT(net).train()
    optimizer = torch.optim.AdamW(gpt.parameters(), fused=True)
    codes, labels = torch.randint(256, (32, 16)), torch.randint(10, (32,))
    times: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(times) < 3 or time.perf_counter() < end:
        started = time.perf_counter()
        hidden = gpt.features(codes[:, :-1], labels).flatten(0, 1)
        loss, _ = linear_cross_entropy(hidden, gpt.output.weight, codes.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - started)
    print(json.dumps(times))


def steps(policy: dict[str, str], busy: bool) -> dict[str, float]:
    """Median and quartiles of the seconds of a step."""
    from benchmarks.timing import spread

    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment |= policy
    command = [sys.executable, "-m", "benchmarks.busy_machine", "--measure_steps"]
    with endless_loop(busy):
        done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    return spread(json.loads(done.stdout)[1:])


def quickstart(policy: dict[str, str], busy: bool) -> dict[str, float]:
    """Seconds of ``make quickstart`` and of its stages, without installing."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "PYTHONPATH"))
    }
    environment |= policy
    with tempfile.TemporaryDirectory() as folder, endless_loop(busy):
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        venv = Path(sys.prefix)
        command = ["make", "-o", f"{venv}/bin/.installed", "quickstart", f"VENV={venv}"]
        started, marks = time.perf_counter(), []
        with subprocess.Popen(
            command, cwd=clone, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            assert process.stdout is not None
            marks = [time.perf_counter() for line in process.stdout if line.startswith(("1/4", "2/4", "3/4", "4/4"))]
        if process.returncode:
            raise SystemExit(f"make quickstart ended with {process.returncode}")
        ends = [*marks[1:], time.perf_counter()]
    stages = {name: round(end - mark, 1) for name, mark, end in zip(STAGES, marks, ends, strict=True)}
    return {"all": round(ends[-1] - started, 1), **stages}


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.busy_machine", description=__doc__)
    parser.add_argument("--steps_only", action="store_true", help="skip make quickstart, which takes 15 minutes")
    parser.add_argument("--measure_steps", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure_steps:
        measure_steps()
        return
    from benchmarks.timing import machine
    from llamagen.files import atomic_file

    record: dict[str, Any] = {
        "benchmark": "busy_machine",
        "machine": machine("cpu"),
        "python": platform.python_version(),
    }
    record["command"] = " ".join(["python -m benchmarks.busy_machine", *sys.argv[1:]])
    record["step_seconds"] = {}
    for policy, settings in POLICIES.items():
        for busy in (False, True):
            name = f"{policy}, {'next to a loop' if busy else 'alone'}"
            record["step_seconds"][name] = found = steps(settings, busy)
            print(f"{name:>32} | {1000 * found['median']:8.1f} ms per step ({found['q1']:.4f} … {found['q3']:.4f} s)")
    if not options.steps_only:
        record["quickstart_seconds"] = {
            "alone": quickstart({}, busy=False),
            "next to a loop": quickstart({}, busy=True),
            "alone, OpenMP's default": quickstart(ACTIVE, busy=False),
        }
        for name, seconds in record["quickstart_seconds"].items():
            print(f"quickstart, {name:>23} | {', '.join(f'{stage} {value:.0f} s' for stage, value in seconds.items())}")
        alone, busy_time, default = (each["all"] for each in record["quickstart_seconds"].values())
        record["ratios"] = {
            "next to a loop / alone": round(busy_time / alone, 2),
            "alone / alone as OpenMP waits by itself": round(alone / default, 2),
        }
        print(record["ratios"])
    with atomic_file(RESULT) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
