"""Files in the layout of every published model load strictly, and are exported unchanged."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_modules import ARGenModule
from llamagen.checkpoints.contents import load_vqgan
from llamagen.checkpoints.export import export
from llamagen.checkpoints.weights import load_weights, read_weights
from llamagen.models.gpt import GPT, GPTConfig
from llamagen.models.vqgan import VQGANConfig
from tests.golden import published_state_dict
from tests.models.test_published_shapes import GPT_SIZES, TOKENIZERS
from tests.small_models import assert_same

BARE = {"GPT-XXL c2i 256", "GPT-3B c2i 256"}


def published_file(name: str, folder: Path) -> Path:
    """A file with the names, shapes and dtypes of a published model. Each entry repeats a single number."""
    _, entries = published_state_dict(name)
    state = {
        key: torch.full((1,), float(place + 1), dtype=getattr(torch, dtype)).expand(shape)
        for place, (key, (dtype, shape)) in enumerate(entries.items())
    }
    path = folder / "published.pt"
    torch.save(state if name in BARE else {"model": state}, path)
    return path


@pytest.mark.parametrize("name", GPT_SIZES)
def test_every_published_model_loads_strictly(name: str, tmp_path: Path) -> None:
    path = published_file(name, tmp_path)
    assert path.stat().st_size < 1 << 20
    with torch.device("meta"):  # differences would be found here, too
        module = ARGenModule(GPTConfig(**GPT_SIZES[name]), init_from=path)
    weights = read_weights(path)
    for changed in ("missing", "unexpected", "shape mismatch"):
        state: dict[str, Tensor] = dict(weights.state)
        last = list(state)[-1]
        if changed == "unexpected":
            state["more"] = state[last]
        elif changed == "missing":
            del state[last]
        else:
            state[last] = state[last][:-1]
        with pytest.raises(ValueError, match=f"{changed}: {'more' if changed == 'unexpected' else last}"):
            load_weights(module.gpt, state, "file")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_published_tokenizer_is_loaded_with_its_configuration(name: str, tmp_path: Path) -> None:
    path = published_file(name, tmp_path)
    vqgan = load_vqgan(path)
    assert vqgan.config == VQGANConfig(channel_multipliers=TOKENIZERS[name])
    assert_same(vqgan.state_dict(), read_weights(path).state)


def assert_exported_unchanged(config: GPTConfig, path: Path, folder: Path) -> None:
    """Assert that exports of a model that was loaded from a file hold the same entries as the file."""
    wanted = read_weights(path).state
    module = ARGenModule(config, init_from=path)
    checkpoint: dict[str, object] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, folder / "run.ckpt")
    for out in (folder / "out.pt", folder / "out.safetensors"):
        export(folder / "run.ckpt", out)
        found = torch.load(out, weights_only=True)["model"] if out.suffix == ".pt" else read_weights(out).state
        assert_same(found, wanted)


def test_published_entries_are_loaded_and_exported_unchanged(tmp_path: Path) -> None:
    _, entries = published_state_dict("GPT-B c2i 256")
    config = GPTConfig(n_layer=12, n_head=12, dim=48, multiple_of=16, vocab_size=20, block_size=16, num_classes=5)
    state = GPT(config).state_dict()
    assert {name: str(value.dtype).removeprefix("torch.") for name, value in state.items()} == {
        name: dtype for name, (dtype, _) in entries.items()
    }
    torch.save({"model": {name: torch.randn_like(state[name]) for name in entries}}, tmp_path / "published.pt")
    assert_exported_unchanged(config, tmp_path / "published.pt", tmp_path)


@pytest.mark.slow
def test_a_published_model_is_loaded_and_exported_unchanged(tmp_path: Path) -> None:
    name = "GPT-B c2i 256"
    assert_exported_unchanged(GPTConfig(**GPT_SIZES[name]), published_file(name, tmp_path), tmp_path)
