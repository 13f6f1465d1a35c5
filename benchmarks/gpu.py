"""Everything that needs a GPU, in at most ten minutes: tests, sampling and training, in one record.

    python -m benchmarks.gpu [--out benchmarks/results/gpu.json] [--budget 580] [--only NAME …]
    python -m benchmarks.gpu --dry-run        # the same parts with tiny models on a CPU

Each part is a process with a time limit; one that fails or hangs does not affect the others. The most important parts
come first, and those that no time is left for are listed as not run. Models have random weights, which do not change
their speed. The parts:

- ``tests``: all tests marked ``gpu``.
- ``sampling_*``: our compiled sampler next to the published loop, eager, compiled and in CUDA graphs
  (``benchmarks/plain_sampling.py``), in bfloat16 with guidance. B runs at 256 px (16 × 16 codes) and the others at 384
  px (24 × 24), the sizes at which the paper reports their best FID, so those that are used.
- ``windows_*``: passes over windows of 1, 4, 8 and 16 codes and ``auto``, next to the published loop in CUDA graphs
  (``benchmarks/bench_windows.py``). Those of all sizes alone: ``--only windows_B windows_L windows_XL windows_XXL
  windows_3B``.
- ``training_*``: steps of the autoregressive model at 256 px with MFU, eager and compiled.
- ``tokenizer``, ``tokenizer_16_mixed``: steps at 256 px with perceptual and adversarial loss, in bfloat16 next to a
  plain step, and in float16 with Lightning's GradScaler.

The record is written after each part. A table is printed at the end. The exit code is 1 if a part failed.
"""

import argparse
import json
import platform
import signal
import sys
import tempfile
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_table import table
from benchmarks.part_runner import FAILED, TIMED_OUT, Part, run_parts
from llamagen.environment import environment
from llamagen.files import atomic_file

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 580.0
"""Ten minutes, less the time to start and to print."""
STATIC = ("compiled", "static", "static_compiled", "static_graphs")
DRY_SECONDS = 150.0
"""Time limit of every part of a dry run, on a machine that may be busy."""
TEST_SECONDS = 90
"""Time limit of a test: less than that of the part, so that a test that hangs is named in the report."""
TESTERS = 6
"""Processes that run the tests: most of their time is compilation."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="path of the record; by default of a dry run runs/gpu_dry_run.json")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all parts")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run only these parts")
    parser.add_argument("--dry-run", action="store_true", help="tiny models on a CPU; tests are collected, not run")
    options = parser.parse_args()
    options.out = options.out or ROOT / ("runs/gpu_dry_run.json" if options.dry_run else "benchmarks/results/gpu.json")
    return options


def gpu_tests() -> list[str]:
    """Files with tests marked ``gpu``; collecting the others would only take time."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [path.relative_to(ROOT).as_posix() for path in files if "pytest.mark.gpu" in path.read_text()]


