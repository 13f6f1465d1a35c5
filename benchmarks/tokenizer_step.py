"""Time and memory of a training step of the tokenizer, compared with a plain implementation of the same step.

    python -m benchmarks.tokenizer_step --image-size 128 --batch-size 4 [--compile] [--device cuda]

Times steps of ``VQGANModule`` in Lightning's Trainer (VQ-16, L2 + LPIPS + PatchGAN + quantiser, clipping, AdamW, EMA).
After each of them it times a step of ``benchmarks/plain_tokenizer.py`` in the same process. LPIPS has random weights,
which do not change its cost. The last steps are profiled by kind of operator, and compared with the time of their
convolutions alone at this machine's best rate. Prints tables, then one line of JSON.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.operators import convolution_flops, fastest_convolution
from benchmarks.plain_tokenizer import PlainStep, quantize
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
from lightning_modules import VQGANLossConfig, VQGANModule
from llamagen.models.discriminator import PatchGAN
from llamagen.models.lpips import LPIPS, read_vgg16
from llamagen.models.vqgan import VQGANConfig

Part = Callable[[Tensor], Tensor]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--contiguous", action="store_true", help="contiguous tensors instead of channels_last")
    parser.add_argument("--memory-of", choices=SIDES, help="only run this side and print its peak memory")
    return parser.parse_args()


def random_vgg16(path: Path) -> Path:
    """Write random weights of VGG16's shapes."""
    torch.manual_seed(0)
    shapes = LPIPS.vgg16_shapes()
    torch.save(
        {name: torch.randn(shape) * (2 / max(shape[1:].numel(), 1)) ** 0.5 for name, shape in shapes.items()}, path
    )
    return path


class TokenizerStopwatch(Stopwatch):
    """Compares with :class:`PlainStep`."""

    def __init__(
        self, options: argparse.Namespace, steps: int, sides: tuple[str, ...] = SIDES, profiled: int = PROFILED
    ) -> None:
        super().__init__(options.device, steps, sides, profiled)
        self.options = options
        self.plain: PlainStep | None = None

    def prepare_plain_step(self, module: VQGANModule) -> None:
        """Copy the networks."""
        if self.plain is None:
            assert isinstance(module.discriminator, PatchGAN)
            self.plain = PlainStep(module.vqgan, module.discriminator, module._lpips[0])

    def plain_step(self, batch: dict[str, Tensor]) -> None:
        """One step of the plain implementation."""
        assert self.plain is not None
        self.plain(batch["images"], autocast_of(self.options.device, self.options.precision))


def build(options: argparse.Namespace, folder: Path, net: VQGANConfig | None = None) -> VQGANModule:
    pl.seed_everything(0, verbose=False)
    return VQGANModule(
        net=net,
        loss=VQGANLossConfig(adversarial_start=0),
        lpips_weights=random_vgg16(folder / "vgg16.pth"),
        channels_last=not options.contiguous,
        compile=options.compile,
    )


def random_images(options: argparse.Namespace) -> Tensor:
    return torch.randn(options.batch_size, 3, options.image_size, options.image_size).tanh()


def batches_of(options: argparse.Namespace, steps: int) -> list[dict[str, Tensor]]:
    return [{"images": random_images(options)} for _ in range(steps)]


def time_part(part: Part, x: Tensor, autocast: Callable[[], torch.autocast], steps: int) -> dict[str, Any]:
    """Seconds of a part's forward and backward pass, and the MiB that it keeps for the backward pass."""
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
    """Bytes of the tensors that a part saves for its backward pass, each storage counted once."""
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
    """Time each part of both steps separately, with a gradient to its input."""
    steps, grid = max(3, options.steps // 2), options.image_size // 16
    autocast = partial(autocast_of, options.device, options.precision)
    images = random_images(options).to(options.device)
    latent = torch.randn(options.batch_size, 8, grid, grid, device=options.device)
    steps_by_name: dict[str, VQGANModule | PlainStep] = {"ours": module, "plain": plain}
    return {
        name: {part: time_part(call, x, autocast, steps) for part, (call, x) in parts_of(step, images, latent).items()}
        for name, step in steps_by_name.items()
    }


def plain_step(options: argparse.Namespace, module: VQGANModule) -> Callable[[], None]:
    """A plain step that can be repeated."""
    device = torch.device(options.device)
    assert isinstance(module.discriminator, PatchGAN)
    lpips = LPIPS(read_vgg16(module.lpips_weights)).to(device)
    plain = PlainStep(module.vqgan.to(device), module.discriminator.to(device), lpips)
    images = random_images(options).to(device)
    return lambda: plain(images, autocast_of(options.device, options.precision))


def peak_memory(options: argparse.Namespace, module: VQGANModule) -> float:
    """Peak memory of two steps in GiB, see :func:`peak_since`."""
    before = resident("VmRSS")
    if options.memory_of == "ours":
        train(module, batches_of(options, 2), options.device, options.precision)
    else:
        step = plain_step(options, module)
        for _ in range(2):
            step()
    return peak_since(before, options.device)


def convolution_limit(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Operations of the convolutions of a step, the machine's best rate, and the resulting minimum in seconds."""
    flops = convolution_flops(plain_step(options, build(options, folder)))
    rate = fastest_convolution(options.device, torch.bfloat16 if options.precision == "bf16" else torch.float32)
    return {"tflop": round(flops / 1e12, 3), "tflop_a_second": round(rate / 1e12, 3), "seconds": round(flops / rate, 3)}


def report(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Print tables and one line of JSON."""
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
        f"\nconvolutions alone: {limit['tflop']:.2f} TFLOP at this machine's best rate, {limit['tflop_a_second']:.2f} "
        f"TFLOP/s take {limit['seconds']:.2f} s; plain / that: {result['plain']['median'] / limit['seconds']:.2f}"
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
        watch = TokenizerStopwatch(options, steps)
        train(module, batches_of(options, steps), options.device, options.precision, watch)
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
    result["peak_gib"] = {name: round(memory_in_own_process("tokenizer_step", name), 2) for name in SIDES}
    report(options, result)


if __name__ == "__main__":
    main()
