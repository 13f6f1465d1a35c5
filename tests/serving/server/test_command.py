"""``python -m serving.server``: its options, errors of the start, and its end."""

import base64
import io
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from llamagen import LlamaGen
from serving import start
from serving.engine.requests import Load
from serving.engine.spec import WorkerSpec
from serving.server import __main__ as command
from serving.server.starting import answered_while_starting
from serving.server.workers import worker_specs
from serving.start import address, listen
from tests.datamodules.shard_files import assert_one_line
from tests.pipeline import Pipeline
from tests.serving.running_server import running, send, until
from tests.serving.server.test_invalid_requests import assert_error

GENERATIONS = "/v1/images/generations"


def specs(*arguments: str) -> list[WorkerSpec]:
    return worker_specs(command._parser().parse_args(["model", *arguments]))


def test_each_option_of_the_model_reaches_the_workers() -> None:
    found = specs(
        *("--tokenizer", "vq", "--text-encoder", "t5", "--devices", "cuda:1,cuda:3"),
        *("--dtype", "float32", "--batch-size", "5", "--window", "6"),
    )
    expected = WorkerSpec("model", "vq", "t5", "cuda:1", "float32", 5, window=6)
    assert found == [expected, replace(expected, device="cuda:3")]
    assert {spec.window for spec in specs("--devices", "cpu")} == {"auto"}
    assert {spec.window for spec in specs("--window", "auto")} == {"auto"}
    assert {spec.window for spec in specs("--engine", "vllm")} == {1}


def test_by_default_there_is_a_worker_on_each_gpu_or_one_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert specs() == [WorkerSpec("model", device="cpu", batch_size=4, window="auto")]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert specs() == [WorkerSpec("model", device=f"cuda:{number}", batch_size=16) for number in range(2)]
    [vllm] = specs("--engine", "vllm", "--tensor-parallel", "2", "--window", "1")
    assert (vllm.device, vllm.engine, vllm.options) == ("cuda:0", "vllm", {"tensor_parallel": 2})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tensor-parallel", "2"], "--tensor-parallel 2 needs --engine vllm"),
        (["--window", "4", "--engine", "vllm"], "--window 4 needs the embedded engine"),
        (["--window", "auto", "--engine", "vllm"], "--window auto needs the embedded engine"),
        (["--devices", "cuda:0,cuda:1", "--engine", "vllm"], "are 2 devices, but --engine vllm takes one"),
        (["--devices", "gpu"], "--devices gpu holds 'gpu', which is not a device; give names like cuda:0"),
        (["--devices", "cuda:0,cuda:0"], "names a GPU twice"),
        (["--devices", ""], "holds '', which is not a device"),
    ],
)
def test_devices_that_do_not_fit_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        specs(*arguments)
    assert_one_line(caught)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--port", "65536"],
        ["--batch-size", "0"],
        ["--window", "0"],
        ["--window", "wide"],
        ["--queue", "many"],
        ["--max-images", "-1"],
        ["--timeout", "0"],
        ["--timeout", "nan"],
        ["--engine", "tgi"],
        ["--tensor-parallel", "1.5"],
        ["--tensorparallel", "2"],
    ],
)
def test_a_wrong_option_is_named_in_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(["model", *arguments])
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert message.startswith("error: ")
    assert arguments[0] in message


