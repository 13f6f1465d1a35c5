"""FIDMonitor measures images generated from classes and reconstructions, during training and in ``test``."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import main
from callbacks import EMA, CompiledSampling, FIDMonitor
from datamodules import ClassRequestDataModule, DigitsDataModule
from evaluation.image_sets import open_images
from evaluation.measurement import Measurement
from evaluation.reference import Reference, make_reference
from lightning_modules import ARGenModule
from llamagen.models.gpt import GPTConfig
from llamagen.models.vqgan import to_uint8
from llamagen.sampling import IMAGE_SETTINGS, SamplingConfig
from tests.lightning_modules.runs import argen_module, evaluator, train, vqgan_module
from tests.metrics.extractors import SIZE, Everything, Projection
from tests.pipeline import GPT_NET, SAMPLING, Pipeline
from tests.ranks import succeeds, two_processes

EXTRACTOR = "tests.metrics.extractors.Everything"
GFID = "gfid_everything/digits"
NAMES = {
    GFID,
    *(f"{name}_everything/digits" for name in ("gsfid", "precision", "recall", "gkid", "gkid_std")),
    *(f"{name}_everything" for name in ("inception_score", "inception_score_std")),
}


@pytest.fixture(scope="module")
def reference(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics of the training digits."""
    path = tmp_path_factory.mktemp("references") / "digits.npz"
    make_reference(open_images(pipeline.digits, SIZE, "train"), Everything(), "digits").save(path)
    return path


def sampling_module(pipeline: Pipeline, seed: int = 0) -> ARGenModule:
    pl.seed_everything(seed, verbose=False)
    module = ARGenModule(GPTConfig(**GPT_NET), sampling=SamplingConfig(), tokenizer=pipeline.tokenizer)
    with torch.no_grad():  # a new model's head is zero
        module.gpt.output.weight.normal_(std=0.5)
    return module


class Spy(pl.Callback):
    """Records the metrics after each validation."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items() if "fid" in name})


class Shown(pl.Callback):
    """Samples at the end of a validation the images that the monitor should sample."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self.images: list[Tensor] = []

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        index = torch.arange(self.count)
        self.images.append(pl_module.sample(index % 10, index, self.seed)[0].permute(0, 3, 1, 2))


def measured(images: Tensor, reference: Path) -> dict[str, float]:
    from evaluation.reference import read_reference

    measurement = Measurement(Everything(), SIZE, "generation", read_reference(reference))
    measurement.update(images)
    return {name: value.item() for name, value in measurement.compute().items()}


def test_logs_the_metrics_of_images_sampled_with_the_averages(
    pipeline: Pipeline, reference: Path, tmp_path: Path
) -> None:
    monitor = FIDMonitor(reference, Everything(), count=23, every_n_validations=2, seed=5, batch_size=4)
    spy, shown = Spy(), Shown(23, 5)
    best = ModelCheckpoint(tmp_path / "best", monitor=GFID, save_top_k=1, save_on_train_epoch_end=False)
    module = sampling_module(pipeline)
    trainer = train(
        module, pipeline, tmp_path, monitor, CompiledSampling(enabled=False, batch_size=6), shown, spy, best,
        max_steps=8, val_check_interval=2,
    )  # fmt: skip
    assert len(spy.seen) == 4
    assert spy.seen[0][GFID] == float("inf")
    expected = [measured(shown.images[number], reference) for number in (1, 3)]
    assert [seen[GFID] for seen in spy.seen[1:]] == pytest.approx(
        [expected[0][GFID], expected[0][GFID], expected[1][GFID]]
    )
    assert set(expected[1]) == NAMES
    for name, value in expected[1].items():
        assert float(trainer.callback_metrics[name]) == pytest.approx(value, rel=1e-5), name
    assert float(best.best_model_score) == pytest.approx(min(each[GFID] for each in expected), rel=1e-5)
    assert float(trainer.callback_metrics["fid_monitor/seconds"]) > 0
    assert module.sampler is None


def test_rejects_several_best_checkpoints_if_not_every_validation_measures(reference: Path) -> None:
    # Otherwise weights that were not measured would be ranked by an earlier measurement.
    def check(every: int, **options: Any) -> None:
        trainer: Any = SimpleNamespace(callbacks=[ModelCheckpoint(**options)])
        FIDMonitor(reference, Everything(), every_n_validations=every)._check_checkpoints(trainer)

    with pytest.raises(ValueError, match=f"the best 3 by {GFID}, .* once in 2 validations.*set save_top_k to 1"):
        check(2, monitor=GFID, save_top_k=3)
    check(1, monitor=GFID, save_top_k=3)
    check(2, monitor=GFID, save_top_k=1)
    check(2, monitor="val/loss", save_top_k=3)


