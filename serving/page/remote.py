"""A backend that is a server of this project on another machine: ``python -m serving.page --server URL``.

A request of the page may have several classes or prompts, and a request of the HTTP API has one: so it becomes several,
which the server joins to batches. A thread with an event loop follows all of them.
"""

import asyncio
import base64
import io
import json
import logging
import re
import socket
from collections.abc import Coroutine
from contextlib import suppress
from threading import Lock, Thread
from typing import Any

import httpx2
import numpy as np
from PIL import Image

from serving.engine.facts import ModelFacts
from serving.engine.requests import (
    Ended,
    Finished,
    ImageRequest,
    Listener,
    Load,
    ReconstructionRequest,
    Request,
    RequestError,
    Rows,
)
from serving.page.event_stream import server_events
from serving.page.refusals import AWAY, NOT_UNDERSTOOD, is_json, refusal, transport_error
from serving.page.uploads import mask_file

LOGGER = logging.getLogger("serving")
CONNECT, ANSWER, SILENCE, RECONSTRUCTION = 5.0, 15.0, 60.0, 600.0
"""Seconds: to connect; for the answer to a question about the server; without a byte of a stream, in which the server
sends comments; for a reconstruction."""
AHEAD = re.compile(r"ahead ([0-9]{1,9})")
"""Comment in a stream of the server: number of images that it generates before this one."""
GENERATIONS, RECONSTRUCTIONS = "/v1/images/generations", "/v1/images/reconstructions"
MODELS, READY = "/v1/models", "/ready"
UNEXPECTED = (
    *(ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError),
    *(OSError, SyntaxError, Image.DecompressionBombError),
)
"""Errors in reading an answer of another program, or of another version."""


class RemoteTicket:
    """A request to the server.

    Args:
        loop: runs it.

    Attributes:
        ahead: number of images that the server generates first.
        places: the same for each HTTP request, by its first image.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.ahead, self.places, self._loop = 0, dict[int, int](), loop
        self._task: asyncio.Task[None] | None = None

    def set_ahead(self, first: int, ahead: int) -> None:
        """Set the place of an HTTP request in the server's queue; 0 if it runs."""
        self.places[first] = ahead
        self.ahead = min(self.places.values())

    def start(self, work: Coroutine[Any, Any, None], listener: Listener) -> asyncio.Task[None]:
        """Run the request, in the thread of the loop, and report its end."""

        def end(task: asyncio.Task[None]) -> None:
            self.ahead = 0
            listener(Ended(_error_of(task)))

        self._task = self._loop.create_task(work)
        self._task.add_done_callback(end)
        return self._task

    def cancel(self) -> None:
        """End the request: its connections are closed, and the server stops generating."""
        with suppress(RuntimeError):  # the backend is closed, and so is the loop
            self._loop.call_soon_threadsafe(lambda: self._task and self._task.cancel())


