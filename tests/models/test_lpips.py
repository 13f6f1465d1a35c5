"""LPIPS has the published values, is a fixed function, and gets its weights or says what is missing."""

import hashlib
import socket
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from math import sqrt
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from llamagen.models import lpips
from llamagen.models.lpips import LPIPS, read_vgg16
from tests.golden import golden, normal_input
from tests.small_models import images_for

State = dict[str, Tensor]
PUBLISHED = {
    (0, 64, 3), (2, 64, 64), (5, 128, 64), (7, 128, 128), (10, 256, 128), (12, 256, 256), (14, 256, 256),
    (17, 512, 256), (19, 512, 512), (21, 512, 512), (24, 512, 512), (26, 512, 512), (28, 512, 512),
}  # fmt: skip
"""Index, width and input width of the convolutions in torchvision's VGG16."""


@pytest.fixture(scope="module")
def state() -> State:
    """Features of VGG16, filled by the rule of :mod:`tests.golden` under torchvision's names."""
    filled = {}
    for index, width, previous in sorted(PUBLISHED):
        name = f"features.{index}"
        filled[f"{name}.weight"] = normal_input(f"{name}.weight", (width, previous, 3, 3)) / sqrt(9 * previous)
        filled[f"{name}.bias"] = normal_input(f"{name}.bias", (width,)) * 0.02
    return filled


@pytest.fixture(scope="module")
def model(state: State) -> LPIPS:
    return LPIPS(state)


@pytest.fixture(scope="module")
def classifier() -> State:
    """What else the published file holds, smaller."""
    return {f"classifier.{index}.{kind}": torch.ones(3) for index in (0, 3, 6) for kind in ("weight", "bias")}


def pair(size: int = 32) -> tuple[Tensor, Tensor]:
    x = images_for(2, size, size)
    return x, x.flip(3) * 0.5


def test_distances_are_the_published_ones(model: LPIPS) -> None:
    record = golden("lpips")
    size = record["size"]
    x, y = (normal_input(f"lpips/{name}", (2, 3, size, size)).tanh() for name in "xy")
    distance = model(x, y)
    assert distance.shape == (2,)
    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance, torch.tensor(record["values"]), atol=1e-6, rtol=0)


def test_weights_have_the_names_and_shapes_of_torchvision() -> None:
    found = {name: tuple(shape) for name, shape in LPIPS.vgg16_shapes().items()}
    weights = {f"features.{index}.weight": (width, previous, 3, 3) for index, width, previous in PUBLISHED}
    biases = {f"features.{index}.bias": (width,) for index, width, _ in PUBLISHED}
    assert found == weights | biases


def test_a_picture_is_at_no_distance_from_itself_and_order_does_not_matter(model: LPIPS) -> None:
    x, y = pair()
    assert model(x, x).tolist() == [0.0, 0.0]
    assert (model(x, y) > 1e-3).all()
    torch.testing.assert_close(model(x, y), model(y, x))


def test_each_picture_has_its_own_distance(model: LPIPS) -> None:
    x, y = pair()
    each = torch.cat([model(x[:1], y[:1]), model(x[1:], y[1:])])
    torch.testing.assert_close(model(x, y), each)
    torch.testing.assert_close(model(x, torch.stack([x[0], y[1]])), torch.stack([torch.tensor(0.0), each[1]]))


def test_every_level_takes_part(model: LPIPS) -> None:
    x, y = pair()
    whole = model(x, y)
    parts = torch.zeros(2)
    heads = {name: head for name, head in model.named_buffers() if name.startswith("head")}
    assert len(heads) == 5
    for name, head in heads.items():
        setattr(model, name, torch.zeros_like(head))
        part = whole - model(x, y)
        setattr(model, name, head)
        assert (part > 1e-5).all(), name
        parts += part
    torch.testing.assert_close(parts, whole)


