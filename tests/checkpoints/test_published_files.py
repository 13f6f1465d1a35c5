"""Files in the layout of every published model load strictly, and are exported unchanged."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_modules import ARGenModule
from llamagen.checkpoints.export import export
from llamagen.checkpoints.weights import load_weights, read_weights
from llamagen.models.gpt import GPTConfig
from tests.golden import published_state_dict
from tests.models.test_published_shapes import GPT_SIZES

SMALL = [name for name in GPT_SIZES if name.startswith("GPT-B")]
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


@pytest.mark.parametrize("name", SMALL)
def test_small_published_models_are_loaded_and_exported_unchanged(name: str, tmp_path: Path) -> None:
    path = published_file(name, tmp_path)
    module = ARGenModule(GPTConfig(**GPT_SIZES[name]), init_from=path)
    checkpoint: dict[str, object] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "run.ckpt")
    for out in (tmp_path / "out.pt", tmp_path / "out.safetensors"):
        export(tmp_path / "run.ckpt", out)
        found = torch.load(out, weights_only=True)["model"] if out.suffix == ".pt" else read_weights(out).state
        _, entries = published_state_dict(name)
        assert {key: (str(value.dtype).removeprefix("torch."), tuple(value.shape)) for key, value in found.items()} == {
            key: (dtype, tuple(shape)) for key, (dtype, shape) in entries.items()
        }
        for place, key in enumerate(entries):
            assert (found[key] == place + 1).all(), key
