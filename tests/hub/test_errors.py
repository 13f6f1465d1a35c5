"""Each error of the hub is one line that names the address and says what to do, at once."""

import os
import re
from collections.abc import Callable

import pytest

from llamagen.hub import transfer
from llamagen.hub.download import local_file, local_repository
from tests.hub_server import HubServer

ADDRESS = "hf://owner/name/model.pt"


@pytest.fixture
def served(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    def refuse(seconds: float) -> None:
        raise AssertionError(f"slept for {seconds} seconds")

    monkeypatch.setattr("time.sleep", refuse)
    hub.add("owner/name", {"model.pt": b"weights", "config.json": b"{}", "tokenizer.pt": b"weights"})
    return hub


def gate(hub: HubServer) -> None:
    hub.gated = {"owner/name"}


def take_down(hub: HubServer) -> None:
    hub.down = True


def answer_as_another_site(hub: HubServer) -> None:
    hub.plain = True


def move(hub: HubServer) -> None:
    os.environ["HF_ENDPOINT"] = "http://127.0.0.1:notaport"  # the fixture restores it


# By address: a fault of the server, a token, and parts of the message.
CASES: dict[str, tuple[str, Callable[[HubServer], None] | None, str | None, tuple[str, ...]]] = {
    "repository": (
        "hf://owner/nowhere/model.pt",
        None,
        None,
        ("/owner/nowhere does not exist, or is private", "HF_TOKEN"),
    ),
    "repository, with a token": ("hf://owner/nowhere/model.pt", None, "hf_valid", ("does not exist, or is private",)),
    "file": ("hf://owner/name/modell.pt", None, None, ("has no file modell.pt at main; it has model.pt",)),
    "revision": (
        f"{ADDRESS}@v9",
        None,
        None,
        ("owner/name has no revision v9; give a branch", "/owner/name/commits/main"),
    ),
    "gated": (ADDRESS, gate, None, ("owner/name is gated; accept its terms on http", "`hf auth login`", "HF_TOKEN")),
    "gated, without access": (ADDRESS, gate, "hf_readonly", ("owner/name is gated; accept its terms on http",)),
    "wrong token": (ADDRESS, None, "hf_wrong", ("the hub refuses the token", "`hf auth login`", "unset it")),
    "no network": (
        ADDRESS,
        HubServer.stop,
        None,
        ("not in the cache, and there is no connection to http", "HF_ENDPOINT"),
    ),
    "down": (ADDRESS, take_down, None, ("answers with status 503; try again later",)),
    "offline": (ADDRESS, lambda hub: hub.offline(), None, ("is not in the cache", "HF_HUB_OFFLINE is set; unset it")),
    "not a hub": (ADDRESS, answer_as_another_site, None, ("does not answer as the hub does; correct HF_ENDPOINT",)),
    "invalid name": ("hf://a--b/c/model.pt", None, None, ("a--b/c cannot be the name of a repository; correct it",)),
    "not a URL": (ADDRESS, move, None, ("HF_ENDPOINT is http://127.0.0.1:notaport, which is not a URL", "unset it")),
    "letter of another alphabet in the token": (ADDRESS, None, "hf_välid", ("the token has characters that no token",)),
    "control character in the token": (ADDRESS, None, "hf_va\x0blid", ("the token has characters that no token",)),
}


@pytest.mark.parametrize("case", CASES)
def test_an_error_of_the_hub_is_one_line_with_a_remedy(
    case: str, served: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, break_it, token, parts = CASES[case]
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    if break_it is not None:
        break_it(served)
    with pytest.raises(ValueError) as error:
        local_file(address)
    message = str(error.value)
    assert message.startswith(f"{address}: ")
    assert "\n" not in message
    for part in parts:
        assert part in message
    assert token is None or token not in message
    assert not list(served.cache.rglob("*.pt"))


@pytest.mark.parametrize("case", [name for name in CASES if name != "file"])
def test_an_error_of_a_repository_is_one_line_with_a_remedy(
    case: str, served: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, break_it, token, parts = CASES[case]
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    if break_it is not None:
        break_it(served)
    source = re.sub(r"/modell?\.pt", "", address)
    with pytest.raises(ValueError) as error:
        local_repository(source)
    message = str(error.value)
    assert message.startswith(f"{source}: ")
    assert "\n" not in message
    assert any(part in message for part in parts)
    assert token is None or token not in message


PAGES = [b"<html>log in</html>", "<html>é</html>".encode("latin-1"), b"{}", b"[1]", b'{"id": "owner/name"}']


@pytest.mark.parametrize("page", PAGES)
def test_an_answer_of_another_site_is_one_line_with_a_remedy(page: bytes, served: HubServer) -> None:
    served.plain, served.page = True, page
    with pytest.raises(ValueError) as error:
        local_repository("owner/name")
    assert str(error.value) == (
        f"owner/name: {served.url} does not answer as the hub does; correct HF_ENDPOINT, or check the proxy"
    )


def test_a_token_opens_a_gated_repository_and_stays_with_the_hub(
    served: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate(served)
    monkeypatch.setenv("HF_TOKEN", "hf_valid")
    assert local_file(ADDRESS).read_bytes() == b"weights"
    tokens = {each.token for each in served.requests if each.path.startswith("/storage")}
    assert tokens == {None}


def test_a_server_that_sends_nothing_is_given_up(served: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer.time, "sleep", lambda seconds: None)
    served.cut(*[0] * 10)
    with pytest.raises(ValueError, match=r"the connection was lost after 0 of 7 bytes .*run the same command again"):
        local_file(ADDRESS)
    assert served.downloads("model.pt") == transfer.ATTEMPTS
