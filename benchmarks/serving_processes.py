"""Memory, threads and open files of a server's processes, from ``/proc`` (Linux)."""

import asyncio
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

PAGE = os.sysconf("SC_PAGE_SIZE")
MIB = 2**20


def descendants(pid: int) -> list[int]:
    """Processes that a process has started, directly or not."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):  # it may have ended
            fields = stat.read_text().rpartition(")")[2].split()
            if fields[0] != "Z":
                parents[int(stat.parent.name)] = int(fields[1])
    found, new = list[int](), [pid]
    while new:
        new = [child for child, parent in parents.items() if parent in new]
        found += new
    return found


def rss(pid: int) -> int:
    """Resident memory of a process in bytes; 0 if it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    except OSError:
        return 0


def largest(pids: list[int]) -> int:
    """The process with the most memory: of those that a server starts, its worker."""
    return max(pids, key=rss)


def resources(front: int) -> dict[str, int]:
    """Number of processes, and sums of threads, open files and memory (MiB), of a server with its workers."""
    pids, found = [front, *descendants(front)], {"processes": 0, "threads": 0, "files": 0}
    for pid in pids:
        with suppress(OSError):
            found["files"] += len(list(Path(f"/proc/{pid}/fd").iterdir()))
            found["threads"] += len(list(Path(f"/proc/{pid}/task").iterdir()))
            found["processes"] += 1
    return {**found, "mib": round(sum(map(rss, pids)) / MIB)}


async def watch_memory(front: int, series: list[dict[str, Any]], every: float) -> None:
    """Append the memory of a server's front and workers in MiB, until the task is cancelled.

    Args:
        front: process of the front.
        series: entries ``seconds``, ``front`` and ``workers`` are appended here.
        every: seconds between entries.
    """
    start = time.monotonic()
    while True:
        workers = sum(rss(pid) for pid in descendants(front))
        entry = {"front": round(rss(front) / MIB, 2), "workers": round(workers / MIB, 2)}
        series.append({"seconds": round(time.monotonic() - start, 1), **entry})
        await asyncio.sleep(every)
