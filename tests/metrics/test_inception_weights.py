"""The network with the published weights of Inception; tests of reading them are in tests/test_published_weights.py."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llamagen.metrics import Inception, inception
from llamagen.metrics.inception import WEIGHTS, fetch_inception, inception_shapes, read_inception

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    """Weights that are small in a file: each entry repeats one number."""
    shapes = enumerate(inception_shapes().items())
    return {name: torch.tensor(float(index)).expand(shape) for index, (name, shape) in shapes}


def same(loaded: State, state: State) -> bool:
    return loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)


def test_the_network_has_the_weights_of_the_file_and_stays_frozen(tmp_path: Path, state: State) -> None:
    torch.save(state, tmp_path / "inception.pth")
    generator = torch.get_rng_state()
    net = Inception(tmp_path / "inception.pth")
    assert torch.equal(torch.get_rng_state(), generator)
    assert same(dict(net.state_dict()), state)
    assert not any(parameter.requires_grad for parameter in net.parameters())
    assert not any(module.training for module in net.train().modules())


def test_the_network_downloads_its_weights(tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    published = tmp_path / WEIGHTS.name
    torch.save(state, published)
    sha256 = hashlib.sha256(published.read_bytes()).hexdigest()
    monkeypatch.setattr(inception, "WEIGHTS", replace(WEIGHTS, address=published.as_uri(), sha256=sha256))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    assert same(dict(Inception().state_dict()), state)
    assert fetch_inception() == tmp_path / "torch/hub/checkpoints" / WEIGHTS.name


@pytest.mark.parametrize("name", [WEIGHTS.name, *WEIGHTS.other_names])
@pytest.mark.parametrize("given", [False, True])
def test_rejects_a_file_of_the_published_name_with_another_checksum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: State, name: str, given: bool
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    file = tmp_path / "torch/hub/checkpoints" / name
    file.parent.mkdir(parents=True)
    torch.save(state | {"fc.bias": torch.zeros(1008)}, file)
    with pytest.raises(ValueError, match=r"has the SHA-256 .*, not .* as published; remove it") as error:
        read_inception(file if given else None)
    assert str(file) in str(error.value)
    assert WEIGHTS.sha256 in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["absent.pth", "folder"])
def test_the_network_reports_a_path_that_is_not_a_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=rf"weights .*{name} is not a file; .*features\.init_args\.weights") as error:
        Inception(tmp_path / name)
    assert WEIGHTS.address in str(error.value)
