"""Compiled sampling exists during a stage, uses the evaluated weights, and frees its memory."""

import gc
import weakref
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from callbacks import EMA, CompiledSampling, SampleGrid
from datamodules import ClassRequestDataModule
from lightning_modules import ARGenModule
from llamagen.sampling import SamplingConfig, generate
from llamagen.sampling.cpu.decoder import CPUCodeDecoder
from llamagen.sampling.decode_weights import DecodeWeights
from tests.lightning_modules.runs import argen_module, evaluator, train, vqgan_module
from tests.pipeline import SAMPLING, Pipeline


def module_for(pipeline: Pipeline, **net: Any) -> ARGenModule:
    module = argen_module(tokenizer=pipeline.tokenizer, **net)
    module.sampling = SamplingConfig(top_k=9, guidance_scale=2.0)
    return module


class Watch(pl.Callback):
    """Records the sampler in validations, and how much of it is still in memory while training."""

    def __init__(self) -> None:
        self.decoders: list[CPUCodeDecoder] = []
        self.codes: list[bool] = []
        self.alive: list[int] = []
        self.memory: list[weakref.ref[Any]] = []

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        assert pl_module.sampler is not None
        decoder = pl_module.sampler.sampler.decoder
        assert isinstance(decoder, CPUCodeDecoder)
        self.memory += [
            weakref.ref(decoder),
            weakref.ref(decoder.caches.free[0].keys),
            weakref.ref(decoder.step.weights),
        ]
        labels = torch.arange(3)
        _, codes = pl_module.sample_async(labels, labels, seed=4)
        expected = generate(pl_module.gpt, labels, pl_module.sampling, seed=4)
        self.codes.append(torch.equal(codes, expected))

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        gc.collect()
        assert pl_module.sampler is None
        self.alive.append(sum(reference() is not None for reference in self.memory))


