"""Inception loads its weights, or says what is missing and where to get it."""

import hashlib
import socket
from http.client import IncompleteRead
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.hub
from safetensors.torch import save_file
from torch import Tensor

from llamagen.metrics import Inception, inception
from llamagen.metrics.inception import FILE, OTHER_NAME, fetch_inception, inception_shapes, read_inception

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    """Weights whose tensors are expanded scalars, so that their files are small."""
    return {
        name: torch.tensor(float(index)).expand(shape) for index, (name, shape) in enumerate(inception_shapes().items())
    }


def same(found: State, state: State) -> bool:
    return found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


def test_reads_weights_from_a_file_of_any_name(tmp_path: Path, state: State) -> None:
    torch.save(state, tmp_path / "new.pth")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same(read_inception(tmp_path / "new.pth"), state)
    assert same(read_inception(str(tmp_path / "old.pth")), state)


def test_reads_weights_from_safetensors(tmp_path: Path, state: State) -> None:
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "inception.safetensors")
    assert same(read_inception(tmp_path / "inception.safetensors"), state)


def test_loads_the_weights_and_stays_frozen(tmp_path: Path, state: State) -> None:
    torch.save(state, tmp_path / "inception.pth")
    generator = torch.get_rng_state()
    net = Inception(tmp_path / "inception.pth")
    assert torch.equal(torch.get_rng_state(), generator)
    assert same(dict(net.state_dict()), state)
    assert not any(parameter.requires_grad for parameter in net.parameters())
    assert not any(module.training for module in net.train().modules())


def test_converts_half_precision_weights_to_float32(tmp_path: Path, state: State) -> None:
    torch.save({name: value.half() for name, value in state.items()}, tmp_path / "half.pth")
    assert {value.dtype for value in read_inception(tmp_path / "half.pth").values()} == {torch.float32}


def test_ignores_step_counters(tmp_path: Path, state: State) -> None:
    steps = {
        name.replace("running_mean", "num_batches_tracked"): torch.tensor(7)
        for name in state
        if name.endswith("running_mean")
    }
    assert len(steps) == 94
    torch.save(state | steps, tmp_path / "inception.pth")
    assert same(read_inception(tmp_path / "inception.pth"), state)


def test_lists_differences_in_one_line(tmp_path: Path, state: State) -> None:
    wrong = state | {"AuxLogits.fc.bias": torch.ones(1), "fc.weight": torch.ones(1000, 2048)}
    del wrong["Mixed_6d.branch7x7dbl_4.bn.running_var"]
    torch.save(wrong, tmp_path / "torchvision.pth")
    with pytest.raises(ValueError) as error:
        read_inception(tmp_path / "torchvision.pth")
    text = str(error.value)
    assert "\n" not in text
    assert f"{tmp_path / 'torchvision.pth'} is not Inception of 2015-12-05: " in text
    for part in (
        "Mixed_6d.branch7x7dbl_4.bn.running_var is missing",
        "AuxLogits.fc.bias is unexpected",
        "fc.weight is (1000, 2048), not (1008, 2048)",
        inception.ADDRESS,
    ):
        assert part in text


def test_limits_the_list_of_differences(tmp_path: Path) -> None:
    torch.save({f"layer{index}.weight": torch.ones(1) for index in range(300)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"is missing; .*; 752 more; get https://") as error:
        read_inception(tmp_path / "other.pth")
    assert str(error.value).count(" is missing") == 20


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "truncated", [1, 2], {"fc.bias": "text"}])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_names_a_damaged_file(tmp_path: Path, state: State, content: Any, suffix: str) -> None:
    path = tmp_path / f"inception.{suffix}"
    if content == "truncated":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:50_000])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError) as error:
        read_inception(path)
    assert f"{path} cannot be read as Inception" in str(error.value)
    assert inception.ADDRESS in str(error.value)
    assert "\n" not in str(error.value)


