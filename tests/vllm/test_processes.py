"""vLLM in processes of its own: its OpenAI server, tensor parallelism, and compiled models."""

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import ended
from tests.vllm.models import CASES, Requests, export_small

PATIENCE = 280
"""Seconds after which a process counts as hanging."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def call(url: str, body: Any = None) -> tuple[int, Any]:
    """Status and content of an answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            content = answer.read()
            return answer.status, json.loads(content) if content else None
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


@contextmanager
def server(folder: Path, log: Path) -> Iterator[str]:
    """The command of docs/vllm.md; yields the address. It is killed with all of its processes."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--dtype", "float32"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--max-num-seqs", "16"]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with (
        log.open("w") as output,
        subprocess.Popen(
            [*command, "--served-model-name", "small"],
            stdout=output,
            stderr=output,
            start_new_session=True,
            env=environment,
        ) as process,
    ):
        try:
            deadline = time.monotonic() + PATIENCE
            while True:
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                try:
                    if call(f"http://127.0.0.1:{port}/health")[0] == 200:
                        break
                except OSError:
                    time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1/completions"
        finally:
            with suppress(ProcessLookupError):  # it has ended
                os.killpg(process.pid, signal.SIGKILL)


def body_of(requests: Requests, row: int) -> dict[str, Any]:
    """A completion request as in docs/vllm.md."""
    prompt = requests.prompts[row]
    body = {
        "model": "small",
        "max_tokens": requests.gpt.config.block_size - len(requests.kept[row]),
        "temperature": 0,
        "return_token_ids": True,
        "vllm_xargs": {"llamagen": json.dumps(requests.settings[row])},
    }
    if "prompt_embeds" not in prompt:
        return body | {"prompt": prompt["prompt_token_ids"]}
    buffer = io.BytesIO()
    torch.save(prompt["prompt_embeds"].clone(), buffer)
    return body | {"prompt": None, "prompt_embeds": base64.b64encode(buffer.getvalue()).decode()}


@pytest.mark.parametrize("condition", ["class", "text"])
@pytest.mark.timeout(PATIENCE + 20)
def test_the_openai_server_answers_24_staggered_requests(condition: str, tmp_path: Path) -> None:
    gpt = export_small(tmp_path / "model", condition=condition, dim=64, n_head=2)
    cases = CASES if condition == "class" else [case for case in CASES if not case.kept]
    requests = Requests(gpt, cases)
    rows = [row for row in range(len(requests.codes)) if row % 3 < (2 if condition == "class" else 3)][:24]

    def answer(row: int) -> list[int]:
        status, content = call(url, body_of(requests, row))
        assert status == 200, content
        (choice,) = content["choices"]
        return list(choice["token_ids"])

    with server(tmp_path / "model", tmp_path / "log") as url:
        with ThreadPoolExecutor(8) as pool:  # a request arrives whenever another one is answered
            answers = list(pool.map(answer, rows))
        for row, codes in zip(rows, answers, strict=True):
            assert [*requests.kept[row], *codes] == requests.codes[row].tolist(), requests.settings[row]
        for settings, message in (
            ('{"top_q": 1}', "llamagen: there is no setting 'top_q'; the settings are seed, index, temperature, "),
            ('{"guidance_scale": "NaN"}', "llamagen: guidance_scale is 'NaN'; it must be a number"),
            ("[" * 10_000, "llamagen: "),
            (json.dumps({"seed": "x" * 10_000}), "llamagen: seed is 'xxx"),
        ):
            status, content = call(url, body_of(requests, rows[0]) | {"vllm_xargs": {"llamagen": settings}})
            assert status == 400
            assert content["error"]["message"].startswith(message)
            assert len(content["error"]["message"]) < 310
            assert "\n" not in content["error"]["message"]
        status, content = call(url, body_of(requests, rows[0]) | {"temperature": 0.5})
        assert (status, content["error"]["message"][:37]) == (400, "temperature is 0.5; set it to 0 and g")
    assert len(rows) >= 20


@pytest.mark.parametrize(
    "arguments",
    [
        {"tensor_parallel": 2, "condition": "class", "dim": 128, "n_head": 4, "n_kv_head": 2},
        {"tensor_parallel": 2, "condition": "text", "dim": 64, "n_head": 2},
        {"compiled": True, "condition": "class", "dim": 200, "n_head": 2},
    ],
    ids=["two ranks, class, grouped queries", "two ranks, text", "compiled, class, padded heads"],
)
@pytest.mark.timeout(PATIENCE + 20)
def test_codes_of_other_processes_equal_generate(arguments: dict[str, Any], tmp_path: Path) -> None:
    done = ended([sys.executable, "-m", "tests.vllm.other_process", str(tmp_path), json.dumps(arguments)], PATIENCE)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.endswith(f"{len(CASES) * 3} images are equal\n")
