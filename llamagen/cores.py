"""How many cores this process may use, and how its threads share them.

Imports neither torch nor anything that does: it runs before torch is loaded.
"""

import math
import os
from pathlib import Path

WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"}
"""How threads wait: they look for work for about 0.1 ms, then sleep. Sleeping at once slows down the many short
operations of a small model; looking for milliseconds, as OpenMP does by itself, slows down everything next to other
programs. The figures are in docs/speed.md."""

CGROUP = Path("/sys/fs/cgroup")
"""Where Linux mounts the control groups of this process, in a container its own."""


def share_cores() -> None:
    """Let threads that wait leave their core to others, and start no more threads than there are cores.

    OpenMP reads these settings when torch is loaded, so this comes first. By default its threads wait by spinning: next
    to one other process on a core, each of the many barriers of a step then lasts until the scheduler takes the core
    away from the thread that spins. What the user has set stays.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ.update(WAITING)
    # A limit of a container counts processor time, not cores, so OpenMP does not see it. Where there is none, the
    # number of threads is left to torch and to launchers, which divide the cores among the processes of a node.
    if (cores := usable_cores()) < available_cores():
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))


def available_cores() -> int:
    """Cores that the scheduler may give to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_cores(root: Path = CGROUP) -> int:
    """The same, but no more than a container's limit of processor time allows.

    Args:
        root: where the control groups are.
    """
    quota = _quota(root)
    return available_cores() if quota > available_cores() else max(1, math.ceil(quota))


def _quota(root: Path) -> float:
    """Cores' worth of processor time that the control group grants; infinite where there is no limit."""
    try:
        own = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
        below = own.removeprefix("0::/")
    except (OSError, StopIteration):
        below = ""
    limits = [math.inf]
    folder = root / below
    for place in {folder, *(parent for parent in folder.parents if parent.is_relative_to(root))}:
        limits.append(_ratio(place / "cpu.max"))
    for controller in ("cpu", "cpu,cpuacct"):  # version 1
        limits.append(_ratio(root / controller / "cpu.cfs_quota_us", root / controller / "cpu.cfs_period_us"))
    return min(limits)


def _ratio(*files: Path) -> float:
    """Quota over period, in one file or in two."""
    try:
        quota, period = (int(number) for file in files for number in file.read_text().split())
    except (OSError, ValueError):  # no such file, or "max"
        return math.inf
    return quota / period if quota > 0 and period > 0 else math.inf