def test_rejects_a_file_that_runs_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"fc.bias": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="cannot be read as Inception"):
        read_inception(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("read", [fetch_inception, read_inception, Inception])
@pytest.mark.parametrize("name", ["absent.pth", "folder"])
def test_names_the_option_of_a_path_that_is_not_a_file(tmp_path: Path, read: Any, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=rf"weights .*{name} is not a file; .*features\.init_args\.weights") as error:
        read(tmp_path / name)
    assert inception.ADDRESS in str(error.value)


class Mirror:
    """The published file at a local address, and an empty cache."""

    def __init__(self, folder: Path, state: State, patch: pytest.MonkeyPatch) -> None:
        self.cache, self.published, self._patch = folder / "torch" / "hub" / "checkpoints", folder / FILE, patch
        torch.save(state, self.published)
        patch.setenv("TORCH_HOME", str(folder / "torch"))
        patch.setattr(inception, "CHECKSUM", hashlib.sha256(self.published.read_bytes()).hexdigest())
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            patch.delenv(name, raising=False)
            patch.delenv(name.upper(), raising=False)
        self.move(self.published.as_uri())

    def move(self, address: str) -> None:
        """Change the expected address."""
        self.address = address
        self._patch.setattr(inception, "ADDRESS", address)

    def cached(self) -> list[str]:
        """Names of the files in the cache."""
        return sorted(path.name for path in self.cache.iterdir()) if self.cache.is_dir() else []


@pytest.fixture
def mirror(tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch) -> Mirror:
    return Mirror(tmp_path, state, monkeypatch)


def refusal(mirror: Mirror) -> str:
    """The error of a download; checks that it has one line and leaves no files."""
    with pytest.raises(ValueError) as error:
        Inception()
    text = str(error.value)
    for part in (FILE, mirror.address, str(mirror.cache), "Inception(weights=…)", "features.init_args.weights"):
        assert part in text
    assert "\n" not in text
    assert mirror.cached() == []
    return text


def test_downloads_the_file_once(mirror: Mirror, state: State, capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch_inception() == mirror.cache / FILE
    assert "100%" in capsys.readouterr().err
    mirror.published.unlink()
    assert same(read_inception(), state)
    assert mirror.cached() == [FILE]


@pytest.mark.parametrize("name", [FILE, OTHER_NAME])
def test_looks_in_the_cache_for_both_names(mirror: Mirror, state: State, name: str) -> None:
    mirror.cache.mkdir(parents=True)
    mirror.published.rename(mirror.cache / name)
    assert fetch_inception() == mirror.cache / name
    assert same(read_inception(None), state)
    assert mirror.cached() == [name]


@pytest.mark.parametrize("name", [FILE, OTHER_NAME])
@pytest.mark.parametrize("given", [False, True])
def test_rejects_another_checksum_under_the_published_name(
    mirror: Mirror, state: State, name: str, given: bool
) -> None:
    mirror.cache.mkdir(parents=True)
    torch.save(state | {"fc.bias": torch.zeros(1008)}, mirror.cache / name)
    with pytest.raises(ValueError, match=r"has the SHA-256 .*, not .* as published; remove it") as error:
        read_inception(mirror.cache / name if given else None)
    assert str(mirror.cache / name) in str(error.value)
    assert inception.CHECKSUM in str(error.value)
    assert "\n" not in str(error.value)


def test_discards_a_download_with_another_checksum(mirror: Mirror) -> None:
    mirror.published.write_bytes(mirror.published.read_bytes() + b"changed on the way")
    assert "invalid hash value" in refusal(mirror)


@pytest.mark.parametrize("failure", [ConnectionResetError("reset by peer"), IncompleteRead(b"1234", 99)])
def test_an_interrupted_download_leaves_nothing(
    mirror: Mirror, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    urlopen = torch.hub.urlopen

    def breaking(request: Any) -> Any:
        response = urlopen(request)
        chunks = [response.read(1000)]

        def read(_: int) -> Any:
            if chunks:
                return chunks.pop()
            raise failure

        monkeypatch.setattr(response, "read", read)
        return response

    monkeypatch.setattr(torch.hub, "urlopen", breaking)
    assert str(failure) in refusal(mirror)


def test_reports_a_file_missing_at_the_address(mirror: Mirror) -> None:
    mirror.published.unlink()
    assert "No such file" in refusal(mirror)


def test_says_what_to_do_without_a_network(mirror: Mirror) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        mirror.move(f"http://127.0.0.1:{unused.getsockname()[1]}/{FILE}")
        assert "refused" in refusal(mirror)


def test_reports_a_cache_that_cannot_be_written(mirror: Mirror) -> None:
    mirror.cache.parent.parent.mkdir()
    mirror.cache.parent.write_text("a file where the folder should be")
    assert "Not a directory" in refusal(mirror) or "exists" in refusal(mirror)


def test_the_address_holds_the_start_of_the_checksum() -> None:
    assert inception.ADDRESS == (
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
    )
    assert inception.CHECKSUM == "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
    assert OTHER_NAME == "pt_inception-2015-12-05-6726825d.pth"
