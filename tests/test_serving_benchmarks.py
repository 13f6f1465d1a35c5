"""The benchmarks of the servers count what they say, and docs/serving.md shows their records."""

import asyncio
import base64
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from PIL import Image

from benchmarks import serving, serving_load
from benchmarks.serving_model import write_model
from benchmarks.serving_processes import descendants, resources
from benchmarks.serving_report import read_records, replace_tables, slope, summarize
from benchmarks.serving_targets import Answer, PublishedLoop, Server, events
from benchmarks.serving_traffic import arrivals, open_loop, percentiles, saturate, summary
from serving.server.fields import GenerationBody, check_fields
from serving.server.options import ServerOptions

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/serving.md"


class Instant:
    """A target that answers the first calls at once, every third one with a refusal, and the others never."""

    def __init__(self, answers: int) -> None:
        self.calls, self.answers = 0, answers

    async def image(self, seed: int, label: int = 0, rows: bool = False) -> Answer:
        self.calls += 1
        is_refused = self.calls % 3 == 0
        await asyncio.sleep(3600 if self.calls > self.answers else 0)
        return Answer(503, 0.0, text="busy") if is_refused else Answer(200, 0.0)

    async def idle(self) -> None:
        pass


def test_the_tables_of_the_page_are_those_of_the_records() -> None:
    assert replace_tables(PAGE.read_text(), read_records(ROOT / "benchmarks/results")) == PAGE.read_text()


def test_the_tables_compare_with_the_published_loop_and_with_the_paper() -> None:
    def engine(rate: float) -> dict[str, Any]:
        point = {"rate": rate * 0.3, **summary([Answer(200, 2.0, 0.5), Answer(200, 4.0, 0.7), Answer(429, 0.0)])}
        rounds = [{"saturation": {"images_s": rate * factor}, "points": {"0.3": point}} for factor in (0.5, 1.0, 1.5)]
        return {"rounds": rounds, **summarize(rounds)}

    settings = {"pixels": 256, "dtype": "bfloat16", "guidance_scale": 4.0, "top_k": 2000, "batch_size": 16}
    models = {"B": {"embedded": engine(1.0), "vllm": engine(3.0), "published": engine(1.5)}}
    text = replace_tables(PAGE.read_text(), {"cpu": {"hardware": "a CPU", "settings": settings, "models": models}})
    rows = {line.split("|")[2].strip(): line for line in text.splitlines() if line.startswith("| B | server")}
    assert "2.00 times (paper, A100, 384 px: 3.26 times)" in rows["server, vLLM engine"]
    assert "0.67 times |" in rows["server, embedded engine"]
    assert "| 1.00 (0.75 to 1.25) |" in rows["server, embedded engine"]
    assert "| 3.00 / 3.90 |" in rows["server, embedded engine"]  # of the two answers, not of the refusal


def test_arrivals_are_a_reproducible_poisson_process() -> None:
    times = arrivals(10.0, 200.0, seed=1)
    assert times == arrivals(10.0, 200.0, seed=1) != arrivals(10.0, 200.0, seed=2)
    assert times == sorted(times)
    assert times[-1] < 200.0
    gaps = [after - before for before, after in pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(0.1, rel=0.05)
    assert statistics.pstdev(gaps) == pytest.approx(0.1, rel=0.1)  # exponential: as large as the mean
    assert len(arrivals(1e9, 1e9, seed=0)) == 20_000


def test_saturation_counts_whole_batches_after_the_first_and_reports_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Instant(30)
    monkeypatch.setattr("benchmarks.serving_traffic.PAUSE", 0.0)
    monkeypatch.setattr("benchmarks.serving_traffic.time", SimpleNamespace(monotonic=lambda: float(target.calls)))
    found = asyncio.run(saturate(target, 4, 20.0, 3, 10_000.0))
    assert found["images"] == 16  # of 20, without the first batch
    assert found["images_s"] == pytest.approx(2 / 3, rel=0.15)  # a call takes a second, and two of three succeed
    assert found["errors"] > 0


def test_options_that_contradict_each_other_and_wrong_interpreters_are_errors(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert serving.arguments(["--part", "eight", "--engines", "embedded"]).batch_size == 8
    with pytest.raises(SystemExit):
        serving.arguments(["--part", "eight", "--engines", "embedded", "--batch-size", "4"])
    assert "--batch-size 4 is for --part load; leave it out" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"^--vllm-python /no/python is no interpreter with vLLM"):
        serving.vllm_version("/no/python")


def test_saturation_that_finishes_nothing_ends_with_an_error() -> None:
    with pytest.raises(ValueError, match=r"^0 images were finished in \d+ s, fewer than two batches of 4; give more"):
        asyncio.run(saturate(Instant(0), 4, 1.0, 3, 0.1))


@pytest.mark.timeout(20)
def test_saturation_ends_with_its_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Instant):
        async def image(self, seed: int, label: int = 0, rows: bool = False) -> Answer:
            raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        asyncio.run(saturate(Broken(0), 4, 1.0, 3, 1e9))
    monkeypatch.setattr("benchmarks.serving_traffic.MAX_REQUESTS", 6)
    monkeypatch.setattr("benchmarks.serving_traffic.PAUSE", 0.0)
    with pytest.raises(ValueError, match=r"^4 images were finished in .*; 503 busy$"):
        asyncio.run(saturate(Instant(6), 4, 1.0, 3, 1e9))