def test_checkpoints_hold_the_number_of_validations_but_not_the_extractor(
    pipeline: Pipeline, reference: Path, tmp_path: Path
) -> None:
    monitor = FIDMonitor(reference, Everything(), count=11, every_n_validations=3)
    train(sampling_module(pipeline), pipeline, tmp_path, monitor, max_steps=6, val_check_interval=2, every=5)
    checkpoint = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert not any("linear" in name or "extractor" in name or "fid" in name for name in checkpoint["state_dict"])
    assert checkpoint["callbacks"]["FIDMonitor"] == {"validations": 2, "last": {}}
    resumed, spy = FIDMonitor(reference, Everything(), count=11, every_n_validations=3), Spy()
    train(
        sampling_module(pipeline, 1), pipeline, tmp_path / "more", resumed, spy,
        ckpt_path=tmp_path / "checkpoints/last.ckpt", max_steps=6, val_check_interval=2,
    )  # fmt: skip
    assert [set(seen) >= {GFID} and seen[GFID] < float("inf") for seen in spy.seen] == [True]
    assert set(resumed.state_dict()["last"]) == NAMES


def test_a_resumed_run_repeats_the_last_measurement(pipeline: Pipeline, reference: Path, tmp_path: Path) -> None:
    monitor, spy = FIDMonitor(reference, Everything(), count=11, every_n_validations=9), Spy()
    monitor.load_state_dict({"validations": 3, "last": {GFID: 3.5}})
    train(sampling_module(pipeline), pipeline, tmp_path, monitor, spy, max_steps=4, val_check_interval=2)
    assert spy.seen == [{GFID: 3.5}] * 2


