"""Memory and time of an image for each published model, on this machine's CPU, with random weights of the same shapes.

Each model is measured in a process of its own, through ``llamagen.LlamaGen`` as users call it. Text models get random
caption features, so the time and memory of FLAN-T5-XL are not included.

    python -m benchmarks.pretrained --out benchmarks/results/pretrained_cpu.json
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.timing import machine, spread
from llamagen.class_names import imagenet_classes
from llamagen.files import atomic_file
from llamagen.hub.published import PUBLISHED, PublishedModel
from llamagen.models.gpt import GPT
from llamagen.models.gpt_config import GPTConfig
from llamagen.models.vqgan import VQGAN, VQGANConfig
from llamagen.pretrained.loading import Parts
from llamagen.pretrained.model import LlamaGen
from llamagen.pretrained.sizes import SIZES
from llamagen.sampling import SamplingConfig

SAMPLING = SamplingConfig(guidance_scale=4.0, top_k=2000)
IMAGES = 4
"""Images of the larger call."""


class RandomPrompts:
    """Replaces the caption encoder: features of 20 tokens."""

    def __init__(self, config: GPTConfig) -> None:
        self.config = config

    def __call__(self, prompts: list[str], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (N, C, W) and lengths (N,)."""
        shape = (len(prompts), self.config.caption_length, self.config.caption_dim)
        features = torch.randn(shape, device=device)
        features[:, :-20] = 0
        return features, torch.full((len(prompts),), 20, device=device)


def random_model(published: PublishedModel) -> LlamaGen:
    tokenizer = VQGAN(VQGANConfig()).eval().requires_grad_(False)
    config = GPTConfig(
        **SIZES[published.size],
        block_size=(published.resolution // 16) ** 2,
        condition="text" if published.kind == "text" else "class",
    )
    with torch.device("meta"):
        gpt = GPT(config)
    gpt = gpt.to(torch.bfloat16).to_empty(device="cpu").eval().requires_grad_(False)
    for tensor in gpt.state_dict().values():
        tensor.normal_(0, 0.02) if tensor.dim() > 1 else tensor.fill_(1)
    text: Any = RandomPrompts(config) if published.kind == "text" else None
    names = imagenet_classes() if text is None else None
    return LlamaGen(Parts(published.name, tokenizer, gpt, SAMPLING, "bfloat16", names, text), batch_size=IMAGES)


def measure(name: str, repeats: int) -> dict[str, Any]:
    model = random_model(PUBLISHED[name])
    assert model.gpt is not None
    conditions: list[Any] = [207, 88, 974, 979] if model.condition == "class" else ["a dog", "a cat", "a hill", "a bay"]
    start = time.perf_counter()
    model.prepare()
    ready = time.perf_counter() - start
    times: dict[str, list[float]] = {"one": [], "four": []}
    for _ in range(repeats):
        for key, count in (("one", 1), ("four", IMAGES)):
            start = time.perf_counter()
            model.generate(conditions[:count], progress=False)
            times[key].append(time.perf_counter() - start)
    return {
        "parameters": sum(parameter.numel() for parameter in model.gpt.parameters()),
        "weights_bytes": sum(parameter.nbytes for parameter in model.gpt.parameters()),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "seconds_to_prepare": round(ready, 2),
        "seconds_for_one_image": spread(times["one"]),
        "seconds_for_four_images": spread(times["four"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3, help="calls of each size")
    parser.add_argument("--only", help="measure this model in this process, and print the result")
    parser.add_argument("--out", type=Path, help="write the record here, as JSON")
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only, options.repeats)))
        return
    results: dict[str, Any] = {}
    names = [name for name, model in PUBLISHED.items() if model.kind != "tokenizer"]
    for name in tqdm(names, unit="model"):
        repeats = options.repeats if PUBLISHED[name].size in ("B", "L") else 1
        command = [sys.executable, "-m", "benchmarks.pretrained", "--only", name, "--repeats", str(repeats)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        results[name] = json.loads(done.stdout.splitlines()[-1])
        one, four = (results[name][f"seconds_for_{key}"]["median"] for key in ("one_image", "four_images"))
        memory = results[name]["peak_memory_bytes"] / 2**30
        tqdm.write(f"{name:>20} | {one:7.1f} s for one image | {four:7.1f} s for four | {memory:5.1f} GiB")
    record = {
        "benchmark": "pretrained",
        "hardware": machine("cpu"),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "command": f"python -m benchmarks.pretrained --repeats {options.repeats} --out {options.out}",
        "sampling": {"guidance_scale": SAMPLING.guidance_scale, "top_k": SAMPLING.top_k},
        "dtype": "bfloat16",
        "models": results,
        "median_of_four_images_over_one": statistics.median(
            each["seconds_for_four_images"]["median"] / each["seconds_for_one_image"]["median"]
            for each in results.values()
        ),
    }
    if options.out:
        with atomic_file(options.out) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
