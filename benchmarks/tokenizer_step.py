"""Time and memory of a training step of the tokenizer, beside a plain implementation of the same step.

    python -m benchmarks.tokenizer_step --image-size 128 --batch-size 4 [--compile] [--device cuda]

The step is that of ``VQGANModule`` in Lightning's Trainer: VQ-16, L2 + LPIPS + PatchGAN + quantiser, clipping, AdamW,
EMA. After each of its steps one of ``benchmarks/plain_tokenizer.py`` is timed in the same process. LPIPS has random
weights here: they do not change its cost. The last steps are profiled: where their time goes, beside what their
convolutions alone would take at the best rate of this machine. Prints tables, then one line of JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.data import DataLoader

from benchmarks.operators import OperatorTimes, convolution_flops, fastest_convolution
from benchmarks.plain_tokenizer import PlainStep, quantize
from benchmarks.timing import machine, spread, synchronize
from callbacks import EMA
from lightning_modules import VQGANLossConfig, VQGANModule
from llamagen.models.discriminator import PatchGAN
from llamagen.models.lpips import LPIPS, read_vgg16

WARM_UP, PROFILED = 3, 3
SIDES = ("ours", "plain")
Part = Callable[[Tensor], Tensor]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--contiguous", action="store_true", help="without channels_last")
    parser.add_argument("--memory-of", choices=SIDES, help="only run this one and print its peak memory")
    return parser.parse_args()


def random_vgg16(path: Path) -> Path:
    """A file of VGG16 weights of the usual size and no use."""
    torch.manual_seed(0)
    shapes = LPIPS.vgg16_shapes()
    torch.save(
        {name: torch.randn(shape) * (2 / max(shape[1:].numel(), 1)) ** 0.5 for name, shape in shapes.items()}, path
    )
    return path


class Stopwatch(pl.Callback):
    """Times each step of the Trainer, and after it one of the peer; the last steps of each are profiled instead."""

    def __init__(self, options: argparse.Namespace, steps: int) -> None:
        self.options, self.first_profiled = options, steps - PROFILED
        self.times: dict[str, list[float]] = {name: [] for name in SIDES}
        self.profiles: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
        self.plain: PlainStep | None = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start."""
        self.profiler = OperatorTimes(self.options.device) if batch_idx >= self.first_profiled else None
        self._start()

    def _start(self) -> None:
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

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop, and let the peer do a step."""
        self._stop("ours")
        if self.plain is None:
            self.plain = PlainStep(pl_module.vqgan, pl_module.discriminator, pl_module._lpips[0])
        if self.profiler is not None:
            self.profiler = OperatorTimes(self.options.device)
        with torch.enable_grad():
            self._start()
            self.plain(batch["images"], autocast_of(self.options)())
            self._stop("plain")
        if self.profiler is None:
            seconds = ", ".join(f"{name} {each[-1]:.3f} s" for name, each in self.times.items())
            print(f"step {batch_idx}: {seconds}", flush=True)


def medians(profiles: list[dict[str, float]]) -> dict[str, float]:
    """Seconds by kind of operator, each the median of several steps."""
    return {kind: round(statistics.median(each[kind] for each in profiles), 3) for kind in profiles[0]}


def build(options: argparse.Namespace, folder: Path) -> VQGANModule:
    pl.seed_everything(0, verbose=False)
    return VQGANModule(
        loss=VQGANLossConfig(adversarial_start=0),
        lpips_weights=random_vgg16(folder / "vgg16.pth"),
        channels_last=not options.contiguous,
        compile=options.compile,
    )


def autocast_of(options: argparse.Namespace) -> Callable[[], torch.autocast]:
    return lambda: torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bf16")


def random_images(options: argparse.Namespace) -> Tensor:
    return torch.randn(options.batch_size, 3, options.image_size, options.image_size).tanh()


def train(options: argparse.Namespace, module: VQGANModule, steps: int, *callbacks: pl.Callback) -> None:
    batches: Any = [{"images": random_images(options)} for _ in range(steps)]
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


def time_part(part: Part, x: Tensor, autocast: Callable[[], torch.autocast], steps: int) -> dict[str, Any]:
    """Forward and backward time of a part in seconds, and what it keeps for the backward pass in MiB."""
    forward, backward = [], []
    for _ in range(steps + WARM_UP):
        leaf = x.detach().requires_grad_()
        synchronize()
        start = time.perf_counter()
        with autocast():
            y = part(leaf)
        synchronize()
        middle = time.perf_counter()
        y.float().sum().backward()
        synchronize()
        forward.append(middle - start)
        backward.append(time.perf_counter() - middle)
    return {
        "forward": spread(forward[WARM_UP:]),
        "backward": spread(backward[WARM_UP:]),
        "kept_mib": round(kept_for_backward(part, x, autocast) / 2**20, 1),
    }


def kept_for_backward(part: Part, x: Tensor, autocast: Callable[[], torch.autocast]) -> int:
    """Bytes of the tensors that a part saves for its gradient, each storage once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor), autocast():
        y = part(x.detach().requires_grad_())
    del y
    return sum(kept.values())


def parts_of(step: VQGANModule | PlainStep, images: Tensor, latent: Tensor) -> dict[str, tuple[Part, Tensor]]:
    """Each part of a step as a function, and its input."""
    vqgan, discriminator = step.vqgan.to(images.device), step.discriminator
    assert discriminator is not None
    weight = vqgan.quantize.get_parameter("embedding.weight")
    if isinstance(step, VQGANModule):
        lpips = step._lpips[0].to(images.device)
        images = images.to(memory_format=step.memory_format)
        quantizer: Part = lambda z: vqgan.quantize(z).quantized  # noqa: E731
    else:
        lpips = step.lpips.to(images.device)
        quantizer = lambda z: quantize(z, weight)[0]  # noqa: E731
    return {
        "encoder": (vqgan.encoder, images),
        "quantiser": (quantizer, latent),
        "decoder": (vqgan.decode, latent),
        "LPIPS": (lambda x: lpips(x, images), images),
        "discriminator": (discriminator.to(images.device), images),
    }


