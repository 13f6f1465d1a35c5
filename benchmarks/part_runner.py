"""Runs the parts of a long measurement as separate processes, within a time budget, and records what became of each."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from xml.etree import ElementTree

LAST_LINES, LAST_BYTES = 40, 1 << 14
OK, FAILED, TIMED_OUT, NOT_RUN = "ok", "failed", "timed out", "not run"


@dataclass(frozen=True)
class Part:
    """A command of a measurement.

    Attributes:
        name: short and unique.
        what: what it measures, in a few words.
        command: program and arguments.
        seconds: its own time limit.
        out: file that it writes: JSON, or pytest's report in JUnit's format (``.xml``); None for a part without.
        least: seconds of the budget that must be left to start it.
    """

    name: str
    what: str
    command: tuple[str, ...]
    seconds: float
    out: Path | None = None
    least: float = 20.0


def run_parts(
    parts: Sequence[Part], budget: float, cwd: Path, report: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """Run the parts in order, each until its own limit or the end of the budget.

    A part that fails or is killed does not affect the others. A part that starts too late is not run.

    Args:
        parts: the parts, the most important ones first.
        budget: seconds for all of them.
        cwd: folder in which they run.
        report: called with all records after each part, so that nothing is lost if this process is killed.

    Returns:
        A record for each part, with ``status`` and, if it is not ``ok``, ``reason``.
    """
    end = time.monotonic() + budget
    records: list[dict[str, Any]] = [
        {
            "name": part.name,
            "what": part.what,
            "command": " ".join(("python" if word == sys.executable else word) for word in part.command),
            "status": NOT_RUN,
            "reason": "not reached",
        }
        for part in parts
    ]
    for part, record in zip(parts, records, strict=True):
        left = end - time.monotonic()
        if left < part.least:
            record["reason"] = f"{max(left, 0):.0f} s of {budget:.0f} were left, and it needs at least {part.least:.0f}"
        else:
            del record["reason"]
            record |= run_part(part, min(part.seconds, left), cwd)
        report(records)
    return records


def run_part(part: Part, limit: float, cwd: Path) -> dict[str, Any]:
    """Run a part, and kill it with all processes that it started when its time is over.

    Args:
        part: the part.
        limit: seconds.
        cwd: folder in which it runs.

    Returns:
        ``status``, ``seconds``, ``limit_s``, ``result`` if it wrote one and, unless it is ok, ``reason`` and
        ``last_lines``.
    """
    started, code = time.monotonic(), None
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            part.command,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(limit)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # a new session: its id is that of the group
            process.wait()
        lines = _last_lines(log)
    record: dict[str, Any] = {"seconds": round(time.monotonic() - started, 1), "limit_s": round(limit, 1)}
    result = read_result(part.out) if part.out is not None else None
    if result is not None:
        record["result"] = result
    reason = ""
    if code is None:
        reason = f"killed after {limit:.0f} s"
    elif code:
        reason = f"exit code {code}" if code > 0 else f"ended by signal {signal.Signals(-code).name}"
    elif part.out is not None and result is None:
        reason = "wrote no result"
    record["status"] = TIMED_OUT if code is None else FAILED if reason else OK
    return {**record, **({"reason": reason, "last_lines": lines} if reason else {})}


def read_result(path: Path) -> dict[str, Any] | None:
    """The content of a part's file; None if there is none, or not a complete one."""
    try:
        if path.suffix == ".xml":
            return _test_counts(ElementTree.parse(path).getroot())
        content: dict[str, Any] = json.loads(path.read_text())
        return content
    except (OSError, ValueError, ElementTree.ParseError):
        return None


def _test_counts(root: ElementTree.Element) -> dict[str, Any]:
    """Number of tests, and names and messages of those that did not pass."""
    counts: dict[str, Any] = {"tests": 0, "passed": 0, "failed": {}, "skipped": {}}
    for case in root.iter("testcase"):
        counts["tests"] += 1
        name = f"{case.get('classname')}.{case.get('name')}"
        faults = [each for kind in ("failure", "error") for each in case.iter(kind)]
        skipped = next(case.iter("skipped"), None)
        if faults:
            counts["failed"][name] = str(faults[0].get("message"))[:500]
        elif skipped is not None:
            counts["skipped"][name] = str(skipped.get("message"))[:200]
        else:
            counts["passed"] += 1
    return counts


def _last_lines(log: IO[bytes]) -> list[str]:
    size = log.seek(0, os.SEEK_END)
    log.seek(max(0, size - LAST_BYTES))
    return log.read().decode(errors="replace").splitlines()[-LAST_LINES:]
