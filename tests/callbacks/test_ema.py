"""The average of the generator's weights."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from callbacks import EMA
from datamodules import DigitsDataModule
from llamagen.checkpoints.contents import load_vqgan
from llamagen.checkpoints.weights import averaged_weights
from tests.lightning_modules.runs import evaluator, train, vqgan_module
from tests.pipeline import Pipeline

PROBE = "vqgan.decoder.conv_out.weight"


class Recorder(pl.Callback):
    """Records a weight before the first step, after each step, and at each validation."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []
        self.validations: list[torch.Tensor] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.steps.append(pl_module.get_parameter(PROBE).detach().clone())

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        weight = pl_module.get_parameter(PROBE).detach().clone()
        if not torch.equal(weight, self.steps[-1]):
            self.steps.append(weight)

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.validations.append(pl_module.get_parameter(PROBE).detach().clone())


def averages(steps: list[torch.Tensor], decay: float) -> list[torch.Tensor]:
    """The definition: the average starts at the weights before the first step."""
    result = [steps[0]]
    for weight in steps[1:]:
        result.append(decay * result[-1] + (1 - decay) * weight)
    return result


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_average_follows_its_definition(accumulate: int, pipeline: Pipeline, tmp_path: Path) -> None:
    recorder = Recorder()
    train(
        vqgan_module(),
        pipeline,
        tmp_path,
        recorder,
        max_steps=4,
        accumulate_grad_batches=accumulate,
        val_check_interval=2 * accumulate,
        batch_size=32,
    )
    expected = averages(recorder.steps, 0.9)
    assert len(expected) == 5
    checkpoint = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    torch.testing.assert_close(averaged_weights(checkpoint)[PROBE], expected[-1])
    # The raw weights are in the state dict, and validation saw the averages.
    torch.testing.assert_close(checkpoint["state_dict"][PROBE], recorder.steps[-1])
    assert len(recorder.validations) == 2
    torch.testing.assert_close(recorder.validations[0], expected[2])
    torch.testing.assert_close(recorder.validations[1], expected[4])


def test_only_the_generator_is_averaged(pipeline: Pipeline, tmp_path: Path) -> None:
    module = vqgan_module()
    train(module, pipeline, tmp_path, max_steps=5, batch_size=32)
    checkpoint = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    names = {f"vqgan.{name}" for name, _ in module.vqgan.named_parameters()}
    assert averaged_weights(checkpoint).keys() == names
    assert not any("ema" in name for name in checkpoint["state_dict"])


def test_an_exception_in_validation_restores_the_raw_weights(pipeline: Pipeline, tmp_path: Path) -> None:
    module = vqgan_module()
    recorder = Recorder()

    class Fails(pl.Callback):
        def on_validation_batch_end(self, *_: Any) -> None:
            raise RuntimeError("validation failed")

    with pytest.raises(RuntimeError, match="validation failed"):
        train(module, pipeline, tmp_path, recorder, Fails(), max_steps=4, val_check_interval=3, batch_size=32)
    assert torch.equal(module.get_parameter(PROBE), recorder.steps[-1])
    assert not torch.equal(recorder.validations[0], recorder.steps[-1])


def test_other_stages_load_the_averages_of_the_checkpoint(pipeline: Pipeline, tmp_path: Path) -> None:
    train(vqgan_module(), pipeline, tmp_path, max_steps=4, batch_size=32)
    path = tmp_path / "checkpoints/last.ckpt"
    expected = averaged_weights(torch.load(path, weights_only=True))[PROBE]
    recorder = Recorder()
    trainer = evaluator(EMA(0.9), recorder, limit_val_batches=1)
    data = DigitsDataModule(pipeline.digits, image_size=8)
    trainer.validate(vqgan_module(seed=5), data, ckpt_path=path, verbose=False)
    assert torch.equal(recorder.validations[0], expected)
    assert torch.equal(load_vqgan(path).decoder.conv_out.weight, expected)


def test_a_run_resumed_without_ema_writes_a_readable_checkpoint(pipeline: Pipeline, tmp_path: Path) -> None:
    train(vqgan_module(), pipeline, tmp_path / "first", max_steps=2, batch_size=32)
    module = vqgan_module()
    trainer = evaluator(max_steps=3, limit_val_batches=0)
    first = tmp_path / "first/checkpoints/last.ckpt"
    trainer.fit(module, DigitsDataModule(pipeline.digits, image_size=8), ckpt_path=first)
    trainer.save_checkpoint(tmp_path / "second.ckpt")
    assert torch.equal(load_vqgan(tmp_path / "second.ckpt").decoder.conv_out.weight, module.get_parameter(PROBE))


def test_rejects_a_checkpoint_without_averages(pipeline: Pipeline, tmp_path: Path) -> None:
    module = vqgan_module()
    trainer = evaluator(max_steps=1, limit_val_batches=0)
    trainer.fit(module, DigitsDataModule(pipeline.digits, image_size=8))
    trainer.save_checkpoint(tmp_path / "raw.ckpt")
    assert torch.equal(load_vqgan(tmp_path / "raw.ckpt").decoder.conv_out.weight, module.get_parameter(PROBE))
    with pytest.raises(ValueError, match="no EMA weights"):
        evaluator(EMA()).validate(
            module, DigitsDataModule(pipeline.digits, image_size=8), ckpt_path=tmp_path / "raw.ckpt"
        )


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0])
def test_rejects_a_decay_out_of_range(decay: float) -> None:
    with pytest.raises(ValueError, match=f"decay is {decay}"):
        EMA(decay)
