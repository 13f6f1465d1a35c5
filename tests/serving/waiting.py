"""Waits for what other threads and processes do."""

import time
from collections.abc import Callable


def until(condition: Callable[[], object]) -> None:
    """Wait for a condition; pytest's time limit ends it."""
    while not condition():
        time.sleep(0.001)
