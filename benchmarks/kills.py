"""Kill a training run repeatedly, fill its disk, and check what is lost.

    python -m benchmarks.kills FOLDER [--seed N] [--out FILE.json]

A small tokenizer trains on synthetic images. Its process is killed (SIGKILL) fifteen times at a random moment and five
times while it writes a checkpoint; five times its disk is full when a checkpoint is due. Each time the same command
resumes the run with ``--ckpt_path last``. The benchmark checks that

- every file under a final name is readable at any time,
- each run resumes from the newest complete checkpoint, so only the steps since then are repeated,
- a full disk ends a run with one line and exit code 1,
- weights and optimizer state at the end equal those of an uninterrupted run, bit for bit.

If the user is root, the run's folder is a small file system in memory, which is resized to fill it. For other users the
run's folder is in ``FOLDER``, which should not be on the file system of temporary files, and the size of files is
limited instead.
"""

import argparse
import csv
import json
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for sums in a fixed order, and so that processes can be forked

import lightning
import torch
import yaml
from PIL import Image
from tqdm import tqdm

from benchmarks.kills_run import EVERY, STEPS, Run, make_images, write_config
from benchmarks.timing import machine
from llamagen.checkpoints.integrity import check_integrity
from llamagen.files import atomic_file

RESULT = Path(__file__).parent / "results/kills.json"
EVENTS = {"random": 15, "saving": 5, "full": 5}
MAX_STEPS = 8
"""A random kill comes at most this many steps after the run has resumed."""
STARTING = 4.0
"""A random kill before the first step comes within this many seconds after the start."""
PAGE = resource.getpagesize()
DISK = 400
"""Size of the file system in memory, in megabytes."""


def check_files(folder: Path) -> int:
    """Read every file of a run that has its final name.

    Returns:
        The step of the newest checkpoint; 0 if there is none.

    Raises:
        AssertionError: if one cannot be read.
    """
    newest = 0
    for path in sorted(folder.rglob("*")):
        if path.is_dir() or path.name.startswith("."):
            continue
        try:
            if path.suffix == ".ckpt":
                check_integrity(path)
                newest = max(newest, torch.load(path, map_location="cpu", weights_only=True)["global_step"])
            elif path.suffix == ".png":
                with Image.open(path) as image:
                    image.load()
            elif path.suffix == ".csv":
                with path.open(newline="") as file:
                    head, *rows = list(csv.reader(file))
                assert all(len(row) == len(head) for row in rows)
            elif path.suffix == ".yaml":
                assert yaml.safe_load(path.read_text())
            else:
                raise AssertionError("unexpected file")
        except Exception as error:
            raise AssertionError(f"{path} cannot be read: {error}") from error
    return newest


def differing(one: Any, other: Any, place: str = "") -> list[str]:
    """Paths of the entries in which two checkpoints are not equal, bit for bit."""
    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, other) else [place]
    if isinstance(one, dict):
        found = [] if one.keys() == other.keys() else [place]
        return found + [each for key in one for each in differing(one[key], other.get(key), f"{place}/{key}")]
    if isinstance(one, list | tuple):
        pairs = enumerate(zip(one, other, strict=True))
        return [each for number, (a, b) in pairs for each in differing(a, b, f"{place}/{number}")]
    return [] if one == other else [place]


class Disk:
    """The disk of the run: a file system in memory, if this process may mount one.

    Args:
        work: folder to use otherwise.
    """

    def __init__(self, work: Path) -> None:
        self.folder = work / "disk"
        self.folder.mkdir(exist_ok=True)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}m", "kills", str(self.folder)]
        self.mounted = os.geteuid() == 0 and subprocess.run(mount, stderr=subprocess.DEVNULL).returncode == 0

    def resize(self, size: str) -> None:
        """Resize it, with a size as ``mount`` reads it."""
        subprocess.run(["mount", "-o", f"remount,size={size}", str(self.folder)], check=True)

    def close(self) -> None:
        """Unmount it."""
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.folder)], check=True)


def kill_at_random(run: Run, numbers: random.Random) -> float:
    """Kill a run while it starts, or after a few steps."""
    steps = numbers.randrange(-2, MAX_STEPS + 1)
    end = run.started + numbers.uniform(0.1, STARTING)
    while run.poll() and (time.monotonic() < end if steps < 0 else run.resumed < 0 or run.step < run.resumed + steps):
        time.sleep(0.002)
    time.sleep(numbers.uniform(0, 0.1))
    return run.kill()


def kill_while_saving(run: Run, numbers: random.Random) -> float:
    """Kill a run when a random part of a checkpoint is written."""
    sizes = [path.stat().st_size for path in run.folder.glob("checkpoints/*.ckpt")]
    enough = int(numbers.uniform(0, 0.9) * max(sizes, default=0))
    while run.poll() and (run.resumed < 0 or run.saved_bytes() < enough):
        pass
    return run.kill()


