"""Weights are read from every usual kind of file, raw or averaged as requested, without any other entries."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from llamagen.checkpoints.contents import build_model, check_fits, describe, load_vqgan
from llamagen.checkpoints.weights import (
    Weights,
    averaged_weights,
    load_weights,
    read_weights,
)
from llamagen.models.discriminator import PatchGAN
from llamagen.models.vqgan import VQGAN, VQGANConfig
from tests.golden import fill
from tests.pipeline import TOKENIZER_NET, Pipeline
from tests.small_models import SMALL_VQGAN, assert_same, small_gpt, small_vqgan

State = dict[str, Tensor]


def scaled(state: State, factor: float) -> State:
    return {name: value * factor for name, value in state.items()}


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: value for name, value in state.items()}


@pytest.fixture(scope="module")
def state() -> State:
    """State dict of a small tokenizer."""
    return small_vqgan().state_dict()


def training_checkpoint(state: State, **changes: Any) -> dict[str, Any]:
    """A published training checkpoint: weights, averages (half the weights), a discriminator and command arguments."""
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    arguments = argparse.Namespace(lr=1e-4, betas=(0.9, 0.95), data={"path": "x"}, inner=argparse.Namespace(a=None))
    return {
        "model": state,
        "ema": scaled(state, 0.5),
        "discriminator": PatchGAN(channels=8, num_layers=1).state_dict(),
        "optimizer": optimizer,
        "optimizer_disc": optimizer,
        "steps": 3,
        "args": arguments,
        **changes,
    }


@pytest.mark.parametrize(
    "layout",
    [
        lambda state: {"model": state},
        lambda state: {"module": state},
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: state,
        lambda state: {"model": prefixed(state, "module.")},
        lambda state: prefixed(state, "_orig_mod."),
        lambda state: {"model": prefixed(state, "module._orig_mod.")},
        lambda state: {"model": prefixed(state, "_orig_mod.module.")},
        # A part that was compiled separately.
        lambda state: {"model": {name.replace("encoder.", "encoder._orig_mod."): each for name, each in state.items()}},
        lambda state: {"model": {**state, "freqs_cis": torch.zeros(3)}},
        lambda state: {"model": prefixed({**state, "freqs_cis": torch.zeros(3)}, "module.")},
    ],
)
@pytest.mark.parametrize("name", ["vq.pt", "vq.pth", "vq.bin"])
def test_all_layouts_give_the_same_weights(
    layout: Callable[[State], Any], name: str, state: State, tmp_path: Path
) -> None:
    torch.save(layout(state), tmp_path / name)
    weights = read_weights(tmp_path / name)
    assert_same(weights.state, state)
    assert (weights.discriminator, weights.config, weights.architecture, weights.averaged) == (None, None, None, False)
    assert weights.source == f"{tmp_path / name}, raw weights (it has no separate EMA weights)"


def test_reads_the_format_before_torch_1_6(state: State, tmp_path: Path) -> None:
    content = training_checkpoint(state)
    torch.save(content, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert_same(read_weights(tmp_path / "old.pt").state, content["ema"])


def test_reads_safetensors_without_metadata(state: State, tmp_path: Path) -> None:
    save_file(state, tmp_path / "vq.safetensors", {"format": "pt"})
    weights = read_weights(tmp_path / "vq.safetensors")
    assert_same(weights.state, state)
    assert (weights.config, weights.architecture) == (None, None)
    assert_same(load_vqgan(tmp_path / "vq.safetensors").state_dict(), state)


def test_keeps_a_prefix_that_not_all_entries_have(state: State, tmp_path: Path) -> None:
    mixed = {**prefixed(state, "module."), "extra": torch.zeros(2)}
    torch.save({"model": mixed}, tmp_path / "vq.pt")
    assert read_weights(tmp_path / "vq.pt").state.keys() == mixed.keys()


def test_drops_only_the_rotary_table(state: State, tmp_path: Path) -> None:
    more = {**state, "layers.0.freqs_cis": torch.zeros(2), "freqs_cis2": torch.zeros(2)}
    torch.save({"model": {**more, "freqs_cis": torch.zeros(2)}}, tmp_path / "vq.pt")
    assert_same(read_weights(tmp_path / "vq.pt").state, more)


@pytest.mark.parametrize(
    ("averaged", "factor", "source"), [(True, 0.5, "vq.pt, EMA weights"), (False, 1.0, "vq.pt, raw weights")]
)
def test_reads_raw_or_averaged_weights_of_a_published_run(
    averaged: bool, factor: float, source: str, state: State, tmp_path: Path
) -> None:
    content = training_checkpoint(state)
    torch.save(content, tmp_path / "vq.pt")
    weights = read_weights(tmp_path / "vq.pt", averaged)
    assert_same(weights.state, scaled(state, factor))
    assert weights.averaged is averaged
    assert weights.source == str(tmp_path / source)
    assert weights.discriminator is not None
    assert_same(weights.discriminator, content["discriminator"])


@pytest.mark.parametrize("changes", [{"ema": None}, {"ema": {}}])
def test_falls_back_to_raw_weights_and_reports_it(changes: dict[str, Any], state: State, tmp_path: Path) -> None:
    torch.save(training_checkpoint(state, **changes), tmp_path / "vq.pt")
    weights = read_weights(tmp_path / "vq.pt", averaged=True)
    assert_same(weights.state, state)
    assert "raw weights" in weights.source
    assert not weights.averaged


@pytest.mark.parametrize("averaged", [True, False])
def test_reads_checkpoints_of_this_project(averaged: bool, pipeline: Pipeline) -> None:
    checkpoint = torch.load(pipeline.tokenizer, weights_only=True)
    raw = {name: value for name, value in checkpoint["state_dict"].items() if name.startswith("vqgan.")}
    averages = averaged_weights(checkpoint)
    assert averages
    weights = read_weights(pipeline.tokenizer, averaged)
    assert_same(prefixed(weights.state, "vqgan."), {**raw, **averages} if averaged else raw)
    assert (weights.architecture, weights.averaged) == ("VQGAN", averaged)
    assert weights.source == f"{pipeline.tokenizer}, {'EMA' if averaged else 'raw'} weights"
    assert weights.config is not None
    assert VQGANConfig(**weights.config) == VQGANConfig(**TOKENIZER_NET)
    assert weights.discriminator is not None
    discriminator = PatchGAN(channels=8, num_layers=1)
    load_weights(discriminator, weights.discriminator, "discriminator")
    assert_same(prefixed(discriminator.state_dict(), "discriminator."), {
        name: value for name, value in checkpoint["state_dict"].items() if name.startswith("discriminator.")
    })  # fmt: skip


def test_reads_a_checkpoint_without_averages(pipeline: Pipeline, tmp_path: Path) -> None:
    checkpoint = torch.load(pipeline.argen, weights_only=True)
    del checkpoint["llamagen"]["ema_names"]
    torch.save(checkpoint, tmp_path / "last.ckpt")
    weights = read_weights(tmp_path / "last.ckpt")
    assert_same(prefixed(weights.state, "gpt."), checkpoint["state_dict"])
    assert (weights.architecture, weights.discriminator, weights.averaged) == ("GPT", None, False)
    assert "raw weights" in weights.source


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.victim}",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("key", ["args", "model"])
def test_never_runs_code_of_a_file(key: str, zipped: bool, state: State, tmp_path: Path) -> None:
    content = training_checkpoint(state, **{key: argparse.Namespace(hook=Hostile(tmp_path / "victim"))})
    torch.save(content, tmp_path / "vq.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"vq\.pt is refused: it needs posix\.system, ") as error:
        read_weights(tmp_path / "vq.pt")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "victim").exists()


def test_rejects_an_unknown_class_by_name(state: State, tmp_path: Path) -> None:
    torch.save(training_checkpoint(state, args=tmp_path), tmp_path / "vq.pt")
    with pytest.raises(ValueError, match=r"is refused: it needs pathlib\.PosixPath, ") as error:
        read_weights(tmp_path / "vq.pt")
    assert "\n" not in str(error.value)


def written(content: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(content, path)


def cut(path: Path) -> None:
    torch.save({"model": {"w": torch.zeros(1000)}}, path)
    path.write_bytes(path.read_bytes()[:2000])


def cut_old(path: Path) -> None:
    torch.save({"model": {"w": torch.zeros(1000)}}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize(
    ("name", "make", "phrase"),
    [
        ("vq.pt", lambda path: None, "vq.pt does not exist; give"),
        ("vq.safetensors", lambda path: None, "vq.safetensors does not exist; give"),
        ("vq.pt", Path.mkdir, "vq.pt is a folder, but not a complete sharded checkpoint"),
        ("vq.pt", cut, "vq.pt cannot be read as a checkpoint (RuntimeError); it is damaged"),
        ("vq.pt", cut_old, "vq.pt cannot be read as a checkpoint (RuntimeError); it is damaged"),
        ("vq.pt", Path.touch, "vq.pt cannot be read as a checkpoint (EOFError)"),
        ("vq.pt", lambda path: path.write_text("text"), "vq.pt cannot be read as a checkpoint"),
        ("vq.safetensors", lambda path: path.write_text("text"), "vq.safetensors cannot be read as safetensors"),
        ("vq.safetensors", cut, "vq.safetensors cannot be read as safetensors"),
        ("vq.pt", written([torch.zeros(2)]), "vq.pt holds a list, not weights"),
        ("vq.pt", written({}), "vq.pt has no weights under model, module, state_dict; it holds nothing"),
        ("vq.pt", written({"steps": 3, "optimizer": {}}), "model, module, state_dict; it holds steps, optimizer; give"),
        ("vq.pt", written({"model": {}}), "vq.pt holds no weights by name"),
        ("vq.pt", written({"model": {3: torch.zeros(2)}}), "vq.pt holds no weights by name"),
        ("vq.pt", written({"w": torch.zeros(2), "v": 3}), "holds weights that are not dense tensors: v"),
        ("vq.pt", written({"model": {"w": torch.zeros(2)}, "discriminator": torch.zeros(2)}), "no weights by name"),
        ("vq.pt", written({"model": {"w": "text"}}), "holds weights that are not dense tensors: w"),
        ("vq.pt", written({"model": {"w": torch.zeros(2).to_sparse()}}), "not dense tensors: w"),
        ("vq.pt", written({"model": {"w": torch.zeros(2, device="meta")}}), "not dense tensors: w"),
        ("vq.pt", written({"llamagen": {}, "state_dict": {}}), "vq.pt is not a complete training checkpoint"),
    ],
)
def test_rejects_files_without_weights_in_one_line(
    name: str, make: Callable[[Path], Any], phrase: str, tmp_path: Path
) -> None:
    make(tmp_path / name)
    with pytest.raises(ValueError) as error:
        read_weights(tmp_path / name)
    assert phrase in str(error.value)
    assert "\n" not in str(error.value)


def test_rejects_a_file_with_averages_only_if_raw_weights_are_requested(state: State, tmp_path: Path) -> None:
    torch.save({"ema": state}, tmp_path / "vq.pt")
    assert_same(read_weights(tmp_path / "vq.pt").state, state)
    with pytest.raises(ValueError, match=r"has no weights under model, module, state_dict; it holds ema"):
        read_weights(tmp_path / "vq.pt", averaged=False)


def test_lists_all_differences_and_changes_nothing(state: State) -> None:
    model = VQGAN(SMALL_VQGAN)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wrong = dict(state)
    del wrong["quantize.codebook_used"], wrong["quant_conv.bias"]
    wrong |= {"layers.0.freqs_cis": torch.zeros(2), "head": torch.zeros(2)}
    wrong["decoder.conv_out.bias"] = torch.zeros(5)
    with pytest.raises(ValueError) as error:
        load_weights(model, wrong, "vq.pt, raw weights")
    assert str(error.value) == (
        "vq.pt, raw weights: they do not fit this VQGAN; missing: quantize.codebook_used, quant_conv.bias; "
        "unexpected: layers.0.freqs_cis, head; shape mismatch: decoder.conv_out.bias is (5,), expected (3,)"
    )
    assert_same(model.state_dict(), before)


def test_a_model_keeps_its_dtype(state: State) -> None:
    model = VQGAN(SMALL_VQGAN).to(torch.bfloat16)
    load_weights(model, state, "vq.pt")
    assert_same(model.state_dict(), {name: value.to(torch.bfloat16) for name, value in state.items()})


def test_loads_integer_buffers() -> None:
    found, wanted = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    wanted(torch.randn(2, 4, 3, 3))
    load_weights(found, wanted.state_dict(), "norm.pt")
    assert_same(found.state_dict(), wanted.state_dict())
    assert found.num_batches_tracked is not None
    assert (found.num_batches_tracked.dtype, found.num_batches_tracked.item()) == (torch.int64, 1)


def test_builds_a_tokenizer_from_its_weights_only(state: State, tmp_path: Path) -> None:
    torch.save({"model": state}, tmp_path / "vq.pt")
    before = torch.get_rng_state()
    vqgan = load_vqgan(tmp_path / "vq.pt")
    assert torch.equal(torch.get_rng_state(), before)
    assert vqgan.config == SMALL_VQGAN
    assert_same(vqgan.state_dict(), state)
    assert not vqgan.training
    assert not any(parameter.requires_grad for parameter in vqgan.parameters())


def test_load_vqgan_rejects_a_gpt(pipeline: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"last\.ckpt holds a GPT, not a VQGAN; give the weights of a tokenizer"):
        load_vqgan(pipeline.argen)
    torch.save({"model": small_gpt().state_dict()}, tmp_path / "gpt.pt")
    with pytest.raises(ValueError, match=r"gpt\.pt, raw weights .*: not the weights of a VQGAN"):
        load_vqgan(tmp_path / "gpt.pt")


@pytest.mark.parametrize(
    ("entry", "phrase"),
    [
        ({"architecture": "VQGAN", "config": {"channel": 3}}, "the configuration in the file is invalid"),
        ({"architecture": "GPT", "config": None}, "the configuration in the file is invalid"),
        ({"architecture": "LPIPS", "config": {}}, "holds a LPIPS, which this version does not know"),
    ],
)
def test_rejects_a_model_that_cannot_be_built(entry: dict[str, Any], phrase: str, state: State) -> None:
    with pytest.raises(ValueError, match=phrase) as error:
        build_model(Weights(state, None, source="run.ckpt, raw weights", **entry))
    assert str(error.value).startswith("run.ckpt, raw weights: ")


def test_rejects_a_checkpoint_of_another_shape_with_all_differences() -> None:
    other = fill(VQGAN(VQGANConfig(**{**vars(SMALL_VQGAN), "codebook_dim": 6})))
    checkpoint = {"llamagen": describe(other, "vqgan."), "state_dict": prefixed(other.state_dict(), "vqgan.")}
    with pytest.raises(ValueError, match=r"VQGAN has another shape: .*; use the configuration") as error:
        check_fits(checkpoint, small_vqgan())
    for name in ("quantize.embedding.weight", "quant_conv.weight", "quant_conv.bias", "post_quant_conv.weight"):
        assert f"{name} is " in str(error.value)
    check_fits(checkpoint, other)
    with pytest.raises(ValueError, match="holds a VQGAN, but a GPT is expected"):
        check_fits(checkpoint, small_gpt())


@pytest.mark.parametrize("option", [{"rope_condition": "identity"}, {"block_size": 64}, {"n_head": 1}])
def test_rejects_a_checkpoint_with_another_option_that_changes_the_function(option: dict[str, Any]) -> None:
    other = small_gpt(**option)
    checkpoint = {"llamagen": describe(other, "gpt."), "state_dict": prefixed(other.state_dict(), "gpt.")}
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=f"the checkpoint's {name} is {value}, but the model's is .*; set {name} to"):
        check_fits(checkpoint, small_gpt())
    check_fits(checkpoint, other)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_rejects_weights_that_are_not_floating_point(dtype: torch.dtype, state: State) -> None:
    name = "encoder.conv_in.weight"
    with pytest.raises(ValueError, match=f"not floating-point: {name} .{str(dtype)[6:]}"):
        load_weights(small_vqgan(), {**state, name: state[name].to(dtype)}, "these")


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), torch.float32), (1e5, torch.float16)])
def test_rejects_weights_that_are_not_finite_in_the_dtype_of_the_model(
    value: float, dtype: torch.dtype, state: State
) -> None:
    model, name = VQGAN(SMALL_VQGAN).to(dtype), "encoder.conv_in.weight"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"^vq.pt: a weight is not finite in {str(dtype)[6:]} .*: {name}; ") as error:
        load_weights(model, {**state, name: torch.full_like(state[name], value)}, "vq.pt")
    assert "\n" not in str(error.value)
    assert_same(model.state_dict(), before)


def test_rejects_a_manipulated_entry_in_one_line(pipeline: Pipeline, tmp_path: Path) -> None:
    for changes, phrase in (
        ({"prefix": 3}, "not a complete training checkpoint"),
        ({"ema_names": ["x"]}, "names 1 averages but holds more"),
    ):
        checkpoint = torch.load(pipeline.tokenizer, weights_only=True)
        checkpoint["llamagen"] |= changes
        torch.save(checkpoint, tmp_path / "crafted.ckpt")
        with pytest.raises(ValueError, match=phrase):
            read_weights(tmp_path / "crafted.ckpt")
