"""Time and memory of a training step of the autoregressive model, beside a plain one.

    python -m benchmarks.argen_step --size B --batch-size 4 [--compile] [--device cuda]

The step is that of ``ARGenModule`` in Lightning's Trainer: the paper's recipe, clipping, AdamW, EMA. After each of its
steps one of ``benchmarks/plain_gpt.py`` (eager, all logits, unfused optimizer) is timed in the same process. The last
steps are profiled, by kind of operator, beside what their matrix products alone would take at the best rate of this
machine. Memory is measured in processes of their own. Prints tables, then one line of JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.operators import OperatorTimes
from benchmarks.plain_gpt import PlainStep
from benchmarks.timing import machine, spread, synchronize
from benchmarks.tokenizer_step import medians, resident
from callbacks import EMA
from callbacks.throughput import known_peak
from lightning_modules import AdamWConfig, ARGenModule
from llamagen.cost.gpt import flops_per_sequence
from llamagen.models.gpt import GPTConfig

WARM_UP, PROFILED = 3, 3
SIDES = ("ours", "plain")
SIZES = Path("configs/argen/size")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="B", choices=sorted(path.stem for path in SIZES.glob("*.yaml")))
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--block-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--checkpointing", action="store_true", help="ours recomputes its blocks")
    parser.add_argument("--without-plain", action="store_true", help="for sizes of which there is room for one only")
    parser.add_argument("--memory-of", choices=SIDES, help="only run this one and print its peak memory")
    return parser.parse_args()


def build(options: argparse.Namespace) -> ARGenModule:
    pl.seed_everything(0, verbose=False)
    net = yaml.safe_load((SIZES / f"{options.size}.yaml").read_text())["model"]["init_args"]["net"]
    return ARGenModule(
        GPTConfig(**net, block_size=options.block_size),
        AdamWConfig(),
        compile=options.compile,
        activation_checkpointing=options.checkpointing,
    )


def batch_of(options: argparse.Namespace) -> dict[str, Tensor]:
    return {
        "codes": torch.randint(16384, (options.batch_size, options.block_size)),
        "condition": torch.randint(1000, (options.batch_size,)),
    }


def autocast_of(options: argparse.Namespace) -> torch.autocast:
    return torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bf16")


def train(options: argparse.Namespace, module: ARGenModule, steps: int, *callbacks: pl.Callback) -> None:
    batches: Any = [batch_of(options) for _ in range(steps)]
    pl.Trainer(
        accelerator="gpu" if options.device == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed" if options.precision == "bf16" else "32-true",
        max_epochs=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[EMA(), *callbacks],
    ).fit(module, DataLoader(batches, batch_size=None))


class Stopwatch(pl.Callback):
    """Times each step of the Trainer, and after it one of the peer; the last steps of each are profiled instead."""

    def __init__(self, options: argparse.Namespace, steps: int) -> None:
        self.options, self.first_profiled = options, steps - PROFILED
        self.sides = SIDES[:1] if options.without_plain else SIDES
        self.times: dict[str, list[float]] = {name: [] for name in self.sides}
        self.profiles: dict[str, list[dict[str, float]]] = {name: [] for name in self.sides}
        self.plain: PlainStep | None = None

    def _start(self, batch_idx: int) -> None:
        self.profiler = OperatorTimes(self.options.device) if batch_idx >= self.first_profiled else None
        synchronize()
        if self.profiler is not None:
            self.profiler.start()
        self.start = time.perf_counter()

    def _stop(self, name: str) -> None:
        synchronize()
        if self.profiler is None:
            self.times[name].append(time.perf_counter() - self.start)
        else:
            self.profiles[name].append(self.profiler.stop())

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start."""
        self._start(batch_idx)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop, and let the peer do a step."""
        self._stop("ours")
        if not self.options.without_plain:
            self.plain = self.plain or PlainStep(pl_module.gpt)
            with torch.enable_grad():
                self._start(batch_idx)
                self.plain(batch["codes"], batch["condition"], autocast_of(self.options))
                self._stop("plain")
        if batch_idx < self.first_profiled:
            print(
                f"step {batch_idx}: {', '.join(f'{n} {each[-1]:.3f} s' for n, each in self.times.items())}", flush=True
            )


def peak_memory(options: argparse.Namespace, module: ARGenModule) -> float:
    """Peak memory of three steps in GiB: of the GPU's allocator, or of the process without what it had before."""
    weights = 4 * sum(parameter.numel() for parameter in module.parameters()) / 2**30
    before = resident("VmRSS") - weights
    if options.memory_of == "ours":
        train(options, module, 3)
    else:
        step, batch = PlainStep(module.gpt.to(options.device)), batch_of(options)
        del module.gpt  # its weights are copied
        moved = {name: value.to(options.device) for name, value in batch.items()}
        for _ in range(3):
            step(moved["codes"], moved["condition"], autocast_of(options))
    if options.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resident("VmHWM") - before


