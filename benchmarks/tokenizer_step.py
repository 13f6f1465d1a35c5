"""Time and memory of a training step of the tokenizer, beside a plain implementation of the same step.

    python benchmarks/tokenizer_step.py --image-size 128 --batch-size 4 [--compile] [--device cuda]

The step is that of ``VQGANModule`` in Lightning's Trainer: VQ-16, L2 + LPIPS + PatchGAN + quantiser, clipping, AdamW, EMA.
After each of its steps one of ``benchmarks/plain_tokenizer.py`` is timed in the same process. LPIPS has random weights here:
they do not change its cost. Prints tables, then one line of JSON.
"""

import argparse
import json
import platform
import resource
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
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.plain_tokenizer import PlainStep, quantize
from callbacks import EMA
from lightning_modules import VQGANLossConfig, VQGANModule
from llamagen.models.lpips import LPIPS

WARM_UP = 2


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--contiguous", action="store_true", help="without channels_last")
    parser.add_argument("--memory-of", choices=["ours", "plain"], help="only run this one and print its peak memory")
    return parser.parse_args()


def random_vgg16(path: Path) -> Path:
    """A file of VGG16 weights of the usual size and no use."""
    torch.manual_seed(0)
    shapes = LPIPS.vgg16_shapes()
    torch.save(
        {name: torch.randn(shape) * (2 / max(shape[1:].numel(), 1)) ** 0.5 for name, shape in shapes.items()}, path
    )
    return path


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def spread(times: list[float]) -> dict[str, float]:
    """Median and quartiles in seconds."""
    low, median, high = statistics.quantiles(times, n=4)
    return {"median": round(median, 4), "q1": round(low, 4), "q3": round(high, 4)}


class Stopwatch(pl.Callback):
    """Times each step of the Trainer, and after it one of the peer."""

    def __init__(self, plain: bool, autocast: Callable[[], torch.autocast]) -> None:
        self.times: dict[str, list[float]] = {"ours": [], "plain": []}
        self.autocast, self.with_plain, self.plain = autocast, plain, None  # type: ignore[var-annotated]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start."""
        synchronize()
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop, and let the peer do a step."""
        synchronize()
        self.times["ours"].append(time.perf_counter() - self.start)
        if self.with_plain:
            if self.plain is None:
                self.plain = PlainStep(pl_module.vqgan, pl_module.discriminator, pl_module._lpips[0])
            with torch.enable_grad():
                start = time.perf_counter()
                self.plain(batch["images"], self.autocast())
                synchronize()
                self.times["plain"].append(time.perf_counter() - start)
        print(f"step {batch_idx}: " + ", ".join(f"{k} {v[-1]:.3f} s" for k, v in self.times.items() if v), flush=True)


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


def train(options: argparse.Namespace, module: VQGANModule, watch: Stopwatch, steps: int) -> None:
    shape = (options.batch_size, 3, options.image_size, options.image_size)
    batches = DataLoader([{"images": torch.randn(shape).tanh()} for _ in range(steps)], batch_size=None)  # type: ignore[arg-type,var-annotated]
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
        callbacks=[EMA(), watch],
    ).fit(module, batches)


def time_part(
    part: Callable[..., Tensor], inputs: list[Tensor], autocast: Callable[[], torch.autocast], steps: int
) -> dict[str, Any]:
    """Forward and backward time of a part, seconds."""
    forward, backward = [], []
    for _ in range(steps + WARM_UP):
        leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
        synchronize()
        start = time.perf_counter()
        with autocast():
            y = part(*leaves)
        synchronize()
        middle = time.perf_counter()
        y.float().sum().backward()
        synchronize()
        forward.append(middle - start)
        backward.append(time.perf_counter() - middle)
    return {"forward": spread(forward[WARM_UP:]), "backward": spread(backward[WARM_UP:])}


def time_parts(options: argparse.Namespace, module: VQGANModule, plain: PlainStep) -> dict[str, dict[str, Any]]:
    """Each part of both steps by itself, with a gradient to its input."""
    device, steps = torch.device(options.device), max(3, options.steps // 2)
    size, grid = options.image_size, options.image_size // 16
    images = torch.randn(options.batch_size, 3, size, size, device=device).tanh()
    latent = torch.randn(options.batch_size, 8, grid, grid, device=device)
    autocast, table = autocast_of(options), {}
    for name, vqgan, discriminator, lpips, layout in (
        ("ours", module.vqgan, module.discriminator, module._lpips[0], module.memory_format),
        ("plain", plain.vqgan, plain.discriminator, plain.lpips, torch.contiguous_format),
    ):
        vqgan, x = vqgan.to(device), images.to(memory_format=layout)
        assert discriminator is not None
        weight = vqgan.quantize.embedding.weight
        quantizer: Callable[..., Tensor] = (
            (lambda z, q=vqgan.quantize: q(z).quantized) if name == "ours" else (lambda z, w=weight: quantize(z, w)[0])
        )
        parts: dict[str, tuple[nn.Module | Callable[..., Tensor], list[Tensor]]] = {
            "encoder": (vqgan.encoder, [x]),
            "quantiser": (quantizer, [latent]),
            "decoder": (lambda z, v=vqgan: v.decoder(v.post_quant_conv(z)), [latent]),
            "LPIPS": (lambda z, y=x, p=lpips.to(device): p(z, y), [x]),
            "discriminator": (discriminator.to(device), [x]),
        }
        table[name] = {part: time_part(call, inputs, autocast, steps) for part, (call, inputs) in parts.items()}
    return table


def peak_memory(options: argparse.Namespace, module: VQGANModule) -> float:
    """Peak memory of two steps in GiB: of the GPU's allocator, or of the process without what it had before."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    watch = Stopwatch(False, autocast_of(options))
    if options.memory_of == "ours":
        train(options, module, watch, 2)
    else:
        module._lpips = (LPIPS.from_weights(module.lpips_weights),)
        device = torch.device(options.device)
        assert module.discriminator is not None
        plain = PlainStep(module.vqgan.to(device), module.discriminator.to(device), module._lpips[0].to(device))  # type: ignore[arg-type]
        images = torch.randn(options.batch_size, 3, options.image_size, options.image_size, device=device).tanh()
        for _ in range(2):
            plain(images, watch.autocast())
    if options.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 - before


