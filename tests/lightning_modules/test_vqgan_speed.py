"""Options for speed and memory change neither names nor results."""

from inspect import signature
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lightning_modules import VQGANModule
from llamagen.models.vqgan import VQGANConfig
from tests.lightning_modules.runs import State, assert_moved_alike, train, vqgan_module
from tests.pipeline import TOKENIZER_NET, Pipeline

NET = VQGANConfig(**{**TOKENIZER_NET, "channels": 64})
"""Without dropout, whose random numbers depend on the memory format."""


def trained(pipeline: Pipeline, folder: Path, steps: int = 3, loss: Any = None, **options: Any) -> tuple[State, State]:
    """Weights before and after a training; options are those of module, trainer and data."""
    chosen = {name: options.pop(name) for name in list(options) if name in signature(VQGANModule).parameters}
    module = vqgan_module(options={"net": NET, **chosen}, **{"adversarial_start": 0, **(loss or {})})
    start = {name: value.detach().clone() for name, value in module.state_dict().items()}
    train(module, pipeline, folder, max_steps=steps, **{"batch_size": 16, **options})
    return start, {name: value.detach().clone() for name, value in module.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("adaptive", [False, True])
def test_compilation_changes_neither_names_nor_results(
    adaptive: bool, pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled_parts: list[str] = []

    def compile_fast(part: torch.nn.Module) -> None:
        """All but the generation of machine code, which takes a minute."""
        compiled_parts.append(type(part).__name__)
        part._compiled_call_impl = torch.compile(part._call_impl, backend="aot_eager_decomp_partition")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_fast)
    loss = {"adaptive_weight": adaptive}
    (start, eager), (_, compiled) = (
        trained(pipeline, tmp_path / str(flag), loss=loss, compile=flag, channels_last=False, limit_val_batches=0)
        for flag in (False, True)
    )
    assert compiled_parts == ["Encoder", "Decoder"]
    assert_moved_alike(start, eager, compiled)


def test_the_memory_format_does_not_change_the_result(pipeline: Pipeline, tmp_path: Path) -> None:
    (start, one), (_, other) = (trained(pipeline, tmp_path / str(flag), channels_last=flag) for flag in (False, True))
    assert_moved_alike(start, one, other)


def test_weights_and_images_have_the_memory_format(pipeline: Pipeline, tmp_path: Path) -> None:
    module = vqgan_module(options={"channels_last": True}, adversarial_start=0)
    seen: list[bool] = []

    def look(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.extend(x.is_contiguous(memory_format=torch.channels_last) for x in (*inputs, output))

    for network in (module.vqgan.encoder, module.vqgan.decoder, module.discriminator):
        assert network is not None
        for layer in network.modules():
            if isinstance(layer, torch.nn.Conv2d):
                layer.register_forward_hook(look)
    train(module, pipeline, tmp_path, max_steps=1)
    assert len(seen) > 30
    assert all(seen)
    kernels = [p for p in module.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    assert kernels
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)


def test_activation_checkpointing_saves_memory_and_does_not_change_the_result(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    kept: dict[bool, int] = {}
    results = []
    for flag in (False, True):
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            results.append(trained(pipeline, tmp_path / str(flag), steps=1, activation_checkpointing=flag))
        kept[flag] = sum(sizes)
    (start, one), (_, other) = results
    assert_moved_alike(start, one, other)
    module = vqgan_module(options={"activation_checkpointing": True})
    assert module.vqgan.encoder.checkpoint_activations
    assert module.vqgan.decoder.checkpoint_activations
    assert kept[True] < kept[False]


def test_accumulated_batches_train_like_one_large_batch(pipeline: Pipeline, tmp_path: Path) -> None:
    # Without a discriminator, whose BatchNorm normalises each batch separately.
    loss = {"adversarial_weight": 0.0}
    (start, whole), (_, halves) = (
        trained(pipeline, tmp_path / str(n), loss=loss, batch_size=32 // n, accumulate_grad_batches=n) for n in (1, 2)
    )
    assert_moved_alike(start, whole, halves)


def test_bfloat16_trains_both_networks_in_float32_weights(pipeline: Pipeline, tmp_path: Path) -> None:
    before, after = trained(pipeline, tmp_path / "after", precision="bf16-mixed")
    _, exact = trained(pipeline, tmp_path / "exact")
    for name, value in after.items():
        assert value.dtype == exact[name].dtype
        assert value.isfinite().all()
    moved, wanted = (
        torch.cat([(each[n] - before[n]).flatten() for n in each if each[n].is_floating_point()])
        for each in (after, exact)
    )
    assert torch.cosine_similarity(moved, wanted, dim=0) > 0.8


class Scales(pl.Callback):
    """Records the GradScaler's scale and the largest gradient that reaches the optimizer."""

    def __init__(self) -> None:
        self.scales: list[float] = []
        self.weights: list[float] = []
        self.norms: list[float] = []

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        gradients = [p.grad for p in pl_module.vqgan.parameters() if p.grad is not None]
        if gradients:
            self.norms.append(torch.nn.utils.get_total_norm(gradients).item())

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.scales.append(trainer.precision_plugin.scaler.get_scale())
        self.weights.append(float(trainer.callback_metrics.get("train/adaptive_weight", 1.0)))


@pytest.mark.parametrize("adaptive", [False, True])
def test_float16_skips_steps_that_overflow_and_clips_unscaled_gradients(
    adaptive: bool, pipeline: Pipeline, tmp_path: Path
) -> None:
    watch = Scales()
    module = vqgan_module(adversarial_start=0, adaptive_weight=adaptive)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-4, growth_interval=1000)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    start = {name: value.detach().clone() for name, value in module.state_dict().items()}
    trainer = train(module, pipeline, tmp_path, watch, max_steps=16, plugins=[plugin], gradient_clip_val=0.01)
    assert watch.scales[0] < 2.0**40  # the first step overflowed
    assert watch.scales[-1] == watch.scales[-5]  # and later ones did not
    assert watch.norms[-1] <= 0.0101
    # What was clipped was unscaled: the norm of scaled gradients is that many times larger.
    assert module.trainer.callback_metrics["train/grad_norm_vqgan"] < 1e-3 * watch.scales[-1]
    # An overflow in the adaptive weight is one of the step: it is not taken for a weight of 0 for ever.
    assert min(watch.weights[-5:]) > 0
    for name, value in module.state_dict().items():
        assert value.isfinite().all(), name
    assert not torch.equal(start["vqgan.decoder.conv_in.weight"], module.state_dict()["vqgan.decoder.conv_in.weight"])
    # Steps that were skipped do not count in the optimizer, nor in the average.
    steps = trainer.optimizers[0].state[module.vqgan.quantize.embedding.weight]["step"].item()
    assert 0 < steps < trainer.global_step
