"""Training and sampling of the autoregressive model."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.nn import functional as F

from callbacks import SampleGrid
from datamodules import ClassRequestDataModule, CodeDataModule
from lightning_modules import ARGenModule
from lightning_modules.optimization import AdamWConfig, build_adamw
from llamagen.models.vqgan import to_uint8
from llamagen.sampling import SamplingConfig, generate
from tests.lightning_modules.runs import argen_module, datamodule_for, evaluator, train
from tests.pipeline import Pipeline
from tests.small_models import small_gpt, small_vqgan


def test_a_new_model_has_the_loss_of_a_uniform_guess(pipeline: Pipeline) -> None:
    module = argen_module()
    (metrics,) = evaluator().validate(module, datamodule_for(module, pipeline, batch_size=70), verbose=False)
    assert metrics["val/loss"] == pytest.approx(math.log(32), abs=1e-5)


def test_validation_loss_is_the_cross_entropy_of_the_whole_dataset(pipeline: Pipeline) -> None:
    module = argen_module()
    torch.nn.init.normal_(module.gpt.output.weight)
    data = datamodule_for(module, pipeline, batch_size=70)
    (validated,) = evaluator().validate(module, data, verbose=False)
    (tested,) = evaluator().test(module, data, verbose=False)
    samples = [data.datasets["val"][number, 0] for number in range(300)]
    codes = torch.stack([sample["codes"] for sample in samples])
    labels = torch.tensor([sample["condition"] for sample in samples])
    with torch.no_grad():
        logits = module.gpt.eval()(codes[:, :-1], labels)
    expected = F.cross_entropy(logits.flatten(0, 1), codes.flatten()).item()
    assert validated["val/loss"] == pytest.approx(expected, rel=1e-5)
    assert tested["test/loss"] == pytest.approx(expected, rel=1e-5)


def test_training_lowers_the_loss(pipeline: Pipeline, tmp_path: Path) -> None:
    module = argen_module()
    losses: list[float] = []

    class Recorder(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
            losses.append(outputs["loss"].item())

    train(module, pipeline, tmp_path, Recorder(), max_steps=30)
    assert losses[0] == pytest.approx(math.log(32), abs=1e-4)
    assert losses[-1] < losses[0] - 0.1


def test_the_tokenizer_is_not_part_of_the_model(pipeline: Pipeline) -> None:
    with_tokenizer, without = argen_module(tokenizer=pipeline.tokenizer), argen_module()
    assert with_tokenizer.state_dict().keys() == without.state_dict().keys()
    assert len(list(with_tokenizer.parameters())) == len(list(without.parameters()))


def test_images_are_the_decoded_codes(pipeline: Pipeline) -> None:
    module = argen_module(tokenizer=pipeline.tokenizer)
    module.sampling = SamplingConfig(guidance_scale=2.0, top_k=5)
    labels, indices = torch.tensor([3, 1, 4]), torch.tensor([10, 11, 12])
    images, codes = module.sample(labels, indices, seed=7)
    assert torch.equal(codes, generate(module.gpt, labels, module.sampling, seed=7, indices=indices))
    assert (images.shape, images.dtype) == ((3, 8, 8, 3), torch.uint8)
    vqgan = module._tokenizer[0]
    with torch.no_grad():
        decoded = vqgan.decode_codes(codes.unflatten(1, (4, 4))).permute(0, 2, 3, 1)
    assert (images.float() - (decoded.clamp(-1, 1) + 1) * 127.5).abs().max() <= 1


def test_images_are_resized_before_rounding_in_batches_of_any_size() -> None:
    module = ARGenModule(small_gpt(vocab_size=64).config, image_size=11)
    vqgan, labels, indices = small_vqgan(), torch.arange(5), torch.arange(5) + 20
    module.gpt.load_state_dict(small_gpt(vocab_size=64).state_dict())
    module.eval()._tokenizer = (vqgan,)
    images, codes = module.sample(labels, indices, seed=7)
    with torch.no_grad():
        decoded = vqgan.decode_codes(codes.unflatten(1, (4, 4)))
    assert (decoded.abs() > 1.1).float().mean() > 0.02  # so clamping before resizing would show
    expected = to_uint8(F.interpolate(decoded, size=(11, 11), mode="bicubic", align_corners=False, antialias=False))
    assert (images.shape, images.dtype) == ((5, 11, 11, 3), torch.uint8)
    difference = (images.int() - expected.permute(0, 2, 3, 1).int()).abs()
    assert difference.max() <= 1  # rounding of the decoder depends on the batch size,
    assert (difference > 0).float().mean() < 0.01  # which rarely changes a level
    for row in range(5):
        one, _ = module.sample(labels[row : row + 1], indices[row : row + 1], seed=7)
        assert torch.equal(one[0], images[row])


def test_rejects_an_image_size_of_zero() -> None:
    with pytest.raises(ValueError, match="image_size is 0; it must be at least 1, or null"):
        ARGenModule(small_gpt().config, image_size=0)


def test_sampling_without_a_tokenizer_names_the_option() -> None:
    with pytest.raises(ValueError, match=r"set model\.init_args\.tokenizer"):
        argen_module().sample(torch.tensor([0]), torch.tensor([0]), seed=0)


def test_rejects_requests_that_cannot_be_sampled_before_training(pipeline: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"set model\.init_args\.tokenizer"):
        train(argen_module(), pipeline, tmp_path, SampleGrid(classes=2), max_steps=1)
    with pytest.raises(ValueError, match="class 10 was requested, but the model has classes 0 to 9"):
        train(argen_module(tokenizer=pipeline.tokenizer), pipeline, tmp_path, SampleGrid(classes=11), max_steps=1)
    with pytest.raises(ValueError, match="class 17 was requested"):
        evaluator().predict(argen_module(tokenizer=pipeline.tokenizer), ClassRequestDataModule(classes=[3, 17]))
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize(
    ("net", "phrase"),
    [
        ({"block_size": 64}, "4 × 4 = 16 codes per image, but the model's block_size is 64; set block_size to 16"),
        ({"vocab_size": 64}, "vocabulary of 32, but the model's vocab_size is 64; set vocab_size to 32"),
        ({"num_classes": 9}, "10 classes, but the model's num_classes is 9; set num_classes to 10"),
    ],
)
def test_rejects_codes_that_do_not_match_the_model(
    net: dict[str, int], phrase: str, pipeline: Pipeline, tmp_path: Path
) -> None:
    with pytest.raises(ValueError) as error:
        train(argen_module(**net), pipeline, tmp_path, max_steps=1)
    assert phrase in str(error.value)
    assert not list(tmp_path.rglob("*"))


def test_rejects_codes_and_checkpoints_of_another_tokenizer(pipeline: Pipeline, tmp_path: Path) -> None:
    shutil.copytree(pipeline.codes, tmp_path / "codes")
    meta = json.loads((tmp_path / "codes/meta.json").read_text())
    (tmp_path / "codes/meta.json").write_text(json.dumps({**meta, "tokenizer": "0" * 64}))
    other = CodeDataModule(tmp_path / "codes", batch_size=100, num_workers=0)
    module = argen_module(tokenizer=pipeline.tokenizer)
    with pytest.raises(ValueError, match="the codes were extracted with a tokenizer of other weights"):
        evaluator().validate(module, other)
    with pytest.raises(ValueError, match="the checkpoint was trained on codes with a tokenizer of other weights"):
        evaluator().validate(argen_module(), other, ckpt_path=pipeline.argen)


@pytest.mark.parametrize(
    ("make", "phrase"),
    [
        (lambda root: root / "nowhere.ckpt", "does not exist"),
        (lambda root: root / "digits/meta.json", "cannot be read as a checkpoint"),
        (lambda root: root / "argen/checkpoints/last.ckpt", "holds a GPT, not a VQGAN"),
    ],
)
def test_rejects_a_file_that_is_no_tokenizer(make: Any, phrase: str, pipeline: Pipeline) -> None:
    with pytest.raises(ValueError) as error:
        argen_module(tokenizer=make(pipeline.root))
    assert phrase in str(error.value)
    assert "\n" not in str(error.value)


def test_rejects_a_tokenizer_with_another_vocabulary(pipeline: Pipeline) -> None:
    with pytest.raises(ValueError, match="has 32 codes, but the model's vocab_size is 16"):
        argen_module(tokenizer=pipeline.tokenizer, vocab_size=16)


def test_weight_decay_applies_to_matrices_only() -> None:
    module: ARGenModule = argen_module()
    groups = build_adamw([module], AdamWConfig(weight_decay=0.3))["optimizer"].param_groups
    assert {group["weight_decay"]: min(p.dim() for p in group["params"]) for group in groups} == {0.3: 2, 0.0: 1}
    assert all(p.dim() >= 2 for p in groups[0]["params"])
    assert sum(len(group["params"]) for group in groups) == len(list(module.parameters()))


def test_warmup_increases_linearly_to_the_learning_rate() -> None:
    built = build_adamw([torch.nn.Linear(2, 2)], AdamWConfig(lr=0.1, warmup_steps=4))
    rates = []
    for _ in range(6):
        rates.append(built["optimizer"].param_groups[0]["lr"])
        built["optimizer"].step()
        built["lr_scheduler"]["scheduler"].step()
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])


@pytest.mark.parametrize("options", [{"lr": 0.0}, {"betas": (0.9, 1.0)}, {"weight_decay": -1.0}, {"warmup_steps": -1}])
def test_rejects_invalid_optimizer_settings(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options)).split("_")[0]):
        AdamWConfig(**options)


def test_warns_if_more_batches_are_accumulated_than_an_epoch_has(recwarn: pytest.WarningsRecorder) -> None:
    module = argen_module()
    for wanted in (6, 20):
        module._trainer = SimpleNamespace(num_training_batches=6, accumulate_grad_batches=wanted)  # type: ignore[assignment]
        module.on_train_start()
    (message,) = [str(each.message) for each in recwarn if "accumulate_grad_batches" in str(each.message)]
    assert message.startswith("accumulate_grad_batches is 20, but an epoch has 6 batches")


def test_a_window_is_refused_before_the_training_of_a_sharded_model() -> None:
    module = argen_module()
    module.sampling = SamplingConfig(window=2)
    module._device_mesh = object()  # type: ignore[assignment]
    with pytest.raises(ValueError, match="window is 2, but the parameters are sharded over ranks"):
        module.configure_model()
