"""Training a tokenizer with the discriminator on DINO's features."""

from pathlib import Path
from typing import Any

import pytest
import torch

import main
from lightning_modules import VQGANModule
from llamagen.models.dino import WEIGHTS
from llamagen.models.discriminator import DINODiscriminator
from tests.dino import dino_state, save_dino
from tests.lightning_modules.runs import assert_moved_alike, datamodule_for, evaluator, state_of, train, vqgan_module
from tests.pipeline import Pipeline
from tests.ranks import succeeds, two_processes

SIZE, STEPS = 16, 3


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dino(tmp_path_factory.mktemp("dino") / "vit.pth")


def module_with(weights: Path | None, **options: Any) -> VQGANModule:
    """A tokenizer with the discriminator and all that works with it."""
    torch.manual_seed(1)
    discriminator = DINODiscriminator(weights, blocks=[0, 2], width=64, min_size=16)
    options = {"discriminator": discriminator, "augmentation": ("color", "translation", "cutout"), **options}
    return vqgan_module(options=options, adversarial_start=1, adaptive_weight=True, lecam_weight=0.1)


def test_a_resumed_run_equals_an_uninterrupted_one_and_saves_no_vit(
    weights: Path, pipeline: Pipeline, tmp_path: Path
) -> None:
    def run(folder: str, steps: int, resume: str | None = None) -> tuple[VQGANModule, dict[str, torch.Tensor]]:
        module = module_with(weights)
        path = None if resume is None else tmp_path / resume / "checkpoints/last.ckpt"
        trainer = train(module, pipeline, tmp_path / folder, ckpt_path=path, max_steps=steps, image_size=SIZE)
        return module, state_of(module, trainer)

    module, whole = run("whole", STEPS)
    run("first", 2)
    _, resumed = run("second", STEPS, "first")
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    assert isinstance(module.discriminator, DINODiscriminator)
    before = module_with(weights).state_dict()
    for name in before:
        if name.startswith("discriminator.") and "classify" not in name:
            assert not torch.equal(before[name], whole[name]), name
    (dino,) = module.discriminator._dino
    assert all(torch.equal(value, dino_state()[name]) for name, value in dino.state_dict().items())
    checkpoint = torch.load(tmp_path / "whole/checkpoints/last.ckpt", weights_only=True)
    judge = [name for name in checkpoint["state_dict"] if name.startswith("discriminator.")]
    assert all(name.startswith("discriminator.heads.") for name in judge)
    assert any(name.endswith("_u") for name in judge)
    trained = sum(1 for network in module.networks.values() for _ in network.parameters())
    assert len(checkpoint["optimizer_states"][0]["state"]) == trained
    assert trained == sum(1 for _ in module.vqgan.parameters()) + 2 * 10


def test_the_tokenizer_gets_the_gradient_of_the_adversarial_loss(weights: Path) -> None:
    module = module_with(weights, augmentation=())
    assert module.game is not None
    assert module.discriminator is not None
    module.discriminator.load()
    output = module(torch.rand(2, 3, SIZE, SIZE) * 2 - 1)
    module.game.generator_loss(module.discriminator, output.reconstruction).backward()
    assert all(parameter.grad is None for parameter in module.discriminator.parameters())
    for name, parameter in (*module.vqgan.encoder.named_parameters(), *module.vqgan.decoder.named_parameters()):
        assert parameter.grad is not None, name
    assert module.vqgan.encoder.conv_in.weight.grad.abs().sum() > 0


def test_only_fit_needs_the_weights(pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    module = module_with(tmp_path / "absent.pth")
    evaluator(limit_val_batches=1).validate(module, datamodule_for(module, pipeline, 8, SIZE), verbose=False)
    with pytest.raises(ValueError) as error:
        train(module, pipeline, tmp_path / "run", max_steps=1, image_size=SIZE)
    assert str(error.value) == (
        f"weights {tmp_path / 'absent.pth'} is not a file; get {WEIGHTS.address} and give its path as "
        "model.init_args.discriminator.init_args.weights"
    )
    assert not (tmp_path / "run").exists()


def test_one_process_per_machine_downloads(
    weights: Path, pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("fetch", "load"):
        monkeypatch.setattr(DINODiscriminator, name, lambda self, name=name: calls.append(name))
    module = module_with(weights)
    with pytest.raises(AssertionError, match=r"load\(\) comes first"):
        train(module, pipeline, tmp_path / "run", max_steps=2, image_size=SIZE)
    assert calls == ["fetch", "load"]


@pytest.mark.slow
def test_two_ranks_train_to_the_weights_of_one_process(weights: Path, pipeline: Pipeline, tmp_path: Path) -> None:
    def arguments(folder: str, batch_size: int, *more: str) -> list[str]:
        judge = "--model.init_args.discriminator.init_args"
        return [
            *("fit", *pipeline.tokenizer_arguments(tmp_path / folder), "--config=configs/vqgan/dino.yaml"),
            *(f"{judge}.weights={weights}", f"{judge}.blocks=[0,2]", f"{judge}.width=64", f"{judge}.min_size=16"),
            "--model.init_args.augmentation=[]",  # its random numbers depend on the rank
            *("--model.init_args.net.channels=64", "--model.init_args.loss.adversarial_start=2"),
            *(f"--data.init_args.batch_size={batch_size}", "--data.init_args.image_size=16", "--trainer.max_steps=6"),
            *more,
        ]

    one = main.main(arguments("one", 32)).model.state_dict()
    succeeds(two_processes(arguments("two", 16)))
    two = torch.load(tmp_path / "two/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    start = main.main(arguments("start", 32, "--trainer.max_steps=0")).model.state_dict()
    assert any(name.endswith("_u") for name in two)
    assert_moved_alike(start, one, two)
