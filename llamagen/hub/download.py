"""Files of the hub as local files, in the cache that all programs share (``HF_HOME``).

A file is downloaded once. Later calls ask the hub only whether it has changed, and take the cached file if the hub does
not answer. With ``HF_HUB_OFFLINE=1``, and for a commit as revision whose files are in the cache, no request is made.
"""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from llamagen.files import atomic_file
from llamagen.hub.address import Address, file_address, is_remote, repository_address
from llamagen.hub.errors import NotOnHubError, cache_folder, damaged_file_error, hub_errors, other_site_error
from llamagen.hub.transfer import receive

__all__ = ["is_remote", "local_file", "local_repository"]

CONFIG = "config.json"
EXPORTED = ("*.json", "*.safetensors", "*.txt", "*.tsv")
"""Files of an exported model; its card and images are not downloaded."""
COMMIT = re.compile(r"[0-9a-f]{40}")


def local_file(source: str | Path) -> Path:
    """Find a file, and download it into the hub's cache if it is on the hub and not yet there.

    Several processes may call this at the same time: one of them downloads, the others wait. The file is complete and
    its checksum is that of the hub, or it does not exist. An interrupted download is resumed by the next call.

    Args:
        source: a local path, which stays as it is (with ``~`` expanded); a published name, unless such a path exists;
            or ``hf://owner/repository/file[@revision]``, in which the revision is a branch, tag or commit.

    Returns:
        The path of the file. A local path need not exist.

    Raises:
        ValueError: in one line with what to do, if the address is wrong, the file does not exist or needs a token,
            there is no network, the download is broken or not what the hub has, or the cache is damaged or cannot be
            written.
        DiskFullError: if there is no room for the file.
    """
    address = file_address(source)
    return Path(source).expanduser() if address is None else _download(address)


def local_repository(source: str) -> Path:
    """Find the files of an exported model, and download those that are not yet in the hub's cache.

    Args:
        source: ``owner/repository[@revision]``, with or without ``hf://`` before it.

    Returns:
        A folder with all of the repository's files of :data:`EXPORTED` outside of folders, of one commit.

    Raises:
        ValueError: in one line with what to do, as :func:`local_file`, or if it is not a model that this project
            exported.
        DiskFullError: if there is no room for the files.
    """
    address = repository_address(source)
    with hub_errors(address):
        from huggingface_hub import HfApi, constants, snapshot_download
    # The patterns of huggingface_hub also match files in folders.
    patterns = {"allow_patterns": list(EXPORTED), "ignore_patterns": ["*/*"]}
    options: dict[str, Any] = {"revision": address.revision, "tqdm_class": _no_bars(), **patterns}
    # footgun: if no list of the commit's files is recorded, a folder of which files are missing is returned.
    if COMMIT.fullmatch(address.revision) and (_folder(address) / "trees" / f"{address.revision}.json").is_file():
        with suppress(OSError, ValueError):  # a file is missing
            return _checked(Path(snapshot_download(address.repository, local_files_only=True, **options)), address)
    try:
        with hub_errors(address):
            timeout = constants.HF_HUB_ETAG_TIMEOUT
            info = HfApi().model_info(address.repository, revision=address.revision, timeout=timeout)
        if info.siblings is None or (info.siblings and not COMMIT.fullmatch(str(info.sha))):
            raise other_site_error(address, constants.ENDPOINT)
    except NotOnHubError:
        raise
    except ValueError as unavailable:
        try:  # raises an error if a file of the commit is missing
            folder = Path(snapshot_download(address.repository, local_files_only=True, **options))
        except (OSError, ValueError):
            raise unavailable from None
        return _checked(folder, address)
    names = [each.rfilename for each in info.siblings]
    if CONFIG not in names:
        raise _not_exported(address)
    for name in names:
        if "/" not in name and any(Path(name).match(pattern) for pattern in EXPORTED):
            _download(Address(address.repository, name, str(info.sha), f"{address.given}: {name}"))
    with hub_errors(address):  # records which commit and files the revision has, for use without a network
        folder = Path(snapshot_download(address.repository, **options))
    return _checked(folder, address)


def _checked(folder: Path, address: Address) -> Path:
    if not (folder / CONFIG).exists():
        raise _not_exported(address)
    return folder


def _not_exported(address: Address) -> ValueError:
    return ValueError(
        f"{address.given} has no {CONFIG}, so it is not a model that this project exported; give one of its files, "
        f"hf://{address.repository}/FILE"
    )


def _download(address: Address) -> Path:
    """A file of the hub in the cache."""
    if COMMIT.fullmatch(address.revision) and (cached := _cached(address, address.revision)):
        return cached
    try:
        with hub_errors(address):
            from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

            url = hf_hub_url(address.repository, address.file, revision=address.revision)
            found = get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        commit, etag = found.commit_hash, found.etag
        if commit is None or etag is None or not COMMIT.fullmatch(commit) or not re.fullmatch(r"[\w-]+", etag):
            raise other_site_error(address, url)
    except NotOnHubError:
        raise
    except ValueError:
        if cached := _cached(address, address.revision):
            return cached
        raise
    path = _cached(address, commit)
    if path is None:
        with hub_errors(address):
            path = _fetch(address, url, etag, found.size, commit)
    if found.size is not None and path.stat().st_size != found.size:
        raise damaged_file_error(path, f"it has {path.stat().st_size:,} bytes instead of {found.size:,}")
    _record(address, commit)
    return path


def _cached(address: Address, revision: str) -> Path | None:
    """A file that is in the cache at a revision; None if it is not."""
    with hub_errors(address):  # the name may be invalid
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(address.repository, address.file, revision=revision)
    return Path(path) if isinstance(path, str) else None


def _fetch(address: Address, url: str, etag: str, size: int | None, commit: str) -> Path:
    """Download the content of a file, and give it its place in the cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import WeakFileLock

    folder = _folder(address)
    lock = cache_folder() / ".locks" / folder.name / f"{etag}.receive.lock"
    for parent in (lock.parent, folder / "blobs"):
        parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        receive(address, url, etag, size, folder / "blobs" / etag)
    # It finds the content there, and links to it from the folder of the commit.
    return Path(hf_hub_download(address.repository, address.file, revision=commit))


def _record(address: Address, commit: str) -> None:
    """Record the commit of a branch or tag, as huggingface_hub does, for use without a network."""
    path = _folder(address) / "refs" / address.revision
    try:
        if commit != address.revision and (not path.is_file() or path.read_text() != commit):
            with atomic_file(path) as temporary:
                temporary.write_text(commit)
    except OSError:  # the file is there; a cache may be read-only
        pass


def _folder(address: Address) -> Path:
    from huggingface_hub.file_download import repo_folder_name

    return cache_folder() / repo_folder_name(repo_id=address.repository, repo_type="model")


def _no_bars() -> Any:
    """A class of progress bars that are not shown, for files that are already there."""
    from functools import partial

    from tqdm import tqdm

    return partial(tqdm, disable=True)
