"""Two replicas on this machine, over HTTP: spread, killed, full, and ended."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from llamagen import LlamaGen
from tests.pipeline import Pipeline
from tests.serving.ray_serve.ray_command import Answer, cpu_ticks, processes_of, ray_command, wait_for

pytest.importorskip("ray")

BATCH = 4
IMAGES = 32
CLIENTS = 8
OPTIONS = "--device cpu --replicas 2 --batch-size 4 --cpus 1 --queue 256 --max-images 32"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_no_request_is_lost_or_answered_twice_when_a_replica_is_killed(pipeline: Pipeline, tmp_path: Path) -> None:
    source = str(pipeline.root / "argen")
    model = LlamaGen.from_pretrained(source, batch_size=BATCH)

    @cache
    def expected(condition: int, seed: int) -> list[np.ndarray]:
        images = model.generate(condition, images_per_prompt=IMAGES, seed=seed, progress=False)
        return [np.asarray(image) for image in images]

    def check(answer: Answer, condition: int, seed: int) -> None:
        assert answer.status == 200, answer.body
        assert [image["index"] for image in answer.body["data"]] == list(range(IMAGES))
        for found, wanted in zip(answer.images, expected(condition, seed), strict=True):
            np.testing.assert_array_equal(found, wanted)

    with (
        ray_command([source, *OPTIONS.split()], tmp_path / "output.txt") as served,
        ThreadPoolExecutor(3 * CLIENTS) as clients,
    ):
        begin = {process: cpu_ticks(process) for process in served.replicas()}
        assert len(begin) == 2

        # Both replicas work. One is killed in the middle.
        pending = [clients.submit(served.generate, number, IMAGES, number) for number in range(CLIENTS)]
        wait_for(lambda: all(cpu_ticks(process) >= ticks + 5 for process, ticks in begin.items()), 60)
        killed = next(iter(begin))
        os.kill(killed, signal.SIGKILL)
        for number, future in enumerate(pending):
            check(future.result(timeout=100), number, number)
        assert "replica lost" in served.logs()

        # It is replaced.
        wait_for(lambda: served.request("/ready").body["workers"] == 2, 100)
        assert served.request("/ready").status == 200
        replicas = served.replicas()
        assert len(replicas) == 2
        assert killed not in replicas

        # While nothing moves, the queue takes 256 images, and not one more. What it took is answered.
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
