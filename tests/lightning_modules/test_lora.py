"""Fine-tuning with LoRA: the base stays as it is, checkpoints hold what is trained, and loading merges both."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from callbacks import EMA
from lightning_modules import AdamWConfig, ARGenModule, models_on_meta_device
from llamagen.checkpoints.adapters import base_weights
from llamagen.checkpoints.contents import build_model, weights_checksum
from llamagen.checkpoints.export import export
from llamagen.checkpoints.weights import read_weights
from llamagen.models.gpt import GPTConfig
from llamagen.models.lora import LoRAConfig, merged_parameters
from tests.lightning_modules.runs import datamodule_for, evaluator, state_of, train
from tests.pipeline import GPT_NET, Pipeline
from tests.small_models import assert_same

NET = GPTConfig(**GPT_NET)
LORA = LoRAConfig(rank=4, alpha=8.0, dropout=0.1)
STEPS = 11  # an epoch has 8


def lora_module(base: Path, seed: int = 0, net: GPTConfig = NET, **options: Any) -> ARGenModule:
    """A module with adapters and all dropouts, which also trains the class embeddings; a function of the seed."""
    pl.seed_everything(seed, verbose=False)
    given = {"init_adapt": ["num_classes"], "lora": LORA, "init_from": base, **options}
    return ARGenModule(replace(net, drop_path=0.1), AdamWConfig(lr=1e-2), **given)


@pytest.fixture(scope="module")
def base(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of the pipeline's model in a file."""
    file = tmp_path_factory.mktemp("base") / "weights.safetensors"
    export(pipeline.argen, file)
    return file


@pytest.fixture(scope="module")
def tuned(pipeline: Pipeline, base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ARGenModule, Any, Path]:
    """A module after its training, the state of the run, and its folder."""
    folder, module = tmp_path_factory.mktemp("tuned"), lora_module(base)
    trainer = train(module, pipeline, folder, max_steps=STEPS)
    return module, state_of(module, trainer), folder


def test_the_base_is_frozen_and_a_checkpoint_holds_only_what_is_trained(
    base: Path, tuned: tuple[ARGenModule, Any, Path]
) -> None:
    module, _, folder = tuned
    frozen = {name: value for name, value in read_weights(base).state.items() if "embedding_table" not in name}
    state = module.state_dict()
    for name, value in frozen.items():
        layer = name.removesuffix(".weight")
        assert torch.equal(state.get(f"gpt.{name}", state.get(f"gpt.{layer}.base_layer.weight")), value), name
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    fresh = lora_module(base).state_dict()
    assert all(not torch.equal(state[name], fresh[name]) for name in trained)
    checkpoint = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == trained
    assert len(trained) == 2 * 5 * NET.n_layer + 1
    assert set(checkpoint["llamagen"]["ema_names"]) == trained
    assert len(checkpoint["optimizer_states"][0]["state"]) == len(trained)
    entry = checkpoint["llamagen"]["lora"]
    assert (entry["rank"], entry["alpha"], entry["base"]["source"]) == (4, 8.0, str(base))


@pytest.mark.parametrize("stop", [5, pytest.param(8, marks=pytest.mark.slow), pytest.param(9, marks=pytest.mark.slow)])
def test_a_resumed_run_ends_in_the_same_state(
    stop: int, pipeline: Pipeline, base: Path, tuned: tuple[ARGenModule, Any, Path], tmp_path: Path
) -> None:
    train(lora_module(base), pipeline, tmp_path, max_steps=stop)
    resumed = lora_module(base, seed=9)
    last = tmp_path / "checkpoints/last.ckpt"
    trainer = train(resumed, pipeline, tmp_path, ckpt_path=last, max_steps=STEPS)
    assert_same(state_of(resumed, trainer), tuned[1])


