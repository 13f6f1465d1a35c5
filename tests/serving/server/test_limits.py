"""Full queues, time limits, API keys, and metrics."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import Request

from serving.engine.requests import RequestError
from serving.server.body import BODY, BodyBudget, BodyShare, read_json
from serving.server.errors import STATUS, ApiError
from serving.server.keys import KeyCheck, read_keys
from serving.server.metrics import Metrics
from serving.server.options import ServerOptions
from tests.datamodules.shard_files import assert_one_line
from tests.serving.fake_backend import FakeBackend
from tests.serving.running_server import running, until
from tests.serving.server.test_invalid_requests import PATH, assert_error


def test_a_full_queue_is_answered_at_once_with_a_time_to_retry() -> None:
    with running(FakeBackend(queue=2)) as server, httpx.Client(base_url=server.url, timeout=30) as client:
        server.backend.gate.clear()
        with ThreadPoolExecutor() as pool:
            accepted = pool.submit(httpx.post, f"{server.url}{PATH}", json={"prompt": 1, "n": 2}, timeout=30)
            until(lambda: server.backend.tickets)
            refused = client.post(PATH, json={"prompt": 1})  # the accepted one cannot have finished
            assert_error(refused, 429, "2 images wait already")
            assert refused.headers["retry-after"] == "2"  # 1.5 seconds, rounded up
            assert refused.json()["error"]["type"] == "rate_limit_error"
            server.backend.gate.set()
            assert accepted.result().status_code == 200


def test_a_request_that_takes_too_long_ends_with_504() -> None:
    with running(options=ServerOptions(timeout=0.01)) as server:
        server.backend.gate.clear()
        response = httpx.post(f"{server.url}{PATH}", json={"prompt": 1}, timeout=30)
        assert_error(response, 504, "not finished in time")


@pytest.mark.parametrize("reason", STATUS)
def test_each_reason_has_a_status_and_those_that_pass_say_when_to_retry(reason: Any) -> None:
    error = ApiError.from_request_error(RequestError(reason, "a sentence"))
    expected = {"invalid": 400, "full": 429, "stopping": 503, "cancelled": 503, "lost": 503, "late": 504, "failed": 500}
    assert error.status == expected[reason]
    assert ("Retry-After" in error.headers) is (error.status in (429, 503, 504))
    assert ("Connection" in error.headers) is (reason == "stopping")


def test_a_failure_of_the_engine_is_an_error_with_its_sentence() -> None:
    with running() as server:
        server.backend.failures.append(RequestError("failed", "pixels are not finite"))
        assert_error(httpx.post(f"{server.url}{PATH}", json={"prompt": 1}), 500, "pixels are not finite")
        server.backend.failures.append(RequestError("invalid", "the image is damaged"))
        assert_error(httpx.post(f"{server.url}{PATH}", json={"prompt": 1}), 400, "the image is damaged")


def test_a_closed_backend_is_not_ready_and_refuses_new_requests() -> None:
    with running() as server, httpx.Client(base_url=server.url) as client:
        assert client.get("/ready").json()["ready"] is True
        server.backend.close()
        assert client.get("/ready").status_code == 503
        assert client.head("/ready").headers["retry-after"] == "5"
        assert client.get("/health").status_code == 200
        response = client.post(PATH, json={"prompt": 1})
        assert_error(response, 503, "shutting down")
        assert (response.headers["connection"], response.headers["retry-after"]) == ("close", "5")


def test_keys_protect_the_api_and_nothing_else() -> None:
    options = ServerOptions(api_keys=("right", "other"))
    with running(options=options) as server, httpx.Client(base_url=server.url) as client:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Basic right"},
            {"Authorization": "x"},
        ):
            for response in (
                client.post(PATH, content=b"?", headers=headers),
                client.get("/v1/models", headers=headers),
            ):
                assert_error(response, 401, "the API key is")
                assert response.headers["www-authenticate"] == "Bearer"
        for key in ("right", "other"):
            assert client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
        assert [client.get(path).status_code for path in ("/health", "/ready", "/metrics")] == [200, 200, 200]


def test_a_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return one == other

    monkeypatch.setattr("serving.server.keys.compare_digest", compare)
    check = KeyCheck(("a", "b" * 100))
    check("Bearer a")
    with pytest.raises(ApiError):
        check("Bearer ab")
    assert len(compared) == 4  # each with all keys
    assert {len(each) for pair in compared for each in pair} == {32}


def test_keys_are_read_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAMAGEN_API_KEY", raising=False)
    assert read_keys(None) == ()
    monkeypatch.setenv("LLAMAGEN_API_KEY", "from-environment")
    assert read_keys(None) == ("from-environment",)
    file = tmp_path / "keys"
    file.write_text("one\n\n two \n")
    assert read_keys(str(file)) == ("one", "two")
    for content in (b"", b"\n", b"with space inside", b"\xff"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="key") as caught:
            read_keys(str(file))
        assert_one_line(caught)
    with pytest.raises(ValueError, match="it is not ASCII text"):
        read_keys(str(file))
    with pytest.raises(ValueError, match="cannot be read") as caught:
        read_keys(str(tmp_path / "missing"))
    assert_one_line(caught)


def test_bodies_of_all_requests_share_a_limit_of_memory() -> None:
    budget = BodyBudget(10)
    first, second = BodyShare(budget), BodyShare(budget)
    first.grow(8)
    with pytest.raises(ApiError, match="too much data"):
        second.grow(3)
    first.release()
    second.grow(3)
    assert budget.used == 3


def test_a_body_without_end_is_read_to_the_limit_only() -> None:
    read = 0

    async def receive() -> dict[str, Any]:
        nonlocal read
        read += 100
        return {"type": "http.request", "body": b" " * 100, "more_body": True}

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "headers": headers, BODY: BodyShare(BodyBudget(10**9))}
    with pytest.raises(ApiError) as caught:
        asyncio.run(read_json(Request(scope, receive), ServerOptions(max_body=1000)))
    assert (caught.value.status, read) == (413, 1100)


def test_the_memory_of_a_body_is_released_when_its_request_ends() -> None:
    with running(options=ServerOptions(max_bodies=100)) as server, httpx.Client(base_url=server.url) as client:
        statuses = [client.post(PATH, json={"prompt": 1, "user": "x" * 40}).status_code for _ in range(3)]
        assert statuses == [200] * 3
        assert_error(client.post(PATH, json={"prompt": 1, "user": "x" * 90}), 503, "too much data")


def test_metrics_count_responses_and_show_the_load() -> None:
    metrics = Metrics()
    metrics.accepted(3)
    metrics.refused("full")
    metrics.ended(None, 2.0)
    metrics.ended("late", 2.0)
    metrics.batch(4)
    metrics.image(0.5, 1.5)
    metrics.worker_started(1.0)
    metrics.worker_died()
    backend = FakeBackend()
    metrics.watch(backend)
    metrics.response("/v1/images/generations", 200, 0.2)
    metrics.response("/images/abc.png", 404, 0.2)
    metrics.response("/../etc/passwd", 404, 0.2)
    backend.close()
    values = dict(line.rsplit(" ", 1) for line in metrics.text().decode().splitlines() if not line.startswith("#"))
    expected = {
        "llamagen_images_accepted_total": 3,
        'llamagen_requests_refused_total{reason="full"}': 1,
        'llamagen_requests_ended_total{reason="finished"}': 1,
        'llamagen_requests_ended_total{reason="late"}': 1,
        "llamagen_request_seconds_sum": 4,
        "llamagen_batch_images_sum": 4,
        "llamagen_images_total": 1,
        "llamagen_queue_seconds_sum": 0.5,
        "llamagen_generation_seconds_sum": 1.5,
        "llamagen_workers_started_total": 1,
        "llamagen_workers_died_total": 1,
        "llamagen_waiting_images": 0,
        "llamagen_running_images": 0,
        "llamagen_workers": 1,
        "llamagen_ready": 0,
        'llamagen_responses_total{path="/v1/images/generations",status="200"}': 1,
        'llamagen_responses_total{path="/images",status="404"}': 1,
        'llamagen_responses_total{path="other",status="404"}': 1,
    }
    assert {name: float(values[name]) for name in expected} == expected


def test_the_server_counts_its_responses() -> None:
    with running() as server, httpx.Client(base_url=server.url) as client:
        client.get("/nothing")
        client.post(PATH, json={"prompt": 1})
        text = client.get("/metrics").text
    assert 'llamagen_responses_total{path="other",status="404"} 1.0' in text
    assert f'llamagen_responses_total{{path="{PATH}",status="200"}} 1.0' in text


def test_images_are_encoded_outside_of_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    from serving.server import answers

    threads: list[str] = []
    encode = answers.encode_image

    def noted(*arguments: Any) -> bytes:
        threads.append(threading.current_thread().name)
        return encode(*arguments)

    monkeypatch.setattr(answers, "encode_image", noted)
    with running() as server:
        httpx.post(f"{server.url}{PATH}", json={"prompt": 1, "n": 2})
    assert len(threads) == 2
    assert "server" not in threads