def memory_in_own_process(kind: str) -> float:
    command = [sys.executable, "-m", "benchmarks.argen_step", *sys.argv[1:], "--memory-of", kind]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(output.strip().splitlines()[-1])


def product_limit(options: argparse.Namespace, module: ARGenModule) -> dict[str, float]:
    """What the matrix products of a step alone cost: operations, the machine's best rate, and so seconds."""
    gpt, batch = module.gpt.to(options.device), batch_of(options)
    with FlopCounterMode(display=False) as counter, autocast_of(options):
        gpt(batch["codes"][:, :-1].to(options.device), batch["condition"].to(options.device)).float().mean().backward()
    gpt.zero_grad()
    flops = float(sum(n for name, n in counter.get_flop_counts()["Global"].items() if "mm" in str(name)))
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    rows, width = options.batch_size * options.block_size, gpt.config.dim
    x, weight = (torch.randn(n, width, device=options.device, dtype=dtype) for n in (rows, 4 * width))
    times = []
    for _ in range(30):
        synchronize()
        start = time.perf_counter()
        torch.mm(x, weight.T)
        synchronize()
        times.append(time.perf_counter() - start)
    rate = 2 * rows * 4 * width**2 / statistics.median(times)
    return {"tflop": round(flops / 1e12, 3), "tflop_a_second": round(rate / 1e12, 3), "seconds": round(flops / rate, 3)}


def report(options: argparse.Namespace, result: dict[str, Any], sides: tuple[str, ...]) -> None:
    """Print the tables and the line of JSON."""
    print(f"\n{'step':22}{'median s':>10}{'quartiles':>20}{'codes/s':>12}{'peak GiB':>10}")
    for name in sides:
        step, memory = result[name], result["peak_gib"][name]
        rate = options.batch_size * options.block_size / step["median"]
        print(f"{name:22}{step['median']:10.3f}{step['q1']:12.3f} {step['q3']:7.3f}{rate:12.0f}{memory:10.2f}")
    if "ratio" in result:
        print(f"\nplain / ours: {result['ratio']:.2f} in time, ours / plain: {result['memory_ratio']:.2f} in memory")
    print(f"{result['tflop_a_second']:.3g} TFLOP/s" + (f", MFU {result['mfu']:.1%}" if "mfu" in result else ""))
    print(f"\n{'operators of a step':22}" + "".join(f"{name + ' s':>10}" for name in sides))
    for kind in result["operators"]["ours"]:
        print(f"{kind:22}" + "".join(f"{result['operators'][name][kind]:10.3f}" for name in sides))
    limit = result["product_limit"]
    print(
        f"\nmatrix products alone: {limit['tflop']:.2f} TFLOP at {limit['tflop_a_second']:.2f} TFLOP/s, the best of "
        f"this machine: {limit['seconds']:.2f} s"
    )
    print("\n" + json.dumps(result))


def main() -> None:
    options = arguments()
    module = build(options)
    if options.memory_of:
        print(peak_memory(options, module))
        return
    steps = WARM_UP + options.steps + PROFILED
    watch = Stopwatch(options, steps)
    train(options, module, steps, watch)
    times = {name: each[WARM_UP:] for name, each in watch.times.items()}
    work = flops_per_sequence(module.gpt.config) * options.batch_size / 1e12 / statistics.median(times["ours"])
    result: dict[str, Any] = {
        "benchmark": "argen_step",
        "command": " ".join(["python -m benchmarks.argen_step", *sys.argv[1:]]),
        "machine": machine(options.device),
        "torch": torch.__version__,
        "options": {k: v for k, v in vars(options).items() if k != "memory_of"},
        **{name: spread(each) for name, each in times.items()},
        "tflop_a_second": round(work, 4),
        "operators": {name: medians(watch.profiles[name]) for name in watch.sides},
    }
    if peak := known_peak(torch.device(options.device)):
        result["mfu"] = round(work / peak, 4)
    watch.plain = None
    result["product_limit"] = product_limit(options, module)
    result["peak_gib"] = {name: round(memory_in_own_process(name), 2) for name in watch.sides}
    if not options.without_plain:
        result["ratio"] = round(statistics.median(times["plain"]) / statistics.median(times["ours"]), 3)
        result["memory_ratio"] = round(result["peak_gib"]["ours"] / result["peak_gib"]["plain"], 3)
    report(options, result, watch.sides)


if __name__ == "__main__":
    main()