def fill(work: Path, disk: Disk, size: int, numbers: random.Random) -> Run:
    """Leave room for only part of a checkpoint once the run has started (a run on a full disk would not start)."""
    room = int(numbers.uniform(0.1, 0.9) * size)
    run = Run(work, disk.folder / "run", limit=None if disk.mounted else room)
    if disk.mounted:
        while run.poll() and run.resumed < 0:
            time.sleep(0.001)
        disk.resize(str(shutil.disk_usage(disk.folder).used + room // PAGE * PAGE))
    run.wait()
    if disk.mounted:
        disk.resize(f"{DISK}m")
    return run


def stop_once(kind: str, work: Path, disk: Disk, numbers: random.Random) -> dict[str, Any]:
    """Stop the run once, and check that nothing was lost.

    Raises:
        AssertionError: if something was lost.
    """
    folder = disk.folder / "run"
    before = check_files(folder)
    (work / "log.txt").unlink(missing_ok=True)
    if kind == "full":
        size = max((path.stat().st_size for path in folder.glob("checkpoints/*.ckpt")), default=1_000_000)
        run = fill(work, disk, size, numbers)
        last = (work / "log.txt").read_text().splitlines()[-1]
        assert run.status == 1, (run.status, last)
        assert " was not written: " in last, last
        found: dict[str, Any] = {"message": last.replace(str(work), "FOLDER")}
    else:
        run = Run(work, folder)
        moment = (kill_while_saving if kind == "saving" else kill_at_random)(run, numbers)
        assert run.status == -signal.SIGKILL, (run.status, (work / "log.txt").read_text()[-2000:])
        found = {"seconds_after_start": moment}
    newest = check_files(folder)
    if run.resumed >= 0:
        assert run.resumed == before, f"resumed from step {run.resumed}, though {before} was complete"
        assert newest >= before
        assert run.step - newest <= EVERY, f"step {run.step} was done, and {newest} is complete"
    hidden = [path for path in folder.rglob(".*") if path.is_file()]
    return {
        "kind": kind,
        **found,
        "resumed_from_step": run.resumed if run.resumed >= 0 else None,
        "last_step_done": run.step if run.resumed >= 0 else None,
        "newest_complete_checkpoint": newest,
        "steps_lost": run.step - newest if run.resumed >= 0 else 0,
        "unfinished_files": [f"{path.stat().st_size} bytes of {path.name.split('.')[1]}" for path in hidden],
    }


def stop_repeatedly(work: Path, seed: int) -> dict[str, Any]:
    """Run the whole benchmark.

    Args:
        work: an empty folder.
        seed: seed of the random moments.

    Raises:
        AssertionError: if something was lost.
    """
    numbers = random.Random(seed)
    make_images(work / "images")
    write_config(work / "kills.yaml")
    kinds = [kind for kind, count in EVENTS.items() for _ in range(count)]
    numbers.shuffle(kinds)
    disk, started = Disk(work), time.monotonic()
    try:
        alone = Run(work, work / "alone")
        assert alone.wait() == 0, (work / "log.txt").read_text()[-2000:]
        events = []
        for kind in tqdm(kinds, "stopping", unit="stop"):
            events.append(stop_once(kind, work, disk, numbers))
        folder = disk.folder / "run"
        last = Run(work, folder)
        before = events[-1]["newest_complete_checkpoint"]
        assert last.wait() == 0, (work / "log.txt").read_text()[-2000:]
        assert last.resumed == before, (last.resumed, before)
        assert check_files(folder) == STEPS
        one, other = (
            torch.load(each / "checkpoints/last.ckpt", weights_only=True) for each in (work / "alone", folder)
        )
        parts = ("state_dict", "optimizer_states", "ImageDataModule", "global_step")
        wrong = [each for part in parts for each in differing(one.get(part), other.get(part), part)]
        assert wrong == [], f"the stopped run ends in another state: {wrong[:5]}"
        another = os.stat(folder).st_dev != os.stat(tempfile.gettempdir()).st_dev
        return {
            "kills": sum(event["kind"] != "full" for event in events),
            "kills_while_a_checkpoint_was_written": EVENTS["saving"],
            "full_disks": EVENTS["full"],
            "full_disk_is": "a small tmpfs" if disk.mounted else "a limit of the size of files",
            "run_on_another_file_system_than_temporary_files": another,
            "steps": STEPS,
            "steps_between_checkpoints": EVERY,
            "most_steps_lost_at_once": max(event["steps_lost"] for event in events),
            "equal_to_an_uninterrupted_run": True,
            "unreadable_files_under_a_final_name": 0,
            "seconds": round(time.monotonic() - started, 1),
            "events": events,
        }
    finally:
        disk.close()


def main(args: list[str] | None = None) -> None:
    """Run the command.

    Args:
        args: arguments; None reads the command line.
    """
    parser = argparse.ArgumentParser("python -m benchmarks.kills", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="an empty folder; it is removed at the end if nothing was lost")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments (default: 0)")
    parser.add_argument(
        "--out", type=Path, default=RESULT, help=f"file of the record (default: benchmarks/results/{RESULT.name})"
    )
    options = parser.parse_args(args)
    work = options.folder.absolute()
    if work.exists() and any(work.iterdir()):
        parser.error(f"{work} is not empty; give an empty folder")
    work.mkdir(parents=True, exist_ok=True)
    found = stop_repeatedly(work, options.seed)
    shutil.rmtree(work)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "lightning": lightning.__version__}
    record = {
        "benchmark": "kills",
        "command": f"python -m benchmarks.kills FOLDER --seed {options.seed}",
        "machine": f"{machine('cpu')}, {sys.platform}",
        "versions": versions,
        "seed": options.seed,
        **found,
    }
    with atomic_file(options.out) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")
    summary = {key: value for key, value in record.items() if key != "events"}
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
