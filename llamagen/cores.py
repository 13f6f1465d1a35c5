"""How many cores this process may use, and how its threads share them.

footgun: this module must not import torch, not even indirectly, because it runs before torch is loaded.
"""

import math
import os
from pathlib import Path

WAIT_SETTINGS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"}
"""Waiting threads spin for about 0.1 ms, then sleep. Sleeping at once would slow down the many short operations of a
small model. OpenMP's default, spinning for milliseconds, slows everything down when other programs share the cores. See
docs/speed.md for measurements."""

CGROUP = Path("/sys/fs/cgroup")
"""Mount point of the control groups of this process; in a container, of those of the container."""


def share_cores() -> None:
    """Let waiting threads yield their core, and limit the number of threads to the usable cores.

    footgun: OpenMP reads these settings when torch is imported, so call this first. By default waiting threads spin. If
    another process shares a core, each of the many barriers of a step then lasts until the scheduler preempts the
    spinning thread. Settings of the user are kept.
    """
    if not any(name in os.environ for name in WAIT_SETTINGS):
        os.environ.update(WAIT_SETTINGS)
    # A container limits processor time, not cores, so OpenMP does not notice the limit. Without such a limit, torch and
    # the launchers choose the number of threads: launchers divide the cores among the processes of a node.
    if (cores := usable_cores()) < available_cores():
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))


def available_cores() -> int:
    """Number of cores that the scheduler may use for this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_cores(root: Path = CGROUP) -> int:
    """Number of available cores, or less if a container limits the processor time.

    Args:
        root: mount point of the control groups.
    """
    quota = _quota(root)
    return available_cores() if quota > available_cores() else max(1, math.ceil(quota))


def _quota(root: Path) -> float:
    """Processor time of the control group in cores; infinite if there is no limit."""
    try:
        own = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
        subfolder = own.removeprefix("0::/")
    except (OSError, StopIteration):
        subfolder = ""
    limits = [math.inf]
    folder = root / subfolder
    for place in {folder, *(parent for parent in folder.parents if parent.is_relative_to(root))}:
        limits.append(_ratio(place / "cpu.max"))
    for controller in ("cpu", "cpu,cpuacct"):  # version 1
        limits.append(_ratio(root / controller / "cpu.cfs_quota_us", root / controller / "cpu.cfs_period_us"))
    return min(limits)


def _ratio(*files: Path) -> float:
    """Quota over period, from one file or two."""
    try:
        quota, period = (int(number) for file in files for number in file.read_text().split())
    except (OSError, ValueError):  # no such file, or "max"
        return math.inf
    return quota / period if quota > 0 and period > 0 else math.inf
