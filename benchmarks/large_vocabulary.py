"""Cost of a large vocabulary: one head of 262,144 codes, or two of 512 in sequence, next to one of 16,384 codes.

    python -m benchmarks.large_vocabulary --out benchmarks/results/large_vocabulary.json

For each of the three models: parameters, operations and the memory of a GPU from ``llamagen.cost``; the peak memory of
training steps on this CPU, each in a process of its own; seconds of a training step; and seconds of a code in sampling,
with guidance, by the engines that can run the model. Times are taken in rounds, each with a step of every model, so the
ratios compare steps that ran at the same time. A training step has the forward and the backward pass in bf16-mixed,
clipping and AdamW, without data and EMA.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from benchmarks.recipe_argen import Step
from benchmarks.sizes import gpt_shape, size_names
from benchmarks.timing import machine, spread, timed
from benchmarks.training_step import memory_in_own_process, peak_since, resident
from lightning_modules import ARGenModule
from llamagen.cost.__main__ import Run, memory
from llamagen.cost.gpt import flops_per_sequence, parameters
from llamagen.files import atomic_file
from llamagen.models.gpt import GPT, GPTConfig
from llamagen.sampling import Sampler, SamplingConfig
from llamagen.sampling.inputs import SamplingRequest

PEER, PLAIN, FACTORS = "16,384 codes", "262,144 codes", "262,144 codes, 512 × 512"
CASES: dict[str, dict[str, Any]] = {
    PEER: {"vocab_size": 1 << 14},
    PLAIN: {"vocab_size": 1 << 18},
    FACTORS: {"vocab_size": 1 << 18, "code_factors": (512, 512)},
}
GPU_BATCH = 32  # of configs/argen/hardware/ddp.yaml
WARM_UP = 2
SAMPLING = SamplingConfig(guidance_scale=4.0)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="B", choices=size_names())
    parser.add_argument("--batch-size", type=int, default=2, help="images of a training step")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of training steps")
    parser.add_argument("--codes", type=int, default=8, help="codes that are sampled by each engine, one in each round")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--memory-of", choices=CASES, help="only train this model and print its peak memory")
    parser.add_argument("--out", type=Path, help="path of the JSON file")
    return parser.parse_args()


def net_of(name: str, size: str) -> GPTConfig:
    return GPTConfig(**gpt_shape(size), **CASES[name])


def training_step(name: str, options: argparse.Namespace) -> Step:
    pl.seed_everything(0, verbose=False)
    return Step(ARGenModule(net_of(name, options.size)), options.batch_size)


def peak_memory(name: str, options: argparse.Namespace) -> float:
    """Peak memory in GiB that training steps add to this process."""
    before, step = resident("VmRSS"), training_step(name, options)
    for _ in range(2):  # the first one allocates the moments
        step()
    return peak_since(before, "cpu")


@torch.no_grad()
def sampling_model(name: str, size: str) -> GPT:
    """The model in bfloat16, with random weights in all parts."""
    with torch.device("meta"):
        gpt = GPT(net_of(name, size)).bfloat16()
    gpt.to_empty(device="cpu").eval()
    for parameter in gpt.parameters():
        parameter.normal_(0, 0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
    return gpt


def with_ratios(times: dict[str, list[float]], base: str) -> dict[str, Any]:
    """Median and quartiles of the seconds, and of their ratios to those of ``base`` in the same round."""
    found = {}
    for name, own in times.items():
        ratios = [one / other for one, other in zip(own, times[base], strict=True)]
        found[name] = {**spread(own), "ratio": {key: round(value, 3) for key, value in spread(ratios).items()}}
    return found


def in_rounds(steps: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int) -> dict[str, list[float]]:
    """Seconds of each step, one of each in a round, after some rounds that do not count."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(warm_up + rounds):
        for name, step in steps.items():
            seconds = timed(step)
            if number >= warm_up:
                times[name].append(seconds)
    return times


@torch.inference_mode()
def sampling_times(options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of a code of one image from the middle of the image on, by model and engine."""
    with ExitStack() as stack:
        steps = dict[str, Callable[[], Any]]()
        for name in CASES:
            gpt = sampling_model(name, options.size)
            first = gpt.config.block_size // 2
            for engine in ("eager", "compiled") if gpt.config.code_factors is None else ("eager",):
                decoder = Sampler(gpt, 1, compiled=engine == "compiled").decoder
                kept = torch.arange(first)[None] * 7
                request = SamplingRequest.from_inputs(gpt, [1], SAMPLING, None, 0, None, kept)
                state = stack.enter_context(decoder.start(request))
                state.prefill()
                state.keep(request.kept)  # type: ignore[arg-type]
                places = iter(range(first, first + WARM_UP + options.codes))
                steps[f"{name}, {engine}"] = lambda state=state, places=places: state.advance(next(places))  # type: ignore[misc]
        return in_rounds(steps, options.codes, WARM_UP)


def gpu_memory(net: GPTConfig) -> dict[str, float]:
    """Gigabytes of a GPU in training with bf16-mixed and EMA, and the parts that depend on the vocabulary."""
    parts = memory(Run(net, GPU_BATCH, "bf16-mixed", ema=True))
    names = ("weights", "gradients", "moments of AdamW", "EMA", "gradients of the loss", "logits, temporarily")
    return {
        name: round(size / 1e9, 3)
        for name, size in {**{n: parts[n] for n in names}, "total": sum(parts.values())}.items()
    }


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    if options.memory_of is not None:
        print(peak_memory(options.memory_of, options))
        return
    record: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.large_vocabulary", *sys.argv[1:]]),
        "machine": machine("cpu"),
        "torch": torch.__version__,
        "size": options.size,
        "batch_size": options.batch_size,
        "gpu_batch_size": GPU_BATCH,
        "models": {},
    }
    for name in CASES:
        net = net_of(name, options.size)
        record["models"][name] = {
            "parameters": parameters(net),
            "training FLOPs of an image": flops_per_sequence(net),
            "GB of a GPU": gpu_memory(net),
            "GiB of training steps": round(memory_in_own_process("large_vocabulary", name), 3),
        }
        print(name, record["models"][name], flush=True)
    record["seconds of a code"] = with_ratios(sampling_times(options), f"{PLAIN}, eager")
    steps = {name: training_step(name, options) for name in CASES}
    record["seconds of a training step"] = with_ratios(in_rounds(steps, options.rounds, WARM_UP), PLAIN)
    for title in ("seconds of a code", "seconds of a training step"):
        print(title)
        for name, found in record[title].items():
            ratio = found["ratio"]
            print(
                f"  {name:40} {found['median']:.4f} ({found['q1']:.4f} – {found['q3']:.4f}), "
                f"ratio {ratio['median']:.3f} ({ratio['q1']:.3f} – {ratio['q3']:.3f})"
            )
    if options.out is not None:
        with atomic_file(options.out) as temporary:
            temporary.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
