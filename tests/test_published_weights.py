"""Weights of LPIPS and Inception are found, downloaded, verified and read, or the error says what to do."""

import hashlib
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from http.client import IncompleteRead
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.hub
from safetensors.torch import save_file
from torch import Tensor

from llamagen.metrics import inception
from llamagen.models import lpips
from llamagen.models.lpips import LPIPS
from llamagen.published_weights import PublishedWeights
from tests.hub_server import HubServer

State = dict[str, Tensor]


@dataclass(frozen=True)
class Network:
    """A network with published weights.

    Attributes:
        module: module of the network.
        constant: name of its :class:`PublishedWeights` in the module.
        shapes: names and shapes of its weights.
        read: reads a file of weights; None for the cache.
        extra: entries of the published file that are not read.
        options: phrase of the message that says how to give the path of the file.
    """

    module: ModuleType
    constant: str
    shapes: Callable[[], dict[str, torch.Size]]
    read: Callable[..., State]
    extra: State
    options: str

    @property
    def weights(self) -> PublishedWeights:
        weights = getattr(self.module, self.constant)
        assert isinstance(weights, PublishedWeights)
        return weights

    def state(self) -> State:
        """Weights that are small in a file: each entry repeats one number."""
        shapes = enumerate(self.shapes().items())
        return {name: torch.tensor(float(index)).expand(shape) for index, (name, shape) in shapes}


CLASSIFIER = {f"classifier.{index}.{kind}": torch.ones(3) for index in (0, 3, 6) for kind in ("weight", "bias")}
STEPS = {
    name.replace("running_mean", "num_batches_tracked"): torch.tensor(7)
    for name in inception.inception_shapes()
    if name.endswith("running_mean")
}
NETWORKS = {
    "vgg16": Network(lpips, "VGG16", LPIPS.vgg16_shapes, lpips.read_vgg16, CLASSIFIER, "model.init_args.lpips_weights"),
    "inception": Network(
        *(inception, "WEIGHTS", inception.inception_shapes, inception.read_inception, STEPS),
        "Inception(weights=…), which is features.init_args.weights in a config",
    ),
}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest) -> Network:
    return NETWORKS[request.param]


@pytest.fixture(scope="module")
def state(network: Network) -> State:
    return network.state()


def same(loaded: State, state: State) -> bool:
    return loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)


def save_pth(state: State, path: Path) -> None:
    torch.save(state, path)


def save_legacy(state: State, path: Path) -> None:
    """Save in the format before zip, as torchvision's file is."""
    torch.save(state, path, _use_new_zipfile_serialization=False)


def save_safetensors(state: State, path: Path) -> None:
    save_file({name: value.contiguous() for name, value in state.items()}, path)


@pytest.mark.parametrize(
    ("name", "save"),
    [("new.pth", save_pth), ("legacy.pth", save_legacy), ("weights.safetensors", save_safetensors)],
)
def test_reads_every_format_and_ignores_extra_entries(
    tmp_path: Path, network: Network, state: State, name: str, save: Callable[[State, Path], None]
) -> None:
    save(state | network.extra, tmp_path / name)
    assert same(network.read(tmp_path / name), state)
    assert same(network.read(str(tmp_path / name)), state)


def test_converts_half_precision_to_float32(tmp_path: Path, network: Network, state: State) -> None:
    torch.save({name: value.half() for name, value in state.items()}, tmp_path / "half.pth")
    assert {value.dtype for value in network.read(tmp_path / "half.pth").values()} == {torch.float32}


def test_lists_all_differences_in_one_line(tmp_path: Path, network: Network, state: State) -> None:
    first, *_, last = state
    wrong = {**state, **network.extra, "more.bias": torch.ones(1), first: torch.ones(64, 1, 3)}
    del wrong[last]
    torch.save(wrong, tmp_path / "other.pth")
    with pytest.raises(ValueError) as error:
        network.read(tmp_path / "other.pth")
    assert str(error.value) == (
        f"{tmp_path / 'other.pth'} is not {network.weights.network}: missing: {last}; unexpected: more.bias; shape "
        f"mismatch: {first} is (64, 1, 3), expected {tuple(state[first].shape)}; get {network.weights.address}"
    )


def test_limits_a_long_list_of_differences(tmp_path: Path, network: Network, state: State) -> None:
    torch.save({f"layer{index}.weight": torch.ones(1) for index in range(300)}, tmp_path / "other.pth")
    with pytest.raises(ValueError) as error:
        network.read(tmp_path / "other.pth")
    message = str(error.value)
    assert f"and {len(state) - 20} more; unexpected: layer0.weight" in message
    assert "and 280 more; get https://" in message
    assert message.count("layer") == 20
    assert sum(name in message for name in state) >= 20


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "truncated", [1, 2], {"fc.bias": "text"}])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_reports_a_damaged_file(tmp_path: Path, network: Network, state: State, content: Any, suffix: str) -> None:
    path = tmp_path / f"weights.{suffix}"
    if content == "truncated":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError) as error:
        network.read(path)
    assert f"{path} cannot be read as {network.weights.network}" in str(error.value)
    assert network.weights.address in str(error.value)
    assert "\n" not in str(error.value)


def test_never_runs_code_of_a_file(tmp_path: Path, network: Network) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"fc.bias": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=f"cannot be read as {network.weights.network}"):
        network.read(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["absent.pth", "folder"])
