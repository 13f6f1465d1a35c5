"""What the serving benchmarks send requests to: a server of this project in its own process, or the published loop."""

import asyncio
import base64
import json
import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import aiohttp
import torch

from benchmarks.plain_sampling import StaticSampler
from llamagen import LlamaGen
from llamagen.sampling import SamplingConfig

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = SamplingConfig(guidance_scale=4.0, top_k=2000)
BODY = {"guidance_scale": SETTINGS.guidance_scale, "top_k": SETTINGS.top_k}
START_SECONDS = 600.0
"""Time limit for the start of a server: vLLM compiles for a minute or more."""
ASK_SECONDS = 5.0
"""Time limit for an answer during the start: a server has its port before it answers."""
JOIN_SECONDS = 0.01
"""How long the published loop waits for simultaneous requests, as our server does."""


class Answer(NamedTuple):
    """What came back for a request of one image.

    Attributes:
        status: HTTP status; 0 if the connection failed.
        seconds: from the call to the complete answer.
        first_row: seconds from the call to the first report of a row; None without one.
        retry_after: the header of a refusal.
        text: the image in base64, or the message of the error.
    """

    status: int
    seconds: float
    first_row: float | None = None
    retry_after: str | None = None
    text: str = ""


class Target(Protocol):
    """Generates images for clients."""

    async def image(self, seed: int, label: int = 0, rows: bool = False) -> Answer:
        """Request one image, and wait for it.

        Args:
            seed: seed of the image.
            label: its class.
            rows: whether rows are reported, where the target can. Their previews take some of the engine's time.
        """

    async def idle(self) -> None:
        """Wait until nothing is generated any more."""


@dataclass(frozen=True)
class Server:
    """A running server of this project.

    Attributes:
        url: its address.
        process: the process of the front.
        session: connections to it, without a limit on their number.
        start_seconds: from the start of the process until it was ready.
    """

    url: str
    process: subprocess.Popen[bytes]
    session: aiohttp.ClientSession
    start_seconds: float

    async def image(self, seed: int, label: int = 0, rows: bool = False) -> Answer:
        """See :class:`Target`."""
        body = {"prompt": label, "seed": seed, **BODY, **({"stream": True} if rows else {})}
        start, first_row = time.monotonic(), None
        try:
            async with self.session.post(f"{self.url}/v1/images/generations", json=body) as response:
                retry_after = response.headers.get("Retry-After")
                if rows and response.status == 200:
                    status, text = 200, ""
                    async for name, data in events(response):
                        if name.endswith("partial_image"):
                            first_row = first_row or time.monotonic() - start
                        elif name.endswith("completed"):
                            text = data["b64_json"]
                        elif name == "error":
                            status, text = 500, json.dumps(data)
                    status = status if text else 0
                else:
                    status, text = response.status, await response.text()
                    if status == 200:
                        text = json.loads(text)["data"][0]["b64_json"]
        except (aiohttp.ClientError, OSError, ValueError, KeyError, IndexError) as error:
            status, text, retry_after = 0, f"{type(error).__name__}: {error}", None
        return Answer(status, time.monotonic() - start, first_row, retry_after, text)

    async def load(self, seconds: float | None = None) -> dict[str, Any]:
        """What ``/ready`` reports; ``{"ready": False}`` if it does not answer, or not within ``seconds``."""
        try:
            timeout = aiohttp.ClientTimeout(total=seconds)
            async with self.session.get(f"{self.url}/ready", timeout=timeout) as response:
                return {**json.loads(await response.text()), "status": response.status}
        except (aiohttp.ClientError, OSError, ValueError):
            return {"ready": False, "status": 0}

    async def idle(self) -> None:
        """See :class:`Target`."""
        while (load := await self.load()).get("waiting") or load.get("running"):
            await asyncio.sleep(0.1)


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """Name and data of each server-sent event."""
    name, buffer = "", b""
    async for chunk in response.content.iter_any():
        buffer += chunk
        *lines, buffer = buffer.split(b"\n")
        for line in lines:
            key, _, value = line.decode().strip().partition(":")
            if key == "event":
                name = value.strip()
            elif key == "data" and value.strip() != "[DONE]":
                yield name, json.loads(value)