def distance_in_float64(x: Tensor, y: Tensor, state: State, heads: list[Tensor]) -> Tensor:
    """LPIPS written down once more, picture by picture."""
    mean, std = (torch.tensor(v).double().view(3, 1, 1) for v in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
    features = [(each.double() - mean) / std for each in (x, y)]
    total = torch.zeros(len(x), dtype=torch.float64)
    last_of_level = dict(zip((2, 7, 14, 21, 28), heads, strict=True))
    for index, *_ in sorted(PUBLISHED):
        if index in (5, 10, 17, 24):
            features = [F.max_pool2d(each, 2) for each in features]
        weight, bias = (state[f"features.{index}.{kind}"].double() for kind in ("weight", "bias"))
        features = [F.conv2d(each, weight, bias, padding=1).relu() for each in features]
        if index in last_of_level:
            a, b = (each / (each.square().sum(1, keepdim=True).sqrt() + 1e-10) for each in features)
            total = total + ((a - b).square() * last_of_level[index].double()).sum(1).mean((1, 2))
    return total


def test_distance_and_gradient_are_those_of_the_formula_in_float64(model: LPIPS, state: State) -> None:
    pictures = pair(48)
    x, exact = (pictures[0].clone().requires_grad_() for _ in range(2))
    distance = model(x, pictures[1])
    expected = distance_in_float64(exact, pictures[1], state, lpips.read_heads())
    torch.testing.assert_close(distance.double(), expected, atol=1e-7, rtol=1e-4)
    distance.sum().backward()
    expected.sum().backward()
    assert x.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(x.grad, exact.grad, atol=1e-4 * exact.grad.abs().max().item(), rtol=1e-3)


def test_features_that_are_all_zero_leave_the_gradient_finite(state: State) -> None:
    dead = LPIPS({name: torch.zeros_like(value) if name.endswith("bias") else value for name, value in state.items()})
    x = dead.mean.expand(1, 3, 16, 16).clone().requires_grad_()
    with torch.autograd.detect_anomaly(check_nan=True):
        dead(x, images_for(1, 16, 16)).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_only_the_pictures_get_gradients_and_the_target_keeps_no_graph(model: LPIPS) -> None:
    x, y = pair(16)
    x.requires_grad_()
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x, y).sum().backward()
    one_sided = sum(tensor.numel() for tensor in saved)
    saved.clear()
    y.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x, y).sum().backward()
    assert one_sided < 0.75 * sum(tensor.numel() for tensor in saved)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())


def test_a_parent_in_training_mode_leaves_it_in_evaluation_mode(model: LPIPS) -> None:
    parent = nn.ModuleDict({"lpips": model}).train()
    assert parent.training
    assert not any(module.training for module in model.modules())


def test_only_the_convolutions_are_in_low_precision_under_autocast(model: LPIPS) -> None:
    x, y = (each.to(torch.bfloat16) for each in pair())
    whole = model(x.float(), y.float())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x, y)
        # A difference below the precision of bfloat16 in the inputs is not lost before the first convolution.
        assert model(x, x).tolist() == [0.0, 0.0]
    assert mixed.dtype == torch.float32
    assert not torch.equal(mixed, whole)
    torch.testing.assert_close(mixed, whole, atol=0, rtol=0.05)


def test_normalisation_is_float32_and_over_channels() -> None:
    features = torch.tensor([3e-6, 4e-6, 0.0]).view(1, 3, 1, 1).half()
    unit = lpips.normalise(features)
    assert unit.dtype == torch.float32
    assert unit.square().sum().item() == pytest.approx(1.0, abs=1e-3)


def test_the_memory_format_changes_nothing(state: State, model: LPIPS) -> None:
    x, y = pair()
    other = LPIPS(state).to(memory_format=torch.channels_last)
    found = other(x.to(memory_format=torch.channels_last), y.to(memory_format=torch.channels_last))
    torch.testing.assert_close(found, model(x, y))


def test_it_is_one_graph_for_the_compiler(model: LPIPS) -> None:
    x, y = pair(16)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, y), model(x, y))


def test_making_it_draws_no_random_numbers(state: State) -> None:
    before = torch.get_rng_state()
    LPIPS(state)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("shape", "other"), [((1, 3, 15, 16), None), ((1, 3, 16, 15), None), ((2, 3, 16, 16), (1, 3, 16, 16))]
)
def test_pictures_that_are_too_small_or_differ_in_shape_are_refused(
    model: LPIPS, shape: tuple[int, ...], other: tuple[int, ...] | None
) -> None:
    other = other or shape
    with pytest.raises(ValueError) as error:
        model(torch.zeros(shape), torch.zeros(other))
    assert f"at least 16 px, not {shape} and {other}" in str(error.value)
    assert model(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16)).tolist() == [0.0]


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
    assert LPIPS.from_weights(str(tmp_path / name)).features[28].weight.equal(state["features.28.weight"])


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
