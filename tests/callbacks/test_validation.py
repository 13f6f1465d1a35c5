"""Validation of averages and of raw weights, and the loss of each position."""

import csv
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from torch.nn import functional as F

from callbacks import EMA, LearningCurves, PositionLoss
from callbacks.figures import new_figure
from callbacks.positions import position_image
from datamodules import CodeDataModule
from tests.lightning_modules.runs import argen_module, evaluator, train, vqgan_module
from tests.pipeline import Pipeline

METRICS = ("loss", "perplexity", "top1", "top5")


def validated(
    module: pl.LightningModule, pipeline: Pipeline, *callbacks: pl.Callback, **options: Any
) -> dict[str, Any]:
    (metrics,) = evaluator(*callbacks, limit_val_batches=2).validate(
        module,
        CodeDataModule(pipeline.codes, batch_size=50, num_workers=0),
        verbose=False,
        weights_only=True,
        **options,
    )
    return dict(metrics)


def test_averages_and_raw_weights_are_validated(pipeline: Pipeline, tmp_path: Path) -> None:
    trainer = train(
        argen_module(),
        pipeline,
        tmp_path,
        callbacks=[EMA(0.9, validate_raw=True), ModelCheckpoint(tmp_path, save_last=True)],
        max_steps=6,
        val_check_interval=6,
        limit_val_batches=2,
        batch_size=50,
    )
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    averages = validated(argen_module(1), pipeline, EMA(), ckpt_path=tmp_path / "last.ckpt")
    weights = validated(argen_module(1), pipeline, ckpt_path=tmp_path / "last.ckpt")
    for name in METRICS:
        assert logged[f"val/{name}"] == pytest.approx(averages[f"val/{name}"], rel=1e-5)
        assert logged[f"val_raw/{name}"] == pytest.approx(weights[f"val/{name}"], rel=1e-5)
    assert logged["val/loss"] != pytest.approx(logged["val_raw/loss"], rel=1e-4)


def test_by_default_only_the_averages_are_validated(pipeline: Pipeline, tmp_path: Path) -> None:
    trainer = train(argen_module(), pipeline, tmp_path, max_steps=2, val_check_interval=2)
    assert not any(name.startswith("val_raw") for name in trainer.callback_metrics)


def test_validating_twice_changes_no_weight(pipeline: Pipeline, tmp_path: Path) -> None:
    states = []
    for flag in (False, True):
        module = argen_module()
        train(
            module, pipeline, tmp_path / str(flag), callbacks=[EMA(0.9, validate_raw=flag)], max_steps=4,
            val_check_interval=2, enable_checkpointing=False,
        )  # fmt: skip
        states.append(module.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_rejects_validate_raw_for_a_module_without_evaluate() -> None:
    with pytest.raises(ValueError, match="VQGANModule has no evaluate; set validate_raw to false"):
        EMA(validate_raw=True).setup(cast(pl.Trainer, None), vqgan_module(), "fit")
    EMA().setup(cast(pl.Trainer, None), vqgan_module(), "fit")


def test_the_loss_of_each_position_is_plotted_and_written(pipeline: Pipeline, tmp_path: Path) -> None:
    module = argen_module()
    module.gpt.output.weight.data.normal_(std=0.5)
    trainer = evaluator(PositionLoss(), default_root_dir=tmp_path)
    data = CodeDataModule(pipeline.codes, batch_size=64, num_workers=0)
    trainer.validate(module, data, verbose=False)
    (table,) = (tmp_path / "positions").glob("*.csv")
    rows = list(csv.DictReader(table.open()))
    module.eval()
    total, count = torch.zeros(16), 0
    for batch in data.val_dataloader():
        with torch.no_grad():
            logits = module(batch["codes"], batch["condition"])
        total += F.cross_entropy(logits.transpose(1, 2), batch["codes"], reduction="none").sum(0)
        count += len(batch["codes"])
    torch.testing.assert_close(torch.tensor([float(row["val"]) for row in rows]), total / count, rtol=1e-4, atol=1e-5)
    assert [(int(row["row"]), int(row["column"])) for row in rows] == [(n // 4, n % 4) for n in range(16)]
    assert float((total / count).std()) > 0.01
    image = np.array(Image.open(table.with_suffix(".png")))
    assert image.std() > 10
    trainer.test(module, data, verbose=False)
    assert next(csv.reader(table.open())) == ["position", "row", "column", "test"]


def test_the_figure_depends_on_the_values() -> None:
    easy, hard = np.zeros(16), np.zeros(16)
    hard[5] = 3.0
    assert np.array(position_image({"val": easy})).shape == np.array(position_image({"val": hard})).shape
    assert (np.array(position_image({"val": easy})) != np.array(position_image({"val": hard}))).any()
    assert position_image({"val": easy, "val_raw": hard}).height > 1.5 * position_image({"val": easy}).height


def test_rejects_a_module_that_predicts_no_codes() -> None:
    with pytest.raises(ValueError, match="VQGANModule has no nats_by_position; remove PositionLoss"):
        PositionLoss().setup(cast(pl.Trainer, None), vqgan_module(), "fit")


def test_curves_hold_averages_and_raw_weights(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curves, plots = LearningCurves(), []
    monkeypatch.setattr("callbacks.curves.new_figure", lambda *size: plots.append(size) or new_figure(*size))
    train(
        argen_module(), pipeline, tmp_path, callbacks=[EMA(0.9, validate_raw=True), curves], max_steps=2,
        val_check_interval=2, enable_checkpointing=False, logger=CSVLogger(tmp_path),
    )  # fmt: skip
    assert {"val/loss", "val_raw/loss"} <= curves.state_dict()["history"].keys()
    assert len(plots) == 1, "plotted again at the end of the run, which adds nothing"
    assert (tmp_path / "curves.png").exists()


def test_a_resumed_run_continues_its_curves(pipeline: Pipeline, tmp_path: Path) -> None:
    curves = LearningCurves()
    before = {"val/loss": [[2.0, 3.5]], "train/loss": [[1.0, 3.75]]}
    curves.load_state_dict({"history": before})
    train(
        argen_module(), pipeline, tmp_path, callbacks=[EMA(0.9), curves], max_steps=1, val_check_interval=1,
        enable_checkpointing=False,
    )  # fmt: skip
    history = curves.state_dict()["history"]
    assert history["val/loss"][0] == [2.0, 3.5]
    assert [batches for batches, _ in history["val/loss"]] == [2.0, 1.0]
    assert history["train/loss"] == [[1.0, 3.75]]
