"""Rate, memory and utilisation of training steps, without the details of the other two benchmarks of steps.

    python -m benchmarks.training_rate argen --size B --batch-size 128 [--block-size 256] [--device cuda] [--out FILE]
    python -m benchmarks.training_rate tokenizer --image-size 256 --batch-size 32 [--precision fp16] [--device cuda]

``argen`` times steps of ``ARGenModule`` in Lightning's Trainer (the paper's recipe, clipping, AdamW, EMA) in this
process, first eager, then with compiled blocks. MFU is the model's operations (``llamagen.cost``) over the peak of the
GPU. ``tokenizer`` times steps of ``VQGANModule`` (VQ-16, L2 + LPIPS + PatchGAN + quantiser); in bfloat16 also in turns
with the plain step of ``benchmarks/plain_tokenizer.py``. LPIPS has random weights, which do not change its cost. With
``--precision fp16`` Lightning's GradScaler is checked: the benchmark fails if the loss or a weight is not finite, or if
steps are still skipped at the end. ``--size tiny`` is for dry runs. Prints one line of JSON and writes it to ``--out``.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from benchmarks import argen_step, tokenizer_step
from benchmarks.sizes import TINY, TINY_TOKENIZER, size_names
from benchmarks.timing import machine, spread
from benchmarks.training_step import PRECISIONS, SIDES, WARM_UP, Stopwatch, train
from callbacks.throughput import known_peak
from lightning_modules import ARGenModule, VQGANModule
from llamagen.cost.gpt import flops_per_sequence
from llamagen.files import atomic_file

SETTLED = 3
"""Number of last steps that a GradScaler must not skip."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["argen", "tokenizer"])
    parser.add_argument("--size", default="B", choices=size_names(), help="of the autoregressive model")
    parser.add_argument("--block-size", type=int, default=256)
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--precision", choices=list(PRECISIONS), default="bf16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--backend", default="inductor", help="of torch.compile; eager for dry runs")
    parser.add_argument("--out", type=Path, help="path of the JSON file")
    # Read by the functions of argen_step and tokenizer_step.
    parser.set_defaults(compile=False, checkpointing=False, without_plain=True, contiguous=False)
    return parser.parse_args()


class Health(pl.Callback):
    """Records loss, scale of the GradScaler and memory of each step.

    Attributes:
        losses: loss of each step.
        scales: scale at the start and after each step; empty without a GradScaler.
        gib: largest memory on the GPU in GiB; 0 without a GPU.
    """

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.scales: list[float] = []
        self.gib = 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Read the scale, and forget the memory of earlier runs."""
        if pl_module.scaler is not None:
            self.scales.append(pl_module.scaler.get_scale())
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Read the values, after the step was timed."""
        self.losses.append(float(outputs["loss"]))
        if pl_module.scaler is not None:
            self.scales.append(pl_module.scaler.get_scale())

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Read the memory before the Trainer frees it."""
        if torch.cuda.is_available():
            self.gib = torch.cuda.max_memory_allocated() / 2**30

    def report(self, module: pl.LightningModule) -> dict[str, Any]:
        """What the steps did, and ``fault``, which is empty if all is well."""
        skipped = [step for step in range(1, len(self.scales)) if self.scales[step] < self.scales[step - 1]]
        finite = all(bool(parameter.isfinite().all()) for parameter in module.parameters())
        fault = "" if finite else "some weights are not finite"
        if not torch.tensor(self.losses).isfinite().all():
            fault = f"some losses are not finite: {self.losses}"
        if skipped and skipped[-1] >= len(self.scales) - SETTLED:
            fault = f"the GradScaler still skips steps at the end: scales {self.scales}"
        found: dict[str, Any] = {"loss_first": round(self.losses[0], 4), "loss_last": round(self.losses[-1], 4)}
        if self.scales:
            found |= {"scale_first": self.scales[0], "scale_last": self.scales[-1], "skipped_steps": len(skipped)}
        return {**found, "fault": fault}


def run(
    options: argparse.Namespace, module: ARGenModule | VQGANModule, watch: Stopwatch, batches: list[Any]
) -> dict[str, Any]:
    """Train, and return the record of our steps."""
    health = Health()
    train(module, batches, options.device, options.precision, watch, health)
    times = watch.times["ours"]
    median = statistics.median(times[WARM_UP:])
    record = {"first_step_s": round(times[0], 3), **spread(times[WARM_UP:]), **health.report(module)}
    record["images_s"] = round(options.batch_size / median, 2)
    if options.device == "cuda":
        record["peak_gib"] = round(health.gib, 3)
    return record


def argen(options: argparse.Namespace) -> dict[str, Any]:
    """Steps of the autoregressive model, eager and compiled."""
    module, steps = argen_step.build(options), WARM_UP + options.steps
    found: dict[str, Any] = {}
    for way in ("eager", "compiled"):
        if way == "compiled" and options.backend == "inductor":
            module.gpt.compile_blocks()
        elif way == "compiled":
            for block in module.gpt.layers:
                block.compile(backend=options.backend)
        watch = argen_step.ARGenStopwatch(options, steps, profiled=0)
        record = run(options, module, watch, argen_step.batches_of(options, steps))
        record["codes_s"] = round(record["images_s"] * options.block_size, 1)
        work = flops_per_sequence(module.gpt.config) / 1e12
        record["tflop_a_second"] = round(work * record["images_s"], 4)
        if peak := known_peak(torch.device(options.device)):
            record["mfu"] = round(record["tflop_a_second"] / peak, 4)
        found[way] = record
    return found


def tokenizer(options: argparse.Namespace) -> dict[str, Any]:
    """Steps of the tokenizer, alone and, in bfloat16, in turns with the plain step."""
    steps, found = WARM_UP + options.steps, dict[str, Any]()
    net = TINY_TOKENIZER if options.size == TINY else None
    batches = tokenizer_step.batches_of(options, steps)
    with tempfile.TemporaryDirectory() as folder:
        module = tokenizer_step.build(options, Path(folder), net)
        watch = tokenizer_step.TokenizerStopwatch(options, steps, SIDES[:1], profiled=0)
        found["ours"] = run(options, module, watch, batches)
        if options.precision == "bf16":
            watch = tokenizer_step.TokenizerStopwatch(options, steps, SIDES, profiled=0)
            train(module, batches, options.device, options.precision, watch)
            times = {name: each[WARM_UP:] for name, each in watch.times.items()}
            ratios = [plain / ours for plain, ours in zip(times["plain"], times["ours"], strict=True)]
            found["in_turns"] = {**{name: spread(each) for name, each in times.items()}, "plain / ours": spread(ratios)}
    return found


def main() -> None:
    options = arguments()
    measured = argen(options) if options.model == "argen" else tokenizer(options)
    result: dict[str, Any] = {
        "benchmark": "training_rate",
        "command": " ".join(["python -m benchmarks.training_rate", *sys.argv[1:]]),
        "machine": machine(options.device),
        "torch": torch.__version__,
        "options": {name: value for name, value in vars(options).items() if name != "out"},
        **measured,
    }
    if options.out:
        with atomic_file(options.out) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")
    print("\n" + json.dumps(result))
    if faults := [each["fault"] for each in measured.values() if each.get("fault")]:
        raise SystemExit(faults[0])


if __name__ == "__main__":
    main()