class RemoteBackend:
    """A server as a backend. All errors are sentences; a server that is back is used again.

    Codes of generated images are empty, (0, 0): the HTTP API has them for reconstructions only.

    Args:
        url: address of the server, such as ``http://127.0.0.1:8000``.
        api_key: its key; None if it needs none.

    Raises:
        ValueError: in one line, if the server cannot be reached, refuses the key, or is another program.
    """

    facts: ModelFacts

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self._url = _checked(url)
        # Found out by the system: a machine that disappeared while a request was silent.
        options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
        for name, seconds in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, name):  # not on all systems
                options.append((socket.IPPROTO_TCP, getattr(socket, name), seconds))
        # A connection for each request: one that is kept may be closed by the server just before it is used again.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
        self._client = httpx2.AsyncClient(
            base_url=self._url,
            headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
            timeout=httpx2.Timeout(SILENCE, connect=CONNECT),
            transport=httpx2.AsyncHTTPTransport(limits=limits, socket_options=options),
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed, self._lock = False, Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="remote backend", daemon=True)
        self._thread.start()
        try:
            self.facts = self._wait(self._read_facts())
        except BaseException:
            self.close()
            raise

    def submit(self, request: Request, listener: Listener, seconds: float | None = None) -> RemoteTicket:
        """Send a request. Whether the server accepts it is reported as an event."""
        with self._lock:
            if self._closed:
                raise RequestError("stopping", "the page is shutting down")
            ticket = RemoteTicket(self._loop)
            self._loop.call_soon_threadsafe(self._start, ticket, request, listener, seconds)
        return ticket

    def load(self) -> Load:
        """How busy the server is now; not ready if it cannot be reached."""
        try:
            answer = self._wait(self._client.get(READY, timeout=ANSWER)).json()
            load = answer.get("load", answer)
            return Load(**{name: load[name] for name in Load.__dataclass_fields__})
        except (httpx2.HTTPError, *UNEXPECTED):
            return Load(False, 0, 0, 0)

    def close(self, seconds: float = 0.0) -> None:
        """Finish the requests for some seconds, and cancel the others."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._wait(self._finish(seconds))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _finish(self, seconds: float) -> None:
        if self._tasks:
            _, unfinished = await asyncio.wait(self._tasks, timeout=seconds)
            for task in unfinished:
                task.cancel()
            await asyncio.gather(*unfinished, return_exceptions=True)
        await self._client.aclose()

    async def _read_facts(self) -> ModelFacts:
        try:
            response = await self._client.get(MODELS, timeout=httpx2.Timeout(ANSWER, connect=CONNECT))
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise ValueError(
                f"the server {self._url} cannot be reached ({str(error) or type(error).__name__}); start it with "
                "python -m serving.server MODEL, or check the address"
            ) from error
        if response.status_code in (401, 403):
            problem = "does not accept this API key" if "authorization" in self._client.headers else "needs an API key"
            raise ValueError(
                f"the server {self._url} {problem}; give its key with --api-key-file, or in LLAMAGEN_API_KEY"
            )
        try:
            (model, *_) = [each for each in response.json()["data"] if "llamagen" in each]
            self._max_images = max(int(model.get("max_images", 1)), 1)
            return ModelFacts.from_json(model["llamagen"])
        except UNEXPECTED as error:
            raise ValueError(
                f"the program at {self._url} is not a server of this project (status {response.status_code} for "
                f"{MODELS}); give the address of python -m serving.server"
            ) from error

    def _start(self, ticket: RemoteTicket, request: Request, listener: Listener, seconds: float | None) -> None:
        task = ticket.start(self._answer(ticket, request, listener, seconds), listener)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, ticket: RemoteTicket, request: Request, listener: Listener, seconds: float | None) -> None:
        try:
            async with asyncio.timeout(seconds):
                if isinstance(request, ReconstructionRequest):
                    await self._reconstruct(request, listener)
                else:
                    await self._generate_all(ticket, request, listener)
        except TimeoutError as error:
            raise RequestError("late", f"the images were not finished in {seconds:g} seconds") from error

    async def _generate_all(self, ticket: RemoteTicket, request: ImageRequest, listener: Listener) -> None:
        parts = split(request, self._max_images)
        ticket.places = {part.start: 0 for part in parts}
        try:
            async with asyncio.TaskGroup() as group:  # all at once, so that the server joins them to a batch
                for part in parts:
                    group.create_task(self._generate(ticket, request, part, listener))
        except ExceptionGroup as errors:  # the first one has cancelled the other parts
            raise errors.exceptions[0] from None

    async def _generate(self, ticket: RemoteTicket, request: ImageRequest, part: range, listener: Listener) -> None:
        """Generate the images of one HTTP request."""
        body, missing = self._body(request, part), set(part)
        try:
            async with self._client.stream("POST", GENERATIONS, json=body) as response:
                if response.status_code != 200 or not response.headers.get("content-type", "").startswith("text/event"):
                    raise refusal(response, await response.aread())
                async for event in server_events(response.aiter_bytes()):
                    if event.name == "error":
                        raise refusal(response, event.data.encode())
                    if ahead := AHEAD.fullmatch(event.data if not event.name else ""):
                        ticket.set_ahead(part.start, int(ahead[1]))
                    elif event.name == "image_generation.partial_image":
                        values = json.loads(event.data)
                        ticket.set_ahead(part.start, 0)
                        file = values.get("b64_json")
                        previews = None if file is None else (base64.b64decode(file),)
                        listener(
                            Rows((part[values["image_index"]],), int(values["row"]), int(values["rows"]), previews)
                        )
                    elif event.name == "image_generation.completed":
                        values = json.loads(event.data)
                        missing.remove(image := part[values["image_index"]])
                        listener(Finished(image, await self._pixels(values["b64_json"]), np.zeros((0, 0), np.int64)))
                    if not missing:
                        return
            raise RequestError("lost", AWAY["lost"])
        except httpx2.HTTPError as error:
            raise transport_error(error, self._url) from error
        except UNEXPECTED as error:
            LOGGER.error("the server %s sent an unexpected event", self._url, exc_info=error)
            raise RequestError("failed", NOT_UNDERSTOOD) from error

    def _body(self, request: ImageRequest, part: range) -> dict[str, Any]:
        """Body of the HTTP request for some images."""
        body = {
            "model": self.facts.name,
            "prompt": request.conditions[part.start],
            "n": len(part),
            "seed": request.seed,
            "index": request.indices[part.start],
            "response_format": "b64_json",
            "output_format": "png",
            "stream": True,
            **request.settings.image_settings(),
        }
        if not request.previews:
            body["partial_images"] = 0
        if request.image is not None:
            body["image"] = base64.b64encode(request.image).decode()
            if request.mask is None:
                body["keep_rows"] = request.keep_rows
            else:
                body["mask"] = base64.b64encode(mask_file(request.mask, self.facts)).decode()
        return body

    async def _reconstruct(self, request: ReconstructionRequest, listener: Listener) -> None:
        image = base64.b64encode(request.image).decode()
        body = {"image": image, "output_format": "png", "response_format": "b64_json"}
        try:
            timeout = httpx2.Timeout(RECONSTRUCTION, connect=CONNECT)
            response = await self._client.post(RECONSTRUCTIONS, json=body, timeout=timeout)
            if response.status_code != 200 or not is_json(response):
                raise refusal(response, response.content)
            item = response.json()["data"][0]
            codes = np.asarray(item["codes"], np.int64).reshape(len(item["codes"]), -1)
            listener(Finished(0, await self._pixels(item["b64_json"]), codes))
        except httpx2.HTTPError as error:
            raise transport_error(error, self._url) from error
        except UNEXPECTED as error:
            LOGGER.error("the server %s sent an unexpected answer", self._url, exc_info=error)
            raise RequestError("failed", NOT_UNDERSTOOD) from error

    async def _pixels(self, text: str) -> np.ndarray:
        """Pixels (H, W, 3) uint8 of a PNG file in base64."""

        def decode() -> np.ndarray:
            with Image.open(io.BytesIO(base64.b64decode(text)), formats=["PNG"]) as image:
                return np.array(image.convert("RGB"))

        return await asyncio.to_thread(decode)


def split(request: ImageRequest, count: int) -> list[range]:
    """Positions of the images of each HTTP request: at most ``count``, of one condition, with consecutive indices."""
    parts, start, conditions, indices = list[range](), 0, request.conditions, request.indices
    for end in range(1, len(request) + 1):
        if (
            end == len(request)
            or end - start == count
            or conditions[end] != conditions[start]
            or indices[end] != indices[end - 1] + 1
        ):
            parts.append(range(start, end))
            start = end
    return parts


def _error_of(task: "asyncio.Task[None]") -> RequestError | None:
    if task.cancelled():
        return RequestError("cancelled", "the request was cancelled")
    error = task.exception()
    if error is None or isinstance(error, RequestError):
        return error
    LOGGER.error("a request failed", exc_info=error)
    return RequestError("failed", "something went wrong; the terminal of the page shows what")


def _checked(url: str) -> str:
    """A URL without the end that clients of the API may have.

    Raises:
        ValueError: in one line, if it is not the address of a server.
    """
    try:
        found = httpx2.URL(url)
    except (httpx2.InvalidURL, TypeError) as error:
        raise ValueError(f"{url!r:.80} is not an address ({error}); give one such as http://127.0.0.1:8000") from error
    if found.scheme not in ("http", "https") or not found.host:
        raise ValueError(f"{url!r:.80} is not the address of a server; give one such as http://127.0.0.1:8000")
    return url.rstrip("/").removesuffix("/v1")
