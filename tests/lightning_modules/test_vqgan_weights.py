"""The tokenizer starts from published weights or those of earlier runs."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import main
from lightning_modules import VQGANModule
from llamagen.checkpoints.export import export
from llamagen.models.discriminator import PatchGAN, StyleGAN
from llamagen.models.lpips import VGG16
from llamagen.models.vqgan import VQGAN, VQGANConfig
from tests.golden import fill
from tests.lightning_modules.runs import State, datamodule_for, evaluator, train, vqgan_module
from tests.pipeline import PATCHGAN, TOKENIZER_NET, Pipeline
from tests.vgg16 import vgg16_state

NEW_DISCRIMINATOR = "has no discriminator: training starts with a new one"


@pytest.fixture(scope="module")
def weights() -> State:
    """Weights of the tests' tokenizer, different from any initial ones."""
    return fill(VQGAN(VQGANConfig(**TOKENIZER_NET))).state_dict()


def assert_holds(module: Any, wanted: State) -> None:
    for name, value in module.state_dict().items():
        assert torch.equal(value, wanted[name]), name


def test_fine_tuning_published_weights_starts_a_new_discriminator_with_a_warning(
    weights: State, pipeline: Pipeline, tmp_path: Path
) -> None:
    torch.save({"model": weights}, tmp_path / "vq.pt")
    with pytest.warns(UserWarning, match=NEW_DISCRIMINATOR):
        module = vqgan_module(options={"init_from": tmp_path / "vq.pt"}, adversarial_start=0)
    assert_holds(module.vqgan, weights)
    trainer = train(module, pipeline, tmp_path / "run", max_steps=2)
    assert trainer.global_step == 2
    assert not torch.equal(module.vqgan.encoder.conv_in.weight, weights["encoder.conv_in.weight"])


