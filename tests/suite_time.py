"""Where the time of the test suite goes, by file and by kind: a pytest plugin.

    python -m pytest -n 2 -p tests.suite_time --suite-time benchmarks/results/suite_time.json

Kinds are exclusive: what a stage spends in processes counts as processes, except that a compiler's process counts as
compiler. The sum over all workers is about the wall-clock time times the number of workers.
"""

import functools
import json
import multiprocessing.process
import platform
import subprocess
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.timing import machine
from llamagen.files import atomic_file

COMPILERS, PROCESSES, PARSES, STAGES = "compilers", "processes", "command-line parses", "stages of Lightning"
COLLECTION, REST = "imports and collection", "the tests' own work"


class SuiteTime:
    """Seconds of each kind in one worker, and, in the controlling process, of each file."""

    def __init__(self, out: str | None) -> None:
        self.out = out
        self.start = time.perf_counter()
        self.seconds: Counter[str] = Counter()
        self.running: list[str] = []
        self.mark = self.start
        self.files: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.tests: Counter[str] = Counter()
        self.cases: Counter[str] = Counter()
        self.collecting: list[float] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Remember how long imports and collection took; measure kinds from here on."""
        taken = time.perf_counter() - self.start
        if (output := getattr(session.config, "workeroutput", None)) is not None:
            output["collecting"] = taken
        elif not hasattr(session.config, "workerinput"):
            self.collecting.append(taken)
        self._wrap_kinds()
        self.mark = time.perf_counter()

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Receive the time that a worker took to collect."""
        self.collecting.append(getattr(node, "workeroutput", {}).get("collecting", 0.0))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, Any, Any]:
        """Attach the seconds of each kind to a report."""
        report = yield
        self._account()
        report.kinds = {kind: seconds for kind, seconds in self.seconds.items() if seconds > 0.0005}
        self.seconds.clear()
        return report

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Add up reports. In workers nobody reads the sums."""
        file = report.nodeid.partition("::")[0]
        known = sum(seconds for kind, seconds in report.kinds.items() if kind != REST)
        self.files[file].update(report.kinds)
        self.files[file][REST] += max(0.0, report.duration - known) - report.kinds.get(REST, 0.0)
        self.tests[report.nodeid] += report.duration
        self.cases[file] += report.when == "call"

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write the record."""
        if self.out is None or hasattr(session.config, "workerinput"):
            return
        kinds: Counter[str] = Counter({COLLECTION: sum(self.collecting)})
        for seconds in self.files.values():
            kinds.update(seconds)
        files = {
            file: {"cases": self.cases[file], "seconds": round(sum(seconds.values()), 2)}
            | {kind: round(value, 2) for kind, value in seconds.most_common() if value >= 0.01}
            for file, seconds in sorted(self.files.items(), key=lambda item: -sum(item[1].values()))
        }
        record = {
            "benchmark": "suite_time",
            "hardware": machine("cpu"),
            "python": platform.python_version(),
            "wall_seconds": round(time.perf_counter() - self.start, 1),
            "cases": sum(self.cases.values()),
            "kinds": {kind: round(seconds, 1) for kind, seconds in kinds.most_common()},
            "slowest_tests": {name: round(seconds, 2) for name, seconds in self.tests.most_common(60)},
            "files": files,
        }
        with atomic_file(Path(self.out)) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n")

    def _account(self) -> None:
        now = time.perf_counter()
        if self.running:
            self.seconds[self.running[-1]] += now - self.mark
        self.mark = now

    def _timed(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._account()
            self.running.append(COMPILERS if COMPILERS in self.running else kind)
            try:
                return function(*args, **kwargs)
            finally:
                self._account()
                self.running.pop()

        return timed

    def _wrap_kinds(self) -> None:
        import torch._dynamo.convert_frame as dynamo
        from lightning.pytorch import Trainer
        from lightning.pytorch.cli import LightningCLI

        from llamagen.sampling.cpu import library

        for kind, owner, names in (
            (PROCESSES, subprocess.Popen, ("__init__", "communicate", "wait")),
            (PROCESSES, multiprocessing.process.BaseProcess, ("start", "join")),
            (COMPILERS, dynamo, ("_compile",)),
            (COMPILERS, library, ("_run",)),
            (PARSES, LightningCLI, ("setup_parser", "parse_arguments")),
            (STAGES, Trainer, ("fit", "validate", "test", "predict")),
        ):
            for name in names:
                setattr(owner, name, self._timed(kind, getattr(owner, name)))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--suite-time``."""
    parser.addoption("--suite-time", metavar="FILE", help="write where the time goes, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    """Start the clock, in each worker as well."""
    config.pluginmanager.register(SuiteTime(config.getoption("--suite-time")), "suite-time")
