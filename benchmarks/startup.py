"""How long the command line takes to start, next to the import of Lightning.

Each command is a new process. They run in turns; the first round, which reads files from disk, does not count.

    python -m benchmarks.startup --out benchmarks/results/startup.json
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.timing import machine, spread
from llamagen.files import atomic_file

ROOT = Path(__file__).resolve().parents[1]
PEER = "import lightning.pytorch"
COMMANDS = {
    PEER: ["-c", PEER],
    "import torch": ["-c", "import torch"],
    "import llamagen": ["-c", "import llamagen"],
    "import llamagen.sampling": ["-c", "import llamagen.sampling"],
    "main.py --help": ["main.py", "--help"],
    "main.py fit --help": ["main.py", "fit", "--help"],
    "main.py fit with a wrong key": ["main.py", "fit", "-c", "configs/argen/base.yaml", "--trainer.max_epoch=3"],
}


def seconds(arguments: list[str]) -> float:
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, check=False)
    taken = time.perf_counter() - start
    expected = 2 if "fit" in arguments and "--help" not in arguments else 0
    if done.returncode != expected:
        raise ValueError(f"{' '.join(arguments)} ended with {done.returncode}: {done.stderr.decode()[-500:]}")
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds")
    parser.add_argument("--out", type=Path, required=True, help="write the record here, as JSON")
    options = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for round_ in tqdm(range(options.rounds + 1), unit="round"):
        for name, command in COMMANDS.items():
            taken = seconds(command)
            if round_:
                times[name].append(taken)
    peer = statistics.median(times[PEER])
    record = {
        "benchmark": "startup",
        "hardware": machine("cpu"),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "command": f"python -m benchmarks.startup --rounds {options.rounds} --out {options.out}",
        "seconds": {name: spread(values) for name, values in times.items()},
        "ratio_to_the_import_of_lightning": {
            name: round(statistics.median(values) / peer, 2) for name, values in times.items()
        },
    }
    for name, ratio in record["ratio_to_the_import_of_lightning"].items():  # type: ignore[attr-defined]
        print(f"{name:>40} | {statistics.median(times[name]):6.2f} s | {ratio:.2f} ×")
    with atomic_file(options.out) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