def test_a_server_that_has_its_port_and_does_not_answer_is_not_ready() -> None:
    async def ask(port: int) -> dict[str, Any]:
        async with aiohttp.ClientSession() as session:
            return await Server(f"http://127.0.0.1:{port}", None, session, 0.0).load(0.01)  # type: ignore[arg-type]

    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert asyncio.run(ask(silent.getsockname()[1])) == {"ready": False, "status": 0}


def test_latency_counts_from_the_planned_arrival() -> None:
    async def call(number: int) -> Answer:
        time.sleep(0.02)  # a generator that lags: it holds up all later requests
        return Answer(200, 0.02, first_row=0.01)

    answers = asyncio.run(open_loop(call, [0.0, 0.0, 0.0]))
    assert answers[2].seconds >= 0.06
    assert answers[2].first_row is not None
    assert answers[2].first_row >= 0.05


def test_statistics() -> None:
    assert percentiles([]) is None
    assert percentiles([2.0]) == {"p50": 2.0, "p95": 2.0, "max": 2.0}
    assert percentiles([float(n) for n in range(101)]) == {"p50": 50.0, "p95": 95.0, "max": 100.0}
    assert slope([(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)]) == pytest.approx(2.0)
    assert slope([(0.0, 1.0)]) == 0.0


def test_reads_events_that_arrive_in_pieces() -> None:
    class Content:
        async def iter_any(self) -> AsyncIterator[bytes]:
            for piece in (b": wait\n\nevent: a.partial_image\nda", b'ta: {"row": 1}\n', b"\nevent: b\ndata: {}\n\n"):
                yield piece

    async def read() -> list[tuple[str, dict[str, Any]]]:
        return [each async for each in events(SimpleNamespace(content=Content()))]  # type: ignore[arg-type]

    assert asyncio.run(read()) == [("a.partial_image", {"row": 1}), ("b", {})]


def test_processes_of_a_server_are_counted_with_their_descendants() -> None:
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, text=True) as process:
        while not descendants(process.pid):
            assert process.poll() is None
        found = resources(process.pid)
        process.communicate("\n", timeout=30)
    assert (found["processes"], found["threads"]) == (2, 2)
    assert descendants(process.pid) == []


def test_the_published_loop_answers_every_request_also_if_a_batch_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = PublishedLoop(write_model(tmp_path, "tiny", 32), 2, "static", "float32", backend="eager")

    async def ask(count: int) -> list[Answer]:
        calls = (loop.image(seed, label=seed) for seed in range(count))
        return await asyncio.wait_for(asyncio.gather(*calls), 30)

    try:
        answers = asyncio.run(ask(3))
        images = [Image.open(BytesIO(base64.b64decode(answer.text))) for answer in answers]
        assert [image.size for image in images] == [(32, 32)] * 3

        def fail(codes: object) -> None:
            raise RuntimeError("no memory")

        monkeypatch.setattr(loop._model, "decode", fail)
        assert [answer[::4] for answer in asyncio.run(ask(3))] == [(500, "RuntimeError: no memory")] * 3
    finally:
        loop.close()


def test_the_examples_of_the_page_are_valid_requests() -> None:
    text = PAGE.read_text()
    bodies = [line.split("'")[1] for line in text.splitlines() if line.strip().startswith("-d '{")]
    assert bodies
    for body in bodies:
        check_fields(GenerationBody, json.loads(body))
    limits = ServerOptions()
    assert f"{limits.max_body // 2**20} MiB for a body" in text
    assert f"proxy_read_timeout {limits.timeout + 30:.0f}s" in text


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_a_server_holds_a_small_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "load.json"
    options = ["--model", "tiny", "--pixels", "32", "--batch-size", "4", "--dtype", "float32", "--clients", "30"]
    tests = ["--tests", "overload", "leavers", "kill", "--overload-seconds", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["serving_load", *options, *tests])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving_load, "AT_ONCE", 20.0)  # no measurement here
        patch.setattr(serving_load, "QUEUE", 16)
        serving_load.main()
    record = json.loads(out.read_text())
    assert record["overload"]["by_status"].keys() == {"200", "429"}
    assert record["leavers"]["same_image"]
    assert record["kill"]["different_images"] == 0
    assert record["server_still_runs"]
