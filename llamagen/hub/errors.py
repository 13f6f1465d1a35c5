"""One line for each error of the hub, with what to do.

``huggingface_hub`` and its HTTP client are imported within functions, because the imports are slow and few runs need
them.
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from json import JSONDecodeError
from pathlib import Path
from urllib.parse import urlsplit

from llamagen.command import one_line
from llamagen.full_disk import DiskFullError, disk_full_error, full_disk_errno
from llamagen.hub.address import Address

LOG_IN = "run `hf auth login`, or set HF_TOKEN"
MAX_REASON = 200
"""Characters of a library's message that are kept."""
MAX_LISTED = 5


class NotOnHubError(ValueError):
    """The hub answers that a revision or file does not exist; a copy in the cache is not used instead."""


@contextmanager
def hub_errors(address: Address, uploads: bool = False) -> Iterator[None]:
    """Convert errors of the hub, the network and the cache within the block to one line.

    Args:
        address: what is downloaded, or uploaded to.
        uploads: whether the block uploads.

    Raises:
        NotOnHubError: if the hub answers that revision or file do not exist.
        ValueError: for other errors of the hub and the network, and for a cache that cannot be written.
        DiskFullError: if the disk is full.
    """
    endpoint = os.environ.get("HF_ENDPOINT", "")
    try:  # footgun: huggingface_hub cannot be imported with a wrong port
        _ = urlsplit(endpoint).port
    except ValueError as error:
        raise ValueError(
            f"{address.given}: HF_ENDPOINT is {endpoint}, which is not a URL ({_reason(error)}); correct or unset it"
        ) from error
    from httpx2 import HTTPError, InvalidURL
    from huggingface_hub.errors import HFValidationError, RemoteEntryNotFoundError, RevisionNotFoundError

    # What an answer of another site raises within huggingface_hub.
    other_site = (JSONDecodeError, UnicodeError, KeyError, TypeError)
    try:
        yield
    except DiskFullError:
        raise
    except (HTTPError, InvalidURL, OSError, RuntimeError, HFValidationError, *other_site) as error:
        cache = cache_folder()
        if (number := full_disk_errno(error, cache)) is not None:
            raise disk_full_error(cache / address.repository, number, None, 0) from error
        line = _line(error, address, uploads)
        if isinstance(error, RevisionNotFoundError | RemoteEntryNotFoundError):
            raise NotOnHubError(line) from error
        raise ValueError(line) from error


def cache_folder() -> Path:
    """The hub's cache, as ``HF_HOME`` or ``HF_HUB_CACHE`` set it."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def other_site_error(address: Address, url: str) -> ValueError:
    """The error of an answer that does not come from a hub.

    Args:
        address: what was asked for.
        url: where.
    """
    return ValueError(
        f"{address.given}: {url} does not answer as the hub does; correct HF_ENDPOINT, or check the proxy"
    )


def damaged_file_error(path: Path, reason: str) -> ValueError:
    """The error of a damaged file in the cache.

    Args:
        path: the file, or the link to it.
        reason: what is wrong.
    """
    return ValueError(
        f"{path} is damaged ({reason}); remove {path.resolve()} and run the same command again to download it again"
    )


def remedy_for_damage(path: Path, other: str) -> str:
    """What to do about a damaged file: for one in the hub's cache, how to download it again.

    Args:
        path: the file.
        other: the remedy for all other files.
    """
    if "huggingface_hub" not in sys.modules or not path.absolute().is_relative_to(cache_folder().absolute()):
        return other
    return f"remove {path.resolve()} and run the same command again to download it again"


def _line(error: Exception, address: Address, uploads: bool) -> str:
    """The line for an error."""
    from httpx2 import HTTPError, InvalidURL, LocalProtocolError
    from huggingface_hub import constants, errors

    if isinstance(error, RuntimeError) and isinstance(error.__cause__, HTTPError):  # a thread of an upload
        error = error.__cause__
    what, page = address.given, f"{constants.ENDPOINT}/{address.repository}"
    status = getattr(getattr(error, "response", None), "status_code", 0)
    if isinstance(error, errors.OfflineModeIsEnabled):
        place = "" if uploads else f" is not in the cache {constants.HF_HUB_CACHE}, and"
        return f"{what}:{place} HF_HUB_OFFLINE is set; unset it, or choose a file of the cache"
    if isinstance(error, errors.GatedRepoError):
        return f"{what}: {address.repository} is gated; accept its terms on {page}, and {LOG_IN} of the same account"
    if isinstance(error, errors.RevisionNotFoundError):
        return (
            f"{what}: {address.repository} has no revision {address.revision}; give a branch, tag or commit of "
            f"{page}/commits/main"
        )
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return (
            f"{what}: {address.repository} has no file {address.file} at {address.revision}; "
            f"{_files_near(address) or f'its files are listed on {page}/tree/{address.revision}'}"
        )
    if status == 401 and "Invalid credentials" in str(error):
        return f"{what}: the hub refuses the token; {LOG_IN} to a valid one, or unset it"
    if status in (401, 403) and uploads:
        reason = "the token has no permission to write" if status == 403 else "it takes a token"
        return (
            f"{what}: {reason} to {address.repository}; {LOG_IN} of an account that may, with the permission to write"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{what}: {page} does not exist, or is private; correct the name, or {LOG_IN} of an account that may read"
        )
    if status in (401, 403):
        return f"{what}: access to {page} is denied; {LOG_IN} of an account that may read it"
    if status:
        return f"{what}: {constants.ENDPOINT} answers with status {status}; try again later"
    if isinstance(error, errors.HFValidationError):
        return f"{what}: {address.repository} cannot be the name of a repository; correct it"
    if isinstance(error, InvalidURL):
        return f"{what}: HF_ENDPOINT or the variable of a proxy is not a URL ({_reason(error)}); correct or unset it"
    # footgun: the text of LocalProtocolError contains the token.
    if isinstance(error, UnicodeEncodeError | LocalProtocolError) and not _token_can_be_sent():
        return f"{what}: the token has characters that no token has; set HF_TOKEN again, or run `hf auth login`"
    if isinstance(error, JSONDecodeError | UnicodeDecodeError | KeyError | TypeError):
        return str(other_site_error(address, constants.ENDPOINT))
    if isinstance(error, HTTPError | ConnectionError | TimeoutError):
        return (
            f"{what}: {'no connection to' if uploads else 'it is not in the cache, and there is no connection to'} "
            f"{constants.ENDPOINT} ({_reason(error)}); check network, proxy and HF_ENDPOINT"
        )
    if isinstance(error, OSError) and error.filename is not None and not uploads:
        return (
            f"{what}: {error.filename} in the cache cannot be written ({error.strerror}); set HF_HOME to a folder that "
            "can be written to"
        )
    return f"{what}: {_reason(error)}; try again later"


def _token_can_be_sent() -> bool:
    from huggingface_hub import get_token

    return re.fullmatch(r"[!-~]*", get_token() or "") is not None


def _reason(error: Exception) -> str:
    text = one_line(str(error)) or type(error).__name__
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]}…"


def _files_near(address: Address) -> str:
    """Files of the repository with similar names; empty if they cannot be listed."""
    from huggingface_hub import HfApi

    with suppress(Exception):  # only for the message
        files = HfApi().list_repo_files(address.repository, revision=address.revision)
        near = get_close_matches(address.file, files, MAX_LISTED, 0.4) or sorted(files)[:MAX_LISTED]
        return f"it has {', '.join(near)}"
    return ""
