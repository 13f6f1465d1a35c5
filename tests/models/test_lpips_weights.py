"""LPIPS gets its weights, or says what is missing and where it is to be had."""

import hashlib
import socket
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from llamagen.models import lpips
from llamagen.models.lpips import LPIPS, read_vgg16
from tests.vgg16 import vgg16_state

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    return dict(vgg16_state())


@pytest.fixture(scope="module")
def classifier() -> State:
    """What else the published file holds, smaller."""
    return {f"classifier.{index}.{kind}": torch.ones(3) for index in (0, 3, 6) for kind in ("weight", "bias")}


def save_pth(state: State, path: Path) -> None:
    torch.save(state, path)


def save_legacy(state: State, path: Path) -> None:
    """As torchvision's file is: from before the zip format."""
    torch.save(state, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("name", "save"), [("vgg.pth", save_pth), ("legacy.pth", save_legacy), ("vgg.safetensors", save_file)]
)
def test_weights_are_read_from_every_format_without_the_classifier(
    tmp_path: Path, state: State, classifier: State, name: str, save: Any
) -> None:
    save(state | classifier, tmp_path / name)
    found = read_vgg16(tmp_path / name)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], value) for key, value in state.items())
    assert LPIPS(read_vgg16(str(tmp_path / name))).features[28].weight.equal(state["features.28.weight"])


def test_half_precision_weights_become_float32(tmp_path: Path, state: State) -> None:
    torch.save({name: value.half() for name, value in state.items()}, tmp_path / "half.pth")
    assert {value.dtype for value in read_vgg16(tmp_path / "half.pth").values()} == {torch.float32}


def test_what_differs_in_a_file_is_listed_in_one_line(tmp_path: Path, state: State, classifier: State) -> None:
    wrong = state | classifier | {"features.30.bias": torch.ones(1), "features.0.weight": torch.ones(64, 1, 3, 3)}
    del wrong["features.5.bias"]
    torch.save(wrong, tmp_path / "vgg16.pth")
    with pytest.raises(ValueError) as error:
        read_vgg16(tmp_path / "vgg16.pth")
    text = str(error.value)
    assert "\n" not in text
    assert f"{tmp_path / 'vgg16.pth'} is not torchvision's VGG16" in text
    for part in (
        "features.5.bias is missing",
        "features.30.bias is unexpected",
        "features.0.weight is (64, 1, 3, 3), not (64, 3, 3, 3)",
    ):
        assert part in text
    assert "classifier" not in text


def test_a_list_of_differences_stays_short(tmp_path: Path) -> None:
    torch.save({f"layer{index}.weight": torch.ones(1) for index in range(300)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"features\.0\.weight is missing; .*; 306 more; get https://"):
        read_vgg16(tmp_path / "other.pth")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "truncated", [1, 2], {"features.0.weight": "text"}])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_damaged_file_is_named(tmp_path: Path, state: State, content: Any, suffix: str) -> None:
    path = tmp_path / f"vgg.{suffix}"
    if content == "truncated":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:100_000])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError) as error:
        read_vgg16(path)
    assert str(path) in str(error.value)
    assert "cannot be read as VGG16" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"features.0.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="cannot be read as VGG16"):
        read_vgg16(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_a_path_that_does_not_exist_is_named_with_its_option(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.init_args\.lpips_weights .*absent\.pth does not exist"):
        read_vgg16(tmp_path / "absent.pth")


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder and remembers what was asked for."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *_: Any) -> None:
        pass


class Mirror:
    """A server with the file, and an empty cache to download it into."""

    def __init__(self, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.cache, self._patch = folder, cache / "checkpoints", monkeypatch
        self.asked: list[str] = []
        handler = type("Asked", (Handler,), {"asked": self.asked})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
        Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}/{lpips.VGG16_FILE}"
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv(name.upper(), raising=False)
        monkeypatch.setenv("TORCH_HOME", str(cache.parent))
        monkeypatch.setattr(lpips, "VGG16_ADDRESS", self.address)

    def serve(self, state: State) -> None:
        """Offer this, and expect its checksum."""
        path = self.folder / lpips.VGG16_FILE
        torch.save(state, path)
        self._patch.setattr(lpips, "CHECKSUM", hashlib.sha256(path.read_bytes()).hexdigest()[:8])

    def cached(self) -> list[str]:
        """Names of the files in the cache."""
        return sorted(path.name for path in self.cache.iterdir()) if self.cache.is_dir() else []


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    (tmp_path / "served").mkdir()
    mirror = Mirror(tmp_path / "served", tmp_path / "torch" / "hub", monkeypatch)
    yield mirror
    mirror.server.shutdown()
    mirror.server.server_close()


def refusal(mirror: Mirror) -> str:
    """The error of a download, which has one line, says everything and leaves nothing behind."""
    with pytest.raises(ValueError) as error:
        read_vgg16()
    text = str(error.value)
    for part in (lpips.VGG16_FILE, mirror.address, str(mirror.cache), "model.init_args.lpips_weights", "torchvision"):
        assert part in text
    assert "\n" not in text
    assert mirror.cached() == []
    return text


def test_the_file_is_downloaded_once(mirror: Mirror, state: State, classifier: State) -> None:
    mirror.serve(state | classifier)
    for _ in range(2):
        found = read_vgg16(None)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[key], value) for key, value in state.items())
    assert mirror.asked == [f"/{lpips.VGG16_FILE}"]
    assert mirror.cached() == [lpips.VGG16_FILE]


def test_a_download_with_another_checksum_is_thrown_away(mirror: Mirror) -> None:
    mirror.serve({"other": torch.ones(1)})
    (mirror.folder / lpips.VGG16_FILE).write_bytes(b"changed on the way")
    assert "invalid hash value" in refusal(mirror)


def test_a_file_that_is_not_on_the_server_is_reported(mirror: Mirror) -> None:
    assert "404" in refusal(mirror)


def test_without_a_network_it_says_what_to_do(mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        mirror.address = f"http://127.0.0.1:{unused.getsockname()[1]}/{lpips.VGG16_FILE}"
        monkeypatch.setattr(lpips, "VGG16_ADDRESS", mirror.address)
        assert "refused" in refusal(mirror)


def test_a_cache_that_cannot_be_written_is_reported(mirror: Mirror, state: State) -> None:
    mirror.cache.parent.parent.mkdir()
    mirror.cache.parent.write_text("a file where the folder should be")
    assert "Not a directory" in refusal(mirror) or "exists" in refusal(mirror)


def test_the_published_address_and_checksum_belong_together() -> None:
    assert lpips.VGG16_ADDRESS == "https://download.pytorch.org/models/vgg16-397923af.pth"
    assert lpips.CHECKSUM == "397923af"
