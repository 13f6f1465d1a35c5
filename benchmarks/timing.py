"""Functions of all benchmarks: waiting for the GPU, summaries of times, and the name of the machine."""

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(run: Callable[[], Any]) -> float:
    """Seconds until the device has finished."""
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def spread(times: list[float]) -> dict[str, float]:
    """Median and quartiles in seconds, which are within the range of the times also for few of them."""
    low, median, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return {"median": round(median, 6), "q1": round(low, 6), "q3": round(high, 6)}


def machine(device: str) -> str:
    """Name of the GPU, or name of the processor with the number of threads."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    return f"{name}, {torch.get_num_threads()} threads"