def test_validation_samples_by_compiled_steps_and_frees_them_before_training(
    pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    watch = Watch()
    train(
        module_for(pipeline), pipeline, tmp_path, CompiledSampling(True), SampleGrid(classes=2), watch,
        max_steps=6, val_check_interval=2,
    )  # fmt: skip
    assert watch.codes == [True] * 3
    assert len(watch.memory) == 9
    assert watch.alive == [0] * 6
    output = capsys.readouterr().out
    assert output.count("compiling sampling in float32, 64 images at a time") == 3
    assert output.count("compiled sampling is ready after") == 3
    assert len(list((tmp_path / "samples").iterdir())) == 3


@pytest.mark.parametrize("first", [True, False])
def test_compiled_weights_are_the_averages_in_any_order_of_callbacks(
    first: bool, pipeline: Pipeline, tmp_path: Path
) -> None:
    equal: list[bool] = []

    class Compare(pl.Callback):
        def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            copied = pl_module.sampler.sampler.decoder.step.weights
            assert copied.dtype is torch.bfloat16
            averages = DecodeWeights.from_gpt(pl_module.gpt, torch.bfloat16)
            equal.append(torch.equal(copied.layers[1].w2.values, averages.layers[1].w2.values))

    order = [CompiledSampling(True), EMA(0.9)] if first else [EMA(0.9), CompiledSampling(True)]
    module = module_for(pipeline)
    trainer = train(
        module, pipeline, tmp_path, max_steps=3, val_check_interval=3, precision="bf16-mixed",
        callbacks=[*order, Compare()],
    )  # fmt: skip
    assert equal == [True]
    average = trainer.optimizers[0].state[module.gpt.layers[1].feed_forward.w2.weight]["ema"]
    assert not torch.equal(average, module.gpt.layers[1].feed_forward.w2.weight)


def test_auto_compiles_only_large_models(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    module, built = module_for(pipeline), []
    build = ARGenModule.build_sampler
    monkeypatch.setattr(
        ARGenModule, "build_sampler", lambda self, size, compiled=False, int8=False: built.append(compiled)
        or build(self, size, compiled, int8),
    )  # fmt: skip
    requests = ClassRequestDataModule(2, 3, batch_size=5)
    evaluator(CompiledSampling()).predict(module, requests)
    assert True not in built
    evaluator(CompiledSampling(False)).predict(module, requests)
    assert True not in built
    monkeypatch.setattr("llamagen.sampling.automatic.MIN_PARAMETERS", 20_000)
    assert sum(p.numel() for p in module.gpt.parameters()) > 20_000
    evaluator(CompiledSampling()).predict(module, requests)
    assert built[-1] is True


def test_auto_falls_back_if_compilation_fails(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamagen.sampling.automatic.MIN_PARAMETERS", 1)

    def refuse(*_: Any) -> None:
        raise ValueError("no compiler here")

    monkeypatch.setattr("llamagen.sampling.cpu.step.cpu_library", refuse)
    module, requests = module_for(pipeline), ClassRequestDataModule(2, 3, batch_size=5)
    with pytest.warns(UserWarning, match="sampling is not compiled: ValueError: no compiler here"):
        outputs = evaluator(CompiledSampling()).predict(module, requests)
    assert outputs is not None
    assert sum(len(batch["codes"]) for batch in outputs) == 6
    with pytest.raises(ValueError, match="no compiler here"):
        evaluator(CompiledSampling(True)).predict(module, requests)
    assert module.sampler is None


def test_auto_needs_no_tokenizer_without_sampling(pipeline: Pipeline, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("llamagen.sampling.automatic.MIN_PARAMETERS", 1)
    module = argen_module()
    train(module, pipeline, tmp_path, CompiledSampling(), max_steps=2, val_check_interval=2)
    assert module.sampler is None


def sampled(pipeline: Pipeline, batch_size: int, **options: Any) -> np.ndarray:
    """The images of the pipeline's sampling command, by compiled steps."""
    module = argen_module(tokenizer=pipeline.tokenizer)
    module.sampling = SAMPLING
    batches: Any = evaluator(EMA(), CompiledSampling(True), **options).predict(
        module, ClassRequestDataModule(10, 3, batch_size), ckpt_path=pipeline.argen
    )
    return np.concatenate([batch["images"].numpy() for batch in batches])


def test_predict_samples_the_same_images_compiled_or_not(pipeline: Pipeline) -> None:
    with np.load(pipeline.samples / "samples.npz") as eager:
        assert np.array_equal(sampled(pipeline, 7), eager["arr_0"])


def test_predict_samples_with_the_batch_size_of_its_data(pipeline: Pipeline, capsys: Any) -> None:
    evaluator(CompiledSampling(True)).predict(module_for(pipeline), ClassRequestDataModule(2, 3, batch_size=5))
    evaluator(CompiledSampling(True, batch_size=2)).predict(
        module_for(pipeline), ClassRequestDataModule(2, 3, batch_size=5)
    )
    output = capsys.readouterr().out
    assert "float32, 5 images at a time" in output
    assert "float32, 2 images at a time" in output


@pytest.mark.slow
def test_int8_samples_with_rounded_weights(pipeline: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    kinds: list[torch.dtype] = []

    class Record(pl.Callback):
        def on_predict_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            kinds.append(pl_module.sampler.sampler.decoder.step.weights.layers[0].wqkv.values.dtype)

    evaluator(CompiledSampling(True, int8=True), Record()).predict(module_for(pipeline), ClassRequestDataModule(2, 1))
    assert kinds == [torch.int8]
    assert "float32, int8 weights" in capsys.readouterr().out


def test_compiled_images_in_bf16_true_are_the_same_in_any_batch(pipeline: Pipeline) -> None:
    one, other = (sampled(pipeline, size, precision="bf16-true") for size in (3, 30))
    assert one.shape == (30, 8, 8, 3)
    assert np.array_equal(one, other)


def test_without_compilation_one_cache_is_kept_for_the_stage(pipeline: Pipeline) -> None:
    seen: list[Any] = []

    class Record(pl.Callback):
        def on_predict_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            seen.append(pl_module.sampler.sampler.decoder.caches.free[0].keys)

    evaluator(CompiledSampling(), Record()).predict(module_for(pipeline), ClassRequestDataModule(2, 3, batch_size=2))
    assert len(seen) == 3
    assert all(keys is seen[0] for keys in seen)


def test_the_sampler_is_freed_after_predict_and_after_an_exception(pipeline: Pipeline) -> None:
    module, requests = module_for(pipeline), ClassRequestDataModule(2, 3, batch_size=2)

    class Fail(pl.Callback):
        def on_predict_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            assert pl_module.sampler is not None
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        evaluator(CompiledSampling(True), Fail()).predict(module, requests)
    assert module.sampler is None
    evaluator(CompiledSampling(True)).predict(module, requests)
    assert module.sampler is None


@pytest.mark.parametrize(
    ("options", "phrase"),
    [({"batch_size": 0}, "batch_size is 0"), ({"enabled": False, "int8": True}, "compiled sampling is not enabled")],
)
def test_rejects_invalid_options(options: dict[str, Any], phrase: str) -> None:
    with pytest.raises(ValueError, match=phrase):
        CompiledSampling(**options)


def test_rejects_a_module_that_samples_no_images(pipeline: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"CompiledSampling needs a module .* but VQGANModule has no .*build_sampler"):
        train(vqgan_module(), pipeline, tmp_path, CompiledSampling(), max_steps=1)
