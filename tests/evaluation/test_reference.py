"""References: making, writing, reading, and checking that images fit."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.extraction import feature_batches
from evaluation.image_sets import open_images
from evaluation.reference import Reference, make_reference, read_reference, with_features
from llamagen.metrics import extract, extractor_checksum
from tests.datamodules.shard_files import assert_one_line
from tests.evaluation.sets import FakeInception, rows_last, write_adm, write_folder, write_npz
from tests.metrics.extractors import SIZE, Corner, Everything, Projection, random_images


@pytest.fixture
def made(tmp_path: Path) -> Reference:
    """A reference of forty images with the features of seven."""
    return make_reference(
        open_images(write_npz(tmp_path / "a.npz", 40, 0)), Everything(), "forty", batch_size=9, max_features=7
    )


def test_statistics_equal_those_of_numpy(made: Reference) -> None:
    batches = [extract(Everything().eval(), some) for some in random_images(40, 0).split(9)]
    for statistics, part in ((made.statistics, "pool"), (made.spatial_statistics, "spatial")):
        rows = torch.cat([getattr(batch, part) for batch in batches]).double().numpy()
        assert statistics is not None
        np.testing.assert_allclose(statistics[0].numpy(), rows.mean(0), rtol=1e-12)
        np.testing.assert_allclose(statistics[1].numpy(), np.cov(rows, rowvar=False), rtol=1e-8, atol=1e-10)


def test_stores_features_of_evenly_spread_images(made: Reference) -> None:
    spread = [0, 6, 13, 20, 26, 32, 39]
    assert made.features is not None
    assert made.thumbnails is not None
    torch.testing.assert_close(made.features, extract(Everything().eval(), random_images(40, 0)[spread]).pool)
    assert np.array_equal(made.thumbnails, rows_last(random_images(40, 0)[spread]))


def test_stores_the_origin_of_the_images(made: Reference, tmp_path: Path) -> None:
    found = open_images(tmp_path / "a.npz")
    list(found.batches(100))
    assert made.facts() == {
        "name": "forty",
        "purpose": "generation",
        "count": 40,
        "resolution": SIZE,
        "crop": "none",
        "extractor": "everything",
        "extractor_checksum": extractor_checksum(Everything()),
        "source": str(tmp_path / "a.npz"),
        "checksum": found.checksum(),
    }


def test_records_that_images_were_cropped(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", 3, 0)
    Image.new("RGB", (20, 12)).save(folder / "wide.png")
    made = make_reference(open_images(folder, SIZE), Everything(), "cut")
    assert (made.crop, made.resolution, made.count) == ("adm-centre", SIZE, 4)


@pytest.mark.parametrize("extractor", [Everything(), Projection()])
def test_a_file_round_trips_every_field(extractor: Projection, tmp_path: Path) -> None:
    made = make_reference(open_images(write_npz(tmp_path / "a.npz", 9, 0)), extractor, "nine", "reconstruction")
    made.save(tmp_path / "new" / "folder" / "r.npz")
    read = read_reference(tmp_path / "new" / "folder" / "r.npz")
    assert (read.spatial_statistics is None) == (not isinstance(extractor, Everything))
    for field in fields(Reference):
        one, other = getattr(made, field.name), getattr(read, field.name)
        if isinstance(one, tuple):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)), field.name
        elif isinstance(one, torch.Tensor | np.ndarray):
            assert np.array_equal(one, other), field.name
            assert one.dtype == other.dtype
        else:
            assert one == other, field.name
    assert replace(made, features=None, thumbnails=None).facts() == read.facts()


def test_the_file_uses_the_keys_of_adm_and_no_pickle(made: Reference, tmp_path: Path) -> None:
    made.save(tmp_path / "r.npz")
    with np.load(tmp_path / "r.npz", allow_pickle=False) as file:
        assert {"mu", "sigma", "mu_s", "sigma_s", "features", "meta"} <= set(file.files)
        assert file["mu"].shape == (16,)
        assert all(file[key].dtype != object for key in file.files)


def test_the_name_can_be_overridden(made: Reference, tmp_path: Path) -> None:
    made.save(tmp_path / "r.npz")
    assert read_reference(tmp_path / "r.npz", "mine").name == "mine"
    with pytest.raises(ValueError, match="cannot be named 'my own'") as error:
        read_reference(tmp_path / "r.npz", "my own")
    assert_one_line(error)


@pytest.mark.parametrize("name", ["", "a/b", "a b", "a\n"])
def test_rejects_a_name_that_result_names_cannot_hold(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a reference cannot be named") as error:
        make_reference(open_images(write_npz(tmp_path / "a.npz", 4, 0)), Everything(), name)
    assert_one_line(error, repr(name))


def test_rejects_an_unknown_purpose(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="purpose is 'nothing'; give generation or reconstruction"):
        make_reference(open_images(write_npz(tmp_path / "a.npz", 4, 0)), Everything(), "a", "nothing")  # type: ignore[arg-type]


def test_an_interrupted_write_keeps_the_old_file(
    made: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out" / "r.npz"
    made.save(out)
    before = out.read_bytes()

    def stop(file: Any, **arrays: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", stop)
    for path in (out, out.with_name("new.npz")):
        with pytest.raises(KeyboardInterrupt):
            made.save(path)
    assert list(out.parent.iterdir()) == [out]
    assert out.read_bytes() == before


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("row", [False, True])
def test_reads_a_reference_of_adm(row: bool, dtype: type, tmp_path: Path) -> None:
    path = write_adm(tmp_path, row=row, dtype=dtype)
    known = read_reference(path)
    assert (known.name, known.extractor, known.resolution, known.purpose) == (
        "imagenet256-adm", "inception", SIZE, "generation",
    )  # fmt: skip
    assert known.spatial_statistics is not None
    with np.load(path) as file:
        for name, value in zip(
            ("mu", "sigma", "mu_s", "sigma_s"), (*known.statistics, *known.spatial_statistics), strict=True
        ):
            assert value.dtype == torch.float64
            assert np.array_equal(value.numpy(), file[name].reshape(value.shape).astype(np.float64))
    assert known.statistics[0].shape == (16,)


def test_adds_features_to_a_reference_of_adm(tmp_path: Path) -> None:
    known = read_reference(write_adm(tmp_path))
    assert known.features is None
    extractor = FakeInception()  # in training mode, with dropout
    whole = with_features(known, extractor, "cpu", show_progress=False)
    assert whole.features is not None
    torch.testing.assert_close(whole.features, extract(FakeInception().eval(), random_images(20, 5)).pool)
    assert torch.equal(whole.statistics[0], known.statistics[0])
    whole.save(tmp_path / "whole.npz")
    again = read_reference(tmp_path / "whole.npz")
    assert again.features is not None
    assert torch.equal(again.features, whole.features)
    assert (again.name, again.count) == ("imagenet256-adm", None)
    assert with_features(again, extractor, "cpu") is again


def test_reads_a_file_of_mean_and_covariance_only(tmp_path: Path) -> None:
    np.savez(tmp_path / "plain.npz", mu=np.zeros(4, np.float32), sigma=np.eye(4, dtype=np.float32), mu_s=np.zeros(3))
    known = read_reference(tmp_path / "plain.npz")
    assert (known.name, known.resolution, known.count, known.features) == ("plain", None, None, None)
    assert known.spatial_statistics is None
    assert with_features(known, FakeInception(), "cpu") is known


DAMAGED: dict[str, tuple[Any, str]] = {
    "another shape": ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"mu is \(3,\), but sigma \(4, 4\)"),
    "a matrix of means": ({"mu": np.zeros((2, 2)), "sigma": np.eye(4)}, r"mu is \(2, 2\), but sigma"),
    "spatial": (
        {"mu": np.zeros(1), "sigma": np.eye(1), "mu_s": np.zeros(2), "sigma_s": np.eye(3)},
        r"mu_s is \(2,\), but sigma_s \(3, 3\)",
    ),
    "no number": ({"mu": np.full(2, np.nan), "sigma": np.eye(2)}, "mu or sigma is not finite"),
    "no covariance": ({"mu": np.zeros(2), "sigma": np.full((2, 2), np.inf)}, "mu or sigma is not finite"),
    "text": ({"mu": np.array(["a"]), "sigma": np.eye(1)}, "could not convert string to float"),
    "objects": ({"mu": np.array([None]), "sigma": np.eye(1)}, "Object arrays cannot be loaded"),
    "images": ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8)}, "no mu and sigma, but arr_0; it holds images"),
    "half": ({"mu": np.zeros(3)}, "no mu and sigma, but mu"),
    "nothing": ({}, "no mu and sigma, but nothing"),
    "float images": (
        {"mu": np.zeros(1), "sigma": np.eye(1), "arr_0": np.zeros((2, 4, 4, 3))},
        "arr_0",
    ),
    "no facts": (
        {"mu": np.zeros(1), "sigma": np.eye(1), "meta": np.array('{"format": "llamagen-reference-1", "name": "a"}')},
        "does not give its purpose, extractor",
    ),
    "a later format": (
        {"mu": np.zeros(1), "sigma": np.eye(1), "meta": np.array('{"format": "llamagen-reference-9"}')},
        "of the format llamagen-reference-9; this version reads llamagen-reference-1",
    ),
    "broken facts": ({"mu": np.zeros(1), "sigma": np.eye(1), "meta": np.array("{")}, "is not a reference"),
    "facts of another kind": ({"mu": np.zeros(1), "sigma": np.eye(1), "meta": np.array("[1]")}, "is not a reference"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_rejects_another_file_in_one_line(kind: str, tmp_path: Path) -> None:
    arrays, phrase = DAMAGED[kind]
    np.savez(tmp_path / "r.npz", **arrays)
    with pytest.raises(ValueError, match=phrase) as error:
        read_reference(tmp_path / "r.npz")
    assert_one_line(error, tmp_path / "r.npz")


@pytest.mark.parametrize("kind", ["missing", "text", "array", "cut off", "damaged", "damaged and packed"])
def test_rejects_a_damaged_or_missing_file_in_one_line(kind: str, made: Reference, tmp_path: Path) -> None:
    path = tmp_path / "r.npz"
    if kind == "text":
        path.write_text("mu, sigma")
    elif kind == "array":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif kind != "missing":
        made.save(path)
        if kind == "damaged and packed":
            with np.load(path) as file:
                np.savez_compressed(path, **{key: file[key] for key in file.files})
        content = bytearray(path.read_bytes())
        if kind == "cut off":
            content = content[: len(content) // 2]
        else:
            start = content.index(b"sigma.npy") + 250
            content[start : start + 40] = bytes(255 - value for value in content[start : start + 40])
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"r\.npz") as error:
        read_reference(path)
    assert_one_line(error, "there is no reference" if kind == "missing" else "is not a reference: ")


def test_rejects_another_extractor_checksum_or_size(made: Reference) -> None:
    other = Everything()
    with torch.no_grad():
        other.linear.bias.add_(1)
    for extractor, size, phrase in (
        (Corner(), SIZE, "the reference forty was made with the extractor everything, not corner"),
        (other, SIZE, "the reference forty was made with other weights of everything"),
        (Everything(), 16, "the reference forty is of images of 8 pixels, not 16"),
    ):
        with pytest.raises(ValueError, match=phrase) as error:
            made.check(extractor, size)
        assert_one_line(error)
    made.check(Everything(), SIZE)
    replace(made, resolution=None, extractor_checksum=None).check(other, 16)


def test_explains_a_reference_for_another_purpose(made: Reference) -> None:
    other = replace(made, purpose="reconstruction")
    assert made.mismatch("generation", 3) is None
    assert other.mismatch("reconstruction", 40) is None
    assert other.mismatch("reconstruction") is None
    assert replace(other, count=None).mismatch("reconstruction", 3) is None
    for warning, *phrases in (
        (made.mismatch("reconstruction", 40), "forty, a reference for generated", "rFID", "--purpose reconstruction"),
        (
            other.mismatch("generation", 40),
            "forty, a reference for reconstructions",
            "gFID",
            "VIRTUAL_imagenet256_labeled",
        ),
        (other.mismatch("reconstruction", 39), "39 reconstructions", "a reference of 40 images", "rFID"),
    ):
        assert warning is not None
        assert "\n" not in warning
        assert all(phrase in warning for phrase in phrases)


def test_warns_of_images_that_cannot_be_read(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", 39, 0)
    (folder / "broken.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match="1 images of .* cannot be read and are skipped"):
        made = make_reference(open_images(folder), Everything(), "a")
    assert made.count == 39
    assert made.features is not None
    assert len(made.features) == 39


def test_shows_a_progress_bar_with_a_total(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = open_images(write_npz(tmp_path / "a.npz", 12, 0))
    assert len(list(feature_batches(found, Everything(), 5, 0, "cpu", "looking"))) == 3
    shown = capsys.readouterr()
    assert "looking: 100%" in shown.err
    assert "12/12" in shown.err
    assert not shown.out
    list(feature_batches(found, Everything(), 5, 0, "cpu", "looking", show_progress=False))
    assert not capsys.readouterr().err