@pytest.mark.parametrize("averaged", [True, False, None], ids=["averaged", "raw", "default"])
def test_init_from_a_published_run_loads_discriminator_and_optionally_averages(
    averaged: bool | None, weights: State, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    judge = fill(PatchGAN(**PATCHGAN)).state_dict()
    half = {name: value * 0.5 for name, value in weights.items()}
    content = {"model": weights, "ema": half, "discriminator": judge, "optimizer": {"state": {}}, "steps": 3}
    torch.save({**content, "args": argparse.Namespace(lr=1e-4)}, tmp_path / "0000003.pt")
    options = {} if averaged is None else {"init_averaged": averaged}
    module = vqgan_module(options={"init_from": tmp_path / "0000003.pt", **options})
    assert_holds(module.vqgan, weights if averaged is False else half)
    assert_holds(module.discriminator, judge)
    assert not [warning for warning in recwarn if NEW_DISCRIMINATOR in str(warning.message)]


@pytest.mark.parametrize("averaged", [True, False])
def test_init_from_a_run_of_this_project_loads_both_networks(averaged: bool, pipeline: Pipeline) -> None:
    checkpoint = torch.load(pipeline.tokenizer, weights_only=True)
    module = vqgan_module(options={"init_from": pipeline.tokenizer, "init_averaged": averaged})
    raw = {name.removeprefix("vqgan."): v for name, v in checkpoint["state_dict"].items() if name.startswith("vqgan.")}
    same = [torch.equal(value, raw[name]) for name, value in module.vqgan.named_parameters()]
    assert all(same) if not averaged else not any(same)
    assert module.discriminator is not None
    for name, value in module.discriminator.state_dict().items():
        assert torch.equal(value, checkpoint["state_dict"][f"discriminator.{name}"]), name


def test_lists_all_differences_and_trains_nothing(weights: State, tmp_path: Path) -> None:
    wrong: dict[str, Tensor] = {**weights, "encoder.conv_in.weight": torch.zeros(1, 2), "extra": torch.zeros(1)}
    del wrong["decoder.conv_out.bias"]
    torch.save({"model": wrong}, tmp_path / "vq.pt")
    with pytest.raises(ValueError) as error:
        vqgan_module(options={"init_from": tmp_path / "vq.pt"})
    message = str(error.value)
    assert "\n" not in message
    assert "missing: decoder.conv_out.bias" in message
    assert "unexpected: extra" in message
    assert "encoder.conv_in.weight is (1, 2), expected (32, 3, 3, 3)" in message


def test_rejects_another_discriminator_for_fit(weights: State, pipeline: Pipeline, tmp_path: Path) -> None:
    torch.save({"model": weights, "discriminator": PatchGAN(4, 1).state_dict()}, tmp_path / "vq.pt")
    module = vqgan_module(options={"init_from": tmp_path / "vq.pt"})
    evaluator(limit_val_batches=1).validate(module, datamodule_for(module, pipeline), verbose=False)
    assert_holds(module.vqgan, weights)
    with pytest.raises(ValueError, match=r"the discriminator of .*shape mismatch: main\.0\.weight is"):
        train(module, pipeline, tmp_path / "run", max_steps=1)
    assert not (tmp_path / "run").exists()


OTHER_LOSSES: dict[str, Callable[[], VQGANModule]] = {
    "another discriminator": lambda: vqgan_module(options={"discriminator": StyleGAN(8)}),
    "no discriminator": lambda: vqgan_module(adversarial_weight=0.0),
    "LeCAM": lambda: vqgan_module(lecam_weight=0.1),
}


@pytest.mark.parametrize("case", OTHER_LOSSES)
def test_the_discriminator_is_ignored_outside_fit(case: str, pipeline: Pipeline) -> None:
    module, same = OTHER_LOSSES[case](), vqgan_module()
    for each in (module, same):
        data = datamodule_for(each, pipeline)
        evaluator(limit_val_batches=1).validate(each, data, ckpt_path=pipeline.tokenizer, verbose=False)
    assert_holds(module.vqgan, same.vqgan.state_dict())


@pytest.mark.parametrize("case", ["another discriminator", "no discriminator"])
def test_rejects_resuming_with_another_discriminator(case: str, pipeline: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the checkpoint has another discriminator: .*start a new run with") as error:
        train(OTHER_LOSSES[case](), pipeline, tmp_path, ckpt_path=pipeline.tokenizer, max_steps=9)
    assert "\n" not in str(error.value)


def test_lecam_can_be_switched_on_and_off_when_resuming(pipeline: Pipeline, tmp_path: Path) -> None:
    last = Path("checkpoints/last.ckpt")
    train(vqgan_module(lecam_weight=0.1), pipeline, tmp_path / "a", ckpt_path=pipeline.tokenizer, max_steps=9)
    train(vqgan_module(), pipeline, tmp_path / "b", ckpt_path=tmp_path / "a" / last, max_steps=10)
    names = [torch.load(tmp_path / run / last, weights_only=True)["state_dict"] for run in "ab"]
    assert [any("lecam" in name for name in each) for each in names] == [True, False]


def test_rejects_the_weights_of_a_gpt(pipeline: Pipeline) -> None:
    with pytest.raises(ValueError, match="holds a GPT, not a VQGAN; give a tokenizer's weights"):
        vqgan_module(options={"init_from": pipeline.argen})


@pytest.mark.parametrize("suffix", [".pt", pytest.param(".safetensors", marks=pytest.mark.slow)])
def test_validates_and_extracts_with_published_weights(
    suffix: str, weights: State, pipeline: Pipeline, tmp_path: Path
) -> None:
    torch.save({"model": weights}, tmp_path / "vq.pt")
    path = tmp_path / "vq.pt"
    if suffix != ".pt":
        path = tmp_path / f"vq{suffix}"
        export(tmp_path / "vq.pt", path)
    start = f"--model.init_args.init_from={path}"
    arguments = pipeline.tokenizer_arguments(tmp_path / "validation")
    cli = main.main(["validate", *arguments, start, "--trainer.limit_val_batches=null"])
    reference = VQGANModule(VQGANConfig(**TOKENIZER_NET), cli.model.loss_config)
    reference.vqgan.load_state_dict(weights)
    (expected,) = evaluator().validate(reference, cli.datamodule, verbose=False)
    found = cli.trainer.callback_metrics
    for name in ("val/psnr", "val/ssim", "val/codebook_usage", "val/codebook_perplexity", "val/reconstruction"):
        assert found[name].item() == pytest.approx(expected[name], rel=1e-4)
    main.main([*pipeline.extract_arguments(tmp_path / "codes"), start])
    assert (tmp_path / "codes/meta.json").is_file()


def test_a_stage_without_weights_reports_how_to_give_them(
    pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main.main(["validate", *pipeline.tokenizer_arguments(tmp_path / "run")])
    message = capsys.readouterr().err
    assert "--ckpt_path" in message
    assert "--model.init_args.init_from" in message


def test_missing_lpips_weights_stop_the_run_with_a_remedy(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("torch.hub.urlopen", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    arguments = pipeline.tokenizer_arguments(tmp_path / "run")
    with pytest.raises(ValueError) as error:
        main.main(["fit", *arguments, "--model.init_args.loss.perceptual_weight=1"])
    for part in (VGG16.name, VGG16.address, "model.init_args.lpips_weights", str(tmp_path / "cache")):
        assert part in str(error.value)
    assert not (tmp_path / "run").exists()
    with pytest.raises((ValueError, SystemExit)) as error:
        main.main(["fit", *arguments, f"--model.init_args.lpips_weights={tmp_path / 'none.pth'}"])


def test_rejects_images_too_small_for_lpips_before_training(pipeline: Pipeline, tmp_path: Path) -> None:
    torch.save(vgg16_state(), tmp_path / "vgg16.pth")
    module = vqgan_module(options={"lpips_weights": tmp_path / "vgg16.pth"}, perceptual_weight=1.0)
    with pytest.raises(ValueError, match="image_size is 8; LPIPS needs at least 16"):
        train(module, pipeline, tmp_path / "run", max_steps=2)
    assert not (tmp_path / "run").exists()


def test_lpips_is_not_in_state_dict_optimizer_or_average(pipeline: Pipeline, tmp_path: Path) -> None:
    path = tmp_path / "vgg16.pth"
    torch.save(vgg16_state(), path)
    module = vqgan_module(options={"lpips_weights": path}, perceptual_weight=1.0)
    trainer = train(module, pipeline, tmp_path / "run", max_steps=2, batch_size=8, image_size=16)
    (lpips,) = module._lpips
    own = {id(parameter) for parameter in lpips.parameters()}
    assert own
    assert not own & {id(parameter) for parameter in module.parameters()}
    assert not own & {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert not any(parameter.requires_grad for parameter in lpips.parameters())
    assert not lpips.training
    names = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert not [name for name in names if "lpips" in name or "features" in name]
    for name, value in lpips.named_parameters():
        assert torch.equal(value, vgg16_state()[name])