def test_without_the_extra_the_command_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "find_spec", lambda name: None if name == "prometheus_client" else object())
    with pytest.raises(ValueError, match=r'the server needs prometheus_client, .* -e "\.\[serve\]"$'):
        command.main(["model"])


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the command starts, without a model, a server and a second signal, unless ``signals`` is 2."""
    import serving.engine.dispatcher
    import serving.server.connections

    seen: dict[str, Any] = {"signals": 0, "closed": False}

    class Backend:
        facts = type("Facts", (), {"description": "a model"})

        def __init__(self, sources: Any, **options: Any) -> None:
            seen.update(sources=sources, **options)

        def close(self) -> None:
            seen["closed"] = True

        def kill(self) -> None:
            seen["killed"] = True

    class Server:
        signals = property(lambda self: seen["signals"])

        def run(self, sockets: Any) -> None:
            seen["address"] = sockets[0].getsockname()
            sockets[0].close()

    def build_server(app: Any, backend: Any, seconds: float) -> Server:
        seen["seconds"] = seconds
        return Server()

    monkeypatch.setattr(serving.engine.dispatcher, "Dispatcher", Backend)
    monkeypatch.setattr(serving.server.connections, "build_server", build_server)
    monkeypatch.setattr("serving.server.app.build_app", lambda backend, options, metrics: seen.update(limits=options))
    return seen


def test_the_options_reach_the_server(seen: dict[str, Any], tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret")
    command.main(
        [
            *("model", "--queue", "9", "--max-images", "3", "--timeout", "7", "--api-key-file", str(keys)),
            *("--host", "127.0.0.1", "--port", "0"),
        ]
    )
    assert (seen["queue"], seen["seconds"], seen["closed"]) == (9, 7.0, True)
    assert (seen["limits"].max_images, seen["limits"].timeout, seen["limits"].api_keys) == (3, 7.0, ("secret",))
    assert seen["address"][0] == "127.0.0.1"


def test_after_a_second_signal_the_process_does_not_wait_for_its_workers(seen: dict[str, Any]) -> None:
    seen["signals"] = 2
    with pytest.raises(SystemExit) as caught:
        command.main(["model", "--port", "0"])
    assert caught.value.code == 128 + signal.SIGTERM
    assert (seen["closed"], seen["killed"]) == (False, True)


def test_probes_are_answered_while_the_model_is_loaded() -> None:
    with closing(listen("127.0.0.1", 0, "the server")) as connection:
        url = address(connection)
        with answered_while_starting(connection):
            assert httpx.get(f"{url}/health").status_code == 200
            ready = httpx.get(f"{url}/ready")
            assert (ready.status_code, ready.headers["retry-after"]) == (503, "5")
            assert ready.json() == vars(Load(False, 0, 0, 0))
            assert httpx.head(f"{url}/ready").content == b""
            assert_error(httpx.post(f"{url}{GENERATIONS}", json={"prompt": 1}), 503, "the model is being loaded")
        connection.settimeout(30)
        with socket.create_connection(connection.getsockname()):  # the socket still listens
            connection.accept()[0].close()


def test_a_signal_finishes_what_was_accepted_and_refuses_the_rest() -> None:
    with running() as server, ThreadPoolExecutor() as pool, httpx.Client(base_url=server.url, timeout=30) as client:
        server.backend.gate.clear()
        accepted = pool.submit(httpx.post, f"{server.url}{GENERATIONS}", json={"prompt": 1}, timeout=30)
        until(lambda: server.backend.tickets)
        server.server.handle_exit(signal.SIGTERM, None)
        until(lambda: not server.backend.load().ready)
        assert client.get("/ready").status_code == 503
        assert client.get("/health").status_code == 200
        refused = client.post(GENERATIONS, json={"prompt": 1})
        assert (refused.status_code, refused.headers["connection"]) == (503, "close")
        assert not server.server.should_exit
        server.backend.gate.set()
        assert accepted.result().status_code == 200
        until(lambda: server.server.should_exit)


def test_a_second_signal_ends_the_server_at_once() -> None:
    with running() as server:
        server.backend.gate.clear()
        with send(server, {"prompt": 1}):
            server.server.handle_exit(signal.SIGINT, None)
            server.server.handle_exit(signal.SIGINT, None)
            assert server.server.force_exit


def worker_of(pid: int) -> int:
    """The worker process of a server."""
    found = subprocess.run(["ps", "-Aww", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True)
    lines = [line.split(maxsplit=2) for line in found.stdout.splitlines()]
    [worker] = [int(line[0]) for line in lines if int(line[1]) == pid and "spawn_main" in line[2:][0]]
    return worker


def has_ended(pid: int) -> bool:
    """Whether a process has ended; it may wait for somebody to collect its exit code."""
    found = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return not found.stdout.strip() or found.stdout.startswith("Z")


@contextmanager
def started(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command in a process of its own, and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "serving.server", *arguments, "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    try:
        assert process.stdout is not None
        address = next((found[1] for line in process.stdout if (found := re.search(r"Serving at (\S+)", line))), None)
        assert address is not None, "the server did not start"
        yield process, address
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_sigterm_ends_the_process_with_0_after_the_accepted_requests(pipeline: Pipeline) -> None:
    folder = pipeline.root / "argen"
    with started(str(folder), "--batch-size", "1") as (process, address), ThreadPoolExecutor(8) as pool:
        bodies = [{"prompt": number, "n": 4, "seed": number} for number in range(8)]
        answers = [pool.submit(httpx.post, f"{address}{GENERATIONS}", json=body, timeout=60) for body in bodies]

        def load() -> dict[str, Any]:
            content: dict[str, Any] = httpx.get(f"{address}/ready").json()
            return content

        until(lambda: load()["waiting"] or any(answer.done() for answer in answers))
        process.send_signal(signal.SIGTERM)
        responses = [answer.result() for answer in answers]
        assert process.wait(60) == 0
    done = [number for number, response in enumerate(responses) if response.status_code == 200]
    assert done
    assert all(response.status_code == 503 for number, response in enumerate(responses) if number not in done)
    model = LlamaGen.from_pretrained(folder)
    for number in done:
        wanted = model.generate(number, images_per_prompt=4, seed=number, progress=False)
        for item, image in zip(responses[number].json()["data"], wanted, strict=True):
            with Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))) as found:
                assert np.array_equal(np.asarray(found), np.asarray(image))


@pytest.mark.slow
def test_a_second_signal_ends_a_process_whose_worker_hangs(pipeline: Pipeline) -> None:
    with started(str(pipeline.root / "argen"), "--batch-size", "1") as (process, address), ThreadPoolExecutor() as pool:
        worker = worker_of(process.pid)
        os.kill(worker, signal.SIGSTOP)
        pool.submit(httpx.post, f"{address}{GENERATIONS}", json={"prompt": 1}, timeout=100)
        until(lambda: httpx.get(f"{address}/ready").json()["running"])
        process.send_signal(signal.SIGTERM)
        until(lambda: not httpx.get(f"{address}/ready").json()["ready"])
        process.send_signal(signal.SIGTERM)
        assert process.wait(100) == 128 + signal.SIGTERM
        until(lambda: has_ended(worker))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="counts files and threads in /proc")
def test_clients_that_leave_half_way_leave_nothing_behind(pipeline: Pipeline) -> None:
    with started(str(pipeline.root / "argen"), "--queue", "1000") as (process, address):

        def threads() -> int:
            return len(os.listdir(f"/proc/{process.pid}/task"))

        def files() -> int:
            return len(os.listdir(f"/proc/{process.pid}/fd"))

        def leave(number: int) -> None:
            body = {"prompt": number % 10, "n": 3, "stream": number % 2 == 0}
            with httpx.Client() as client, suppress(httpx.TimeoutException):
                client.post(f"{address}{GENERATIONS}", json=body, timeout=0.05)

        httpx.post(f"{address}{GENERATIONS}", json={"prompt": 1, "n": 3}, timeout=60)
        before = threads(), files()
        with ThreadPoolExecutor(20) as pool:
            list(pool.map(leave, range(200)))
        until(lambda: not {"waiting", "running"} & {k for k, v in httpx.get(f"{address}/ready").json().items() if v})
        assert httpx.post(f"{address}{GENERATIONS}", json={"prompt": 1}, timeout=60).status_code == 200
        until(lambda: files() <= before[1] + 1)
        assert threads() <= before[0] + 6  # threads that encode images are kept
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


@pytest.mark.slow
def test_errors_of_the_start_are_one_line_with_exit_code_2(tmp_path: Path) -> None:
    for arguments in (["nowhere", "--devices", "cpu"], ["x", "--host", "no.such.host.invalid"]):
        done = subprocess.run(
            [sys.executable, "-m", "serving.server", *arguments],
            capture_output=True,
            text=True,
            timeout=100,
            env={**os.environ, "PYTHONPATH": os.getcwd(), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        )
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert done.stderr.startswith("error: ")
