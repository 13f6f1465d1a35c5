"""Time to the first image in a new process, and images per second of several processes."""

import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from typing import Any

import torch
import torch.multiprocessing as mp

from benchmarks.timing import synchronize
from llamagen.models.gpt import GPT
from llamagen.models.vqgan import VQGAN, VQGANConfig
from llamagen.sampling import PixelDecoder, Sampler, SamplingConfig

CACHES = ("XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


def first_image(module: str, size: str, kind: str, device: str) -> dict[str, dict[str, float]]:
    """Seconds until one guided image of 256 px is done in a new process, with the weights on the device.

    Args:
        module: benchmark module with ``build`` and ``DTYPES``.
        size: size of the GPT.
        kind: key of ``DTYPES``.
        device: ``cpu`` or ``cuda``.

    Returns:
        Seconds of ``ready`` (compiling), ``codes`` and ``pixels``, for eager sampling, for compiled sampling with empty
        caches, and for compiled sampling with the caches that the second run left.
    """
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, **{name: f"{folder}/{name}" for name in CACHES}}
        for name, compiled in (("eager", False), ("compiled, first time", True), ("compiled, later", True)):
            command = [
                sys.executable,
                "-m",
                "benchmarks.sampling_start",
                module,
                size,
                kind,
                device,
                str(int(compiled)),
            ]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            found[name] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


@torch.no_grad()
def _one_image(gpt: GPT, device: str, config: SamplingConfig, compiled: bool) -> dict[str, float]:
    tokenizer = VQGAN(VQGANConfig())
    marks = [time.perf_counter()]

    def mark() -> None:
        synchronize()
        marks.append(time.perf_counter())

    sampler = Sampler(gpt, 1, compiled=compiled)
    sampler.prepare(config)
    pixels = PixelDecoder(tokenizer, torch.device(device), gpt.output.weight.dtype)
    mark()
    codes = sampler(torch.zeros(1, dtype=torch.int64, device=device), config)
    mark()
    pixels(codes.unflatten(1, (16, 16))).numpy()
    mark()
    names = ("ready", "codes", "pixels")
    return {name: round(b - a, 3) for name, (a, b) in zip(names, pairwise(marks), strict=True)}


def _rank(rank: int, threads: int, gpt: GPT, batch: int, config: SamplingConfig, start: Any, ends: Any) -> None:
    torch.set_num_threads(threads)
    sampler = Sampler(gpt, batch, compiled=True)
    sampler.prepare(config)
    start.wait()
    began = time.perf_counter()
    indices = torch.arange(rank * batch, (rank + 1) * batch)
    sampler(indices % 1000, config, indices=indices)
    ends.put(time.perf_counter() - began)


def images_a_second(gpt: GPT, ranks: int, images: int, config: SamplingConfig) -> float:
    """Images per second whose codes several processes generate. They share the processor's threads equally."""
    context = mp.get_context("spawn")
    start, ends = context.Barrier(ranks), context.Queue()
    threads, batch = max(torch.get_num_threads() // ranks, 1), images // ranks
    gpt.share_memory()
    running = [context.Process(target=_rank, args=(r, threads, gpt, batch, config, start, ends)) for r in range(ranks)]
    for process in running:
        process.start()
    taken = [ends.get(timeout=600) for _ in running]
    for process in running:
        process.join()
    return images / float(max(taken))


if __name__ == "__main__":
    from importlib import import_module

    module, size, kind, device, compiled = sys.argv[1:]
    benchmark = import_module(module)
    built = benchmark.build(size, 256, device, benchmark.DTYPES[kind])
    print(json.dumps(_one_image(built, device, benchmark.CONFIG, bool(int(compiled)))))