def test_reports_a_path_that_is_not_a_file(tmp_path: Path, network: Network, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError) as error:
        network.read(tmp_path / name)
    assert f"weights {tmp_path / name} is not a file; get {network.weights.address}" in str(error.value)
    assert network.options in str(error.value)


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder and records the requested paths."""

    requested: list[str]

    def do_GET(self) -> None:
        self.requested.append(self.path)
        super().do_GET()

    def log_message(self, *_: Any) -> None:
        pass


class Mirror:
    """A local server with the published file, and an empty cache."""

    def __init__(self, network: Network, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.network, self._patch = network, patch
        self.cache, self.published = root / "torch/hub/checkpoints", root / "served" / network.weights.name
        self.published.parent.mkdir()
        torch.save(network.state() | network.extra, self.published)
        self.requested: list[str] = []
        handler = type("Recording", (Handler,), {"requested": self.requested})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(self.published.parent)))
        Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            patch.delenv(name, raising=False)
            patch.delenv(name.upper(), raising=False)
        patch.setenv("TORCH_HOME", str(root / "torch"))
        self.expect(
            address=f"http://127.0.0.1:{self.server.server_port}/{network.weights.name}",
            sha256=hashlib.sha256(self.published.read_bytes()).hexdigest(),
        )

    def expect(self, **changes: str) -> None:
        """Change the expected address, size and checksum of the published file."""
        weights = replace(self.network.weights, **changes)  # type: ignore[arg-type]
        self._patch.setattr(self.network.module, self.network.constant, weights)

    def cached(self) -> list[str]:
        """Names of the files in the cache."""
        return sorted(path.name for path in self.cache.iterdir()) if self.cache.is_dir() else []

    def error(self) -> str:
        """The error of a download. Checks that it is one line with all details, and that the cache has no files."""
        weights = self.network.weights
        with pytest.raises(ValueError) as error:
            self.network.read()
        message = str(error.value)
        for part in (weights.name, weights.address, str(self.cache), self.network.options, weights.network):
            assert part in message
        assert "could not be downloaded" in message
        assert "\n" not in message
        assert self.cached() == []
        return message


@pytest.fixture
def mirror(network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    mirror = Mirror(network, tmp_path, monkeypatch)
    yield mirror
    mirror.server.shutdown()
    mirror.server.server_close()


def test_downloads_the_file_once(mirror: Mirror, state: State, capsys: pytest.CaptureFixture[str]) -> None:
    assert mirror.network.weights.fetch() == mirror.cache / mirror.published.name
    assert "100%" in capsys.readouterr().err
    mirror.published.unlink()
    for _ in range(2):
        assert same(mirror.network.read(None), state)
    assert mirror.requested == [f"/{mirror.published.name}"]
    assert mirror.cached() == [mirror.published.name]


def test_finds_the_file_in_the_cache_under_all_its_names(mirror: Mirror, state: State) -> None:
    mirror.cache.mkdir(parents=True)
    for name in (mirror.network.weights.name, *mirror.network.weights.other_names):
        (mirror.cache / name).write_bytes(mirror.published.read_bytes())
        assert mirror.network.weights.fetch() == mirror.cache / name
        assert same(mirror.network.read(None), state)
        assert mirror.cached() == [name]
        (mirror.cache / name).unlink()
    assert mirror.requested == []


def test_discards_a_download_with_another_checksum(mirror: Mirror) -> None:
    mirror.published.write_bytes(mirror.published.read_bytes() + b"changed on the way")
    assert "invalid hash value" in mirror.error()


def test_downloads_a_file_whose_checksum_is_not_known(mirror: Mirror) -> None:
    mirror.expect(sha256="")
    assert mirror.network.weights.fetch().read_bytes() == mirror.published.read_bytes()


def test_finds_a_file_of_the_hub(hub: HubServer) -> None:
    hub.add("owner/name", {"weights.pth": b"content"})
    assert lpips.VGG16.fetch("hf://owner/name/weights.pth").read_bytes() == b"content"
    assert hub.downloads("weights.pth") == 1
    with pytest.raises(ValueError, match=r"hf://owner/name/other.pth") as error:
        lpips.VGG16.fetch(Path("hf://owner/name/other.pth"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("failure", [ConnectionResetError("reset by peer"), IncompleteRead(b"1234", 99)])
def test_discards_an_interrupted_download(mirror: Mirror, monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    urlopen = torch.hub.urlopen

    def interrupted(request: Any) -> Any:
        response = urlopen(request)
        chunks = [response.read(1000)]

        def read(_: int) -> Any:
            if chunks:
                return chunks.pop()
            raise failure

        monkeypatch.setattr(response, "read", read)
        return response

    monkeypatch.setattr(torch.hub, "urlopen", interrupted)
    assert str(failure) in mirror.error()


def test_reports_a_file_that_is_missing_on_the_server(mirror: Mirror) -> None:
    mirror.published.unlink()
    assert "404" in mirror.error()


def test_reports_a_refused_connection(mirror: Mirror) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        mirror.expect(address=f"http://127.0.0.1:{unused.getsockname()[1]}/{mirror.published.name}")
        assert "refused" in mirror.error()


def test_reports_a_cache_that_cannot_be_written(mirror: Mirror) -> None:
    mirror.cache.parent.parent.mkdir()
    mirror.cache.parent.write_text("a file where the folder should be")
    message = mirror.error()
    assert "Not a directory" in message or "exists" in message


def test_published_addresses_and_checksums() -> None:
    assert lpips.VGG16.address == "https://download.pytorch.org/models/vgg16-397923af.pth"
    assert lpips.VGG16.sha256 == "397923af"
    assert "torchvision" in lpips.VGG16.network
    assert inception.WEIGHTS.address == (
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
    )
    assert inception.WEIGHTS.sha256 == "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
    assert inception.WEIGHTS.other_names == ("pt_inception-2015-12-05-6726825d.pth",)
    for weights in (lpips.VGG16, inception.WEIGHTS):
        assert weights.address.endswith(f"/{weights.name}")
    assert len(STEPS) == 94