@pytest.mark.parametrize("stored", [False, True])
def test_reconstructions_are_measured_against_the_images_themselves(
    stored: bool, pipeline: Pipeline, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    data = DigitsDataModule(pipeline.digits, image_size=SIZE, batch_size=64, num_workers=0)
    module = vqgan_module()
    stored_reference: Reference | None = None
    if stored:
        all_images = open_images(pipeline.digits, SIZE, "val")
        stored_reference = make_reference(all_images, Everything(), "digits-val", "reconstruction")
        stored_reference.save(tmp_path / "val.npz")
    monitor = FIDMonitor(tmp_path / "val.npz" if stored else None, Everything())
    results = evaluator(monitor, default_root_dir=tmp_path).test(module, data, verbose=False)[0]
    data.setup("validate")
    images = torch.cat([batch["images"] for batch in data.val_dataloader()])
    with torch.no_grad():
        found = to_uint8(module.eval().reconstruct(images))
    measurement = Measurement(Everything(), SIZE, "reconstruction", stored_reference)
    if not stored:
        measurement.update(to_uint8(images), real=True)
    measurement.update(found)
    expected = measurement.compute()
    name = "rfid_everything/digits-val" if stored else "rfid_everything/val"
    assert name in expected
    for each, value in expected.items():
        assert results[each] == pytest.approx(value.item(), rel=1e-3, abs=1e-6), each
    assert not [warning for warning in recwarn if "mix" in str(warning.message) or "rFID" in str(warning.message)]
    report = json.loads((tmp_path / "report/metrics.json").read_text())
    assert report["metrics"][name] == pytest.approx(results[name], rel=1e-6)
    assert {"test/psnr", "test/ssim"} <= set(report["metrics"])
    assert Image.open(tmp_path / "report/reconstructions.png").size[0] > 8 * SIZE


def test_reconstructions_are_resized_before_they_are_measured(
    pipeline: Pipeline, reference: Path, tmp_path: Path
) -> None:
    data = DigitsDataModule(pipeline.digits, image_size=16, batch_size=64, num_workers=0)
    module = vqgan_module()
    monitor = FIDMonitor(features=Everything(), image_size=SIZE)
    results = evaluator(monitor, default_root_dir=tmp_path).test(module, data, verbose=False)[0]
    data.setup("validate")
    images = torch.cat([batch["images"] for batch in data.val_dataloader()])
    with torch.no_grad():
        pair = (images, module.eval().reconstruct(images))
    small = [to_uint8(F.interpolate(each, size=(SIZE, SIZE), mode="bicubic")) for each in pair]
    measurement = Measurement(Everything(), SIZE, "reconstruction")
    measurement.update(small[0], real=True)
    measurement.update(small[1])
    name = "rfid_everything/val"
    assert results[name] == pytest.approx(measurement.compute()[name].item(), rel=1e-3)
    monitor = FIDMonitor(reference, Everything(), image_size=SIZE)
    with pytest.raises(ValueError, match=r"image_size of FIDMonitor is 8, .* set model.init_args.image_size instead"):
        evaluator(monitor, default_root_dir=tmp_path).test(
            sampling_module(pipeline), ClassRequestDataModule(10, 2, 8), verbose=False
        )


def test_rejects_a_folder_of_other_files_before_sampling(
    pipeline: Pipeline, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report/notes.txt").write_text("mine")
    trainer = evaluator(FIDMonitor(reference, Everything()), default_root_dir=tmp_path)
    module = sampling_module(pipeline)
    monkeypatch.setattr(ARGenModule, "test_step", lambda *_: pytest.fail("sampled"))
    with pytest.raises(ValueError, match="report exists and is not a report; move it away"):
        trainer.test(module, ClassRequestDataModule(10, 2, 8), verbose=False)


def test_warns_about_reconstructions_against_a_reference_for_generation(
    pipeline: Pipeline, reference: Path, tmp_path: Path
) -> None:
    data = DigitsDataModule(pipeline.digits, image_size=SIZE, batch_size=64, num_workers=0)
    trainer = evaluator(FIDMonitor(reference, Everything()), default_root_dir=tmp_path)
    with pytest.warns(UserWarning, match="reconstructions are compared with digits, a reference for generated images"):
        results = trainer.test(vqgan_module(), data, verbose=False)[0]
    assert "rfid_everything/digits" in results


def test_warns_about_generated_images_against_a_reference_for_reconstructions(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    path = tmp_path / "val.npz"
    make_reference(open_images(pipeline.digits, SIZE, "val"), Everything(), "val", "reconstruction").save(path)
    trainer = evaluator(FIDMonitor(path, Everything(), count=10), default_root_dir=tmp_path)
    with pytest.warns(UserWarning, match="generated images are compared with val, a reference for reconstructions"):
        trainer.test(sampling_module(pipeline), ClassRequestDataModule(10, 2, 8), verbose=False)


def test_arguments(pipeline: Pipeline, folder: Path, reference: Path) -> list[str]:
    """Arguments of ``test`` that samples three digits of each class."""
    return [
        *("test", *pipeline.sample_arguments(folder)[1:]),
        *("--config", "configs/argen/evaluate.yaml", f"--trainer.default_root_dir={folder}"),
        *(f"--trainer.callbacks.reference={reference}", f"--trainer.callbacks.features={EXTRACTOR}"),
        *("--data.init_args.per_class=3", "--data.init_args.batch_size=7", f"--ckpt_path={pipeline.argen}"),
    ]


test_arguments.__test__ = False  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def report(pipeline: Pipeline, reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the command ``test`` with one process."""
    folder = tmp_path_factory.mktemp("evaluation")
    main.main(test_arguments(pipeline, folder, reference))
    return folder / "report"


def test_test_measures_the_images_that_predict_samples(pipeline: Pipeline, report: Path, reference: Path) -> None:
    metrics = json.loads((report / "metrics.json").read_text())
    batches = list(open_images(pipeline.samples / "samples.npz").batches(100))
    expected = measured(torch.cat([batch.images for batch in batches]), reference)
    assert metrics["metrics"] == pytest.approx(expected, rel=1e-5)
    assert metrics["images"] == {"count": 30, "resolution": SIZE}
    assert metrics["reference"]["name"] == "digits"
    assert metrics["sampling"]["guidance_scale"] == SAMPLING.guidance_scale
    assert metrics["sampling"].keys() == {*IMAGE_SETTINGS, "seed"}


def test_a_report_has_metrics_the_papers_values_and_images(report: Path) -> None:
    assert {path.name for path in report.iterdir()} == {
        "metrics.json", "report.md", "random.png", "classes.png", "neighbours.png",
    }  # fmt: skip
    text = (report / "report.md").read_text()
    assert f"| {GFID} |" in text
    assert "| B, 384 px | 6.09 | 182.5 | 0.84 |" not in text
    assert "| B, 384 px | 6.09 | 182.5 | 0.85 | 0.42 |" in text
    assert Image.open(report / "classes.png").size[1] == 10 * (SIZE + 2) + 2


def test_two_processes_report_the_same_as_one(
    pipeline: Pipeline, report: Path, reference: Path, tmp_path: Path
) -> None:
    succeeds(two_processes(test_arguments(pipeline, tmp_path, reference)))
    one, two = (json.loads((folder / "metrics.json").read_text()) for folder in (report, tmp_path / "report"))
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-6)
    assert two["images"] == one["images"]
    for name in ("random.png", "classes.png", "neighbours.png"):
        assert (tmp_path / "report" / name).read_bytes() == (report / name).read_bytes()


def test_test_on_codes_measures_the_loss_and_samples(pipeline: Pipeline, reference: Path, tmp_path: Path) -> None:
    from datamodules import CodeDataModule

    monitor = FIDMonitor(reference, Everything(), count=13, batch_size=4)
    data = CodeDataModule(pipeline.codes, batch_size=50, num_workers=0)
    results = evaluator(monitor, default_root_dir=tmp_path).test(sampling_module(pipeline), data, verbose=False)[0]
    assert {"test/loss", *NAMES} <= set(results)
    assert json.loads((tmp_path / "report/metrics.json").read_text())["images"]["count"] == 13


def test_validate_always_measures(pipeline: Pipeline, reference: Path, tmp_path: Path) -> None:
    from datamodules import CodeDataModule

    monitor = FIDMonitor(reference, Everything(), count=12, every_n_validations=7)
    trainer = evaluator(EMA(), monitor, default_root_dir=tmp_path)
    results = trainer.validate(
        sampling_module(pipeline),
        CodeDataModule(pipeline.codes, num_workers=0),
        verbose=False,
        ckpt_path=pipeline.argen,
    )[0]
    assert set(results) >= NAMES


@pytest.mark.parametrize(
    ("make", "phrase"),
    [
        (lambda path: FIDMonitor(None, Everything()), "needs a reference to compare generated images with"),
        (lambda path: FIDMonitor(path, Projection()), "made with the extractor everything, not Projection"),
    ],
)
def test_rejects_impossible_measurements_before_training(
    make: Any, phrase: str, pipeline: Pipeline, reference: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=phrase):
        train(sampling_module(pipeline), pipeline, tmp_path, make(reference), max_steps=2)


def test_rejects_a_reference_of_another_resolution(pipeline: Pipeline, reference: Path, tmp_path: Path) -> None:
    module = argen_module(tokenizer=pipeline.tokenizer)
    module.image_size = 16
    with pytest.raises(ValueError, match="of images of 8 pixels, not 16"):
        train(module, pipeline, tmp_path, FIDMonitor(reference, Everything()), max_steps=2)


def test_warns_about_fewer_images_than_classes(pipeline: Pipeline, reference: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="only of the first 7 of 10 classes; set count to a multiple"):
        FIDMonitor(reference, Everything(), count=7).setup(
            evaluator(default_root_dir=tmp_path), sampling_module(pipeline), "fit"
        )


def test_rejects_an_extractor_for_another_size_before_training(pipeline: Pipeline, tmp_path: Path) -> None:
    monitor = FIDMonitor(features=Projection(), every_n_validations=99)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        train(vqgan_module(), pipeline, tmp_path, monitor, max_steps=2, image_size=16)
    assert not (tmp_path / "checkpoints").exists()


def test_a_run_resumed_with_another_reference_logs_the_new_name(
    pipeline: Pipeline, reference: Path, tmp_path: Path
) -> None:
    monitor, spy = FIDMonitor(reference, Everything(), count=11, every_n_validations=9), Spy()
    monitor.load_state_dict({"validations": 3, "last": {"gfid_everything/other": 3.5}})
    train(sampling_module(pipeline), pipeline, tmp_path, monitor, spy, max_steps=2, val_check_interval=2)
    assert spy.seen[0][GFID] == float("inf")


@pytest.mark.parametrize("options", [{"count": 1}, {"every_n_validations": 0}, {"batch_size": 0}])
def test_rejects_invalid_options(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="they must be at least 2, 1 and 1"):
        FIDMonitor(**options)


def test_the_error_without_inception_weights_names_the_file(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr("llamagen.published_weights.download_url_to_file", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with pytest.raises(ValueError, match=r"weights-inception-2015-12-05-6726825d\.pth"):
        train(vqgan_module(), pipeline, tmp_path, FIDMonitor(), max_steps=2)
