"""Logging of the tokenizer's training, and how it stops at values that are not finite."""

import csv
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

import main
from callbacks import CodebookHistogram, LearningCurves, ReconstructionGrid
from lightning_modules import AdamWConfig
from lightning_modules.optimization import build_adamw
from tests.lightning_modules.poison import Poison
from tests.lightning_modules.runs import argen_module, datamodule_for, evaluator, train, vqgan_module
from tests.pipeline import Pipeline


def rows(folder: Path) -> list[dict[str, str]]:
    with next(folder.rglob("metrics.csv")).open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("accumulate", "make"),
    [
        (1, vqgan_module),
        (2, argen_module),
        pytest.param(2, vqgan_module, marks=pytest.mark.slow),
        pytest.param(1, argen_module, marks=pytest.mark.slow),
    ],
)
def test_the_x_axis_is_the_number_of_training_batches(
    accumulate: int, make: Any, pipeline: Pipeline, tmp_path: Path
) -> None:
    train(
        make(),
        pipeline,
        tmp_path,
        LearningCurves(),
        logger=CSVLogger(tmp_path, "logs"),
        log_every_n_steps=1,
        max_steps=6,
        accumulate_grad_batches=accumulate,
        val_check_interval=4,
    )
    logged = rows(tmp_path)
    training = [int(row["step"]) for row in logged if row.get("train/loss")]
    assert training == list(range(accumulate, 6 * accumulate + 1, accumulate))
    validation = [int(row["step"]) for row in logged if row.get("val/loss")]
    assert validation == list(range(4, 6 * accumulate + 1, 4))
    curves = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["callbacks"]["LearningCurves"]["history"]
    assert [x for x, _ in curves["val/loss"]] == validation[: len(curves["val/loss"])]


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_the_x_axis_of_an_evaluation_is_that_of_its_checkpoint(stage: str, pipeline: Pipeline, tmp_path: Path) -> None:
    arguments = pipeline.tokenizer_arguments(tmp_path)
    main.main([stage, *arguments, f"--ckpt_path={pipeline.tokenizer}", "--trainer.limit_test_batches=2"])
    assert {int(row["step"]) for row in rows(tmp_path)} == {8}
    if stage == "validate":
        assert [path.name for path in (tmp_path / "reconstructions").iterdir()] == ["step_0000008.png"]


def test_every_loss_term_is_logged_from_its_first_step(pipeline: Pipeline, tmp_path: Path) -> None:
    module = vqgan_module(adversarial_start=2)
    train(
        module,
        pipeline,
        tmp_path,
        logger=CSVLogger(tmp_path, "logs"),
        log_every_n_steps=1,
        max_steps=4,
        val_check_interval=4,
    )
    logged = rows(tmp_path)
    with_generator = [int(row["step"]) for row in logged if row["train/generator"]]
    assert with_generator == [3, 4]  # after the batches that are steps 2 and 3
    for name in ("discriminator", "logits_real", "logits_fake"):
        assert [int(row["step"]) for row in logged if row[f"train/{name}"]] == with_generator
    always = ("reconstruction", "codebook", "commitment", "lr", "grad_norm_vqgan")
    assert all(row[f"train/{name}"] for name in always for row in logged if row["train/loss"])
    last = logged[-1]
    for name in ("psnr", "ssim", "codebook_usage", "codebook_perplexity", "reconstruction"):
        assert any(row[f"val/{name}"] for row in logged), last
    total = {name: float(logged[0][f"train/{name}"]) for name in ("reconstruction", "codebook", "commitment")}
    expected = total["reconstruction"] + total["codebook"] + 0.25 * total["commitment"]
    assert float(logged[0]["train/loss"]) == pytest.approx(expected, rel=1e-5)


def test_the_discriminator_is_not_run_before_its_start(pipeline: Pipeline, tmp_path: Path) -> None:
    module = vqgan_module(adversarial_start=2)
    assert module.discriminator is not None
    calls: list[int] = []
    module.discriminator.register_forward_hook(lambda *_: calls.append(module.global_step))
    train(module, pipeline, tmp_path, max_steps=4, val_check_interval=2)
    assert calls == [2, 2, 2, 3, 3, 3]  # reconstruction, then image and reconstruction


