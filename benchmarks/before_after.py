"""Speed of two checkouts of this project, compared in alternation: sampling, training steps and image loading.

    python -m benchmarks.before_after BEFORE AFTER [--rounds 3] [--out benchmarks/results/before_after.json]

Each round starts a process with the code of BEFORE, then one with the code of AFTER, both with this interpreter. Each
process runs all parts of ``benchmarks/before_after_parts.py`` of this checkout, in about a minute on two cores. In each
round the median time of a part after is divided by the median time before. The ratio of a part is the median over the
rounds; above 1, AFTER is slower. Prints a table and writes the record.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from benchmarks.timing import machine, spread
from llamagen.cores import WAIT_SETTINGS
from llamagen.environment import commit
from llamagen.files import atomic_file
from llamagen.output_paths import check_output

PARTS = Path(__file__).with_name("before_after_parts.py")
RESULT = Path(__file__).parent / "results/before_after.json"
SIDES = ("before", "after")
IMAGES, CLASSES = 160, 4


def write_images(folder: Path) -> None:
    """Class folders of JPEGs of 300 × 260 pixels, smooth like photographs."""
    numbers = np.random.default_rng(0)
    for index in range(IMAGES):
        place = folder / f"class{index % CLASSES}"
        place.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(numbers.integers(0, 256, (13, 15, 3), dtype=np.uint8))
        with atomic_file(place / f"{index}.jpg") as temporary:
            coarse.resize((300, 260), Image.Resampling.BICUBIC).save(temporary, format="jpeg", quality=90)


def run_parts(checkout: Path, images: Path, parts: list[str]) -> dict[str, list[float]]:
    """Seconds of each repetition of each part, with the code of a checkout.

    Raises:
        SystemExit: if the process fails, or imports the package from elsewhere.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment |= {**WAIT_SETTINGS, "PYTHONPATH": str(checkout)}
    command = [sys.executable, "-P", str(PARTS), str(images), *parts]  # -P: modules of the checkout alone
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the parts failed in {checkout}:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if not Path(found["package"]).is_relative_to(checkout):
        raise SystemExit(f"{found['package']} was imported instead of the package of {checkout}")
    seconds: dict[str, list[float]] = found["seconds"]
    return seconds


def summarize(rounds: list[dict[str, dict[str, list[float]]]]) -> dict[str, Any]:
    """For each part the times of both sides over all rounds, and the ratio of each round."""
    result = {}
    for name in rounds[0]["before"]:
        ratios = [statistics.median(each["after"][name]) / statistics.median(each["before"][name]) for each in rounds]
        result[name] = {
            **{side: spread([seconds for each in rounds for seconds in each[side][name]]) for side in SIDES},
            "ratio": round(statistics.median(ratios), 3),
            "ratios": [round(ratio, 3) for ratio in ratios],
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="folder of a checkout")
    parser.add_argument("after", type=Path, help="folder of another checkout")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", nargs="*", default=[], help="names of parts; all by default")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    checkouts = {side: getattr(options, side).resolve() for side in SIDES}
    for side, checkout in checkouts.items():
        if not (checkout / "llamagen").is_dir():
            parser.error(f"{side} is {checkout}, which is no checkout of this project; give its folder")
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}; it must be at least 1")
    try:
        check_output(options.out, "--out")
    except ValueError as error:
        parser.error(str(error))
    rounds: list[dict[str, dict[str, list[float]]]] = [{} for _ in range(options.rounds)]
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder))
        for number, side in tqdm([(number, side) for number in range(options.rounds) for side in SIDES], unit="run"):
            rounds[number][side] = run_parts(checkouts[side], Path(folder), options.parts)
    record: dict[str, Any] = {
        "benchmark": "before_after",
        "command": f"python -m benchmarks.before_after BEFORE AFTER --rounds {options.rounds}",
        "commits": {side: commit(checkout) for side, checkout in checkouts.items()},
        "machine": machine("cpu"),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "parts": summarize(rounds),
    }
    print(f"{'part':32}{'before s':>10}{'after s':>10}{'ratio':>8}   of each round")
    for name, part in record["parts"].items():
        medians = [part[side]["median"] for side in SIDES]
        print(f"{name:32}{medians[0]:10.4f}{medians[1]:10.4f}{part['ratio']:8.3f}   {part['ratios']}")
    with atomic_file(options.out) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
