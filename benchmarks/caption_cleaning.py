"""Processor time of both caption cleanings per caption, in microseconds.

    python -m benchmarks.caption_cleaning --out benchmarks/results

The captions are of five kinds, from web text to long descriptions, and all are different.
"""

import argparse
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path

from benchmarks.timing import machine, spread
from llamagen.files import atomic_file
from llamagen.text.cleaning import CLEANINGS, Cleaning, clean_caption

KINDS = (
    "A {n} year old dog sits on the red sofa of an old house.",
    "Buy shoes no. {n} <b>SALE!!!</b> at www.shop-{n}.com &amp; more",
    "IMG_{n}.JPG | stock photo | by @user{n}",
    "Portrait of {n} geckos wearing a train conductor’s hat and holding a flag that has a yin-yang symbol on it.",
    "The image shows a kitchen with {n} wooden chairs, a round table and a window. The light comes from the left, and "
    "a cat sleeps on the floor next to a bowl. In the background there is a shelf with books, plants and a blue vase.",
)


def captions(count: int) -> list[str]:
    """Different captions of every kind in turn."""
    return [KINDS[number % len(KINDS)].format(n=number) for number in range(count)]


def measure(cleaning: Cleaning, texts: list[str], repeats: int) -> dict[str, float]:
    """Median and quartiles in microseconds per caption."""
    clean_caption("", cleaning)  # loads its libraries
    times = []
    for _ in range(repeats):
        start = time.process_time()
        for text in texts:
            clean_caption(text, cleaning)
        times.append((time.process_time() - start) / len(texts))
    return {name: round(seconds * 1e6, 1) for name, seconds in spread(times).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    texts = captions(2000)
    result = {
        "benchmark": "caption_cleaning",
        "hardware": machine("cpu"),
        "versions": {"python": platform.python_version(), "diffusers": version("diffusers"), "ftfy": version("ftfy")},
        "command": "python -m benchmarks.caption_cleaning --out benchmarks/results",
        "captions": len(texts),
        "mean characters": round(sum(map(len, texts)) / len(texts), 1),
        "microseconds per caption": {name: measure(name, texts, 7) for name in CLEANINGS},  # type: ignore[arg-type]
    }
    print(json.dumps(result, indent=1))
    if options.out is not None:
        with atomic_file(options.out / "caption_cleaning.json") as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
