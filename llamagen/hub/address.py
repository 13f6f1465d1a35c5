"""Addresses of the hub: published names, ``hf://owner/repository/file[@revision]``, ``hf://owner/repository``."""

import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from llamagen.hub.published import PUBLISHED

SCHEME = "hf://"
FORM = "hf://owner/repository/file[@revision]"
REPOSITORY_FORM = "owner/repository[@revision]"
MAIN = "main"
# footgun: a single slash, too, because Path("hf://a") is "hf:/a".
_REMOTE = re.compile(r"hf:/{1,2}(?P<rest>.*)", re.DOTALL)
_NAME = r"[A-Za-z0-9](?:[\w.-]*\w)?"
_ADDRESS = re.compile(rf"(?P<repository>{_NAME}/{_NAME})(?P<file>(?:/[^/@\s]+)*)(?:@(?P<revision>[\w./-]+))?", re.ASCII)


@dataclass(frozen=True)
class Address:
    """A file of the hub, or a repository.

    Attributes:
        repository: ``owner/name``.
        file: path of the file in the repository; empty for the repository itself.
        revision: branch, tag or commit.
        given: the text that the user gave, for messages.
    """

    repository: str
    file: str
    revision: str
    given: str


def is_remote(source: object) -> bool:
    """Whether a source of weights is on the hub: an ``hf://`` address, or a published name and not a local path.

    Args:
        source: path, published name or address; None and other objects are not on the hub.
    """
    if not isinstance(source, str | Path):
        return False
    text = str(source)
    return _REMOTE.match(text) is not None or (text in PUBLISHED and not Path(text).exists())


def file_address(source: str | Path) -> Address | None:
    """The address of a file on the hub; None for a local path.

    Raises:
        ValueError: in one line, if an ``hf://`` address does not name a file, or the source does not exist and is
            similar to a published name.
    """
    text = str(source)
    if is_remote(source):
        if text in PUBLISHED:
            return Address(PUBLISHED[text].repository, PUBLISHED[text].file, MAIN, text)
        address = _parse(text)
        if address is None or not address.file:
            raise ValueError(
                f"{text} does not name a file on the hub; give {FORM}, or a published name such as c2i_L_384"
            )
        return address
    if not Path(text).expanduser().exists() and "/" not in text:
        near = get_close_matches(text.removesuffix(".pt"), PUBLISHED, 3, 0.6)
        if near:
            raise ValueError(
                f"{text} is neither a file nor a published name; give a path, {FORM}, or a name such as "
                f"{', '.join(near)}"
            )
    return None


def repository_address(source: str) -> Address:
    """The address of a repository, with or without ``hf://``.

    Raises:
        ValueError: in one line, if the text is not such an address.
    """
    address = _parse(str(source))
    if address is None or address.file:
        raise ValueError(f"{source} is not a repository of the hub; give {REPOSITORY_FORM}")
    return address


def _parse(text: str) -> Address | None:
    remote = _REMOTE.match(text)
    match = _ADDRESS.fullmatch(remote["rest"] if remote else text)
    if match is None or ".." in match["file"].split("/"):
        return None
    given = f"{SCHEME}{remote['rest']}" if remote else text
    return Address(match["repository"], match["file"].lstrip("/"), match["revision"] or MAIN, given)
