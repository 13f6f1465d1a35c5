"""``python -m evaluation`` compares two datasets of images without a model; errors are one line."""

import json
import runpy
import sys
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.__main__ import compare, main, reference
from evaluation.image_sets import ImageBatch, ImageSet, open_images
from evaluation.measurement import Measurement
from evaluation.reference import make_reference, read_reference
from llamagen.metrics import extract
from llamagen.metrics.classifier import Classifier
from tests.evaluation.refusals import fails, refusal
from tests.evaluation.sets import (
    ADM_FILE,
    EVERYTHING,
    FAKE_INCEPTION,
    FakeInception,
    write_adm,
    write_classifier,
    write_folder,
    write_npz,
)
from tests.metrics.extractors import SIZE, Everything, random_images

NAMES = {
    *(f"{name}_everything/real" for name in ("gfid", "gsfid", "gkid", "gkid_std", "precision", "recall")),
    *(f"{name}_everything" for name in ("inception_score", "inception_score_std")),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images as folders, arrays and statistics."""
    root = tmp_path_factory.mktemp("images")
    for name, count, seed in (("real", 30, 0), ("fake", 40, 1)):
        write_folder(root / name, count, seed)
        write_npz(root / f"{name}.npz", count, seed, np.arange(count) % 3)
    make_reference(open_images(root / "real"), Everything(), "real").save(root / "statistics.npz")
    Image.new("RGB", (16, 16)).save(write_folder(root / "larger", 0, 0) / "a.png")
    Image.new("RGB", (16, 16)).save(root / "larger" / "b.png")
    write_folder(root / "one", 1, 0)
    (root / "empty").mkdir()
    (root / "folder.npz").mkdir()
    np.savez(root / "others.npz", images=np.zeros((3, 8, 8, 3), np.uint8))
    np.savez(root / "float.npz", arr_0=np.zeros((3, 8, 8, 3)))
    (root / "text.npz").write_text("no images")
    write_adm(root)
    return root


def numbers(printed: str) -> dict[str, float]:
    """Values of the table that the command prints."""
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    return {name: float(value) for name, value in rows[2:]}


@pytest.mark.parametrize(("fake", "real"), [("fake", "real.npz"), ("fake.npz", "real"), ("fake", "statistics.npz")])
def test_compare_gives_the_results_of_a_measurement(
    fake: str, real: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report"
    main(["compare", str(root / fake), str(root / real), EVERYTHING, f"--report={report}", "--batch_size=7"])
    measurement = Measurement(Everything(), SIZE, "generation", read_reference(root / "statistics.npz"))
    measurement.update(random_images(40, 1))
    expected = {name: value.item() for name, value in measurement.compute().items()}
    assert set(expected) == NAMES
    content = json.loads((report / "metrics.json").read_text())
    for found in (expected, content["metrics"]):  # all subsets are the whole: what differs is rounding
        assert found.pop("gkid_std_everything/real") < 1e-9 * found["gkid_everything/real"]
    assert content["metrics"] == pytest.approx(expected, rel=1e-5, abs=1e-9)
    shown = capsys.readouterr()
    printed = numbers(shown.out)
    assert set(printed) == NAMES
    assert {name: printed[name] for name in expected} == pytest.approx(expected, rel=1e-3)
    assert f"report: {report / 'report.md'}" in shown.out
    assert "40/40" in shown.err
    assert "warning" not in shown.err
    found = open_images(root / fake)
    list(found.batches(50))
    assert content["images"] == {
        "source": str(root / fake), "count": 40, "resolution": SIZE, "crop": "none", "checksum": found.checksum(),
    }  # fmt: skip
    assert content["reference"] == {
        **read_reference(root / "statistics.npz").facts(),
        "source": str(root / ("real" if real == "statistics.npz" else real)),
    }
    grids = {"random.png", "neighbours.png"} | ({"classes.png"} if fake == "fake.npz" else set())
    assert {path.name for path in report.iterdir()} == {"metrics.json", "report.md", *grids}


def test_a_dataset_has_distance_zero_from_itself(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for real in ("fake", "fake.npz"):
        compare(str(root / "fake.npz"), str(root / real), Everything())
        found = numbers(capsys.readouterr().out)
        assert found["gfid_everything/fake"] == pytest.approx(0, abs=1e-6)
        assert found["gsfid_everything/fake"] == pytest.approx(0, abs=1e-6)
        assert found["precision_everything/fake"] == found["recall_everything/fake"] == 1


def test_the_reference_can_be_given_a_name(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["compare", str(root / "fake"), str(root / "real"), EVERYTHING, "--reference_name=mine"])
    assert "gfid_everything/mine" in numbers(capsys.readouterr().out)
    found = compare(str(root / "fake"), str(root / "statistics.npz"), Everything(), reference_name="mine")
    assert "gfid_everything/mine" in found
    folder = write_folder(tmp_path / "version 1.5", 5, 0)
    assert "gfid_everything/version_1.5" in compare(str(root / "real"), str(folder), Everything())


def test_reconstructions_have_their_own_names(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["compare", str(root / "real.npz"), str(root / "real"), EVERYTHING, "--reconstructions=true"])
    shown = capsys.readouterr()
    found = numbers(shown.out)
    assert found["rfid_everything/real"] == pytest.approx(0, abs=1e-6)
    assert not any("inception" in name for name in found)
    assert "warning" not in shown.err


def test_warns_of_a_reference_for_another_purpose(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "val.npz"
    main(["reference", str(root / "real"), str(out), EVERYTHING, "--purpose=reconstruction"])
    assert f"{out}: 30 images of 8 px, for reconstruction, named val" in capsys.readouterr().out
    for fake, real, reconstructions, phrase in (
        ("real", root / "statistics.npz", True, "real, a reference for generated images"),
        ("fake", out, False, "val, a reference for reconstructions"),
        ("fake", out, True, "40 reconstructions are compared with val, a reference of 30"),
        ("fake", root / "real", True, "40 reconstructions are compared with real"),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # there is no other warning
            compare(str(root / fake), str(real), Everything(), reconstructions=reconstructions)
        (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
        assert phrase in warning


def test_lists_what_is_not_measured(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["compare", str(root / "fake"), str(root / "real"), "--features=tests.metrics.extractors.Projection"])
    shown = capsys.readouterr()
    assert "sfid" not in shown.out
    assert [line for line in shown.err.splitlines() if line.startswith("warning: ")] == [
        "warning: not measured: sfid, because the extractor Projection gives no spatial features; inception_score, "
        "because the extractor Projection gives no logits"
    ]


def test_compares_with_a_reference_of_adm_and_adds_its_features(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["compare", str(root / "fake"), str(root / ADM_FILE), FAKE_INCEPTION])
    found = numbers(capsys.readouterr().out)
    with np.load(root / ADM_FILE) as file:
        mean, covariance = file["mu"], file["sigma"]
    rows = extract(FakeInception().eval(), random_images(40, 1)).pool.double().numpy()
    roots = np.sqrt(np.linalg.eigvals(covariance @ np.cov(rows, rowvar=False)).real.clip(0))
    expected = np.square(mean - rows.mean(0)).sum() + np.trace(covariance + np.cov(rows, rowvar=False)) - 2 * sum(roots)
    assert found["gfid/imagenet256-adm"] == pytest.approx(expected, rel=1e-3)
    assert {"gsfid/imagenet256-adm", "precision/imagenet256-adm", "inception_score"} <= set(found)
    reference(str(root / ADM_FILE), tmp_path / "adm.npz", features=FakeInception())
    assert "an unknown number of images of 8 px, for generation, named adm" in capsys.readouterr().out
    compare(str(root / "fake"), str(tmp_path / "adm.npz"), FakeInception())
    again = numbers(capsys.readouterr().out)
    assert {name.replace("/adm", "/imagenet256-adm"): value for name, value in again.items()} == found


@pytest.mark.filterwarnings("ignore:30 images are fewer than the 32 features")
def test_a_classifier_can_replace_inception(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, out = write_classifier(tmp_path / "c.safetensors", 0), tmp_path / "train.npz"
    features = ["--features=Classifier", f"--features.weights={weights}"]
    reference(str(root / "real"), out, features=Classifier(weights))
    main(["compare", str(root / "fake"), str(out), *features])
    found = numbers(capsys.readouterr().out)
    assert {"gfid_shapes/train", "gsfid_shapes/train", "recall_shapes/train", "inception_score_shapes"} <= set(found)
    again = compare(str(root / "real"), str(root / "real.npz"), Classifier(weights))
    assert again["gfid_shapes/real"] == pytest.approx(0, abs=1e-6)
    write_classifier(weights, 1)
    message = refusal(capsys, compare, str(root / "fake"), str(out), Classifier(weights))
    assert "the reference train was made with other weights of shapes" in message


REFUSED: dict[str, tuple[list[str], list[str]]] = {
    "nothing": ([], ["one of {compare,reference,classifier,clip}", "python -m evaluation --help"]),
    "another command": (["compair"], ["invalid choice: 'compair'"]),
    "no reference": (["compare", "fake"], ["required", "reference"]),
    "a third set": (["compare", "fake", "real", "real"], ["unrecognized arguments", "compare --help"]),
    "an abbreviation": (["compare", "fake", "real", "--batch=3"], ["unrecognized arguments: --batch=3"]),
    "no number": (["compare", "fake", "real", "--batch_size=x"], ["batch_size", "int", "x"]),
    "another split": (["compare", "fake", "real", "--split=test"], ["split", "'train', 'val'", "test"]),
    "no class": (["compare", "fake", "real", "--features=tests.metrics.extractors.No"], ["attribute 'No'"]),
    "no module": (["compare", "fake", "real", "--features=nowhere.No"], ["No module named 'nowhere'"]),
    "no extractor": (["compare", "fake", "real", "--features=datetime.date"], ["datetime.date", "Module"]),
    "no weights": (["compare", "fake", "real", "--features=Classifier"], ["required", "weights"]),
    "missing weights": (
        ["compare", "fake", "real", "--features=Classifier", "--features.weights=no.safetensors"],
        ["there is no classifier no.safetensors; train one with python -m evaluation classifier"],
    ),
    "no config": (["compare", "fake", "real", "--config=no.yaml"], ["no.yaml"]),
    "no images": (["compare", "missing", "real", EVERYTHING], ["missing does not exist"]),
    "no purpose": (["reference", "real", "out.npz", "--purpose=no"], ["'generation', 'reconstruction'", "no"]),
    "a file for a folder": (["reference", "real", "text.npz/out.npz", EVERYTHING], ["text.npz"]),
}
NOT_COMPARED: dict[str, tuple[str, str, dict[str, Any], list[str]]] = {
    "no batch": ("fake", "real", {"batch_size": 0}, ["batch_size is 0; it must be at least 1"]),
    "a split of none": ("fake", "real", {"split": "val"}, ["leave split val out"]),
    "a split of statistics": (
        *("fake", "statistics.npz", {"reference_split": "val"}),
        ["statistics.npz is a file of statistics and has no split val"],
    ),
    "no such device": ("fake", "real", {"device": "gpu"}, ["device is 'gpu'", "give cpu, or cuda"]),
    "no such reference": ("fake", "missing.npz", {}, ["missing.npz does not exist"]),
    "one image": ("one", "real", {}, ["one holds 1 images; at least 2 are needed"]),
    "one real image": ("fake", "one", {}, ["one holds 1 images; at least 2 are needed"]),
    "an empty folder": ("empty", "real", {}, ["empty", "give a folder of images"]),
    "another array": ("others.npz", "real", {}, ["others.npz", "arr_0"]),
    "floats": ("float.npz", "real", {}, ["float.npz", "float64", "uint8"]),
    "text": ("fake", "text.npz", {}, ["text.npz is not an .npz, or damaged"]),
    "other sizes": ("fake", "larger", {}, ["larger are 16 × 16, but those of", "fake 8 × 8", "image_size"]),
    "a size of statistics": ("larger", "statistics.npz", {}, ["real is of images of 8 pixels, not 16"]),
    "another extractor": ("fake", ADM_FILE, {}, ["made with the extractor inception, not everything"]),
    "no report": ("fake", "real", {"report": Path("empty")}, ["empty exists and is not a report"]),
    "a name with a slash": ("fake", "real", {"reference_name": "a/b"}, ["cannot be named 'a/b'"]),
}
NO_REFERENCE: dict[str, tuple[str, str, dict[str, Any], list[str]]] = {
    "out of no format": ("real", "out", {}, ["out is", "give the name of a file, *.npz"]),
    "out is a folder": ("real", "folder.npz", {}, ["out is", "give the name of a file, *.npz"]),
    "out is the source": ("real.npz", "real.npz", {}, ["which is the file of images; give another name"]),
    "a slash": ("real", "out.npz", {"name": "a/b"}, ["cannot be named 'a/b'"]),
    "no name": ("real", "out.npz", {"name": ""}, ["cannot be named ''"]),
    "white space": ("real", "my out.npz", {}, ["cannot be named 'my out'"]),
    "a size": ("statistics.npz", "out.npz", {"image_size": 16}, ["of images of 8 pixels, not 16"]),
    "a file for a folder": ("real", "text.npz/out.npz", {}, ["text.npz"]),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_rejects_wrong_arguments_in_one_line(
    kind: str, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, phrases = REFUSED[kind]
    monkeypatch.chdir(root)
    before = sorted(root.iterdir())
    message = fails(capsys, *arguments)
    for phrase in phrases:
        assert phrase in message, message
    assert sorted(root.iterdir()) == before


def test_rejects_wrong_images_and_options_in_one_line(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(root)
    before = sorted(root.iterdir())
    wrong = []
    for kind, (images, other, options, phrases) in NOT_COMPARED.items():
        message = refusal(capsys, compare, images, other, Everything(), **options)
        wrong += [(kind, message)] if any(phrase not in message for phrase in phrases) else []
    for kind, (images, out, options, phrases) in NO_REFERENCE.items():
        message = refusal(capsys, reference, images, Path(out), features=Everything(), **options)
        wrong += [(kind, message)] if any(phrase not in message for phrase in phrases) else []
    assert wrong == []
    assert sorted(root.iterdir()) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_an_error_of_one_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, compare, str(root / "fake"), str(root / "real"), Everything(), device="cuda")
    assert "device is 'cuda', which cannot be used here" in message


def test_missing_weights_of_inception_are_an_error_with_a_remedy(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr("llamagen.published_weights.download_url_to_file", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for message in (
        fails(capsys, "compare", root / "fake", root / "real"),
        refusal(capsys, reference, str(root / "real"), tmp_path / "r.npz"),
    ):
        assert "weights-inception-2015-12-05-6726825d.pth" in message
        assert "https://github.com/toshas/torch-fidelity" in message
        assert "--features Inception --features.weights" in message
    message = fails(
        capsys, "compare", root / "fake", root / "real", "--features=Inception", "--features.weights=no.pth"
    )
    assert "weights no.pth is not a file" in message


def test_a_reference_keeps_its_purpose_by_default(root: Path, tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.npz" for name in "abc"]
    reference(str(root / "real"), paths[0], purpose="reconstruction", features=Everything())
    reference(str(paths[0]), paths[1], features=Everything())
    reference(str(paths[1]), paths[2], purpose="generation", features=Everything())
    assert [read_reference(path).purpose for path in paths] == ["reconstruction", "reconstruction", "generation"]
    assert [read_reference(path).name for path in paths] == ["a", "b", "c"]


def test_an_interrupt_leaves_no_files_and_no_traceback(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Everything, "forward", interrupt)
    with pytest.raises(SystemExit) as stopped:
        main(["reference", str(root / "real"), str(tmp_path / "r.npz"), EVERYTHING])
    assert stopped.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted; nothing was written"
    assert not list(tmp_path.iterdir())


def test_streams_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        write_npz(tmp_path / f"{name}.npz", 200, seed)
    alive: set[int] = set()
    most = 0
    batches = ImageSet.batches

    def spied(self: ImageSet, *arguments: Any, **options: Any) -> Iterator[ImageBatch]:
        nonlocal most
        for batch in batches(self, *arguments, **options):
            alive.add(id(batch.images))
            weakref.finalize(batch.images, alive.discard, id(batch.images))
            most = max(most, len(alive))
            yield batch

    monkeypatch.setattr(ImageSet, "batches", spied)
    compare(str(tmp_path / "a.npz"), str(tmp_path / "b.npz"), Everything(), batch_size=10)
    assert 0 < most <= 3


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_runs_as_a_module(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluation", "compare", str(root / "missing"), str(root / "real"), EVERYTHING])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("evaluation", run_name="__main__")
    assert stopped.value.code == 2
    shown = capsys.readouterr()
    assert not shown.out
    assert shown.err.count("\n") == 1
    assert shown.err.startswith("error: ")


@pytest.mark.parametrize("command", ["compare", "reference", "classifier"])
def test_help_is_short(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "--batch_size BATCH_SIZE" in shown
    assert ("--features.weights FILE" in " ".join(shown.split())) == (command != "classifier")
    assert "torch.nn.ReLU" not in shown
    assert len(shown.splitlines()) < 80
