"""Training of the tokenizer."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics.functional.image import structural_similarity_index_measure

from datamodules import DigitsDataModule
from lightning_modules.adversarial import frozen
from llamagen.losses import codebook_loss, commitment_loss, hinge_discriminator_loss, hinge_generator_loss
from llamagen.models.discriminator import PatchGAN
from tests.lightning_modules.runs import argen_module, datamodule_for, evaluator, train, vqgan_module
from tests.pipeline import Pipeline


def copies(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def unchanged(module: nn.Module, before: dict[str, torch.Tensor]) -> list[bool]:
    return [torch.equal(value, before[name]) for name, value in module.state_dict().items()]


def test_the_discriminator_is_not_trained_before_its_start(pipeline: Pipeline, tmp_path: Path) -> None:
    module = vqgan_module()
    assert module.discriminator is not None
    before = copies(module.discriminator)
    trainer = train(module, pipeline, tmp_path / "early", max_steps=3)
    assert all(unchanged(module.discriminator, before))
    optimizer = trainer.optimizers[0]
    assert not any(parameter in optimizer.state for parameter in module.discriminator.parameters())
    train(module, pipeline, tmp_path / "late", max_steps=4, ckpt_path=tmp_path / "early/checkpoints/last.ckpt")
    assert not any(torch.equal(p, before[name]) for name, p in module.discriminator.named_parameters() if p.dim() > 1)


def test_without_adversarial_weight_there_is_no_discriminator(pipeline: Pipeline, tmp_path: Path) -> None:
    module = vqgan_module(adversarial_weight=0.0)
    assert module.discriminator is None
    train(module, pipeline, tmp_path, max_steps=1)
    assert "train/generator" not in module.trainer.callback_metrics


def test_one_optimizer_matches_two(pipeline: Pipeline, tmp_path: Path) -> None:
    # One memory format, so that convolutions add in one order.
    options = {"channels_last": False}
    module, reference = (vqgan_module(options=options, adversarial_start=0) for _ in range(2))
    for each in (module, reference):
        each.vqgan.apply(lambda part: setattr(part, "p", 0.0) if isinstance(part, nn.Dropout) else None)
    assert reference.discriminator is not None
    batches: list[torch.Tensor] = []

    class Recorder(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            batches.append(batch["images"])

    train(module, pipeline, tmp_path, Recorder(), max_steps=3)

    settings = module.optimizer_config
    optimizers, schedulers = [], []
    for network in (reference.vqgan, reference.discriminator):
        decayed = [p for p in network.parameters() if p.dim() >= 2]
        others = [p for p in network.parameters() if p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
        optimizers.append(torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=True))
        schedulers.append(torch.optim.lr_scheduler.LambdaLR(optimizers[-1], lambda step: (step + 1) / 4))
    reference.train()
    for images in batches:
        output = reference.vqgan(images)
        entries, latent = reference.vqgan.quantize.lookup(output.encoding.codes), output.encoding.latent
        loss = F.mse_loss(output.reconstruction, images) + codebook_loss(entries, latent)
        loss = loss + 0.25 * commitment_loss(entries, latent)
        loss = loss + 0.5 * hinge_generator_loss(reference.discriminator(output.reconstruction))
        optimizers[0].zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(reference.vqgan.parameters(), 1.0)
        optimizers[0].step()
        real, fake = reference.discriminator(images), reference.discriminator(output.reconstruction.detach())
        optimizers[1].zero_grad()
        hinge_discriminator_loss(real, fake).backward()
        nn.utils.clip_grad_norm_(reference.discriminator.parameters(), 1.0)
        optimizers[1].step()
        for scheduler in schedulers:
            scheduler.step()
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, reference.state_dict()[name], msg=name)


def test_a_frozen_network_passes_gradients_through() -> None:
    network, x = nn.Linear(2, 1), torch.ones(1, 2, requires_grad=True)
    with frozen(network):
        network(x).sum().backward()
    assert x.grad is not None
    assert network.weight.grad is None
    assert network.weight.requires_grad


class LargeGradients(pl.Callback):
    """Sets gradients of norm 10 for the tokenizer and 0.01 for the discriminator, and records the clipped norms."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for scale, network in ((10.0, pl_module.vqgan), (0.01, pl_module.discriminator)):
            gradients = [parameter.grad for parameter in network.parameters()]
            size = sum(gradient.numel() for gradient in gradients) ** 0.5
            for gradient in gradients:
                gradient.fill_(scale / size)

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if pl_module.vqgan.quant_conv.weight.grad is not None:
            networks = {"vqgan": pl_module.vqgan, "discriminator": pl_module.discriminator}
            self.gradients = {
                name: torch.cat([p.grad.flatten() for p in network.parameters()]) for name, network in networks.items()
            }


