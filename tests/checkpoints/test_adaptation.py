"""``init_from`` reads every published layout strictly; another length or other classes need ``init_adapt``."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules import ARGenModule
from llamagen.checkpoints.export import export
from llamagen.models.gpt import GPT, GPTConfig
from tests.datamodules.shard_files import assert_one_line
from tests.lightning_modules.runs import argen_module
from tests.pipeline import GPT_NET, Pipeline
from tests.small_models import assert_same

TABLE = "cls_embedding.embedding_table.weight"


def config(**options: Any) -> GPTConfig:
    return GPTConfig(**{**GPT_NET, **options})


@pytest.fixture
def weights() -> dict[str, Tensor]:
    torch.manual_seed(3)
    gpt = GPT(config())
    torch.nn.init.normal_(gpt.output.weight)
    return gpt.state_dict()


def bare(state: dict[str, Tensor]) -> dict[str, Any]:
    return {**state, "freqs_cis": torch.zeros(3)}


LAYOUTS = {
    "model": lambda state: {"model": state},
    "module": lambda state: {"module": state},
    "state_dict": lambda state: {"state_dict": state},
    "bare, with a rotary table": bare,
    "training checkpoint": lambda state: {"model": {n: v + 1 for n, v in state.items()}, "ema": state, "steps": 5},
    "compiled": lambda state: {"model": {f"_orig_mod.{name}": value for name, value in state.items()}},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_init_from_reads_every_published_layout(tmp_path: Path, weights: dict[str, Tensor], layout: Any) -> None:
    torch.save(layout(weights), tmp_path / "weights.pt")
    module = ARGenModule(config(), init_from=tmp_path / "weights.pt")
    assert_same(module.gpt.state_dict(), weights)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_init_from_reads_exported_files(pipeline: Pipeline, tmp_path: Path, suffix: str) -> None:
    export(pipeline.argen, tmp_path / f"weights.{suffix}")
    module = ARGenModule(config(), init_from=tmp_path / f"weights.{suffix}")
    direct = ARGenModule(config(), init_from=pipeline.argen)
    assert_same(module.gpt.state_dict(), direct.gpt.state_dict())
    raw = ARGenModule(config(), init_from=pipeline.argen, init_averaged=False)
    assert not torch.equal(raw.gpt.output.weight, direct.gpt.output.weight)


def test_rejects_missing_and_unexpected_entries(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    del weights["norm.weight"]
    weights["extra"] = torch.zeros(2)
    torch.save(weights, tmp_path / "weights.pt")
    with pytest.raises(ValueError) as error:
        ARGenModule(config(), init_from=tmp_path / "weights.pt")
    assert_one_line(error, tmp_path, "missing: norm.weight", "unexpected: extra")


def test_other_classes_need_init_adapt(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    torch.save(weights, tmp_path / "weights.pt")
    with pytest.raises(ValueError) as error:
        ARGenModule(config(num_classes=4), init_from=tmp_path / "weights.pt")
    assert_one_line(error, tmp_path, "num_classes is 10, but the model's is 4", "set init_adapt to [num_classes]")
    torch.manual_seed(8)
    fresh = GPT(config(num_classes=4))
    torch.manual_seed(8)
    module = ARGenModule(config(num_classes=4), init_from=tmp_path / "weights.pt", init_adapt=["num_classes"])
    table = module.gpt.state_dict()[TABLE]
    assert torch.equal(table[:4], fresh.state_dict()[TABLE][:4])
    assert torch.equal(table[4], weights[TABLE][10])  # no class
    assert_same(
        {name: value for name, value in module.gpt.state_dict().items() if name != TABLE},
        {name: value for name, value in weights.items() if name != TABLE},
    )


def test_a_longer_sequence_needs_init_adapt_if_the_file_has_a_configuration(pipeline: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        ARGenModule(config(block_size=64), init_from=pipeline.argen)
    assert_one_line(error, "block_size is 16, but the model's is 64", "set init_adapt to [block_size]")
    module = ARGenModule(config(block_size=64), init_from=pipeline.argen, init_adapt=["block_size"])
    same = ARGenModule(config(), init_from=pipeline.argen)
    assert_same(module.gpt.state_dict(), same.gpt.state_dict())
    codes = torch.randint(32, (2, 63))
    assert module.gpt.eval()(codes, torch.tensor([1, 2])).shape == (2, 64, 32)


@pytest.mark.parametrize(
    ("option", "value"), [("n_head", 1), ("rope_base", 500.0), ("rope_condition", "identity"), ("norm_eps", 1e-3)]
)
def test_options_that_change_no_shape_are_compared_with_the_configuration_in_the_file(
    pipeline: Pipeline, option: str, value: Any
) -> None:
    with pytest.raises(ValueError, match=rf"{option} is .*, but the model's is {value}; set {option} to"):
        ARGenModule(config(**{option: value}), init_from=pipeline.argen)


def test_rejects_the_weights_of_a_tokenizer(pipeline: Pipeline) -> None:
    with pytest.raises(ValueError, match=r"weights of a VQGAN, not of a GPT"):
        ARGenModule(config(), init_from=pipeline.tokenizer)


def test_rejects_init_adapt_without_init_from() -> None:
    with pytest.raises(ValueError, match=r"^init_adapt is \['num_classes'\], but init_from is not given"):
        ARGenModule(config(), init_adapt=["num_classes"])
    assert argen_module().gpt is not None
