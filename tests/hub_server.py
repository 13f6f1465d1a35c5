"""A local server that answers as the Hugging Face Hub does, for tests without a network.

Use the fixture ``hub`` (tests/conftest.py): a server, empty and without faults at the start of each test, to which
``huggingface_hub`` of this process and of processes that the test starts is directed, with an empty cache::

    def test_something(hub: HubServer) -> None:
        hub.add("owner/repository", {"model.pt": b"…", "config.json": Path("config.json")})   # a commit on main
        hub.add_published("c2i_B_256", path)                  # a file at the place of a published name
        ...
        assert hub.downloads("model.pt") == 1 and hub.count("HEAD") == 1

Faults, until the test ends or they are set back: ``hub.gated``, ``hub.tokens``, ``hub.down``, ``hub.corrupt``,
``hub.cut(after, times)``, and ``hub.stop()``, after which nobody listens at its address. ``hub.cache`` is the folder of
cached files, ``hub.environment`` what processes need, and ``hub.offline()`` sets ``HF_HUB_OFFLINE``.

As on the hub, weights (:data:`LFS_SUFFIXES`) are stored elsewhere: their addresses redirect to another port, which
refuses requests with a token, as signed addresses do. Their ETags are SHA-256, those of other files are git's SHA-1.
The storage protocol xet is not spoken; the fixture switches it off, so that uploads use LFS.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants

from llamagen.hub.published import PUBLISHED

LFS_SUFFIXES = (".pt", ".bin", ".ckpt", ".safetensors", ".npz")
CHUNK = 1 << 16


class Request(NamedTuple):
    """A request that the server received.

    Attributes:
        method: ``GET``, ``HEAD``, ``POST`` or ``PUT``.
        path: path of its address, without the query.
        token: token that came with it.
        range: value of its ``Range`` header.
    """

    method: str
    path: str
    token: str | None
    range: str | None


class Blob(NamedTuple):
    """Content of a file: bytes, or a file on disk."""

    content: bytes | Path
    size: int
    sha256: str
    sha1: str
    is_lfs: bool

    @classmethod
    def of(cls, name: str, content: bytes | Path) -> "Blob":
        """Hash the content of a file."""
        data = content.read_bytes() if isinstance(content, Path) else content
        sha1 = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        return cls(content, len(data), hashlib.sha256(data).hexdigest(), sha1, name.endswith(LFS_SUFFIXES))

    @property
    def etag(self) -> str:
        """Name of the content in ETags and in the cache."""
        return self.sha256 if self.is_lfs else self.sha1

    def data(self) -> bytes:
        """The whole content."""
        return self.content.read_bytes() if isinstance(self.content, Path) else self.content


@dataclass
class Repository:
    """Files by commit, and commits by the name of a branch or tag."""

    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Mapping[str, Blob], revision: str = "main") -> str:
        """Add a commit to a branch, which is created if needed; other files of the branch stay."""
        base = self.commits.get(self.branches.get(revision, self.branches.get("main", "")), {})
        merged = {**base, **files}
        described = json.dumps([len(self.commits), revision, {name: blob.etag for name, blob in merged.items()}])
        commit = hashlib.sha1(described.encode()).hexdigest()
        self.commits[commit] = merged
        self.branches[revision] = commit
        return commit


class HubServer:
    """The server; see the description of this file.

    Attributes:
        gated: repositories that need a token of :attr:`tokens`.
        tokens: valid tokens. Other tokens are refused; reading needs none, writing does.
        readonly_tokens: tokens of :attr:`tokens` without the permission to write.
        down: answer every request with 503.
        corrupt: send other bytes of the same number.
        requests: what was received, in order.
        repositories: content by ``owner/repository``.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._servers: list[ThreadingHTTPServer] = []
        self.cache = Path()
        self.environment: dict[str, str] = {}
        self.offline: Callable[[], None] = lambda: None
        self.reset()

    def reset(self) -> None:
        """Remove all content and faults, and listen again."""
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, Blob] = {}
        self.gated: set[str] = set()
        self.tokens = {"hf_valid", "hf_readonly"}
        self.readonly_tokens = {"hf_readonly"}
        self.down = self.corrupt = False
        self._cut_after, self._cuts = 0, 0
        self.requests: list[Request] = []
        if not self._servers:
            for handler in (_HubHandler, _StorageHandler):
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

        def offline() -> None:
            self.environment["HF_HUB_OFFLINE"] = "1"
            patch.setenv("HF_HUB_OFFLINE", "1")
            patch.setattr(constants, "HF_HUB_OFFLINE", True)

        self.offline = offline

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

    def cut(self, after: int, times: int = 1) -> None:
        """Close the connection of the next downloads after so many bytes of the content."""
        self._cut_after, self._cuts = after, times

    def next_cut(self) -> int | None:
        """Bytes after which this download is cut; None to send all."""
        with self._lock:
            if self._cuts == 0:
                return None
            self._cuts -= 1
            return self._cut_after

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


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    @property
    def token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def handle_request(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        chunked = self.headers.get("Transfer-Encoding") == "chunked"
        self.body = self._chunks() if chunked else self.rfile.read(length)
        parts = urlsplit(self.path)
        if parts.path == "/api/agent-harnesses":  # housekeeping of huggingface_hub, at most once a day
            self.fail(404, "", "no such page")
            return
        self.hub.received(Request(self.command, unquote(parts.path), self.token, self.headers.get("Range")))
        if self.hub.down:
            self.fail(503, "", "the hub is down")
        else:
            self.answer_request([unquote(part) for part in parts.path.strip("/").split("/")])

    do_GET = do_HEAD = do_POST = do_PUT = handle_request  # noqa: N815

    def answer_request(self, parts: list[str]) -> None:
        raise NotImplementedError

    def _chunks(self) -> bytes:
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def answer(self, status: int, headers: Mapping[str, str], content: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def json(self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.answer(status, {"Content-Type": "application/json", **(headers or {})}, json.dumps(content).encode())

    def fail(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        self.json({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})})

    def send_blob(self, blob: Blob, headers: Mapping[str, str]) -> None:
        """Send content from the first byte that was asked for."""
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        status, more = 200, dict(headers)
        if self.headers.get("Range"):
            status, more["Content-Range"] = 206, f"bytes {start}-{blob.size - 1}/{blob.size}"
        if self.command == "HEAD":
            self.answer(status, {**more, "Content-Length": str(blob.size - start)})
            return
        data = blob.data()[start:]
        if self.hub.corrupt:
            data = bytes(byte ^ 0xFF for byte in data)
        cut = self.hub.next_cut()
        self.send_response(status)
        for name, value in {"Accept-Ranges": "bytes", "Content-Length": str(len(data)), **more}.items():
            self.send_header(name, value)
        self.end_headers()
        end = len(data) if cut is None else min(cut, len(data))
        for place in range(0, end, CHUNK):
            self.wfile.write(data[place : min(place + CHUNK, end)])
        if cut is not None:
            self.close_connection = True


class _StorageHandler(_Handler):
    """Where weights are stored: ``/storage/NAME/SHA-256``, and ``/upload/SHA-256``."""

    def answer_request(self, parts: list[str]) -> None:
        if self.token is not None:
            self.fail(400, "", "a signed address takes no token")
        elif self.command == "PUT" and parts[0] == "upload":
            blob = Blob.of("upload.pt", self.body)
            if blob.sha256 != parts[1]:
                self.fail(400, "", "the content does not match its SHA-256")
                return
            self.hub.objects[blob.sha256] = blob
            self.answer(200, {"ETag": f'"{blob.sha256}"'})
        elif parts[0] == "storage" and parts[-1] in self.hub.objects:
            self.send_blob(self.hub.objects[parts[-1]], {"ETag": '"of the storage"'})
        else:
            self.fail(404, "", "no such object")


class _HubHandler(_Handler):
    def answer_request(self, parts: list[str]) -> None:
        if self.token is not None and self.token not in self.hub.tokens:
            self.fail(401, "", "Invalid credentials in Authorization header")
        elif parts[:2] == ["api", "models"] and len(parts) >= 4:
            self._api(f"{parts[2]}/{parts[3]}", parts[4:])
        elif parts == ["api", "repos", "create"]:
            self._create()
        elif parts == ["api", "validate-yaml"]:
            self.json({"errors": [], "warnings": []})
        elif len(parts) > 4 and parts[2] == "resolve":
            self._resolve(f"{parts[0]}/{parts[1]}", parts[3], "/".join(parts[4:]))
        elif parts[2:] == ["info", "lfs", "objects", "batch"]:
            self._batch()
        else:
            self.fail(404, "", "no such page")

    def _repository(self, name: str) -> Repository | None:
        """A repository that the token may read, or the hub's answer."""
        if name not in self.hub.repositories:
            if self.token is None:
                self.fail(401, "RepoNotFound", "Invalid username or password.")
            else:
                self.fail(404, "RepoNotFound", "Repository not found")
        elif name in self.hub.gated and self.token is None:
            self.fail(401, "GatedRepo", f"Access to model {name} is restricted. You must have access to it.")
        elif name in self.hub.gated and self.token in self.hub.readonly_tokens:
            self.fail(403, "GatedRepo", f"Access to model {name} is restricted and you are not in the authorized list.")
        else:
            return self.hub.repositories[name]
        return None

    def _commit(self, repository: Repository, revision: str) -> str | None:
        commit = repository.branches.get(revision, revision)
        if commit in repository.commits:
            return commit
        self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return None

    def _resolve(self, name: str, revision: str, file: str) -> None:
        if (repository := self._repository(name)) is None or (commit := self._commit(repository, revision)) is None:
            return
        common = {"X-Repo-Commit": commit}
        blob = repository.commits[commit].get(file)
        if blob is None:
            self.fail(404, "EntryNotFound", "Entry not found", common)
        elif blob.is_lfs:
            linked = {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
            location = f"{self.hub.storage}/storage/{Path(file).name}/{blob.sha256}?signature=1"
            self.answer(302, {**common, **linked, "Location": location, "ETag": '"of the redirect"'})
        else:
            self.send_blob(blob, {**common, "ETag": f'"{blob.sha1}"'})

    def _api(self, name: str, rest: list[str]) -> None:
        if (repository := self._repository(name)) is None:
            return
        writes = self.command == "POST"
        if writes and not self._may_write():
            return
        if rest[:1] == ["preupload"]:
            files = json.loads(self.body)["files"]
            modes = {file["path"]: "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular" for file in files}
            self.json({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]})
        elif rest[:1] == ["commit"]:
            self._add_commit(name, repository, rest[1])
        elif rest[:1] in ([], ["revision"], ["tree"]):
            revision = rest[1] if rest else "main"
            if not repository.commits and revision == "main":  # created, but empty
                self.json({"id": name, "sha": None, "siblings": []} if rest[:1] != ["tree"] else [])
            elif (commit := self._commit(repository, revision)) is not None:
                self.json(self._tree(repository, commit) if rest[:1] == ["tree"] else self._info(name, commit))
        else:
            self.fail(404, "", "no such page")

    def _info(self, name: str, commit: str) -> dict[str, Any]:
        files = self.hub.repositories[name].commits[commit]
        return {"id": name, "modelId": name, "sha": commit, "siblings": [{"rfilename": file} for file in files]}

    def _tree(self, repository: Repository, commit: str) -> list[dict[str, Any]]:
        entries = []
        for path, blob in repository.commits[commit].items():
            entry: dict[str, Any] = {"type": "file", "path": path, "size": blob.size, "oid": blob.sha1}
            if blob.is_lfs:
                entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 134}
            entries.append(entry)
        return entries

    def _may_write(self) -> bool:
        if self.token is None:
            self.fail(401, "", "Invalid username or password.")
        elif self.token in self.hub.readonly_tokens:
            self.fail(403, "", "You don't have the rights to write to this repository")
        else:
            return True
        return False

    def _create(self) -> None:
        if not self._may_write():
            return
        content = json.loads(self.body)
        name = f"{content.get('organization') or 'owner'}/{content['name']}"
        if name in self.hub.repositories:
            self.json({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409)
            return
        self.hub.repositories[name] = Repository()
        self.json({"url": f"{self.hub.url}/{name}", "name": name})

    def _batch(self) -> None:
        if not self._may_write():
            return
        objects: list[dict[str, Any]] = []
        for each in json.loads(self.body)["objects"]:
            known = each["oid"] in self.hub.objects
            href = f"{self.hub.storage}/upload/{each['oid']}"
            objects.append({**each} if known else {**each, "actions": {"upload": {"href": href}}})
        self.json({"transfer": "basic", "objects": objects})

    def _add_commit(self, name: str, repository: Repository, revision: str) -> None:
        files = {}
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = Blob.of(value["path"], base64.b64decode(value["content"]))
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        commit = repository.commit(files, revision)
        self.json({"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{name}/commit/{commit}"})
