"""A local server that answers as the Hugging Face Hub does, for tests without a network.

Use the fixture ``hub`` (tests/conftest.py): a server, empty and without faults at the start of each test, to which
``huggingface_hub`` of this process and of processes that the test starts is directed, with an empty cache::

    def test_something(hub: HubServer) -> None:
        hub.add("owner/repository", {"model.pt": b"…", "config.json": Path("config.json")})   # a commit on main
        hub.add_published("c2i_B_256", path)                  # a file at the place of a published name
        ...
        assert hub.downloads("model.pt") == 1 and hub.count("HEAD") == 1

The fixture ``published_hub`` has a small model under each published name.

Faults, until the test ends or they are set back: ``hub.gated``, ``hub.tokens``, ``hub.down``, ``hub.corrupt``,
``hub.ranges``, ``hub.plain``, ``hub.cut(bytes, …)``, and ``hub.stop()``, after which nobody listens at its address.
``hub.cache`` is the folder of cached files, ``hub.environment`` what processes need, and ``hub.offline()`` sets
``HF_HUB_OFFLINE`` until ``hub.online()``.

As on the hub, weights (``LFS_SUFFIXES``) are stored elsewhere: their addresses redirect to another port, which refuses
requests with a token, as signed addresses do. Their ETags are SHA-256, those of other files are git's SHA-1.
The storage protocol xet is not spoken; the fixture switches it off, so that uploads use LFS.
"""

from collections.abc import Callable, Mapping
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread

import huggingface_hub
import pytest
from huggingface_hub import constants

from llamagen.hub.published import PUBLISHED
from tests.hub.content import LFS_SUFFIXES, Blob, Repository, Request
from tests.hub.handlers import HubHandler, StorageHandler


class HubServer:
    """The server; see the description of this file.

    Attributes:
        gated: repositories that need a token of :attr:`tokens`.
        tokens: valid tokens. Other tokens are refused; reading needs none, writing does.
        readonly_tokens: tokens of :attr:`tokens` without the permission to write.
        down: answer every request with 503.
        corrupt: send other bytes of the same number.
        plain: leave out the headers that only the hub sends, and answer requests to the API with :attr:`page`, as
            another site does.
        page: a page of another site.
        ranges: answer requests for a part of a file with that part; otherwise with the whole file.
        requests: what was received, in order.
        repositories: content by ``owner/repository``.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._servers: list[ThreadingHTTPServer] = []
        self.cache = Path()
        self.environment: dict[str, str] = {}
        self.offline: Callable[[], None] = lambda: None
        self.online = self.offline
        self.reset()

    def reset(self) -> None:
        """Remove all content and faults, and listen again."""
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, Blob] = {}
        self.gated: set[str] = set()
        self.tokens = {"hf_valid", "hf_readonly"}
        self.readonly_tokens = {"hf_readonly"}
        self.down = self.corrupt = self.plain = False
        self.page = b"<html>log in</html>"
        self.ranges = True
        self._cuts: list[int] = []
        self.requests: list[Request] = []
        if not self._servers:
            for handler in (HubHandler, StorageHandler):
                bound = type(handler.__name__, (handler,), {"hub": self})
                server = ThreadingHTTPServer(("127.0.0.1", 0), bound)
                server.daemon_threads = True
                Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
                self._servers.append(server)
            self.url, self.storage = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def direct_here(self, home: Path, patch: pytest.MonkeyPatch) -> None:
        """Direct ``huggingface_hub`` of this process and of those it starts to this server, with ``home`` as HF_HOME.

        footgun: huggingface_hub reads its environment variables once, when it is imported.
        """
        self.cache = home / "hub"
        self.environment = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN_PATH"):
            patch.delenv(name, raising=False)
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS"):
            patch.delenv(name, raising=False)
        self.environment["NO_PROXY"] = self.environment["no_proxy"] = "127.0.0.1"
        for name, value in self.environment.items():
            patch.setenv(name, value)
        huggingface_hub.close_session()
        places = {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(self.cache),
            "HUGGINGFACE_HUB_CACHE": str(self.cache),
            "HF_XET_CACHE": str(home / "xet"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
            "AGENT_HARNESSES_PATH": str(home / ".agent_harnesses.json"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_PROGRESS_BARS": None,
        }
        for name, constant in places.items():
            patch.setattr(constants, name, constant)

        def set_offline(value: bool) -> None:
            self.environment["HF_HUB_OFFLINE"] = str(int(value))
            patch.setenv("HF_HUB_OFFLINE", str(int(value)))
            patch.setattr(constants, "HF_HUB_OFFLINE", value)

        self.offline, self.online = partial(set_offline, True), partial(set_offline, False)

    def stop(self) -> None:
        """Close both ports, as if there were no network; :meth:`reset` listens again, at other ports."""
        for server in self._servers:
            server.shutdown()
            server.server_close()
        self._servers.clear()
        huggingface_hub.close_session()  # its open connections are still served

    def add(self, repository: str, files: Mapping[str, bytes | Path], revision: str = "main") -> str:
        """Add a commit with these files to a repository, which is created if needed, and return the commit's hash."""
        blobs = {name: Blob.of(name, content) for name, content in files.items()}
        self.objects.update({blob.sha256: blob for blob in blobs.values()})
        return self.repositories.setdefault(repository, Repository()).commit(blobs, revision)

    def add_published(self, name: str, content: bytes | Path) -> str:
        """Add a file at the place of a published name, and return the commit's hash."""
        return self.add(PUBLISHED[name].repository, {PUBLISHED[name].file: content})

    def cut(self, *after: int) -> None:
        """Close the connections of the next downloads, each after so many bytes of the content."""
        self._cuts = list(after)

    def next_cut(self) -> int | None:
        """Bytes after which this download is cut; None to send all."""
        with self._lock:
            return self._cuts.pop(0) if self._cuts else None

    def count(self, method: str, part: str = "") -> int:
        """Number of requests with this method whose path contains ``part``."""
        return len([each for each in self.requests if each.method == method and part in each.path])

    def downloads(self, file: str) -> int:
        """Number of requests for the content of a file."""
        return self.count("GET", f"/storage/{file}/" if file.endswith(LFS_SUFFIXES) else f"/{file}")

    def received(self, request: Request) -> None:
        """Note a request."""
        with self._lock:
            self.requests.append(request)
