"""``FIDMonitor`` measures, logs and reports metrics that it does not name."""

import json
from pathlib import Path

import pytest
from jsonargparse import ArgumentError, ArgumentParser

from callbacks import FIDMonitor
from datamodules import DigitsDataModule
from evaluation.image_sets import open_images
from evaluation.reference import make_reference
from llamagen.metrics import FID
from tests.lightning_modules.runs import evaluator, vqgan_module
from tests.metrics.brightness import Brightness
from tests.metrics.extractors import SIZE, Everything
from tests.pipeline import Pipeline

NAMES = {"rbrightness_everything/val-digits", "brightness_max_everything"}


def test_logs_and_reports_a_further_metric(pipeline: Pipeline, tmp_path: Path) -> None:
    images = open_images(pipeline.digits, SIZE, "val")
    make_reference(images, Everything(), "val-digits", "reconstruction").save(tmp_path / "val.npz")
    monitor = FIDMonitor(tmp_path / "val.npz", Everything(), extra_metrics=[Brightness])
    data = DigitsDataModule(pipeline.digits, image_size=SIZE, batch_size=64, num_workers=0)
    logged = evaluator(monitor, default_root_dir=tmp_path).test(vqgan_module(), data, verbose=False)[0]
    assert set(logged) >= NAMES
    assert set(monitor.metric_names()) >= {"rfid_everything/val-digits", *NAMES}
    report = json.loads((tmp_path / "report/metrics.json").read_text())["metrics"]
    text = (tmp_path / "report/report.md").read_text()
    for name in NAMES:
        assert report[name] == pytest.approx(logged[name], rel=1e-6)
        assert f"| {name} |" in text


def test_takes_class_paths_of_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(FIDMonitor, "monitor")
    options = ["--monitor=callbacks.FIDMonitor", "--monitor.features=tests.metrics.extractors.Everything"]
    path = "tests.metrics.brightness.Brightness"
    monitor = parser.instantiate_classes(parser.parse_args([*options, f"--monitor.extra_metrics=[{path}]"])).monitor
    assert monitor.metrics[-1] is Brightness
    for wrong in ("tests.metrics.extractors.Everything", "tests.metrics.brightness.Missing"):
        with pytest.raises(ArgumentError, match="extra_metrics"):
            parser.parse_args([*options, f"--monitor.extra_metrics=[{wrong}]"])


def test_rejects_a_metric_that_is_measured_already() -> None:
    with pytest.raises(ValueError, match="two metrics are named fid or report fid; give FID symbols of its own"):
        FIDMonitor(features=Everything(), extra_metrics=[FID])