@asynccontextmanager
async def serve(
    source: Path, *options: str, python: str = sys.executable, env: Mapping[str, str] | None = None
) -> AsyncIterator[Server]:
    """Run ``python -m serving.server SOURCE …`` on a free port of 127.0.0.1, wait until it is ready, and end it.

    Raises:
        ValueError: with the last lines of its output, if it does not start.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [python, "-m", "serving.server", str(source), "--port", str(port), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    environment.pop("LLAMAGEN_API_KEY", None)
    # A connection for each request, so that a test of what stays open does not find those that are kept for the next.
    start, connector = time.monotonic(), aiohttp.TCPConnector(limit=0, force_close=True)
    with tempfile.TemporaryFile() as log, running(command, log, environment) as process:
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
            server = Server(f"http://127.0.0.1:{port}", process, session, 0.0)
            while (await server.load(ASK_SECONDS))["status"] != 200:
                if process.poll() is not None or time.monotonic() - start > START_SECONDS:
                    log.seek(0)
                    raise ValueError(f"{' '.join(command)} did not start: {log.read().decode()[-1000:]}")
                await asyncio.sleep(0.1)
            yield Server(server.url, process, session, time.monotonic() - start)


@contextmanager
def running(command: list[str], log: Any, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is interrupted at the end, and killed if it does not end."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class PublishedLoop:
    """One static batch after another, as the published sampling script works.

    Requests wait until the running batch has ended; the next batch takes the oldest of them, up to the maximum. The
    loop is that of ``benchmarks/plain_sampling.py``: a cache of the full length, and both branches of guidance in one
    batch. It is prepared for the batch sizes 1, 2, 4, …, so that few requests do not pay for a full batch. Pixels and
    PNG files are made as by our server.

    Args:
        source: folder of an exported class-conditional model.
        capacity: maximum number of images of a batch.
        way: one of ``benchmarks.plain_sampling.WAYS``.
        dtype: precision of the model.
        backend: of ``torch.compile``; ``eager`` for dry runs.
    """

    def __init__(self, source: Path, capacity: int, way: str, dtype: str, backend: str = "inductor") -> None:
        start = time.monotonic()
        self._model = LlamaGen.from_pretrained(source, dtype=dtype, batch_size=capacity, compile=False)  # type: ignore[arg-type]
        gpt = self._model.gpt
        assert gpt is not None
        sizes = sorted({min(2**power, capacity) for power in range(capacity.bit_length() + 1)})
        self._samplers = {size: StaticSampler(gpt, size, SETTINGS, way, backend) for size in sizes}
        self._queue: queue.Queue[tuple[int, asyncio.Future[str]] | None] = queue.Queue()
        self._unfinished = 0
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()
        self.start_seconds = time.monotonic() - start

    async def image(self, seed: int, label: int = 0, rows: bool = False) -> Answer:
        """See :class:`Target`. The loop has one random state and reports no rows: ``seed``, ``rows`` do nothing."""
        start = time.monotonic()
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._queue.put((label, future))
        try:
            status, text = 200, await future
        except Exception as error:
            status, text = 500, f"{type(error).__name__}: {error}"
        return Answer(status, time.monotonic() - start, text=text)

    async def idle(self) -> None:
        """See :class:`Target`."""
        while self._unfinished or not self._queue.empty():
            await asyncio.sleep(0.1)

    def close(self) -> None:
        """End the thread, after the running batch."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (first := self._queue.get()) is not None:
            self._unfinished = 1
            time.sleep(JOIN_SECONDS)
            batch = [first]
            while len(batch) < max(self._samplers) and not self._queue.empty():
                if (each := self._queue.get_nowait()) is None:
                    return
                batch.append(each)
            batch = [(label, future) for label, future in batch if not future.cancelled()]
            try:
                self._generate(batch)
            except Exception as error:  # the clients must not wait for ever
                for _, future in batch:
                    future.get_loop().call_soon_threadsafe(_resolve, future, error)
            self._unfinished = 0

    def _generate(self, batch: list[tuple[int, "asyncio.Future[str]"]]) -> None:
        if not batch:
            return
        size = min(size for size in self._samplers if size >= len(batch))
        labels = torch.zeros(size, dtype=torch.int64, device=self._model.device)
        labels[: len(batch)] = torch.tensor([label for label, _ in batch])
        codes = self._samplers[size](labels)[: len(batch)]
        side = int(codes.shape[1] ** 0.5)
        for (_, future), image in zip(batch, self._model.decode(codes.view(-1, side, side)), strict=True):
            file = BytesIO()
            image.save(file, format="png")
            text = base64.b64encode(file.getvalue()).decode()
            future.get_loop().call_soon_threadsafe(_resolve, future, text)


def _resolve(future: "asyncio.Future[str]", result: str | Exception) -> None:
    if future.done():  # its owner has left
        return
    if isinstance(result, str):
        future.set_result(result)
    else:
        future.set_exception(result)