@pytest.mark.parametrize("averaged", [True, False])
def test_merged_weights_are_read_like_those_of_other_checkpoints(
    averaged: bool, pipeline: Pipeline, base: Path, tuned: tuple[ARGenModule, Any, Path], tmp_path: Path
) -> None:
    last = tuned[2] / "checkpoints/last.ckpt"
    weights = read_weights(last, averaged)
    module = lora_module(base, seed=3)
    trainer = evaluator(*([EMA(0.9)] if averaged else []), limit_val_batches=1)
    (metrics,) = trainer.validate(
        module, datamodule_for(module, pipeline), ckpt_path=last, verbose=False, weights_only=True
    )
    assert weights_checksum(module.gpt) == weights_checksum(build_model(weights))
    assert weights.averaged is averaged
    whole = ARGenModule(NET, init_from=last, init_averaged=averaged)  # a run may also start from merged weights
    assert_same(whole.gpt.state_dict(), weights.state)
    (merged,) = evaluator(limit_val_batches=1).validate(whole, datamodule_for(whole, pipeline), verbose=False)
    assert merged["val/loss"] == pytest.approx(metrics["val/loss"], abs=1e-5)
    export(last, tmp_path / "merged.safetensors", averaged)
    exported = read_weights(tmp_path / "merged.safetensors")
    assert_same(exported.state, weights.state)
    assert exported.config == weights.config


def test_new_classes_start_at_random_and_no_class_from_the_base(base: Path) -> None:
    module = lora_module(base, net=replace(NET, num_classes=3))
    table = module.gpt.cls_embedding.embedding_table.weight  # type: ignore[union-attr]
    own = read_weights(base).state["cls_embedding.embedding_table.weight"]
    assert torch.equal(table[-1], own[-1])  # type: ignore[index]
    assert not torch.isclose(table[:-1], own[:3]).any()  # type: ignore[index]
    plain = lora_module(base, lora=None)
    assert all(parameter.requires_grad for parameter in plain.parameters())
    fixed = lora_module(base, init_adapt=[])
    assert not fixed.gpt.cls_embedding.embedding_table.weight.requires_grad  # type: ignore[union-attr]


def _move(folder: Path, base: Path) -> None:
    shutil.move(base, folder / "base.safetensors")


def _keep(folder: Path, base: Path) -> None:
    pass


@pytest.mark.parametrize("place", [_keep, _move], ids=["where it was", "in the run's folder"])
def test_the_base_is_found_again(
    place: Callable[[Path, Path], None], base: Path, tuned: tuple[ARGenModule, Any, Path], tmp_path: Path
) -> None:
    run, copy, last = tmp_path / "run", tmp_path / "weights.safetensors", tmp_path / "run/checkpoints/last.ckpt"
    last.parent.mkdir(parents=True)
    shutil.copy(base, copy)
    checkpoint = torch.load(tuned[2] / "checkpoints/last.ckpt", weights_only=True)
    checkpoint["llamagen"]["lora"]["base"] |= {"source": copy.name, "file": None}  # relative to a parent of the run
    torch.save(checkpoint, last)
    place(run, copy)
    wanted = read_weights(tuned[2] / "checkpoints/last.ckpt").state
    assert_same(read_weights(last).state, wanted)


