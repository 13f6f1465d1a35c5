"""The effect of ``rope_condition`` on a model that must read its captions: ``zero`` compared with ``identity``.

The images are scikit-learn's 8 × 8 digits as 4 × 4 codes (k-means over their 2 × 2 patches). A caption names several
digits and means one of them: "not a five and a three". The words next to a digit decide whether it is meant, so the
same words in another order describe another image. The features come from a small T5 with random weights. In the cases
"word by word" the T5 encodes each word separately, so the features of a word contain nothing about its neighbours. Two
GPTs differ only in ``rope_condition``: with the same seed, they have the same initial weights, data order and captions.

    python -m benchmarks.rope_condition --out benchmarks/results

Prints a table, then one JSON line. A support vector machine, trained on the real training images, classifies the images
generated for validation captions. ``wrong caption costs`` is the increase of the validation cross entropy when the
meant digit of each caption is swapped with another digit of the caption.
"""

import argparse
import json
import platform
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sklearn
import torch
import transformers
from matplotlib.figure import Figure
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from torch import Tensor
from torch.nn import functional as F

from benchmarks.small_t5 import save_small_t5
from benchmarks.timing import machine
from llamagen.files import atomic_file
from llamagen.grids import figure_image, save_png
from llamagen.models.gpt import GPT, GPTConfig
from llamagen.sampling import Sampler
from llamagen.text import CaptionEncoder, pad_left

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = ("a", "not", "and", *DIGITS)
ROTATIONS = ("zero", "identity")
CODES, WIDTH, BATCH = 64, 64, 32
LONGEST = 15
VALIDATION = 300
CAPTIONS_OF_A_DIGIT = 300


class Case(NamedTuple):
    """A kind of captions: how many digits they name, and whether each word is encoded separately."""

    named: int
    word_by_word: bool = False


CASES = {
    "one digit": Case(1),
    "two digits": Case(2),
    "two digits, word by word": Case(2, True),
    "four digits": Case(4),
}


class Captions(NamedTuple):
    """Features (N, C, W) padded on the left, lengths (N,), and digits (N, named) with the meant one first."""

    features: Tensor
    lengths: Tensor
    digits: Tensor


class Images(NamedTuple):
    """Digits as codes (N, 16) with labels (N,), the grey values (64, 2 × 2) of each code, and the classifier."""

    codes: Tensor
    labels: Tensor
    patches: np.ndarray
    judge: SVC

    def shown(self, codes: Tensor) -> Tensor:
        """Classify images: codes (N, 16) → digits (N,)."""
        pixels = self.patches[codes.numpy()].reshape(-1, 4, 4, 2, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 64)
        return torch.from_numpy(self.judge.predict(pixels))


def make_images() -> Images:
    """All digits in a fixed order; codes and classifier are fitted without the last 300, which are for validation."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.data))
    pixels, labels = digits.data[order], digits.target[order]
    patches = pixels.reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 4)
    clusters = KMeans(CODES, n_init=1, random_state=0).fit(patches[: -16 * VALIDATION])
    codes = torch.from_numpy(clusters.predict(patches).astype(np.int64)).view(-1, 16)
    judge = SVC(gamma=0.001, C=10).fit(pixels[:-VALIDATION], labels[:-VALIDATION])
    return Images(codes, torch.from_numpy(labels), clusters.cluster_centers_, judge)


def write_caption(digits: Sequence[int], place: int) -> str:
    """A caption that means the first of the digits. ``place`` is its place among the others."""
    phrases = [f"not a {DIGITS[digit]}" for digit in digits[1:]]
    phrases.insert(place, f"a {DIGITS[digits[0]]}")
    return " and ".join(phrases)


def random_captions(encoder: CaptionEncoder, case: Case, meant: Sequence[int], seed: int) -> tuple[Captions, Captions]:
    """A random caption for each digit, and the same caption with the meant and the next digit swapped."""
    source = random.Random(seed)
    digits = [[digit, *source.sample([x for x in range(10) if x != digit], case.named - 1)] for digit in meant]
    places = [source.randrange(case.named) for _ in meant]
    swapped = [[*row[1::-1], *row[2:]] for row in digits]
    first, second = (
        Captions(*encode(encoder, case, [write_caption(row, place) for row, place in zip(rows, places, strict=True)]),
                 torch.tensor(rows))
        for rows in (digits, swapped)
    )  # fmt: skip
    return first, second


def encode(encoder: CaptionEncoder, case: Case, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Features of captions, padded on the left, and their lengths."""
    encoded = encoder(captions)
    features, length = encoded.features, 4 * case.named - 1
    if case.word_by_word:  # the end of the caption is also encoded alone
        alone = {word: encoder([word]).features[0, 0] for word in WORDS} | {"": encoder([""]).features[0, 0]}
        features = torch.zeros_like(features)
        for row, caption in enumerate(captions):
            for place, word in enumerate([*caption.split(), ""]):
                features[row, place] = alone[word]
    return pad_left(features[:, :length], encoded.lengths), encoded.lengths


