"""With encoder and quantiser frozen, training changes the decoder only: all codes, and models of them, stay valid."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from lightning_modules import VQGANModule
from llamagen import LlamaGen
from llamagen.checkpoints.contents import load_vqgan, weights_checksum
from llamagen.checkpoints.export import export
from llamagen.checkpoints.lineage import codes_checksum
from llamagen.checkpoints.weights import averaged_weights, read_weights
from llamagen.models.vqgan import VQGAN
from tests.lightning_modules.runs import argen_module, datamodule_for, evaluator, state_of, train, vqgan_module
from tests.pipeline import Pipeline

BOTH = ("encoder", "quantizer")
FROZEN = ("encoder.", "quant_conv.", "quantize.")
LAST = "checkpoints/last.ckpt"


class Watch(pl.Callback):
    """Records the modes of encoder and decoder in training, and whether the latent has a gradient."""

    def __init__(self) -> None:
        self.modes: list[tuple[bool, bool]] = []
        self.latent_has_gradient: list[bool] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.vqgan.quantize.register_forward_pre_hook(
            lambda _, args: self.latent_has_gradient.append(args[0].requires_grad)
        )

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.modes.append((pl_module.vqgan.encoder.training, pl_module.vqgan.decoder.training))


@dataclass(frozen=True)
class Run:
    """A decoder that was fine-tuned for 3 steps, with a validation after the second."""

    module: VQGANModule
    trainer: pl.Trainer
    watch: Watch
    checkpoint: Path


def tuned(base: Path, seed: int = 0, **options: Any) -> VQGANModule:
    return vqgan_module(seed, {"init_from": base, "freeze": BOTH, **options}, adversarial_start=0, adaptive_weight=True)


@pytest.fixture(scope="module")
def run(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder, watch = tmp_path_factory.mktemp("tuned"), Watch()
    module = tuned(pipeline.tokenizer, activation_checkpointing=True)
    options = {"max_steps": 3, "accumulate_grad_batches": 2, "val_check_interval": 4, "precision": "bf16-mixed"}
    trainer = train(module, pipeline, folder, watch, **options)
    return Run(module, trainer, watch, folder / LAST)


def frozen_entries(vqgan: VQGAN) -> dict[str, Tensor]:
    return {name: value for name, value in vqgan.state_dict().items() if name.startswith(FROZEN)}


def test_all_codes_stay_identical_and_the_decoder_is_trained(run: Run, pipeline: Pipeline) -> None:
    base = load_vqgan(pipeline.tokenizer)
    images = torch.cat([batch["images"] for batch in data_of(run.module, pipeline)])
    assert len(images) == 300
    codes = base.encode(images).codes
    assert len(codes.unique()) > 5
    for averaged in (True, False):
        found = load_averaged(run.checkpoint, averaged)
        assert torch.equal(found.encode(images).codes, codes)
        for name, value in frozen_entries(base).items():
            assert torch.equal(found.state_dict()[name], value), name
        assert not torch.equal(found.decoder.conv_out.weight, base.decoder.conv_out.weight)
        assert not torch.equal(found.post_quant_conv.weight, base.post_quant_conv.weight)


def data_of(module: VQGANModule, pipeline: Pipeline) -> Any:
    data: Any = datamodule_for(module, pipeline)
    data.prepare_data()
    data.setup("validate")
    return data.val_dataloader()


def load_averaged(checkpoint: Path, averaged: bool) -> VQGAN:
    vqgan = VQGAN(load_vqgan(checkpoint).config)
    vqgan.load_state_dict(read_weights(checkpoint, averaged).state)
    return vqgan.eval()


def test_frozen_parts_are_not_trained_averaged_or_differentiated(run: Run) -> None:
    (optimizer,) = run.trainer.optimizers
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    names = {name for name, value in run.module.vqgan.named_parameters() if id(value) in trained}
    assert names == {name for name, _ in run.module.vqgan.named_parameters() if not name.startswith(FROZEN)}
    averages = averaged_weights(torch.load(run.checkpoint, weights_only=True))
    assert averages.keys() == {f"vqgan.{name}" for name in names}
    assert run.watch.modes == [(False, True)] * 6  # dropout acts in the decoder only
    assert run.watch.latent_has_gradient
    assert not any(run.watch.latent_has_gradient)


def test_codes_and_models_of_the_base_are_accepted(run: Run, pipeline: Pipeline, tmp_path: Path) -> None:
    module = argen_module(tokenizer=run.checkpoint)
    assert module.tokenizer_checksum == weights_checksum(load_vqgan(run.checkpoint))  # of a stopped `predict`
    evaluator(limit_val_batches=1).validate(
        module, datamodule_for(module, pipeline), ckpt_path=pipeline.argen, verbose=False
    )
    assert LlamaGen.from_pretrained(pipeline.argen, tokenizer=run.checkpoint).resolution == 8
    other = argen_module(tokenizer=pipeline.tokenizer)
    assert module._tokenizer_checksum == other._tokenizer_checksum == weights_checksum(load_vqgan(pipeline.tokenizer))


def test_the_lineage_survives_exports_and_a_second_fine_tuning(run: Run, pipeline: Pipeline, tmp_path: Path) -> None:
    base = weights_checksum(load_vqgan(pipeline.tokenizer))
    for number, suffix in enumerate((".pt", ".safetensors")):
        export(run.checkpoint if number == 0 else tmp_path / "0.pt", tmp_path / f"{number}{suffix}")
        assert codes_checksum(load_vqgan(tmp_path / f"{number}{suffix}")) == base
    module = tuned(tmp_path / "1.safetensors")
    train(module, pipeline, tmp_path / "second", max_steps=1)
    second = load_vqgan(tmp_path / "second" / LAST)
    assert weights_checksum(second) != weights_checksum(load_vqgan(run.checkpoint))
    assert codes_checksum(second) == base


def test_other_weights_of_the_encoder_end_the_lineage(run: Run, pipeline: Pipeline, tmp_path: Path) -> None:
    vqgan = load_vqgan(run.checkpoint)
    with torch.no_grad():
        vqgan.quantize.get_parameter("embedding.weight")[3, 1] += 1e-6
    assert codes_checksum(vqgan) == weights_checksum(vqgan)
    # Trained in full, it writes codes of its own. Its checkpoint does not claim anything else.
    train(tuned(run.checkpoint, freeze=("encoder",)), pipeline, tmp_path, max_steps=1)
    assert read_weights(tmp_path / LAST).codes_of is None


def test_the_codebook_alone_can_be_trained(pipeline: Pipeline, tmp_path: Path) -> None:
    module = tuned(pipeline.tokenizer, freeze=("encoder",), revive_codes_every=1)
    before = {name: value.clone() for name, value in frozen_entries(module.vqgan).items()}
    train(module, pipeline, tmp_path, max_steps=1)
    changed = {name for name, value in frozen_entries(module.vqgan).items() if not torch.equal(value, before[name])}
    assert changed == {"quantize.embedding.weight"}


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(pipeline: Pipeline, tmp_path: Path) -> None:
    whole = tuned(pipeline.tokenizer)
    expected = state_of(whole, train(whole, pipeline, tmp_path / "whole", max_steps=3))
    train(tuned(pipeline.tokenizer), pipeline, tmp_path / "first", max_steps=2)
    # init_from may have changed: the frozen weights are those of the checkpoint.
    resumed = tuned(pipeline.tokenizer, seed=9, init_averaged=False)
    trainer = train(resumed, pipeline, tmp_path / "second", ckpt_path=tmp_path / "first" / LAST, max_steps=3)
    found = state_of(resumed, trainer)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    first, second = (read_weights(tmp_path / name / LAST).codes_of for name in ("first", "second"))
    assert first == second is not None


def test_rejects_resuming_with_other_parts_frozen(run: Run, pipeline: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has freeze \[encoder, quantizer\], but model.init_args.freeze is \[\]; set"):
        train(vqgan_module(), pipeline, tmp_path, ckpt_path=run.checkpoint, max_steps=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze": ["decoder"]}, "freeze has 'decoder'; choose from encoder, quantizer"),
        ({}, "freeze is [encoder, quantizer], but init_from is not given; give the weights to freeze"),
        (
            {"init_from": "a.pt", "revive_codes_every": 5},
            "revive_codes_every is 5, but freeze has quantizer, whose codes do not move; set revive_codes_every to 0",
        ),
    ],
)
def test_rejects_options_that_exclude_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        vqgan_module(options={"freeze": BOTH, **options})
    assert str(error.value) == message


def test_rejects_an_entropy_loss_of_a_frozen_codebook() -> None:
    with pytest.raises(ValueError, match=r"entropy_weight is 0.1, but freeze has quantizer; set loss.entropy_weight"):
        vqgan_module(options={"freeze": ["quantizer"], "init_from": "a.pt"}, entropy_weight=0.1)


def test_rejects_a_precision_that_rounds_frozen_weights(pipeline: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"trainer\.precision is bf16-true, which would round the weights of freeze"):
        train(tuned(pipeline.tokenizer), pipeline, tmp_path, max_steps=1, precision="bf16-true")
