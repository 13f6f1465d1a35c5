"""Each stage stops at values that are not finite, says where they come from, and leaves no output files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml

from callbacks import CodeWriter, FIDMonitor, ImageWriter, SampleGrid
from datamodules import ClassRequestDataModule, CodeDataModule, DigitsDataModule
from lightning_modules import ARGenModule, VQGANModule
from lightning_modules.base import GenerativeModule
from llamagen.checkpoints.contents import load_vqgan
from llamagen.checkpoints.export import export
from llamagen.models.gpt import GPTConfig
from llamagen.models.vqgan import VQGANConfig
from tests.lightning_modules.poison import Poison
from tests.lightning_modules.runs import argen_module, datamodule_for, evaluator, train, vqgan_module
from tests.metrics.extractors import Projection
from tests.pipeline import GPT_NET, Pipeline
from tests.ranks import two_processes

NAN = float("nan")
BROKEN = "the weights are broken: use an earlier checkpoint or another file"


def error_of(run: Callable[[], Any], kind: type[Exception] = FloatingPointError) -> str:
    """The one-line message of the error that a run raises."""
    with pytest.raises(kind) as error:
        run()
    assert "\n" not in str(error.value)
    return str(error.value)


def files(root: Path) -> list[str]:
    return sorted(path.name for path in root.rglob("*") if path.is_file() and not path.name.startswith("."))


def poison(module: GenerativeModule, name: str, value: float = NAN) -> GenerativeModule:
    with torch.no_grad():
        module.generator.get_parameter(name).view(-1)[0] = value
    return module


def digits(pipeline: Pipeline) -> DigitsDataModule:
    return DigitsDataModule(pipeline.digits, image_size=8, batch_size=200)


def extraction(module: VQGANModule, pipeline: Pipeline, out: Path, **options: Any) -> Callable[[], Any]:
    trainer = evaluator(CodeWriter(1000), default_root_dir=out, **options)
    return lambda: trainer.predict(module, digits(pipeline), return_predictions=False)


@pytest.mark.parametrize("name", ["encoder.conv_in.weight", "quant_conv.bias", "quantize.embedding.weight"])
def test_extraction_stops_and_names_the_weight(name: str, pipeline: Pipeline, tmp_path: Path) -> None:
    module = poison(vqgan_module(), name)
    assert isinstance(module, VQGANModule)
    said = error_of(extraction(module, pipeline, tmp_path))
    what = "the codebook's entry" if name.startswith("quantize") else "the encoder's latent"
    assert said.startswith(what)
    assert said.endswith(f" in predict, batch 0 (precision 32-true): weight {name} is not finite; {BROKEN}")
    assert files(tmp_path) == []


def test_extraction_stops_at_a_bad_image_and_keeps_earlier_shards(pipeline: Pipeline, tmp_path: Path) -> None:
    trainer = evaluator(CodeWriter(300), Poison(3), default_root_dir=tmp_path)
    said = error_of(lambda: trainer.predict(vqgan_module(), digits(pipeline), return_predictions=False))
    assert said.startswith("the encoder's latent is not finite in predict, batch 3 (precision 32-true): the input of ")
    assert files(tmp_path) == ["train-000000.tar"]


def test_an_error_on_one_rank_ends_the_extraction_on_all(pipeline: Pipeline, tmp_path: Path) -> None:
    writer = {"class_path": "CodeWriter", "init_args": {"samples_per_shard": 300}}
    broken = {"class_path": "tests.lightning_modules.poison.Poison", "init_args": {"batch": 0, "rank": 1}}
    (tmp_path / "callbacks.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [writer, broken]}}))
    arguments = [*pipeline.extract_arguments(tmp_path / "run"), f"--config={tmp_path / 'callbacks.yaml'}"]
    done = two_processes([*arguments, f"--ckpt_path={pipeline.tokenizer}"])
    assert done.returncode != 0
    assert "the encoder's latent is not finite in predict, batch 0 (precision 32-true)" in done.stderr
    assert "meta.json" not in files(tmp_path / "run")


def test_overflow_in_16_bits_is_reported_with_a_remedy(pipeline: Pipeline, tmp_path: Path) -> None:
    module = vqgan_module()
    with torch.no_grad():
        module.vqgan.encoder.conv_in.weight.mul_(3e5)  # the following norms remove the scale
    evaluator().predict(module, digits(pipeline))
    said = error_of(extraction(module, pipeline, tmp_path / "16", precision="16-true"))
    assert "the encoder's latent is not finite in predict, batch 0 (precision 16-true): " in said
    assert "encoder.conv_in" in said
    assert files(tmp_path) == []


@pytest.mark.parametrize("build", [vqgan_module, argen_module])
def test_rejects_training_in_16_true_before_it_starts(
    build: Callable[[], GenerativeModule], pipeline: Pipeline, tmp_path: Path
) -> None:
    said = error_of(lambda: train(build(), pipeline, tmp_path / "run", precision="16-true", max_steps=1), ValueError)
    assert said.startswith("trainer.precision is 16-true, in which ")
    assert said.endswith("train in bf16-mixed, 16-mixed or 32-true")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluation_stops_and_names_stage_precision_and_weight(stage: str, pipeline: Pipeline) -> None:
    weights = {"encoder.mid.0.conv1.weight": vqgan_module, "layers.1.feed_forward.w2.weight": argen_module}
    for name, build in weights.items():
        module = poison(build(), name)
        with torch.no_grad():
            if isinstance(module, ARGenModule):  # zero in a new model
                module.gpt.output.weight.normal_()
        run = getattr(evaluator(), stage)
        said = error_of(lambda module=module, run=run: run(module, datamodule_for(module, pipeline), verbose=False))  # type: ignore[misc]
        assert f"not finite in {stage}, batch 0 (precision 32-true): weight {name} is not finite; {BROKEN}" in said


def test_fit_with_broken_weights_stops_at_its_first_validation(pipeline: Pipeline, tmp_path: Path) -> None:
    module = poison(argen_module(), "norm.weight")
    said = error_of(lambda: train(module, pipeline, tmp_path, max_steps=1, num_sanity_val_steps=1))
    assert said.startswith("loss not finite in validation at step 0")
    assert not (tmp_path / "checkpoints").exists()


def sampling_module(pipeline: Pipeline) -> ARGenModule:
    pl.seed_everything(0, verbose=False)
    module = argen_module(tokenizer=pipeline.tokenizer)
    poison(module, "layers.0.attention.wo.weight")
    return module


def test_sampling_writes_no_image_archive_or_grid(pipeline: Pipeline, tmp_path: Path) -> None:
    trainer = evaluator(ImageWriter(), default_root_dir=tmp_path)
    data = ClassRequestDataModule(2, 3, 4)
    said = error_of(lambda: trainer.predict(sampling_module(pipeline), data, return_predictions=False))
    assert said == (
        "the logits of the autoregressive model are not finite (precision float32): weight "
        f"layers.0.attention.wo.weight is not finite; {BROKEN}"
    )
    assert files(tmp_path) == []


def test_grids_and_fid_stop_on_broken_weights(pipeline: Pipeline, tmp_path: Path) -> None:
    module = sampling_module(pipeline)
    module.stop_unless_finite = lambda *_: None  # type: ignore[method-assign]
    grid = evaluator(SampleGrid(2, 2), default_root_dir=tmp_path)
    said = error_of(lambda: grid.validate(module, datamodule_for(module, pipeline), verbose=False))
    assert said.startswith("the logits of the autoregressive model are not finite")
    tokenizer = vqgan_module()
    extractor = Projection()
    with torch.no_grad():
        next(iter(extractor.state_dict().values())).view(-1)[0] = NAN
    fid = evaluator(FIDMonitor(features=extractor), default_root_dir=tmp_path)
    said = error_of(lambda: fid.validate(tokenizer, digits(pipeline), verbose=False))
    assert said.startswith("the pool features of the extractor ")
    assert files(tmp_path) == []


def test_rejects_checkpoints_that_are_not_finite_when_they_are_read(pipeline: Pipeline, tmp_path: Path) -> None:
    broken, bad = tmp_path / "broken.ckpt", "quant_conv.bias"
    checkpoint = torch.load(pipeline.tokenizer, weights_only=True)
    checkpoint["state_dict"][f"vqgan.{bad}"][0] = NAN
    for optimizer in checkpoint["optimizer_states"]:
        for state in optimizer["state"].values():
            state.get("ema", torch.zeros(0)).fill_(NAN)
    torch.save(checkpoint, broken)
    module = vqgan_module()
    said = error_of(lambda: evaluator().validate(module, digits(pipeline), ckpt_path=broken, verbose=False), ValueError)
    assert said.startswith(
        f"the checkpoint: a weight is not finite in float32 (NaN or infinity): {bad}; the run that wrote them"
    )
    for option, load in (
        ("", lambda: load_vqgan(broken)),
        ("init_from: ", lambda: vqgan_module(options={"init_from": broken})),
        ("tokenizer: ", lambda: argen_module(tokenizer=broken)),
        ("", lambda: export(broken, tmp_path / "out.safetensors")),
    ):
        said = error_of(load, ValueError)
        assert said.startswith(f"{option}{broken}, EMA weights: weights are not finite in float32 (NaN or infinity): ")
    assert files(tmp_path) == ["broken.ckpt"]


def test_rejects_a_codebook_that_is_too_large() -> None:
    said = error_of(lambda: VQGANModule(VQGANConfig(codebook_size=2**18 + 1)), ValueError)
    assert said == "codebook_size is 262145; at most 262,144 codes are supported"


def test_rejects_invalid_arguments_of_modules() -> None:
    for value in (0, -1.0, NAN, float("inf")):
        said = error_of(lambda value=value: argen_module_with(max_grad_norm=value), ValueError)  # type: ignore[misc]
        assert said.startswith(f"max_grad_norm is {value}; it must be positive")
    for options in ({"image_size": NAN}, {"image_size": 1.5}, {"sample_seed": NAN}, {"tokenizer": "nowhere"}):
        name = next(iter(options))
        assert error_of(lambda options=options: argen_module_with(**options), ValueError).startswith(name)  # type: ignore[misc]
    assert error_of(lambda: argen_module_with(init_from="nowhere"), ValueError).startswith("init_from: nowhere does")
    assert "image_size is 0" in error_of(lambda: argen_module_with(image_size=0), ValueError)
    assert "revive_codes_every is -1" in error_of(lambda: VQGANModule(revive_codes_every=-1), ValueError)
    assert "init_from: nowhere" in error_of(lambda: VQGANModule(init_from="nowhere"), ValueError)


def argen_module_with(**options: Any) -> ARGenModule:
    return ARGenModule(GPTConfig(**GPT_NET), **options)


def test_rejects_codes_with_more_classes_than_the_model_at_the_start(pipeline: Pipeline, tmp_path: Path) -> None:
    module = argen_module(num_classes=9)
    data = CodeDataModule(pipeline.codes, num_workers=0)
    trainer = evaluator(default_root_dir=tmp_path)
    assert "num_classes is 9" in error_of(lambda: trainer.fit(module, data), ValueError)