def cross_entropy(gpt: GPT, codes: Tensor, captions: Captions) -> Tensor:
    """Mean over all codes, in nats."""
    logits = gpt(codes[:, :-1], captions.features, caption_lengths=captions.lengths)
    return F.cross_entropy(logits.flatten(0, 1), codes.flatten())


def train(options: argparse.Namespace, images: Images, encoder: CaptionEncoder, case: Case, rotation: Any,
          seed: int) -> dict[str, Any]:  # fmt: skip
    """Train a model, validate it while it trains, and classify the images that it generates."""
    torch.manual_seed(seed)
    length = 4 * case.named - 1
    gpt = GPT(GPTConfig(dim=options.dim, n_layer=options.layers, n_head=4, multiple_of=32, vocab_size=CODES,
                        block_size=16, condition="text", caption_dim=WIDTH, caption_length=length,
                        condition_dropout=0.0, token_dropout=0.0, resid_dropout=0.0, ffn_dropout=0.0,
                        rope_condition=rotation))  # fmt: skip
    codes, labels = images.codes[:-VALIDATION], images.labels[:-VALIDATION]
    training, _ = random_captions(encoder, case, sorted(10 * list(range(10)) * (CAPTIONS_OF_A_DIGIT // 10)), seed)
    held_out, meant = images.codes[-VALIDATION:], images.labels[-VALIDATION:]
    right, wrong = random_captions(encoder, case, meant.tolist(), 1000)
    optimizer = torch.optim.AdamW(gpt.parameters(), options.lr, (0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, options.steps, pct_start=0.1)
    order = torch.Generator().manual_seed(seed)
    curve, waiting = [], torch.empty(0, dtype=torch.int64)
    for step in range(1, options.steps + 1):
        if len(waiting) < BATCH:
            waiting = torch.randperm(len(codes), generator=order)
        rows, waiting = waiting[:BATCH], waiting[BATCH:]
        chosen = labels[rows] * CAPTIONS_OF_A_DIGIT + torch.randint(CAPTIONS_OF_A_DIGIT, (BATCH,), generator=order)
        loss = cross_entropy(gpt, codes[rows], Captions(*(part[chosen] for part in training)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % options.every == 0 or step == options.steps:
            with torch.no_grad():
                curve.append((step, round(float(cross_entropy(gpt, held_out, right)), 4)))
    with torch.no_grad():
        costs = float(cross_entropy(gpt, held_out, wrong)) - curve[-1][1]
    generated = Sampler(gpt, VALIDATION)(right.features, caption_lengths=right.lengths, seed=seed)
    seen = images.shown(generated)[:, None] == right.digits
    return {
        "curve": curve,
        "cross entropy": curve[-1][1],
        "wrong caption costs": costs if case.named > 1 else None,
        "shows the meant digit": float(seen[:, 0].float().mean()),
        "shows a digit that is not meant": float(seen[:, 1:].any(1).float().mean()) if case.named > 1 else None,
    }


def summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean, lowest and highest value of each metric over the seeds."""
    names = [name for name, value in runs[0].items() if isinstance(value, float)]
    columns = {name: [run[name] for run in runs] for name in names}
    return {
        name: {
            "mean": round(statistics.mean(column), 4),
            "lowest": round(min(column), 4),
            "highest": round(max(column), 4),
        }
        for name, column in columns.items()
    }


def plot(runs: dict[str, dict[str, list[dict[str, Any]]]]) -> Figure:
    """For each case, plot the cross entropies of all seeds (above) and the digits in the generated images (below)."""
    figure = Figure(figsize=(3.2 * len(runs), 5.6), layout="constrained")
    axes = figure.subplots(2, len(runs), squeeze=False, sharey="row")
    for column, (case, sides) in enumerate(runs.items()):
        above, below = axes[:, column]
        for number, (rotation, seeds) in enumerate(sides.items()):
            color = f"C{number}"
            for run in seeds:
                above.plot(*zip(*run["curve"], strict=True), color=color, alpha=0.3)
            means = np.mean([[value for _, value in run["curve"]] for run in seeds], axis=0)
            above.plot([step for step, _ in seeds[0]["curve"]], means, color=color, label=rotation)
            kinds = ("shows the meant digit", "shows a digit that is not meant")
            for place, kind in enumerate(kind for kind in kinds if seeds[0][kind] is not None):
                shares, left = [run[kind] for run in seeds], place + 0.4 * number - 0.2
                below.bar(left, np.mean(shares), 0.38, color=color, alpha=0.7)
                below.plot([left] * len(shares), shares, "k.", markersize=4)
        above.set(title=case, xlabel="step")
        below.set(xticks=[0, 1], xticklabels=["meant", "named, not meant"], ylim=(0, 1), xlim=(-0.5, 1.5))
    axes[0, 0].set(ylabel="validation cross entropy, nats a code")
    axes[1, 0].set(ylabel="share of generated images")
    axes[0, 0].legend(title="rope_condition")
    return figure


def report(result: dict[str, Any], ceiling: float) -> None:
    """Print the table."""
    print(
        f"\n{'captions':26}{'rope_condition':16}{'cross entropy':>14}{'wrong costs':>13}{'meant':>8}{'not meant':>11}"
    )
    for case, sides in result.items():
        for rotation, numbers in sides.items():
            names = ("cross entropy", "wrong caption costs", "shows the meant digit", "shows a digit that is not meant")
            cells = [f"{numbers[name]['mean']:.3f}" if name in numbers else "" for name in names]
            print(f"{case:26}{rotation:16}{cells[0]:>14}{cells[1]:>13}{cells[2]:>8}{cells[3]:>11}")
    print(f"\nreal validation images, encoded and decoded, that are recognised as their label: {ceiling:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for rope_condition.json and rope_condition.png")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--every", type=int, default=100, help="steps between two validations")
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    started, images = time.process_time(), make_images()
    held_out = slice(-VALIDATION, None)
    ceiling = float((images.shown(images.codes[held_out]) == images.labels[held_out]).float().mean())
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {
        case: {side: [] for side in ROTATIONS} for case in options.cases
    }
    with tempfile.TemporaryDirectory() as folder:
        save_small_t5(Path(folder), WORDS, WIDTH)
        encoder = CaptionEncoder(folder, LONGEST, "float32")
        for seed in range(options.seeds):
            for case in options.cases:
                for rotation in ROTATIONS:
                    run = train(options, images, encoder, CASES[case], rotation, seed)
                    print(f"seed {seed}, {case}, {rotation}: meant {run['shows the meant digit']:.3f}", flush=True)
                    runs[case][rotation].append(run)
    result = {case: {side: summarize(each) for side, each in sides.items()} for case, sides in runs.items()}
    report(result, ceiling)
    record = {
        "benchmark": "rope_condition",
        "command": " ".join(["python -m benchmarks.rope_condition", *map(shlex.quote, sys.argv[1:])]),
        "machine": machine("cpu"),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "scikit-learn": sklearn.__version__,
        },
        "options": {name: value for name, value in vars(options).items() if name != "out"},
        "processor_seconds": round(time.process_time() - started, 1),
        "real images": ceiling,
        "result": result,
        "runs": runs,
    }
    line = json.dumps(record)
    print(line)
    if options.out:
        with atomic_file(options.out / "rope_condition.json") as temporary:
            temporary.write_text(line + "\n")
        save_png(figure_image(plot(runs)), options.out / "rope_condition.png")


if __name__ == "__main__":
    main()
