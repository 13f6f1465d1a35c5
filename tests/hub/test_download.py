"""Files of the hub are downloaded once, resumed and verified. The hub is a local server."""

import errno
import resource
import shutil
import signal
import threading
from collections.abc import Iterator
from hashlib import sha1, sha256
from pathlib import Path
from types import SimpleNamespace

import pytest

from llamagen.full_disk import DiskFullError
from llamagen.hub import transfer
from llamagen.hub.address import Address
from llamagen.hub.download import local_file
from tests.hub_server import HubServer

NAME = "model.pt"
ADDRESS = f"hf://owner/name/{NAME}"
CONTENT = bytes(range(256)) * 1200
HALF = len(CONTENT) // 2


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "PAUSE", 0.0)


@pytest.fixture
def no_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where a request would be repeated after a while."""

    def refuse(seconds: float) -> None:
        raise AssertionError(f"slept for {seconds} seconds")

    monkeypatch.setattr("time.sleep", refuse)


@pytest.fixture
def served(hub: HubServer) -> HubServer:
    hub.add("owner/name", {NAME: CONTENT, "config.json": b"{}"})
    return hub


def blobs(hub: HubServer) -> list[Path]:
    """All contents in the cache, complete or not."""
    return sorted(hub.cache.glob("models--*/blobs/*"))


def test_the_first_download_shows_its_progress(served: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    path = local_file(ADDRESS)
    assert (path.name, path.read_bytes()) == (NAME, CONTENT)
    assert path.is_relative_to(served.cache)
    bar = capsys.readouterr().err
    assert NAME in bar
    assert "100%" in bar
    assert "307k" in bar  # bytes
    assert [file.name for file in blobs(served)] == [path.resolve().name]


def test_a_small_file_is_verified_and_cached_too(served: HubServer) -> None:
    for _ in range(2):
        assert local_file("hf://owner/name/config.json").read_bytes() == b"{}"
    assert served.downloads("config.json") == 1


def test_huggingface_hub_finds_what_was_downloaded_and_the_reverse(served: HubServer) -> None:
    from huggingface_hub import hf_hub_download

    path = local_file(ADDRESS)
    assert hf_hub_download("owner/name", NAME) == str(path)
    shutil.rmtree(served.cache)
    assert hf_hub_download("owner/name", NAME) == str(local_file(ADDRESS))
    assert served.downloads(NAME) == 2


def test_a_cached_file_is_not_downloaded_again(served: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    first = local_file(ADDRESS)
    capsys.readouterr()
    assert local_file(ADDRESS) == first
    assert served.downloads(NAME) == 1
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("no_sleep")
@pytest.mark.parametrize("fault", ["no network", "down", "offline", "gated", "not a hub"])
def test_a_cached_file_needs_no_hub(fault: str, served: HubServer) -> None:
    path = local_file(ADDRESS)
    requests = len(served.requests)
    if fault == "no network":
        served.stop()
    elif fault == "offline":
        served.offline()
    elif fault == "down":
        served.down = True
    elif fault == "not a hub":
        served.plain = True
    else:
        served.gated = {"owner/name"}
    assert local_file(ADDRESS) == path
    assert fault != "offline" or len(served.requests) == requests


def test_a_new_commit_is_downloaded_and_recorded(served: HubServer) -> None:
    old = local_file(ADDRESS)
    served.add("owner/name", {NAME: b"new"})
    new = local_file(ADDRESS)
    assert (old.read_bytes(), new.read_bytes()) == (CONTENT, b"new")
    served.offline()
    assert local_file(ADDRESS) == new


def test_another_revision_is_another_file(served: HubServer) -> None:
    (commit,) = served.repositories["owner/name"].commits
    served.add("owner/name", {NAME: b"tagged"}, revision="refs/pr/1")
    assert local_file(f"{ADDRESS}@refs/pr/1").read_bytes() == b"tagged"
    assert local_file(f"{ADDRESS}@{commit}").read_bytes() == CONTENT
    served.stop()
    assert local_file(f"{ADDRESS}@{commit}").read_bytes() == CONTENT
    assert local_file(f"{ADDRESS}@refs/pr/1").read_bytes() == b"tagged"


def test_a_commit_in_the_cache_takes_no_request(served: HubServer) -> None:
    (commit,) = served.repositories["owner/name"].commits
    local_file(f"{ADDRESS}@{commit}")
    served.requests.clear()
    local_file(f"{ADDRESS}@{commit}")
    assert served.requests == []


def test_the_same_content_in_another_commit_is_not_downloaded_again(served: HubServer) -> None:
    local_file(ADDRESS)
    served.add("owner/name", {"README.md": b"text"})
    local_file(ADDRESS)
    assert served.downloads(NAME) == 1


def test_a_connection_that_is_cut_is_resumed(served: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    served.cut(100_000, 100_000)
    assert local_file(ADDRESS).read_bytes() == CONTENT
    ranges = [each.range for each in served.requests if each.path.startswith("/storage")]
    assert ranges == [None, "bytes=100000-", "bytes=200000-"]
    assert "100%" in capsys.readouterr().err


def interrupt(hub: HubServer) -> Path:
    """Interrupt a download after half of the bytes, and return the incomplete file."""
    hub.cut(HALF, *[0] * transfer.ATTEMPTS)
    with pytest.raises(
        ValueError, match=r"lost after 153,600 of 307,200 bytes .*run the same command again to resume"
    ) as e:
        local_file(ADDRESS)
    assert "\n" not in str(e.value)
    (incomplete,) = blobs(hub)
    assert incomplete.suffix == ".incomplete"
    assert incomplete.stat().st_size == HALF
    return incomplete


def test_an_interrupted_download_is_resumed_by_the_next_call(served: HubServer) -> None:
    interrupt(served)
    served.requests.clear()
    path = local_file(ADDRESS)
    assert path.read_bytes() == CONTENT
    assert [each.range for each in served.requests if each.path.startswith("/storage")] == [f"bytes={HALF}-"]
    assert blobs(served) == [path.resolve()]


def test_a_server_that_does_not_resume_sends_the_file_again(served: HubServer) -> None:
    interrupt(served)
    served.ranges = False
    assert local_file(ADDRESS).read_bytes() == CONTENT


def test_an_incomplete_file_that_is_too_long_is_discarded(served: HubServer) -> None:
    with interrupt(served).open("ab") as file:
        file.write(CONTENT)
    assert local_file(ADDRESS).read_bytes() == CONTENT


def receive_of_unknown_size(hub: HubServer, path: Path, partial: bytes) -> bytes:
    """Continue the download of a file whose size the server does not tell."""
    path.with_name(f"{path.name}.incomplete").write_bytes(partial)
    url = f"{hub.url}/owner/name/resolve/main/{NAME}"
    transfer.receive(Address("owner/name", NAME, "main", ADDRESS), url, sha256(CONTENT).hexdigest(), None, path)
    assert not path.with_name(f"{path.name}.incomplete").exists()
    return path.read_bytes()


@pytest.mark.parametrize(
    ("partial", "ranges"),
    [
        (CONTENT, [f"bytes={len(CONTENT)}-"]),
        (CONTENT[:HALF], [f"bytes={HALF}-"]),
        (bytes(len(CONTENT)), [f"bytes={len(CONTENT)}-", None]),
    ],
    ids=["complete", "half", "damaged"],
)
def test_a_download_of_unknown_size_is_completed(
    partial: bytes, ranges: list[str | None], served: HubServer, tmp_path: Path
) -> None:
    assert receive_of_unknown_size(served, tmp_path / "content", partial) == CONTENT
    assert [each.range for each in served.requests if each.path.startswith("/storage")] == ranges


@pytest.mark.parametrize("prefix", [b"", b"blob %d\0" % len(CONTENT)], ids=["content", "git"])
def test_a_checksum_of_40_digits_is_that_of_the_content_or_of_git(
    prefix: bytes, served: HubServer, tmp_path: Path
) -> None:
    url, etag = f"{served.url}/owner/name/resolve/main/{NAME}", sha1(prefix + CONTENT).hexdigest()
    address = Address("owner/name", NAME, "main", ADDRESS)
    transfer.receive(address, url, etag, len(CONTENT), tmp_path / "content")
    assert (tmp_path / "content").read_bytes() == CONTENT
    served.corrupt = True
    with pytest.raises(ValueError, match="is not that of the hub"):
        transfer.receive(address, url, etag, len(CONTENT), tmp_path / "other")


def test_corrupt_content_is_discarded(served: HubServer) -> None:
    for name in (NAME, "config.json"):
        served.corrupt = True
        with pytest.raises(
            ValueError, match=r"content that was received is not that of the hub \(checksum .*run the sam"
        ):
            local_file(f"hf://owner/name/{name}")
        assert not any(path.name == name for path in served.cache.rglob("*"))
        served.corrupt = False
        local_file(f"hf://owner/name/{name}")
    assert len(blobs(served)) == 2


def test_a_resumed_file_with_a_damaged_beginning_is_discarded(served: HubServer) -> None:
    incomplete = interrupt(served)
    incomplete.write_bytes(bytes(HALF))
    with pytest.raises(ValueError, match="is not that of the hub"):
        local_file(ADDRESS)
    assert blobs(served) == []
    assert local_file(ADDRESS).read_bytes() == CONTENT


def test_a_truncated_file_in_the_cache_is_named_with_the_remedy(served: HubServer) -> None:
    path = local_file(ADDRESS)
    content = path.resolve()
    content.write_bytes(CONTENT[:-1])
    with pytest.raises(ValueError) as error:
        local_file(ADDRESS)
    assert str(error.value) == (
        f"{path} is damaged (it has 307,199 bytes instead of 307,200); remove {content} and run the same command again "
        "to download it again"
    )
    content.unlink()
    assert local_file(ADDRESS).read_bytes() == CONTENT


def test_several_processes_download_a_file_once(served: HubServer) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(local_file(ADDRESS))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len({*found}) == 1
    assert served.downloads(NAME) == 1


def test_a_full_disk_is_found_before_the_download(served: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(
        DiskFullError, match=r"it needs 307,200 bytes, and 1,000 bytes are free in .*; free some space"
    ) as e:
        local_file(ADDRESS)
    assert e.value.errno == errno.ENOSPC
    assert served.downloads(NAME) == 0


@pytest.fixture
def small_files() -> Iterator[None]:
    """Limits files of this process to 100,000 bytes, which acts like a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, before)


@pytest.mark.usefixtures("small_files")
def test_a_disk_that_is_full_during_the_download_leaves_no_file(served: HubServer) -> None:
    with pytest.raises(DiskFullError, match=r"was not written: .*it needs 307,200 bytes"):
        local_file(ADDRESS)
    assert [path.suffix for path in blobs(served)] == [".incomplete"]


def test_a_cache_that_cannot_be_written_is_named(served: HubServer) -> None:
    served.cache.parent.mkdir()
    served.cache.touch()
    with pytest.raises(ValueError, match=rf"{served.cache}.* in the cache cannot be written .*set HF_HOME to a folder"):
        local_file(ADDRESS)


def test_a_local_path_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/user")
    assert local_file("~/a.pt") == Path("/home/user/a.pt")
    assert local_file(Path("runs/nowhere.pt")) == Path("runs/nowhere.pt")


def test_a_published_name_is_the_file_of_its_repository(hub: HubServer) -> None:
    hub.add_published("c2i_B_256", b"B")
    path = local_file("c2i_B_256")
    assert (path.name, path.read_bytes()) == ("c2i_B_256.pt", b"B")
    assert "models--FoundationVision--LlamaGen" in path.parts