def test_a_base_is_recorded_without_the_working_directory_and_without_links(
    base: Path, tuned: tuple[ARGenModule, Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = base_weights("t2i_XL_stage1_256", False, {})
    assert (published.source, published.file) == ("hf://peizesun/llamagen_t2i/t2i_XL_stage1_256.pt", None)
    last, link = tmp_path / "last.ckpt", tmp_path / "link.safetensors"
    link.symlink_to(base)
    monkeypatch.chdir(tmp_path)
    checkpoint = torch.load(tuned[2] / "checkpoints/last.ckpt", weights_only=True)
    checkpoint["llamagen"]["lora"]["base"] = base_weights(link.name, False, read_weights(base).state)._asdict()
    torch.save(checkpoint, last)
    link.unlink()
    read_weights(last)
    checkpoint["llamagen"]["lora"]["rank"] = 0
    torch.save(checkpoint, last)
    with pytest.raises(ValueError, match=r"last.ckpt: the description of its adapters is damaged \(lora.rank is 0; "):
        read_weights(last)


def test_a_missing_or_another_base_is_an_error_of_one_line(
    pipeline: Pipeline, tuned: tuple[ARGenModule, Any, Path], tmp_path: Path
) -> None:
    last = tmp_path / "last.ckpt"
    checkpoint = torch.load(tuned[2] / "checkpoints/last.ckpt", weights_only=True)
    entry = checkpoint["llamagen"]["lora"]["base"]
    entry["file"] = None
    for source, reason in (("gone/weights.pt", ""), (str(pipeline.argen), f" ({pipeline.argen} has other weights)")):
        entry["source"], entry["averaged"] = source, False
        torch.save(checkpoint, last)
        with pytest.raises(ValueError) as error:
            read_weights(last)
        assert str(error.value) == (
            f"{last} holds LoRA adapters of {source} with checksum {entry['checksum'][:12]}, which was not "
            f"found{reason}; put that file at {tmp_path / 'base'}{Path(source).suffix}"
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": None}, r"the checkpoint holds LoRA adapters; set model.init_args.lora to \{rank: 4, alpha: 8\}"),
        ({"lora": LoRAConfig(rank=2, alpha=8)}, "the checkpoint's adapters have rank 4, but lora.rank is 2; set it to"),
        ({"lora": LoRAConfig(rank=4, alpha=4)}, "adapters have alpha 8, but lora.alpha is 4; set it to 8$"),
        ({"init_adapt": []}, "unexpected: cls_embedding.embedding_table.weight"),
    ],
)
def test_a_checkpoint_of_other_adapters_is_refused(
    options: dict[str, Any], message: str, pipeline: Pipeline, base: Path, tuned: tuple[ARGenModule, Any, Path]
) -> None:
    module = lora_module(base, **options)
    with pytest.raises(ValueError, match=message) as error:
        evaluator().validate(
            module, datamodule_for(module, pipeline), ckpt_path=tuned[2] / "checkpoints/last.ckpt", weights_only=True
        )
    assert "\n" not in str(error.value)


def test_adapters_and_complete_checkpoints_are_not_mixed_up(
    pipeline: Pipeline, base: Path, tuned: tuple[ARGenModule, Any, Path]
) -> None:
    last = tuned[2] / "checkpoints/last.ckpt"
    with pytest.raises(ValueError, match=r"init_from: .* holds LoRA adapters; set lora to null, which merges them, or"):
        lora_module(last)
    with pytest.raises(ValueError, match="lora is given, but init_from is not; give the weights"):
        ARGenModule(NET, lora=LORA)
    module = lora_module(base)
    with pytest.raises(ValueError, match="the checkpoint holds all weights, but lora is set"):
        evaluator().validate(module, datamodule_for(module, pipeline), ckpt_path=pipeline.argen, weights_only=True)
    raw = lora_module(pipeline.argen, init_averaged=False)
    with pytest.raises(ValueError, match=r"adapters belong to the weights of .*, but init_from has others"):
        evaluator().validate(raw, datamodule_for(raw, pipeline), ckpt_path=last, weights_only=True)


def test_a_model_that_is_allocated_later_has_the_same_values(base: Path) -> None:
    one, other = lora_module(base), lora_module(base, seed=1)
    with models_on_meta_device():
        later = lora_module(base)
    later.configure_model()
    assert_same(later.state_dict(), one.state_dict())
    name = "gpt.layers.0.attention.wo.lora_A.default.weight"
    assert not torch.equal(other.state_dict()[name], one.state_dict()[name])
    assert 0.15 < one.state_dict()[name].abs().max() <= 32**-0.5
    assert merged_parameters(one.gpt).keys() == read_weights(base).state.keys()