@pytest.mark.parametrize("step", [0, 4])
def test_a_nan_loss_stops_the_run_and_keeps_the_last_good_checkpoint(
    step: int, pipeline: Pipeline, tmp_path: Path
) -> None:
    module = vqgan_module()
    message = rf"^reconstruction, .* not finite at step {step}; resume from the last checkpoint, if there is one"
    with pytest.raises(FloatingPointError, match=message):
        train(module, pipeline, tmp_path, Poison(step), every=2, max_steps=8)
    for weight in module.parameters():
        assert weight.isfinite().all()
    last = tmp_path / "checkpoints/last.ckpt"
    assert last.exists() == (step == 4)
    if step == 4:
        checkpoint = torch.load(last, weights_only=True)
        assert checkpoint["global_step"] == 4
        assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())
        resumed = vqgan_module()
        train(resumed, pipeline, tmp_path / "on", ckpt_path=last, max_steps=6)
        assert resumed.trainer.global_step == 6


class PoisonedValidation(Poison):
    """Puts a NaN into an image of the second validation."""

    def __init__(self) -> None:
        super().__init__(batch=0)
        self.validations = 0

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        self.validations += batch_idx == 0
        if self.validations == 2:
            self.on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: dict[str, Any], batch_idx: int) -> None:
        if trainer.validating or trainer.sanity_checking or not pl_module.training:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)


