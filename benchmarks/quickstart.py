"""Time and accuracy of ``make quickstart`` in a fresh clone with an empty environment, including the installation.

Prints a table, then one JSON line.

    python benchmarks/quickstart.py
"""

import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from llamagen.files import atomic_file

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        start = time.perf_counter()
        subprocess.run(["make", "install"], cwd=clone, check=True, stdout=sys.stderr)
        installed = time.perf_counter()
        subprocess.run(["make", "quickstart"], cwd=clone, check=True, stdout=sys.stderr)
        end = time.perf_counter()
        command = [".venv/bin/python", "benchmarks/digits_accuracy.py", "runs/quickstart/samples/samples.npz"]
        accuracy = subprocess.run(command, cwd=clone, check=True, capture_output=True, text=True).stdout.splitlines()[
            -1
        ]
        for name in ("samples/grid.png", f"tokenizer/reconstructions/{_last(clone)}"):
            target = ROOT / "runs/benchmark" / Path(name).name
            with atomic_file(target) as temporary:
                temporary.write_bytes((clone / "runs/quickstart" / name).read_bytes())
    record = {
        "benchmark": "quickstart",
        "seconds": {"install": installed - start, "train and sample": end - installed, "all": end - start},
        "digits_accuracy": json.loads(accuracy)["accuracy"],
        "hardware": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "command": "python benchmarks/quickstart.py",
    }
    for name, value in record["seconds"].items():
        print(f"{name:>18} | {value:6.0f} s")
    print(f"{'digits recognised':>18} | {record['digits_accuracy']['all']:.3f}")
    print(json.dumps(record))


def _last(clone: Path) -> str:
    return sorted(path.name for path in (clone / "runs/quickstart/tokenizer/reconstructions").iterdir())[-1]


if __name__ == "__main__":
    main()
