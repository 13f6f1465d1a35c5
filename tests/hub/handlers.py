"""How the local hub server answers: the addresses of the hub, and those of the storage of weights."""

import base64
import json
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.hub.content import LFS_SUFFIXES, Blob, Repository, Request

CHUNK = 1 << 16


class Handler(BaseHTTPRequestHandler):
    """Reads a request, notes it, and sends contents with the server's faults."""

    protocol_version = "HTTP/1.1"
    hub: Any
    """The :class:`~tests.hub_server.HubServer`."""

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
        wanted = self.headers.get("Range") if self.hub.ranges else None
        start = int((wanted or "bytes=0-").removeprefix("bytes=").split("-")[0])
        if wanted and start >= blob.size:
            self.answer(416, {"Content-Range": f"bytes */{blob.size}"})
            return
        status, more = 200, dict(headers)
        if wanted:
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


class StorageHandler(Handler):
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


class HubHandler(Handler):
    """The hub: files by address, and its API."""

    def answer_request(self, parts: list[str]) -> None:
        if self.token is not None and self.token not in self.hub.tokens:
            self.fail(401, "", "Invalid credentials in Authorization header")
        elif parts[0] == "api" and self.hub.plain:
            self.answer(200, {"Content-Type": "text/html"}, self.hub.page)
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
        common = {} if self.hub.plain else {"X-Repo-Commit": commit}
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
