"""Windows: passes an image, ways to guess, and wall time with and without.

    python -m benchmarks.windows passes --model cifar256=runs/cifar256/argen --model cifar64=runs/cifar64/argen
    python -m benchmarks.windows guesses --model cifar256=runs/cifar256/argen --codes cifar256=runs/cifar256/codes
    python -m benchmarks.windows times --model cifar256=runs/cifar256/argen
    python -m benchmarks.windows pass_times --size B --size L
    python -m benchmarks.windows --table docs/sampling.md

``passes`` and ``guesses`` count passes, which does not depend on the machine, and check that every code is the one that
sampling without windows gives. ``times`` measures seconds a call of a trained model, ``pass_times`` seconds of a pass
of a model of the paper, whatever its weights; both take all windows in turn in each round. Run them on a quiet machine.
Each command replaces its part of the record and leaves the others.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.first_guesses import WAYS, NeighbourLoop, guessing
from benchmarks.sizes import gpt_shape
from benchmarks.timing import machine, spread
from benchmarks.windows_report import plot, write_table
from datamodules import CodeDataModule
from llamagen.command import run_command
from llamagen.files import atomic_file
from llamagen.models.gpt import GPT
from llamagen.models.gpt_config import GPTConfig
from llamagen.parser_errors import OneLineParser
from llamagen.pretrained.model import LlamaGen
from llamagen.sampling import Sampler, SamplingConfig
from llamagen.sampling.inputs import SamplingRequest
from llamagen.sampling.windows import WindowLoop

RECORD = Path("benchmarks/results/windows_cpu.json")
WINDOWS = (2, 4, 8, 16, 32)
TIMED: tuple[int | str, ...] = (1, 2, 4, 8, 16, "auto")
GUIDANCE = (1.0, 2.0, 4.0)
SEED, PASSES = 5, 4


def main() -> None:
    """Measure a part, or write the tables."""
    parser = OneLineParser("python -m benchmarks.windows", "Passes and seconds an image with windows.")
    parser.add_argument("part", nargs="?", choices=["passes", "guesses", "times", "pass_times"])
    parser.add_argument("--model", action="append", default=[], metavar="NAME=RUN", help="a trained model; repeatable")
    parser.add_argument("--codes", action="append", default=[], metavar="NAME=FOLDER", help="its training codes")
    parser.add_argument(
        "--size", action="append", default=[], help="a size of the paper with random weights, for times"
    )
    parser.add_argument("--images", type=int, default=16, help="images of passes and guesses (default: 16)")
    parser.add_argument("--batch", type=int, action="append", help="batches to time (default: 1, 4, 16)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of timing (default: 5)")
    parser.add_argument("--out", type=Path, default=RECORD)
    parser.add_argument("--table", type=Path, help="write the tables of the record into this file, and the plot")
    options = parser.parse_args()
    record: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    if options.table:
        write_table(record, options.table)
        plot(record, options.out.with_suffix(".png"))
        return
    if options.part is None:
        raise ValueError("name a part (passes, guesses or times), or --table FILE")
    models = {name: _gpt(path) for name, path in _pairs(options.model).items()}
    part: dict[str, Any] = record.get(options.part, {})
    if options.part == "passes":
        for name, gpt in models.items():
            part[name] = count_passes(name, gpt, options.images)
    elif options.part == "guesses":
        for name, folder in _pairs(options.codes).items():
            if name not in models:
                raise ValueError(f"--codes {name}={folder} needs --model {name}=RUN")
            part[name] = compare_guesses(name, models[name], folder, options.images)
    else:
        record["machine"] = machine("cpu")
        if options.part == "pass_times":
            models = {size: random_model(size) for size in options.size}
        measure = measure_times if options.part == "times" else time_passes
        for name, gpt in models.items():
            for batch in options.batch or (1, 4, 16):
                part.setdefault(name, {})[str(batch)] = measure(name, gpt, batch, options.rounds)
    record[options.part] = part
    with atomic_file(options.out) as path:
        path.write_text(json.dumps(record, indent=1) + "\n")


def count_passes(name: str, gpt: GPT, images: int) -> list[dict[str, Any]]:
    """Mean number of passes an image, for each guidance scale, top-k and window."""
    sampler, labels, found = Sampler(gpt, images, compiled=True), _labels(gpt, images), []
    top_ks = sorted({0, _top_k(gpt)})
    settings = [(guidance, top_k) for guidance in GUIDANCE for top_k in top_ks]
    for guidance, top_k in tqdm(settings, desc=f"passes of {name}", unit="setting"):
        config = {"guidance_scale": guidance, "top_k": top_k}
        codes = sampler(labels, SamplingConfig(**config), seed=SEED)
        passes = {str(window): _passes(sampler, codes, config, window) for window in WINDOWS}
        found.append({**config, "codes": gpt.config.block_size, "vocabulary": gpt.config.vocab_size, "passes": passes})
    return found


def compare_guesses(name: str, gpt: GPT, folder: str, images: int) -> dict[str, dict[str, float]]:
    """Mean number of passes an image at guidance 2, for each way to guess and each window."""
    data = CodeDataModule(folder, batch_size=256, num_workers=0)
    data.prepare_data()
    data.setup("fit")
    codes = torch.cat([batch["codes"] for batch, _ in zip(data.train_dataloader(), range(64), strict=False)])
    side = gpt.config.grid_size
    NeighbourLoop.tables = NeighbourLoop.count(codes.view(-1, side, side), gpt.config.vocab_size)
    sampler, labels, config = Sampler(gpt, images, compiled=True), _labels(gpt, images), {"guidance_scale": 2.0}
    expected = sampler(labels, config, seed=SEED)
    return {
        way: {str(window): _passes(sampler, expected, config, window, way) for window in WINDOWS}
        for way in tqdm(WAYS, desc=f"guesses of {name}", unit="way")
    }


def _passes(sampler: Sampler, expected: torch.Tensor, config: dict[str, Any], window: int, way: str = "") -> float:
    """Mean passes an image; the codes must be those of sampling without windows."""
    labels = _labels(sampler.gpt, len(expected))
    with guessing(way or next(iter(WAYS))) as loops:
        codes = sampler(labels, SamplingConfig(**config, window=window), seed=SEED)
    if not torch.equal(codes, expected):
        raise AssertionError(f"window {window} changed {int((codes != expected).any(1).sum())} images")
    passes = sum(float(loop.finished.sum()) for loop in loops)
    return round(1 + passes / len(expected), 2)  # the first code comes from the condition


def measure_times(name: str, gpt: GPT, batch: int, rounds: int) -> dict[str, Any]:
    """Seconds a call in bfloat16 for each window, all windows in turn in each round, and ratios to window 1."""
    gpt = gpt.to(torch.bfloat16)
    sampler, labels = Sampler(gpt, batch, compiled=True), _labels(gpt, batch)
    configs = {str(window): SamplingConfig(guidance_scale=2.0, window=window) for window in TIMED}  # type: ignore[arg-type]
    times: dict[str, list[float]] = {window: [] for window in configs}
    expected = sampler(labels, configs["1"], seed=SEED)
    for config in configs.values():
        sampler.prepare(config)
    for seed in tqdm(range(rounds), desc=f"times of {name}, batch {batch}", unit="round"):
        for window, config in configs.items():
            start = time.perf_counter()
            codes = sampler(labels, config, seed=SEED + seed)
            times[window].append(time.perf_counter() - start)
            if seed == 0 and not torch.equal(codes, expected):
                raise AssertionError(f"window {window} changed the images")
    ratios = {
        window: spread([one / other for one, other in zip(times["1"], times[window], strict=True)]) for window in times
    }
    return {
        "codes": gpt.config.block_size,
        "seconds": {window: spread(each) for window, each in times.items()},
        "times_faster": ratios,
    }


@torch.no_grad()
def time_passes(name: str, gpt: GPT, batch: int, rounds: int) -> dict[str, Any]:
    """Seconds of a pass in bfloat16 with guidance, in the middle of an image, for each window."""
    decoder, config = Sampler(gpt.to(torch.bfloat16), batch, compiled=True).decoder, SamplingConfig(guidance_scale=2.0)
    request = SamplingRequest.from_inputs(gpt, _labels(gpt, batch), config, None, SEED, None)
    times: dict[str, list[float]] = {str(window): [] for window in (1, *WINDOWS)}
    for _ in tqdm(range(PASSES * rounds), desc=f"passes of {name}, batch {batch}", unit="round"):
        with decoder.start(request) as state:
            state.codes.zero_()
            loop = WindowLoop(state, gpt.config.block_size // 2, None)
            for window, found in times.items():
                loop.counts[:] = gpt.config.block_size // 2
                start = time.perf_counter()
                loop.advance(int(window))
                found.append(time.perf_counter() - start)
    return {window: spread(found) for window, found in times.items()}


def random_model(size: str) -> GPT:
    """A model of the paper with random weights."""
    gpt = GPT(GPTConfig(**gpt_shape(size), block_size=256)).eval()
    torch.nn.init.normal_(gpt.output.weight, std=0.02)
    return gpt


def _top_k(gpt: GPT) -> int:
    """The paper's top-k, or an eighth of a small vocabulary, as 2000 is of 16,384."""
    return 2000 if gpt.config.vocab_size > 2000 else gpt.config.vocab_size // 8


def _gpt(path: str) -> GPT:
    gpt = LlamaGen.from_pretrained(path).gpt
    if gpt is None:
        raise ValueError(f"{path} is a tokenizer; give the run of an autoregressive model")
    return gpt


def _labels(gpt: GPT, count: int) -> torch.Tensor:
    return torch.arange(count) % gpt.config.num_classes


def _pairs(values: list[str]) -> dict[str, str]:
    for value in values:
        if "=" not in value:
            raise ValueError(f"{value!r} must be NAME=PATH")
    return dict(value.split("=", 1) for value in values)


if __name__ == "__main__":
    run_command(main)