def tests(folder: Path, dry_run: bool) -> Part:
    """All tests marked ``gpu``, in several processes if pytest-xdist is installed."""
    common = (sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider")
    if dry_run:
        return Part("tests", "tests marked gpu, collected only", (*common, "-q", "--collect-only", *gpu_tests()), 0)
    out = folder / "tests.xml"
    how: tuple[str, ...] = ("-v", f"--junitxml={out}")
    if find_spec("pytest_timeout"):
        how = (*how, f"--timeout={TEST_SECONDS}")
    if find_spec("xdist"):
        how = (*how, "-n", str(TESTERS))
    return Part("tests", "tests marked gpu", (*common, *how, *gpu_tests()), 200, out)


def sampling(folder: Path, dry_run: bool, size: str, codes: int, seconds: float, *more: str) -> Part:
    """Sampling of one size with batches of 1, 8 and 64."""
    out = folder / f"sampling_{size}.json"
    options = [*("--device", "cuda", "--sizes", size, "--codes", str(codes), "--batches", "1", "8", "64")]
    options += ["--static-codes", "32", "--warm", "3"]
    if dry_run:
        options = [
            "--sizes",
            "tiny",
            "--codes",
            "16",
            "--batches",
            "1",
            "2",
            "--static-codes",
            "4",
            "--backend",
            "eager",
        ]
        options += ["--warm", "2"] if size == "B" else []
    command = (sys.executable, "-m", "benchmarks.bench_sampling", "--dtypes", "bf16", "--brief", "--out", str(out))
    limits = ("--repeats", "2" if dry_run else "5", "--case-seconds", "10")
    what = f"sampling of {size}, {codes} codes"
    return Part(f"sampling_{size}", what, (*command, *options, *limits, "--sides", *STATIC, *more), seconds, out)


def windows(folder: Path, dry_run: bool, size: str, codes: int) -> Part:
    """Passes over windows of one size."""
    out = folder / f"windows_{size}.json"
    options = ["--device", "cuda", "--sizes", size, "--codes", str(codes), "--batches", "1", "8"]
    if dry_run:
        options = ["--sizes", "tiny", "--codes", "16", "--batches", "1", "--backend", "eager", "--repeats", "1"]
    command = (sys.executable, "-m", "benchmarks.bench_windows", *options, "--out", str(out))
    return Part(f"windows_{size}", f"windows of {size}, {codes} codes", command, 110, out)


def training(folder: Path, dry_run: bool, model: str, name: str, what: str, seconds: float, *options: str) -> Part:
    """Steps of a model in the Trainer."""
    out = folder / f"{name}.json"
    if dry_run:
        small = ("--size", "tiny", "--batch-size", "2", "--steps", "3", "--block-size", "16", "--image-size", "32")
        options = (*small, "--backend", "eager", *(("--precision", "fp16") if "fp16" in options else ()))
    else:
        options = (*options, "--device", "cuda")
    command = (sys.executable, "-m", "benchmarks.training_rate", model, *options, "--out", str(out))
    return Part(name, what, command, seconds, out)


def all_parts(folder: Path, dry_run: bool) -> list[Part]:
    """All parts, the most important first: one of each kind, then the other sizes."""

    def argen(size: str, batch: int, seconds: float) -> Part:
        options = ("--size", size, "--batch-size", str(batch), "--steps", "12")
        return training(folder, dry_run, "argen", f"training_{size}", f"training steps of {size}", seconds, *options)

    def tokenizer(name: str, what: str, precision: str) -> Part:
        options = ("--image-size", "256", "--batch-size", "32", "--steps", "10", "--precision", precision)
        return training(folder, dry_run, "tokenizer", name, what, 75, *options)

    parts = [
        tests(folder, dry_run),
        sampling(folder, dry_run, "B", 256, 110, "static_reduce_overhead"),
        windows(folder, dry_run, "B", 256),
        argen("B", 128, 70),
        tokenizer("tokenizer", "training steps of VQ-16", "bf16"),
        tokenizer("tokenizer_16_mixed", "the same with 16-mixed", "fp16"),
        sampling(folder, dry_run, "XL", 576, 100),
        sampling(folder, dry_run, "L", 576, 90),
        sampling(folder, dry_run, "3B", 576, 110),
        argen("XL", 64, 80),
        argen("L", 64, 70),
        *(windows(folder, dry_run, size, 576) for size in ("XL", "L", "XXL", "3B")),
    ]
    return [replace(part, seconds=DRY_SECONDS) for part in parts] if dry_run else parts


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running part is killed, too
    options = arguments()
    if not options.dry_run and not torch.cuda.is_available():
        raise SystemExit("PyTorch finds no GPU here; use --dry-run to try the script on a CPU")
    started = time.monotonic()
    result: dict[str, Any] = {
        "benchmark": "gpu",
        "command": " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]),
        "dry_run": options.dry_run,
        "environment": environment() | {"Python": platform.python_version()},
        "budget_s": options.budget,
    }

    def report(records: list[dict[str, Any]]) -> None:
        result.update(seconds=round(time.monotonic() - started, 1), parts=records)
        with atomic_file(options.out) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")
        done = [record for record in records if "seconds" in record]
        if done:
            print(f"{result['seconds']:6.0f} s  {done[-1]['name']}: {done[-1]['status']}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        parts = all_parts(Path(folder), options.dry_run)
        names = [part.name for part in parts]
        if unknown := set(options.only or ()) - set(names):
            raise SystemExit(f"--only {' '.join(sorted(unknown))} names no part; the parts are {', '.join(names)}")
        wanted = [part for part in parts if not options.only or part.name in options.only]
        records = run_parts(wanted, options.budget - (time.monotonic() - started), ROOT, report)
    print("\n".join(["", *table(result), "", f"The record is {options.out}."]))
    if any(record["status"] in (FAILED, TIMED_OUT) for record in records):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
