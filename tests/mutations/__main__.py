"""Break the code in one place at a time and see whether the tests notice: ``python -m tests.mutations``.

Each mutation of the YAML files in this folder replaces one piece of text in one file, in a copy of the repository, and
runs the tests that should notice. First ``make test``'s tests; if they pass, those of ``make test-all``. A mutation is
caught if a test fails. A test that cannot be collected does not count.

The check fails if the tests of ``make test`` catch less than 95 %, if those of ``make test-all`` do not catch all, or
if the tests fail on the unbroken code.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

from tqdm import tqdm

from benchmarks.timing import machine
from llamagen.files import atomic_file
from tests.mutations import ROOT, Mutation, mutations

LEVELS = {"make test": "not slow and not gpu", "make test-all": "not gpu"}
AT_LEAST = 0.95
PATIENCE = 1200
"""Seconds after which the tests of one mutation are ended. A test that hangs ends much earlier, with its name."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="only mutations whose name, file or tests match this expression")
    parser.add_argument("--jobs", type=int, default=2, help="copies of the repository that run at the same time")
    parser.add_argument("--out", type=Path, help="write the record here, as JSON")
    options = parser.parse_args()
    chosen = [each for each in mutations() if re.search(options.only, " ".join([each.name, each.file, *each.tests]))]
    if not chosen:
        parser.error(f"--only {options.only} matches no mutation; give another expression")
    with tempfile.TemporaryDirectory() as folder:
        copies: Queue[Copy] = Queue()
        started = [Copy(Path(folder) / str(number)) for number in range(options.jobs)]
        for copy in started:
            copies.put(copy)
        try:
            with ThreadPoolExecutor(options.jobs) as pool:
                tests = sorted({test.partition("::")[0] for each in chosen for test in each.tests})
                unbroken = pool.submit(_run_unbroken, tests, copies)
                tried = pool.map(lambda each: _try(each, copies), chosen)
                results = list(tqdm(tried, total=len(chosen), unit="mutation"))
                failing = unbroken.result()
        finally:
            for copy in started:
                copy.close()
    record = _record(results, failing)
    if options.out is not None:
        with atomic_file(options.out) as temporary:
            temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    raise SystemExit(_report(record))


def _copy_repository(folder: Path) -> None:
    """Copy all files that git knows or would add, with their present content."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)  # some tests list the files of the repository
    subprocess.run(["git", "add", "--all"], cwd=folder, check=True)


class Copy:
    """A copy of the repository, and a process that runs pytest in it.

    Args:
        folder: a new folder for the copy and for temporary files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.temporary = folder / "copy", folder / "temporary"
        _copy_repository(self.folder)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        self.server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("server.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True,
        )  # fmt: skip

    def pytest(self, arguments: list[str], level: str) -> tuple[int, str]:
        """Exit code and output of pytest for the tests of a level; exit code 5 if the level has none of them."""
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        out = self.temporary / "output"
        options = ["-q", "-p", "no:cacheprovider", f"--basetemp={self.temporary / 'pytest'}", "-m", LEVELS[level]]
        request = {
            "folder": str(self.folder),
            "arguments": [*options, *arguments],
            "out": str(out),
            "seconds": PATIENCE,
        }
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        print(json.dumps(request), file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline()), out.read_text(errors="replace")

    def close(self) -> None:
        """End the process."""
        self.server.kill()
        self.server.wait()


def _run_unbroken(tests: list[str], copies: "Queue[Copy]") -> list[str]:
    """Names of tests that fail on the unbroken code."""
    copy = copies.get()
    try:
        code, output = copy.pytest(tests, "make test-all")
    finally:
        copies.put(copy)
    return [] if code == 0 else re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.M) or [f"pytest exits with {code}"]


def _try(mutation: Mutation, copies: "Queue[Copy]") -> dict[str, Any]:
    """Break a copy of the repository, run the tests, restore the copy."""
    copy = copies.get()
    file = copy.folder / mutation.file
    content = file.read_text()
    result: dict[str, Any] = {"name": mutation.name, "file": mutation.file, "meant": mutation.meant, "caught_by": None}
    start = time.perf_counter()
    try:
        file.write_text(mutation.applied(content))
        for level in LEVELS:
            code, output = copy.pytest(["-x", *mutation.tests], level)
            if code == 1 and (failed := re.findall(r"^FAILED (\S+)|^ERROR (\S+)", output, re.M)):
                result |= {"caught_by": level, "test": next(filter(None, failed[0]))}
                break
            if code not in (0, 5):
                result["problem"] = f"pytest exits with {code}: {output.strip().splitlines()[-1:]}"
    finally:
        file.write_text(content)
        copies.put(copy)
    return result | {"seconds": round(time.perf_counter() - start, 1)}


def _record(results: list[dict[str, Any]], failing: list[str]) -> dict[str, Any]:
    by_level = {level: sum(each["caught_by"] == level for each in results) for level in LEVELS}
    return {
        "benchmark": "mutations",
        "hardware": machine("cpu"),
        "command": "python -m tests.mutations --out benchmarks/results/mutations.json",
        "mutations": len(results),
        "meant": sum(each["meant"] for each in results),
        "caught_by": by_level,
        "failing_without_mutation": failing,
        "results": results,
    }


def _report(record: dict[str, Any]) -> int:
    """Print what was caught and what was not; return the exit code."""
    number, caught = record["mutations"], record["caught_by"]
    for each in record["results"]:
        if each["caught_by"] is None:
            print(f"not caught: {each['name']} ({each['file']}) {each.get('problem', '')}")
    for name in record["failing_without_mutation"]:
        print(f"fails without any mutation: {name}")
    quick, every = caught["make test"], sum(caught.values())
    print(f"{number} mutations: make test catches {quick} ({quick / number:.1%}), make test-all {every}")
    return int(bool(record["failing_without_mutation"]) or every < number or quick < AT_LEAST * number)


if __name__ == "__main__":
    main()