def memory_in_own_process(kind: str) -> float:
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", kind]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(output.strip().splitlines()[-1])


def machine(options: argparse.Namespace) -> str:
    if options.device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    return f"{name}, {torch.get_num_threads()} threads"


def report(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Print the tables and the line of JSON."""
    print(f"\n{'step':14}{'median s':>10}{'quartiles':>20}{'pictures/s':>12}{'peak GiB':>10}")
    for name in ("ours", "plain"):
        step = result[name]
        print(
            f"{name:14}{step['median']:10.3f}{step['q1']:12.3f} {step['q3']:7.3f}{options.batch_size / step['median']:12.2f}"
            f"{result['peak_gib'][name]:10.2f}"
        )
    print(f"\nplain / ours: {result['ratio']:.2f}\n\n{'part':14}{'ours f + b s':>18}{'plain f + b s':>18}{'ratio':>8}")
    for part in result["parts"]["ours"]:
        sides = [result["parts"][name][part] for name in ("ours", "plain")]
        both = [side["forward"]["median"] + side["backward"]["median"] for side in sides]
        cells = [f"{side['forward']['median']:9.4f} {side['backward']['median']:8.4f}" for side in sides]
        print(f"{part:14}{cells[0]:>18}{cells[1]:>18}{both[1] / both[0]:8.2f}")
    print("\n" + json.dumps(result))


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory() as folder:
        module = build(options, Path(folder))
        if options.memory_of:
            print(peak_memory(options, module))
            return
        watch = Stopwatch(True, autocast_of(options))
        train(options, module, watch, options.steps + WARM_UP)
        times = {name: each[WARM_UP:] for name, each in watch.times.items()}
        assert watch.plain is not None
        result: dict[str, Any] = {
            "benchmark": "tokenizer_step",
            "machine": machine(options),
            "torch": torch.__version__,
            "options": {k: v for k, v in vars(options).items() if k != "memory_of"},
            **{name: spread(each) for name, each in times.items()},
            "ratio": round(statistics.median(times["plain"]) / statistics.median(times["ours"]), 3),
            "parts": time_parts(options, module, watch.plain),
        }
    result["peak_gib"] = {name: round(memory_in_own_process(name), 2) for name in ("ours", "plain")}
    report(options, result)


if __name__ == "__main__":
    main()