def time_parts(options: argparse.Namespace, module: VQGANModule, plain: PlainStep) -> dict[str, dict[str, Any]]:
    """Each part of both steps by itself, with a gradient to its input."""
    steps, autocast, grid = max(3, options.steps // 2), autocast_of(options), options.image_size // 16
    images = random_images(options).to(options.device)
    latent = torch.randn(options.batch_size, 8, grid, grid, device=options.device)
    steps_by_name: dict[str, VQGANModule | PlainStep] = {"ours": module, "plain": plain}
    return {
        name: {part: time_part(call, x, autocast, steps) for part, (call, x) in parts_of(step, images, latent).items()}
        for name, step in steps_by_name.items()
    }


def plain_step(options: argparse.Namespace, module: VQGANModule) -> Callable[[], None]:
    """A step of the peer that can be repeated."""
    device = torch.device(options.device)
    assert isinstance(module.discriminator, PatchGAN)
    lpips = LPIPS(read_vgg16(module.lpips_weights)).to(device)
    plain = PlainStep(module.vqgan.to(device), module.discriminator.to(device), lpips)
    images = random_images(options).to(device)
    return lambda: plain(images, autocast_of(options)())


def resident(field: str) -> float:
    """Memory of this process in GiB: ``VmRSS``, or its peak ``VmHWM``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 2**20


def peak_memory(options: argparse.Namespace, module: VQGANModule) -> float:
    """Peak memory of two steps in GiB: of the GPU's allocator, or of the process without what it had before."""
    before = resident("VmRSS")
    if options.memory_of == "ours":
        train(options, module, 2)
    else:
        step = plain_step(options, module)
        for _ in range(2):
            step()
    if options.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resident("VmHWM") - before


def memory_in_own_process(kind: str) -> float:
    command = [sys.executable, "-m", "benchmarks.tokenizer_step", *sys.argv[1:], "--memory-of", kind]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(output.strip().splitlines()[-1])


def convolution_limit(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """What the convolutions of a step alone cost: operations, the machine's best rate, and so seconds."""
    flops = convolution_flops(plain_step(options, build(options, folder)))
    rate = fastest_convolution(options.device, torch.bfloat16 if options.precision == "bf16" else torch.float32)
    return {"tflop": round(flops / 1e12, 3), "tflop_a_second": round(rate / 1e12, 3), "seconds": round(flops / rate, 3)}


def report(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Print the tables and the line of JSON."""
    print(f"\n{'step':22}{'median s':>10}{'quartiles':>20}{'images/s':>12}{'peak GiB':>10}")
    for name in SIDES:
        step, memory = result[name], result["peak_gib"][name]
        print(
            f"{name:22}{step['median']:10.3f}{step['q1']:12.3f} {step['q3']:7.3f}"
            f"{options.batch_size / step['median']:12.2f}{memory:10.2f}"
        )
    print(f"\nplain / ours: {result['ratio']:.2f}")
    print(f"\n{'part':22}{'ours f + b s':>18}{'plain f + b s':>18}{'ratio':>8}{'ours, plain keep MiB':>24}")
    for part in result["parts"]["ours"]:
        sides = [result["parts"][name][part] for name in SIDES]
        both = [side["forward"]["median"] + side["backward"]["median"] for side in sides]
        cells = [f"{side['forward']['median']:9.4f} {side['backward']['median']:8.4f}" for side in sides]
        kept = "".join(f"{side['kept_mib']:12.1f}" for side in sides)
        print(f"{part:22}{cells[0]:>18}{cells[1]:>18}{both[1] / both[0]:8.2f}{kept}")
    print(f"\n{'operators of a step':22}{'ours s':>10}{'plain s':>10}")
    for kind in result["operators"]["ours"]:
        print(f"{kind:22}" + "".join(f"{result['operators'][name][kind]:10.3f}" for name in SIDES))
    limit = result["convolution_limit"]
    print(
        f"\nconvolutions alone: {limit['tflop']:.2f} TFLOP at {limit['tflop_a_second']:.2f} TFLOP/s, the best of this "
        f"machine: {limit['seconds']:.2f} s; plain / that: {result['plain']['median'] / limit['seconds']:.2f}"
    )
    print("\n" + json.dumps(result))


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory() as folder:
        module = build(options, Path(folder))
        if options.memory_of:
            print(peak_memory(options, module))
            return
        steps = WARM_UP + options.steps + PROFILED
        watch = Stopwatch(options, steps)
        train(options, module, steps, watch)
        times = {name: each[WARM_UP:] for name, each in watch.times.items()}
        assert watch.plain is not None
        result: dict[str, Any] = {
            "benchmark": "tokenizer_step",
            "command": " ".join(["python -m benchmarks.tokenizer_step", *sys.argv[1:]]),
            "machine": machine(options.device),
            "torch": torch.__version__,
            "options": {k: v for k, v in vars(options).items() if k != "memory_of"},
            **{name: spread(each) for name, each in times.items()},
            "ratio": round(statistics.median(times["plain"]) / statistics.median(times["ours"]), 3),
            "parts": time_parts(options, module, watch.plain),
            "operators": {name: medians(watch.profiles[name]) for name in SIDES},
            "convolution_limit": convolution_limit(options, Path(folder)),
        }
    result["peak_gib"] = {name: round(memory_in_own_process(name), 2) for name in SIDES}
    report(options, result)


if __name__ == "__main__":
    main()
