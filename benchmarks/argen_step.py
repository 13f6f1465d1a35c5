"""Time and memory of a training step of the autoregressive model, compared with a plain implementation.

    python -m benchmarks.argen_step --size B --batch-size 4 [--compile] [--device cuda]

Times steps of ``ARGenModule`` in Lightning's Trainer (the paper's recipe, clipping, AdamW, EMA). After each of them it
times a step of ``benchmarks/plain_gpt.py`` (eager, all logits, unfused optimizer) in the same process. The last steps
are profiled by kind of operator, and compared with the time of their matrix products alone at this machine's best rate.
Memory is measured in separate processes. Prints tables, then one line of JSON.
"""

import argparse
import json
import statistics
import sys
import time
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.plain_gpt import PlainStep
from benchmarks.sizes import gpt_shape, size_names
from benchmarks.timing import machine, spread, synchronize
from benchmarks.training_step import (
    PROFILED,
    SIDES,
    WARM_UP,
    Stopwatch,
    autocast_of,
    medians,
    memory_in_own_process,
    peak_since,
    resident,
    train,
)
from callbacks.throughput import known_peak
from lightning_modules import AdamWConfig, ARGenModule
from llamagen.cost.gpt import flops_per_sequence
from llamagen.models.gpt import GPTConfig


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="B", choices=size_names())
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--block-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in our step")
    parser.add_argument("--without-plain", action="store_true", help="for sizes that fit into memory only once")
    parser.add_argument("--memory-of", choices=SIDES, help="only run this side and print its peak memory")
    return parser.parse_args()


def build(options: argparse.Namespace) -> ARGenModule:
    pl.seed_everything(0, verbose=False)
    return ARGenModule(
        GPTConfig(**gpt_shape(options.size), block_size=options.block_size),
        AdamWConfig(),
        compile=options.compile,
        activation_checkpointing=options.checkpointing,
    )


def batch_of(options: argparse.Namespace) -> dict[str, Tensor]:
    return {
        "codes": torch.randint(16384, (options.batch_size, options.block_size)),
        "condition": torch.randint(1000, (options.batch_size,)),
    }


def batches_of(options: argparse.Namespace, steps: int) -> list[dict[str, Tensor]]:
    return [batch_of(options) for _ in range(steps)]


class ARGenStopwatch(Stopwatch):
    """Compares with :class:`PlainStep`."""

    def __init__(self, options: argparse.Namespace, steps: int, profiled: int = PROFILED) -> None:
        super().__init__(options.device, steps, SIDES[:1] if options.without_plain else SIDES, profiled)
        self.options = options
        self.plain: PlainStep | None = None

    def prepare_plain_step(self, module: ARGenModule) -> None:
        """Copy the weights."""
        self.plain = self.plain or PlainStep(module.gpt)

    def plain_step(self, batch: dict[str, Tensor]) -> None:
        """One step of the plain implementation."""
        assert self.plain is not None
        self.plain(batch["codes"], batch["condition"], autocast_of(self.options.device, self.options.precision))


def peak_memory(options: argparse.Namespace, module: ARGenModule) -> float:
    """Peak memory of three steps in GiB, see :func:`peak_since`."""
    weights = 4 * sum(parameter.numel() for parameter in module.parameters()) / 2**30
    before = resident("VmRSS") - weights
    if options.memory_of == "ours":
        train(module, batches_of(options, 3), options.device, options.precision)
    else:
        step, batch = PlainStep(module.gpt.to(options.device)), batch_of(options)
        del module.gpt  # PlainStep has copied its weights
        moved = {name: value.to(options.device) for name, value in batch.items()}
        for _ in range(3):
            step(moved["codes"], moved["condition"], autocast_of(options.device, options.precision))
    return peak_since(before, options.device)


def product_limit(options: argparse.Namespace, module: ARGenModule) -> dict[str, float]:
    """Operations of the matrix products of a step, the machine's best rate, and the resulting minimum in seconds."""
    gpt, batch = module.gpt.to(options.device), batch_of(options)
    with FlopCounterMode(display=False) as counter, autocast_of(options.device, options.precision):
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
    """Print tables and one line of JSON."""
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
        f"\nmatrix products alone: {limit['tflop']:.2f} TFLOP at this machine's best rate of "
        f"{limit['tflop_a_second']:.2f} TFLOP/s take {limit['seconds']:.2f} s"
    )
    print("\n" + json.dumps(result))


def main() -> None:
    options = arguments()
    module = build(options)
    if options.memory_of:
        print(peak_memory(options, module))
        return
    steps = WARM_UP + options.steps + PROFILED
    watch = ARGenStopwatch(options, steps)
    train(module, batches_of(options, steps), options.device, options.precision, watch)
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
    watch.plain = None  # frees its memory
    result["product_limit"] = product_limit(options, module)
    result["peak_gib"] = {name: round(memory_in_own_process("argen_step", name), 2) for name in watch.sides}
    if not options.without_plain:
        result["ratio"] = round(statistics.median(times["plain"]) / statistics.median(times["ours"]), 3)
        result["memory_ratio"] = round(result["peak_gib"]["ours"] / result["peak_gib"]["plain"], 3)
    report(options, result, watch.sides)


if __name__ == "__main__":
    main()
