"""Requests of the serving benchmarks: a closed loop that keeps a queue full, and an open loop of Poisson arrivals.

All traffic is bounded in number and time.
"""

import asyncio
import random
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

from benchmarks.serving_targets import Answer, Target

CLASSES = 1000
MAX_REQUESTS = 20_000
"""Bound on the requests of a loop."""
PAUSE = 0.5
"""Seconds that a client of a closed loop waits after an error."""


async def saturate(
    target: Target,
    capacity: int,
    seconds: float,
    batches: int,
    max_seconds: float,
    on_image: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Images a second with a queue that is always full: twice the capacity is outstanding.

    The first ``capacity`` images warm up. Whole multiples of the capacity are counted, from the end of the first batch
    on: images of a batch finish together, so a window that cuts a batch would measure its own position.

    Args:
        target: what generates.
        capacity: images at a time.
        seconds: length of the measurement.
        batches: minimum number of batches, even if they take longer.
        max_seconds: bound on the whole measurement.
        on_image: called after each image.

    Returns:
        ``images_s``, the number of counted ``images``, their ``seconds``, and ``errors``.
    """
    start, finished = time.monotonic(), list[float]()
    errors: list[str] = []
    numbers = iter(range(MAX_REQUESTS))

    async def client() -> None:
        for number in numbers:
            answer = await target.image(number, number % CLASSES)
            if answer.status != 200:
                errors.append(f"{answer.status} {answer.text[:200]}")
                await asyncio.sleep(PAUSE)
                continue
            finished.append(time.monotonic())
            on_image()

    clients = [asyncio.create_task(client()) for _ in range(2 * capacity)]
    try:
        while (now := time.monotonic()) - start < max_seconds:
            counted = now - finished[capacity - 1] if len(finished) >= capacity else 0.0
            if counted >= seconds and len(finished) >= (batches + 1) * capacity:
                break
            done, working = await asyncio.wait(clients, timeout=0.05)
            for task in done:
                task.result()  # raises what the client raised
            if not working:  # all requests are used up
                break
    finally:
        await _cancel(clients)
    await target.idle()
    whole = len(finished) // capacity * capacity
    if whole < 2 * capacity:
        raise ValueError(
            f"{len(finished)} images were finished in {now - start:.0f} s, fewer than two batches of {capacity}; give "
            f"more --max-seconds or a smaller --batch-size{'; ' + errors[0] if errors else ''}"
        )
    images, spent = whole - capacity, finished[whole - 1] - finished[capacity - 1]
    return {
        "images_s": round(images / spent, 4),
        "images": images,
        "seconds": round(spent, 2),
        "errors": len(errors),
    }


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Times of Poisson arrivals in seconds.

    Args:
        rate: mean number of arrivals a second.
        seconds: length of the period.
        seed: seed of the times.
    """
    generator, times, now = random.Random(seed), list[float](), 0.0
    while (now := now + generator.expovariate(rate)) < seconds and len(times) < MAX_REQUESTS:
        times.append(now)
    return times


async def open_loop(
    call: Callable[[int], Awaitable[Answer]], times: list[float], on_image: Callable[[], object] = lambda: None
) -> list[Answer]:
    """Send requests at given times, whether or not earlier ones are answered, and wait for all answers.

    Args:
        call: sends request k.
        times: when each request is sent, in seconds from now.
        on_image: called after each answer.

    Returns:
        The answers in order. Their seconds count from the planned time: a generator that lags must not look like a fast
        server.
    """
    start = time.monotonic()

    async def client(number: int) -> Answer:
        await asyncio.sleep(start + times[number] - time.monotonic())
        late = time.monotonic() - start - times[number]
        answer = await call(number)
        on_image()
        first = None if answer.first_row is None else answer.first_row + late
        return answer._replace(seconds=answer.seconds + late, first_row=first)

    tasks = [asyncio.create_task(client(number)) for number in range(len(times))]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        await _cancel(tasks)


def summary(answers: list[Answer]) -> dict[str, Any]:
    """Number of answers and errors, and latencies in seconds of those with an image."""
    good = [answer for answer in answers if answer.status == 200]
    rows = [answer.first_row for answer in good if answer.first_row is not None]
    return {
        "requests": len(answers),
        "errors": len(answers) - len(good),
        "latency_s": percentiles([answer.seconds for answer in good]),
        "first_row_s": percentiles(rows),
    }


def percentiles(values: list[float]) -> dict[str, float] | None:
    """Median, 95th percentile and maximum; None without values."""
    if not values:
        return None
    many = values * 2 if len(values) == 1 else values
    p95 = statistics.quantiles(many, n=20, method="inclusive")[18]
    return {"p50": round(statistics.median(values), 4), "p95": round(p95, 4), "max": round(max(values), 4)}


async def _cancel(tasks: list["asyncio.Task[Any]"]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
