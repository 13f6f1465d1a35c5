"""FIDMonitor measures images generated from captions, during the training of a text model and in ``test``."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import Tensor

import main
from callbacks import EMA, CompiledSampling, FIDMonitor
from datamodules import CodeDataModule, PromptDataModule
from datamodules.storage.shards import CODES_FORMAT, ShardDataset
from evaluation.image_sets import open_images
from evaluation.measurement import Measurement
from evaluation.reference import make_reference, read_reference
from lightning_modules import AdamWConfig, ARGenModule
from llamagen.checkpoints.contents import describe, load_vqgan, weights_checksum
from llamagen.models.gpt import GPTConfig
from llamagen.models.vqgan import VQGAN, VQGANConfig
from llamagen.sampling import SamplingConfig
from llamagen.text import CaptionEncoder, TextEncoderConfig, pad_left
from tests.datamodules.code_datasets import codes_of, npy
from tests.evaluation.sets import write_npz
from tests.golden import fill
from tests.lightning_modules.runs import evaluator
from tests.metrics.extractors import SIZE, Everything
from tests.pipeline import GPT_NET, TOKENIZER_NET
from tests.ranks import main_ended, succeeds
from tests.tiny_t5 import WIDTH, WORDS, save_tiny_t5

GFID = "gfid_everything/some"
NAMES = {
    GFID,
    *(f"{name}_everything/some" for name in ("gsfid", "precision", "recall", "gkid", "gkid_std")),
    *(f"{name}_everything" for name in ("inception_score", "inception_score_std")),
}
VAL, POSITIONS, SEED = 14, 6, 5
BROKEN = (2, 4)
"""Both belong to the first of two ranks, which then samples fewer images than the other."""
NET = {**GPT_NET, "condition": "text", "caption_dim": WIDTH, "caption_length": POSITIONS}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics of some images."""
    folder = tmp_path_factory.mktemp("references")
    images = open_images(write_npz(folder / "images.npz", 60, seed=0))
    make_reference(images, Everything(), "some").save(folder / "some.npz")
    return folder / "some.npz"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of an image tokenizer."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.ckpt"
    vqgan = fill(VQGAN(VQGANConfig(**TOKENIZER_NET)))
    state = {f"vqgan.{name}": value for name, value in vqgan.state_dict().items()}
    torch.save({"llamagen": describe(vqgan, "vqgan."), "state_dict": state}, path)
    return path


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small encoder."""
    return save_tiny_t5(tmp_path_factory.mktemp("t5"))


def caption(number: int) -> str:
    """A unique caption for validation example ``number``."""
    return f"a {WORDS[number % len(WORDS)]} on the {WORDS[-1 - number // 4]} house" if number % 3 else WORDS[number]


def stored(number: int) -> Tensor:
    """The features of validation example ``number``, (n, W)."""
    generator = torch.Generator().manual_seed(number)
    return torch.randn(number % POSITIONS + 1, WIDTH, generator=generator).bfloat16()


def write_set(root: Path, tokenizer: Path, features: bool, broken: Collection[int] = ()) -> Path:
    """Write codes with captions, and their features if ``features``."""
    shards = ShardDataset(root, {}, hint="")
    shards.begin(("train", "val"))
    for split, count in (("train", 8), ("val", VAL)):
        with shards.shard(split, 0) as writer:
            for number in range(count):
                parts = {"npy": npy(codes_of(number, grid=(4, 4), vocabulary=32)), "txt": caption(number).encode()}
                if features:
                    bits = stored(number).view(torch.uint16).numpy().astype("<u2").tobytes()
                    parts["features"] = bits[:-1] if split == "val" and number in broken else bits
                writer.write(f"{split}/{number}", parts)
    checksum = weights_checksum(load_vqgan(tokenizer))
    meta: dict[str, Any] = {"format": CODES_FORMAT, "vocabulary": 32, "grid": [4, 4], "views": 1, "tokenizer": checksum}
    facts = {"encoder": "t5", "width": WIDTH, "caption_length": POSITIONS, "dtype": "bfloat16", "short": False}
    more = {"encoder_dtype": "bfloat16", "weights": "1" * 64, "tokenizer": "2" * 64, "cleaned": False}
    meta |= {"features": facts | more} if features else {}
    shards.finish({"train": 1, "val": 1}, meta, rejected={}, max_bad_share=0.0)
    return root


@pytest.fixture(scope="module")
def codes(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Codes with stored features."""
    return write_set(tmp_path_factory.mktemp("codes") / "set", tokenizer, features=True)


