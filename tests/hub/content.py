"""What the local hub server holds: repositories, commits, contents of files, and the requests that it received."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

LFS_SUFFIXES = (".pt", ".bin", ".ckpt", ".safetensors", ".npz")


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