def test_networks_are_clipped_separately(pipeline: Pipeline, tmp_path: Path) -> None:
    watch = LargeGradients()
    module = vqgan_module(adversarial_start=0)
    train(module, pipeline, tmp_path / "norm", watch, max_steps=2)
    assert watch.gradients["vqgan"].norm().item() == pytest.approx(1.0, rel=1e-4)
    assert watch.gradients["discriminator"].norm().item() == pytest.approx(0.01, rel=1e-4)
    logged = module.trainer.callback_metrics
    assert logged["train/grad_norm_vqgan"].item() == pytest.approx(10.0, rel=1e-4)
    assert logged["train/grad_norm_discriminator"].item() == pytest.approx(0.01, rel=1e-4)
    by_value = {"gradient_clip_val": 1e-5, "gradient_clip_algorithm": "value"}
    train(vqgan_module(adversarial_start=0), pipeline, tmp_path / "value", watch, max_steps=2, **by_value)
    assert all(gradient.abs().max() <= 1e-5 for gradient in watch.gradients.values())


def test_validation_covers_the_full_dataset(pipeline: Pipeline, tmp_path: Path) -> None:
    module = vqgan_module()
    trainer = evaluator(default_root_dir=tmp_path)
    data = datamodule_for(module, pipeline, batch_size=70)
    (validated,) = trainer.validate(module, data, verbose=False)
    (tested,) = trainer.test(module, data, verbose=False)
    images = torch.stack([data.datasets["val"][number, 0]["images"] for number in range(300)])
    with torch.no_grad():
        output = module.eval()(images)
    error = ((output.reconstruction.clamp(-1, 1) - images) / 2).square().mean((1, 2, 3))
    psnr = (-10 * error.log10()).mean().item()  # of each image, then the mean, as in the paper
    pixels = [(x.clamp(-1, 1) + 1) / 2 for x in (output.reconstruction, images)]
    ssim = structural_similarity_index_measure(*pixels, data_range=1.0)
    used = len(output.encoding.codes.unique()) / 32
    for stage, metrics in (("val", validated), ("test", tested)):
        assert metrics[f"{stage}/psnr"] == pytest.approx(psnr, abs=1e-3)
        assert metrics[f"{stage}/ssim"] == pytest.approx(float(ssim), abs=1e-4)
        assert metrics[f"{stage}/codebook_usage"] == pytest.approx(used)
        expected = F.mse_loss(output.reconstruction, images).item()
        assert metrics[f"{stage}/reconstruction"] == pytest.approx(expected, rel=1e-4)


def test_rejects_the_checkpoint_of_another_model(pipeline: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds a GPT, but a VQGAN is expected"):
        train(vqgan_module(), pipeline, tmp_path, ckpt_path=pipeline.argen, max_steps=9)
    with pytest.raises(ValueError, match="holds a VQGAN, but a GPT is expected"):
        train(argen_module(), pipeline, tmp_path, ckpt_path=pipeline.tokenizer, max_steps=9)
    wide = argen_module(dim=64)
    with pytest.raises(ValueError, match=r"has another shape: .*; use the configuration") as error:
        train(wide, pipeline, tmp_path, ckpt_path=pipeline.argen, max_steps=9)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("name", ["reconstruction_weight", "commitment_weight", "adversarial_start"])
def test_rejects_negative_weights(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is -1"):
        vqgan_module(**{name: -1})


@pytest.mark.parametrize(
    ("image_size", "layers", "phrase"),
    [(9, 1, "image_size is 9; the tokenizer needs a multiple of 2"), (8, 2, "the discriminator needs at least 12")],
)
def test_rejects_unsuitable_image_sizes_before_training(
    image_size: int, layers: int, phrase: str, pipeline: Pipeline, tmp_path: Path
) -> None:
    module = vqgan_module(options={"discriminator": PatchGAN(num_layers=layers)})
    trainer = evaluator(default_root_dir=tmp_path)
    with pytest.raises(ValueError, match=phrase):
        trainer.fit(module, DigitsDataModule(pipeline.digits, image_size=image_size))
    assert not list(tmp_path.iterdir())