def text_module(tokenizer: Path, t5: Path | None = None) -> ARGenModule:
    pl.seed_everything(0, verbose=False)
    encoder = TextEncoderConfig("nobody/has-this" if t5 is None else str(t5), "float32")
    config = SamplingConfig(guidance_scale=2.0)
    module = ARGenModule(GPTConfig(**NET), AdamWConfig(lr=1e-3), config, tokenizer=tokenizer, text_encoder=encoder)
    with torch.no_grad():  # a new model's head is zero
        module.gpt.output.weight.normal_(std=0.5)
    return module


def data_of(codes: Path, **options: Any) -> CodeDataModule:
    return CodeDataModule(codes, **{"batch_size": 4, "num_workers": 0, **options})


def train(
    module: ARGenModule, data: CodeDataModule, folder: Path, *callbacks: pl.Callback, **options: Any
) -> pl.Trainer:
    """Fit on one CPU process, with averages."""
    trainer = pl.Trainer(
        accelerator="cpu", default_root_dir=folder, logger=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, callbacks=[EMA(0.9), *callbacks], **options,
    )  # fmt: skip
    trainer.fit(module, data)
    return trainer


class Measured:
    """Records the measured images by number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images: dict[int, Tensor] = {}
        update = Measurement.update

        def record(measurement: Measurement, images: Tensor, index: Tensor, real: bool = False) -> Any:
            for number, image in zip(index.tolist(), images, strict=True):
                assert number not in self.images
                self.images[number] = image.clone()
            return update(measurement, images, index, real)

        monkeypatch.setattr(Measurement, "update", record)


def sampled(module: ARGenModule, features: list[Tensor], index: list[int], seed: int) -> Tensor:
    """Images (B, 3, H, W) that the module generates from features (n, W)."""
    lengths = torch.tensor([len(each) for each in features])
    padded = torch.stack([torch.nn.functional.pad(each, (0, 0, 0, POSITIONS - len(each))) for each in features])
    return module.sample(pad_left(padded, lengths), torch.tensor(index), seed, lengths)[0].permute(0, 3, 1, 2)


class Shown(pl.Callback):
    """Samples at the end of a validation the images that the monitor should sample."""

    def __init__(self, index: list[int], size: int = VAL) -> None:
        self.index, self.size = index, size
        self.images: list[dict[int, Tensor]] = []

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        features = [stored(number % self.size) for number in self.index]
        images = sampled(pl_module, features, self.index, SEED)
        self.images.append(dict(zip(self.index, images, strict=True)))


def assert_equal(found: dict[int, Tensor], wanted: dict[int, Tensor]) -> None:
    assert sorted(found) == sorted(wanted)
    for number, image in wanted.items():
        assert torch.equal(found[number], image), number


def metrics_of(images: dict[int, Tensor], reference: Path) -> dict[str, float]:
    measurement = Measurement(Everything(), SIZE, "generation", read_reference(reference))
    measurement.update(torch.stack([images[number] for number in sorted(images)]), torch.arange(len(images)))
    return {name: value.item() for name, value in measurement.compute().items()}


def assert_same_metrics(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Compare all metrics but KID's deviation, which is only rounding if each subset contains all images."""
    assert set(found) >= NAMES
    for name in NAMES - {"gkid_std_everything/some"}:
        assert float(found[name]) == pytest.approx(float(wanted[name]), rel=1e-5), name


