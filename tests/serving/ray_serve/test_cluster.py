"""Two replicas on this machine, over HTTP: spread, killed, full, and ended."""

import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from llamagen import LlamaGen
from tests.pipeline import Pipeline
from tests.serving.ray_serve.ray_command import Answer, RayCommand, cpu_ticks, processes_of, ray_command, wait_for

pytest.importorskip("ray")

IMAGES = 4
CLIENTS = 8


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_no_request_is_lost_or_answered_twice_when_a_replica_is_killed(pipeline: Pipeline, tmp_path: Path) -> None:
    model = LlamaGen.from_pretrained(pipeline.root / "argen", batch_size=IMAGES)

    @cache
    def expected(condition: int, seed: int) -> list[np.ndarray]:
        images = model.generate(condition, images_per_prompt=IMAGES, seed=seed, progress=False)
        return [np.asarray(image) for image in images]

    def check(answer: Answer, condition: int, seed: int) -> None:
        assert answer.status == 200, answer.body
        assert [image["index"] for image in answer.body["data"]] == list(range(IMAGES))
        for found, wanted in zip(answer.images, expected(condition, seed), strict=True):
            np.testing.assert_array_equal(found, wanted)

    arguments = [
        str(pipeline.root / "argen"),
        *["--device", "cpu", "--replicas", "2", "--batch-size", "4", "--cpus", "1", "--queue", "32"],
    ]
    with ray_command(arguments, tmp_path / "output.txt") as served, ThreadPoolExecutor(3 * CLIENTS) as clients:
        begin = dict.fromkeys(served.replicas(), 0)
        assert len(begin) == 2
        ask = _asking(served, clients)

        # Both replicas work.
        begin = {process: cpu_ticks(process) for process in begin}
        for number, answer in enumerate(ask(range(10), CLIENTS)):
            check(answer, number % 10, number)
        assert all(cpu_ticks(process) > ticks for process, ticks in begin.items())

        # One stops while it holds requests, and dies. The others' answers show that the rest goes on.
        killed = next(iter(begin))
        os.kill(killed, signal.SIGSTOP)
        pending = [clients.submit(served.generate, number % 10, IMAGES, number) for number in range(CLIENTS)]
        wait_for(lambda: any(future.done() for future in pending), 60)
        os.kill(killed, signal.SIGKILL)
        for number, future in enumerate(pending):
            check(future.result(timeout=100), number % 10, number)
        assert "replica lost" in served.logs()

        # It is replaced.
        wait_for(lambda: served.request("/ready").body["workers"] == 2, 100)
        assert served.request("/ready").status == 200
        replicas = served.replicas()
        assert len(replicas) == 2
        assert killed not in replicas

        # While nothing moves, the queue takes 32 images, and not one more. What it took is answered.
        for process in replicas:
            os.kill(process, signal.SIGSTOP)
        pending = [clients.submit(served.generate, 3, IMAGES, 5) for _ in range(CLIENTS + 3)]
        wait_for(lambda: sum(future.done() for future in pending) >= 3, 60)
        refused = [future.result() for future in pending if future.done()]
        for process in replicas:
            os.kill(process, signal.SIGCONT)
        assert [answer.status for answer in refused] == [429] * 3
        assert all(int(answer.headers["Retry-After"]) >= 1 for answer in refused)
        answers = [future.result(timeout=100) for future in pending]
        for answer in answers:
            if answer.status != 429:
                check(answer, 3, 5)
        assert sum(answer.status == 200 for answer in answers) == CLIENTS

        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(60) == 0, served.text
        assert "finishing accepted requests" in served.text
        wait_for(lambda: not processes_of(served.folder), 20)
        assert processes_of(served.folder) == []


def _asking(served: RayCommand, clients: ThreadPoolExecutor) -> Callable[[range, int], list[Answer]]:
    def ask(conditions: range, at_once: int) -> list[Answer]:
        answers: list[Answer] = []
        for begin in range(0, 3 * at_once, at_once):
            numbers = range(begin, begin + at_once)
            futures = [clients.submit(served.generate, conditions[n % len(conditions)], IMAGES, n) for n in numbers]
            answers += [future.result(timeout=100) for future in futures]
        return answers

    return ask