def test_a_nan_in_validation_keeps_the_last_good_checkpoint(pipeline: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(
        FloatingPointError, match=r"^reconstruction, .* not finite in validation at step 6; resume from"
    ):
        train(vqgan_module(), pipeline, tmp_path, PoisonedValidation(), max_steps=9, val_check_interval=3)
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 3


def test_a_nan_in_the_validation_of_another_rank_stops_before_the_weights_are_saved() -> None:
    other_rank = torch.tensor([0.0, 1.0])
    strategy = SimpleNamespace(reduce=lambda flags, reduce_op: flags + other_rank)
    module: Any = vqgan_module()
    module._log_batches_seen = module._log_metrics = module._log_skipped = lambda *_: None
    module._trainer = SimpleNamespace(world_size=2, strategy=strategy, global_step=7)
    module._broken_in_validation = {name: torch.tensor(False) for name in ("reconstruction", "codebook")}
    with pytest.raises(FloatingPointError, match=r"^codebook not finite in validation at step 7"):
        module.on_validation_epoch_end()


class PoisonedTest(Poison):
    """Puts a NaN into an image of a test."""

    def on_test_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        self.on_train_batch_start(trainer, pl_module, batch, batch_idx)


def test_a_nan_in_a_test_does_not_stop_a_later_training(pipeline: Pipeline, tmp_path: Path) -> None:
    module = vqgan_module()
    said = r"^reconstruction, .* are not finite in test, batch 0 \(precision 32-true\): the input of layer encoder"
    with pytest.raises(FloatingPointError, match=said):
        evaluator(PoisonedTest(0)).test(module, datamodule_for(module, pipeline), verbose=False)
    train(module, pipeline, tmp_path, max_steps=2, val_check_interval=2)
    assert module.trainer.global_step == 2


@pytest.mark.parametrize("term", ["perceptual", "entropy", "generator", "discriminator", "lecam"])
def test_the_error_names_the_term_that_is_not_finite(
    term: str, pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = vqgan_module(adversarial_start=0, entropy_weight=0.1, lecam_weight=0.1)
    broken = torch.tensor(float("inf"))
    if term == "entropy":
        monkeypatch.setattr("llamagen.models.vector_quantizer.entropy_loss", lambda *_: broken)
    elif term == "perceptual":
        object.__setattr__(module.loss_config, "perceptual_weight", 1.0)
        for name in ("fetch_vgg16", "read_vgg16"):
            monkeypatch.setattr(f"lightning_modules.vqgan.{name}", lambda _: {})
        monkeypatch.setattr("lightning_modules.vqgan.LPIPS", lambda _: BrokenDistance())
    elif term == "lecam":
        assert module.game is not None
        monkeypatch.setattr(module.game, "lecam", BrokenLeCAM())
    else:
        assert module.game is not None
        losses = module.game.losses._replace(**{term: lambda *_: broken})
        monkeypatch.setattr(module.game, "losses", losses)
    with pytest.raises(FloatingPointError, match=rf"^{term} not finite at step 0"):
        train(module, pipeline, tmp_path, max_steps=2, batch_size=8, image_size=16)


class BrokenDistance(torch.nn.Module):
    """An LPIPS that returns NaN."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x.new_full((len(x),), float("nan"))


class BrokenLeCAM(torch.nn.Module):
    """A LeCAM that returns NaN."""

    def update(self, *_: Any) -> None:
        pass

    def forward(self, *_: Any) -> torch.Tensor:
        return torch.tensor(float("nan"))


@pytest.mark.parametrize("elsewhere", [False, True])
def test_all_ranks_stop_if_a_term_is_not_finite_on_one(elsewhere: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = vqgan_module()
    reduce = SimpleNamespace(reduce=lambda flags, reduce_op: flags + torch.tensor([0.0, float(elsewhere)]))
    trainer = SimpleNamespace(world_size=2, strategy=reduce, global_step=7)
    monkeypatch.setattr(type(module), "trainer", trainer)
    monkeypatch.setattr(type(module), "global_step", 7)
    terms = {name: torch.tensor(False) for name in ("codebook", "generator")}
    with pytest.raises(FloatingPointError, match=r"^generator not finite at step 7") if elsewhere else nullcontext():
        module.check_finite(terms)


def test_a_nan_gradient_stops_the_run_before_the_step(pipeline: Pipeline, tmp_path: Path) -> None:
    module = vqgan_module()
    module.vqgan.decoder.conv_out.bias.register_hook(lambda gradient: gradient * float("nan"))
    before = module.vqgan.encoder.conv_in.weight.detach().clone()
    with pytest.raises(FloatingPointError, match="the gradient of the vqgan is not finite at step 0"):
        train(module, pipeline, tmp_path, max_steps=2)
    assert torch.equal(before, module.vqgan.encoder.conv_in.weight)


def test_reconstruction_grids_and_code_histograms_are_saved_at_the_configured_batches(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    callbacks = (ReconstructionGrid(count=3, every_n_batches=3), CodebookHistogram(), LearningCurves())
    train(vqgan_module(), pipeline, tmp_path, *callbacks, max_steps=8, val_check_interval=4)
    names = sorted(path.name for path in (tmp_path / "reconstructions").iterdir())
    assert names == [f"step_{step:07d}.png" for step in (3, 4, 6, 8)]
    assert len(list((tmp_path / "codebook").iterdir())) == 2
    assert (tmp_path / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.25), (1, 0.5), (3, 1.0), (4, 1.0), (7, 0.55), (10, 0.1), (12, 0.1)]
)
def test_the_learning_rate_warms_up_and_decays_with_a_cosine(step: int, expected: float) -> None:
    config = AdamWConfig(lr=1.0, warmup_steps=4, schedule="cosine", final_lr=0.1)
    assert config.rate(step, 10) == pytest.approx(expected)
    assert AdamWConfig(lr=1.0, warmup_steps=4).rate(step, 10) == pytest.approx(min(1.0, (step + 1) / 4))


def test_the_optimizer_follows_the_schedule(pipeline: Pipeline, tmp_path: Path) -> None:
    settings = AdamWConfig(lr=1e-3, warmup_steps=2, schedule="cosine", final_lr=1e-4)
    module = vqgan_module(options={"optimizer": settings})
    train(module, pipeline, tmp_path, logger=CSVLogger(tmp_path, "logs"), log_every_n_steps=1, max_steps=6)
    rates = [float(row["train/lr"]) for row in rows(tmp_path) if row["train/loss"]]
    assert rates == pytest.approx([settings.rate(step, 6) for step in range(6)])


def test_rejects_a_cosine_schedule_without_an_end() -> None:
    with pytest.raises(ValueError, match="set max_epochs or max_steps"):
        build_adamw([torch.nn.Linear(1, 1)], AdamWConfig(schedule="cosine"))


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ({"schedule": "linear"}, "schedule is 'linear'; it must be constant or cosine"),
        ({"final_lr": 1.0}, "final_lr is 1.0; it must be between 0 and lr, 0.0001"),
    ],
)
def test_rejects_invalid_schedules(options: dict[str, Any], phrase: str) -> None:
    with pytest.raises(ValueError, match=re.escape(phrase)):
        AdamWConfig(**options)