def test_measures_images_of_the_captions_of_the_validation_data(
    tokenizer: Path, reference: Path, codes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monitor = FIDMonitor(reference, Everything(), count=11, every_n_validations=2, seed=SEED)
    best = ModelCheckpoint(tmp_path / "best", monitor=GFID, save_on_train_epoch_end=False)
    shown, module = Shown(list(range(11))), text_module(tokenizer)
    monkeypatch.setattr("llamagen.text.condition.CaptionEncoder", lambda *_: pytest.fail("loaded"))
    measured = Measured(monkeypatch)
    trainer = train(
        module, data_of(codes), tmp_path, shown, CompiledSampling(enabled=False, batch_size=6), monitor, best,
        max_steps=4, val_check_interval=2, check_val_every_n_epoch=None,
    )  # fmt: skip
    monkeypatch.undo()
    assert_equal(measured.images, shown.images[-1])
    expected = metrics_of(measured.images, reference)
    assert_same_metrics(trainer.callback_metrics, expected)
    assert float(best.best_model_score) == pytest.approx(expected[GFID], rel=1e-5)
    assert module.sampler is None


@pytest.mark.parametrize(
    ("count", "batches", "index", "size"),
    [
        pytest.param(11, 1.0, range(11), VAL, id="fewer than captions"),
        pytest.param(14, 1.0, range(14), VAL, id="one of each caption"),
        pytest.param(30, 1.0, range(30), VAL, id="more than captions"),
        pytest.param(12, 2, range(12), 8, id="more than captions of the batches"),
    ],
)
def test_captions_are_repeated_in_order(
    count: int,
    batches: float,
    index: range,
    size: int,
    tokenizer: Path,
    reference: Path,
    codes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    measured, shown = Measured(monkeypatch), Shown(list(index), size)
    monitor = FIDMonitor(reference, Everything(), count=count, seed=SEED, batch_size=7)
    trainer = evaluator(shown, monitor, default_root_dir=tmp_path, limit_val_batches=batches)
    results = trainer.validate(text_module(tokenizer), data_of(codes), verbose=False)[0]
    assert set(results) >= NAMES
    assert_equal(measured.images, shown.images[0])
    warned = [str(warning.message).split(";")[0] for warning in recwarn if "which are repeated" in str(warning.message)]
    several = f"FIDMonitor samples {count} images from only {size} captions, which are repeated"
    assert warned == ([several] if count > size else [])


def test_unreadable_captions_leave_a_gap(
    tokenizer: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_of(write_set(tmp_path / "set", tokenizer, features=True, broken=BROKEN), max_bad_share=0.2)
    index = [number for number in range(20) if number % VAL not in BROKEN]
    measured, shown = Measured(monkeypatch), Shown(index)
    trainer = evaluator(shown, FIDMonitor(reference, Everything(), 20, seed=SEED), default_root_dir=tmp_path)
    trainer.validate(text_module(tokenizer), data, verbose=False)
    assert_equal(measured.images, shown.images[0])


def test_test_on_codes_samples_their_captions_and_shows_them(
    tokenizer: Path, reference: Path, t5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = write_set(tmp_path / "set", tokenizer, features=False)
    measured, module = Measured(monkeypatch), text_module(tokenizer, t5)
    trainer = evaluator(FIDMonitor(reference, Everything(), count=10, seed=SEED), default_root_dir=tmp_path)
    results = trainer.test(module, data_of(codes), verbose=False)[0]
    assert {"test/loss", *NAMES} <= set(results)
    encoded = CaptionEncoder(t5, POSITIONS, "float32")([caption(number) for number in range(10)])
    features = [each[:length] for each, length in zip(encoded.features, encoded.lengths.tolist(), strict=True)]
    images = sampled(module, features, list(range(10)), SEED)
    assert_equal(measured.images, dict(enumerate(images)))
    assert_captioned(tmp_path, 10)


def assert_captioned(folder: Path, images: int) -> None:
    """A report shows captions below images, names the text encoder, and has no values of the paper."""
    assert {path.name for path in (folder / "report").iterdir()} == {
        "metrics.json", "report.md", "random.png", "neighbours.png",
    }  # fmt: skip
    grid = np.asarray(Image.open(folder / "report/random.png"))
    assert grid.shape[1] > min(images, 8) * 192
    assert grid.shape[0] > 192 + 2 * 12
    facts = json.loads((folder / "report/metrics.json").read_text())
    assert facts["captions"]["width"] == WIDTH
    assert "384 px" not in (folder / "report/report.md").read_text()


def test_test_with_prompts_measures_the_images_that_predict_samples(
    tokenizer: Path, reference: Path, t5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "captions.tsv"
    table.write_text("id\tcaption\n" + "".join(f"{number}\t{caption(number)}\n" for number in range(VAL)))
    measured, module = Measured(monkeypatch), text_module(tokenizer, t5)
    data = PromptDataModule(table, per_prompt=2, batch_size=5, column="caption")
    batches: Any = evaluator().predict(module, data)
    expected = {
        number: image
        for batch in batches
        for number, image in zip(
            batch["index"].tolist(), batch["images"].tensor().permute(0, 3, 1, 2).clone(), strict=True
        )
    }
    trainer = evaluator(FIDMonitor(reference, Everything()), default_root_dir=tmp_path)
    results = trainer.test(module, data, verbose=False)[0]
    monkeypatch.undo()
    assert len(expected) == 2 * VAL
    assert_equal(measured.images, expected)
    assert_same_metrics(results, metrics_of(expected, reference))
    assert_captioned(tmp_path, 2 * VAL)
    assert json.loads((tmp_path / "report/metrics.json").read_text())["images"]["count"] == 2 * VAL


@pytest.mark.slow
def test_the_report_is_the_same_on_any_number_of_processes(tokenizer: Path, reference: Path, tmp_path: Path) -> None:
    """Includes ranks with unequal numbers of captions, and ranks that wait for each other in each step."""
    codes = write_set(tmp_path / "set", tokenizer, features=True, broken=BROKEN)
    keep = ModelCheckpoint(tmp_path, filename="text")
    train(text_module(tokenizer), data_of(codes, max_bad_share=0.2), tmp_path, keep, max_steps=2, limit_val_batches=0)
    monitor = {"reference": str(reference), "features": "tests.metrics.extractors.Everything"}
    monitor |= {"count": 20, "batch_size": 2}  # 3 batches of one rank and 5 of the other
    callbacks = [{"class_path": "EMA"}, {"class_path": "FIDMonitor", "init_args": monitor}]
    config = {"trainer": {"logger": False, "enable_checkpointing": False, "callbacks": callbacks}}
    (tmp_path / "monitor.yaml").write_text(json.dumps(config))
    arguments = [
        *("test", "--config", "configs/argen/base.yaml", "--config", "configs/argen/t2i_stage1.yaml"),
        *("--config", f"{tmp_path / 'monitor.yaml'}", "--trainer.accelerator=cpu", "--trainer.precision=32-true"),
        *(f"--model.init_args.net.{key}={value}" for key, value in NET.items()),
        *(f"--model.init_args.tokenizer={tokenizer}", f"--ckpt_path={tmp_path / 'text.ckpt'}"),
        *(f"--data.init_args.root={codes}", "--data.init_args.num_workers=0"),
        *("--data.init_args.batch_size=1", "--data.init_args.max_bad_share=0.2"),
        *(
            "--data.init_args.clean_captions=false",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
        ),
    ]
    found = {}
    for name in ("one", "ddp", "sharded"):
        command = [*arguments, f"--trainer.default_root_dir={tmp_path / name}"]
        if name == "one":
            main.main(command)
        else:
            succeeds(main_ended([*command, "--trainer.devices=2", f"--trainer.strategy={name}"], ranks=2))
        found[name] = json.loads((tmp_path / name / "report/metrics.json").read_text())
    assert found["one"]["images"]["count"] == 16
    for name in ("ddp", "sharded"):
        assert found[name]["images"] == found["one"]["images"]
        assert_same_metrics(found[name]["metrics"], found["one"]["metrics"])
