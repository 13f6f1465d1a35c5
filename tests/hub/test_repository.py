"""Repositories of exported models: downloaded to a folder, complete, and uploaded in one commit."""

from pathlib import Path

import pytest

from llamagen.hub.download import local_file, local_repository
from llamagen.hub.upload import upload_folder
from tests.hub_server import HubServer

FILES: dict[str, bytes] = {
    "config.json": b"{}",
    "model.safetensors": b"model",
    "tokenizer.safetensors": b"tokenizer",
    "classes.txt": b"cat",
}
OTHERS: dict[str, bytes] = {"README.md": b"card", "samples/0.png": b"png", "samples/index.json": b"[]"}


@pytest.fixture
def served(hub: HubServer) -> HubServer:
    hub.add("me/model", FILES | OTHERS)
    return hub


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("source", ["me/model", "hf://me/model", "hf://me/model@main"])
def test_the_files_of_an_exported_model_are_downloaded(source: str, served: HubServer) -> None:
    assert content(local_repository(source)) == FILES


def test_only_new_files_of_another_commit_are_downloaded(served: HubServer) -> None:
    old = local_repository("me/model")
    served.requests.clear()
    served.add("me/model", {"model.safetensors": b"trained longer"}, revision="v2")
    new = local_repository("me/model@v2")
    assert content(new) == FILES | {"model.safetensors": b"trained longer"}
    assert content(old) == FILES
    assert (served.downloads("model.safetensors"), served.downloads("tokenizer.safetensors")) == (1, 0)


@pytest.mark.parametrize("fault", ["no network", "offline"])
def test_a_cached_repository_needs_no_network(fault: str, served: HubServer) -> None:
    folder = local_repository("me/model")
    if fault == "offline":
        served.offline()
    else:
        served.stop()
    assert local_repository("me/model") == folder


def test_a_commit_in_the_cache_takes_no_request(served: HubServer) -> None:
    (commit,) = served.repositories["me/model"].commits
    folder = local_repository(f"me/model@{commit}")
    served.requests.clear()
    assert local_repository(f"me/model@{commit}") == folder
    assert served.requests == []
    (folder / "tokenizer.safetensors").unlink()
    assert content(local_repository(f"me/model@{commit}")) == FILES


def test_a_commit_of_which_only_a_file_was_downloaded_is_completed(served: HubServer) -> None:
    (commit,) = served.repositories["me/model"].commits
    local_file(f"hf://me/model/config.json@{commit}")
    assert content(local_repository(f"me/model@{commit}")) == FILES


def test_a_repository_of_which_a_file_is_missing_is_not_used_offline(served: HubServer) -> None:
    folder = local_repository("me/model")
    (folder / "tokenizer.safetensors").unlink()
    served.offline()
    with pytest.raises(ValueError, match=r"^me/model: is not in the cache .*HF_HUB_OFFLINE is set"):
        local_repository("me/model")


def test_an_interrupted_download_is_completed_by_the_next_call(served: HubServer) -> None:
    served.corrupt = True
    with pytest.raises(ValueError, match=r"^me/model: .*: the content that was received is not that of the hub"):
        local_repository("me/model")
    served.corrupt = False
    assert content(local_repository("me/model")) == FILES


def test_another_repository_is_not_taken_for_an_exported_model(served: HubServer) -> None:
    served.add("me/files", {"model.pt": b""})
    with pytest.raises(
        ValueError, match=r"^me/files has no config.json, so .* give one of its files, hf://me/files/FILE"
    ):
        local_repository("me/files")


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    folder = tmp_path / "exported"
    for name, each in (FILES | OTHERS | {".cache/lock": b""}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(each)
    return folder


def test_an_upload_creates_a_repository_with_one_commit(
    hub: HubServer, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_valid")
    assert upload_folder(exported, "hf://me/model") == f"{hub.url}/me/model"
    (commit,) = hub.repositories["me/model"].commits.values()
    assert {name: blob.data() for name, blob in commit.items()} == FILES | OTHERS
    assert content(local_repository("hf://me/model")) == FILES


def test_an_upload_to_an_existing_repository_is_another_commit(
    served: HubServer, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_valid")
    (exported / "model.safetensors").write_bytes(b"new")
    upload_folder(exported, "me/model")
    assert len(served.repositories["me/model"].commits) == 2
    assert content(local_repository("me/model"))["model.safetensors"] == b"new"


def stop(hub: HubServer) -> None:
    hub.stop()


# A token, and parts of the message; the repository is new, or that of another account.
FAILURES: dict[str, tuple[str | None, str]] = {
    "no token": (None, "an upload takes a token with the permission to write; run `hf auth login`, or set HF_TOKEN"),
    "no permission": ("hf_readonly", "the token has no permission to write to me/new; run `hf auth login`"),
    "wrong token": ("hf_wrong", "the hub refuses the token"),
    "token that cannot be sent": ("hf_välid", "the token has characters that no token has; set HF_TOKEN again"),
    "no network": ("hf_valid", "no connection to http://127.0.0.1"),
    "not a hub": ("hf_valid", "does not answer as the hub does; correct HF_ENDPOINT"),
    "offline": ("hf_valid", "HF_HUB_OFFLINE is set; unset it"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failed_upload_is_one_line_with_a_remedy(
    case: str, hub: HubServer, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, part = FAILURES[case]
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    if case == "no network":
        hub.stop()
    if case == "offline":
        hub.offline()
    hub.plain = case == "not a hub"
    with pytest.raises(ValueError) as error:
        upload_folder(exported, "hf://me/new")
    assert str(error.value).startswith("hf://me/new: ")
    assert part in str(error.value)
    assert "\n" not in str(error.value)
    assert hub.repositories == {}


def test_an_upload_of_nothing_is_refused(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_valid")
    with pytest.raises(ValueError, match="has no files to upload; give the folder of an exported model"):
        upload_folder(tmp_path / "nowhere", "hf://me/new")
