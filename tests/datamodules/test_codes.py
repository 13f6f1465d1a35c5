"""Codes: views are drawn in training alone, and what does not fit its description is refused before training."""

import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.codes import CodeDataModule
from datamodules.shards import META_FILE, describe_split, write_meta
from tests.datamodules.shard_files import assert_one_line, write_shards

VIEWS, HEIGHT, WIDTH, VOCABULARY, CLASSES = 3, 2, 4, 50, 5
COUNTS = {"train": 9, "val": 4}


def array_file(array: np.ndarray) -> bytes:
    buffer = BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def codes_of(split: str, number: int) -> np.ndarray:
    """(A, h, w) codes, each picture its own."""
    rng = np.random.default_rng([split == "val", number])
    return rng.integers(0, VOCABULARY, (VIEWS, HEIGHT, WIDTH)).astype(np.uint16)


def write_codes(root: Path, changed: dict[tuple[str, int], dict[str, bytes]] | None = None) -> None:
    """A set of codes; ``changed`` replaces the parts of single samples."""
    splits = {}
    for split, count in COUNTS.items():
        samples = [
            (f"{split}{number}", {"npy": array_file(codes_of(split, number)), "cls": str(number % CLASSES).encode()})
            for number in range(count)
        ]
        for (changed_split, number), parts in (changed or {}).items():
            if changed_split == split:
                samples[number] = (samples[number][0], parts)
        splits[split] = describe_split(write_shards(root / split, samples, per_shard=4), count)
    write_meta(
        root,
        {
            "format": "llamagen-codes",
            "vocabulary": VOCABULARY,
            "grid": [HEIGHT, WIDTH],
            "views": VIEWS,
            "num_classes": CLASSES,
            "tokenizer": "0" * 64,
            "splits": splits,
        },
    )


def change_meta(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    meta = json.loads((root / META_FILE).read_text())
    change(meta)
    write_meta(root, meta)


def code_data(root: Path, stage: str = "fit", seed: int = 0, batch_size: int = 4) -> CodeDataModule:
    data = CodeDataModule(root, batch_size, num_workers=0, seed=seed)
    data.setup(stage)
    return data


def views_drawn(data: CodeDataModule, epochs: int) -> list[dict[str, int]]:
    """For each epoch which view of each picture was drawn."""
    loader = data.train_dataloader()
    drawn = []
    for _ in range(epochs):
        views: dict[str, int] = {}
        for batch in loader:
            for key, codes in zip(batch["keys"], batch["codes"].numpy(), strict=True):
                of_picture = codes_of("train", int(key.removeprefix("train"))).reshape(VIEWS, -1)
                (views[key],) = np.flatnonzero((of_picture == codes).all(axis=1)).tolist()
        drawn.append(views)
    return drawn


def test_batches_hold_codes_in_raster_order_and_their_class(tmp_path: Path) -> None:
    write_codes(tmp_path)
    batches = list(code_data(tmp_path).val_dataloader())
    (batch,) = batches
    assert (batch["codes"].dtype, batch["codes"].shape) == (torch.int64, (4, HEIGHT * WIDTH))
    assert batch["codes"].tolist() == [codes_of("val", number)[0].flatten().tolist() for number in range(4)]
    assert (batch["condition"].dtype, batch["condition"].tolist()) == (torch.int64, [0, 1, 2, 3])
    assert batch["keys"] == [f"val{number}" for number in range(4)]


def test_training_batches_hold_every_picture_with_its_class(tmp_path: Path) -> None:
    write_codes(tmp_path)
    batches = list(code_data(tmp_path).train_dataloader())
    labels = {
        key: label for batch in batches for key, label in zip(batch["keys"], batch["condition"].tolist(), strict=True)
    }
    assert labels == {f"train{number}": number % CLASSES for number in range(9)}
    assert [tuple(batch["codes"].shape) for batch in batches] == [(4, 8), (4, 8), (1, 8)]


def test_views_are_drawn_anew_each_epoch_as_seed_epoch_and_picture_say(tmp_path: Path) -> None:
    write_codes(tmp_path)
    drawn = views_drawn(code_data(tmp_path), epochs=4)
    assert {view for views in drawn for view in views.values()} == set(range(VIEWS))
    assert all(len(set(views.values())) > 1 for views in drawn)
    assert len({tuple(sorted(views.items())) for views in drawn}) == 4
    assert views_drawn(code_data(tmp_path, batch_size=2), epochs=4) == drawn
    assert views_drawn(code_data(tmp_path, seed=1), epochs=4) != drawn


def test_validation_takes_the_first_view(tmp_path: Path) -> None:
    write_codes(tmp_path)
    data = code_data(tmp_path, "validate")
    for _ in range(2):
        for batch in data.val_dataloader():
            for key, codes in zip(batch["keys"], batch["codes"].tolist(), strict=True):
                assert codes == codes_of("val", int(key.removeprefix("val")))[0].flatten().tolist()
    assert list(data.datasets) == ["val"]


def test_evaluation_of_the_training_split_takes_the_first_view_too(tmp_path: Path) -> None:
    write_codes(tmp_path)
    loader = code_data(tmp_path).predict_dataloader()[0]
    codes = [codes for batch in loader for codes in batch["codes"].tolist()]
    assert codes == [codes_of("train", number)[0].flatten().tolist() for number in range(9)]


GOOD = codes_of("train", 0)
OUTSIDE = GOOD.copy()
OUTSIDE[-1, -1, -1] = VOCABULARY
BAD_PARTS: dict[str, tuple[dict[str, bytes], str]] = {
    "code outside of the vocabulary": ({"npy": array_file(OUTSIDE), "cls": b"0"}, f"code {VOCABULARY}, outside"),
    "int64 codes": ({"npy": array_file(GOOD.astype(np.int64)), "cls": b"0"}, "int64 codes"),
    "float codes": ({"npy": array_file(GOOD.astype(np.float32)), "cls": b"0"}, "float32 codes"),
    "without views": ({"npy": array_file(GOOD[0]), "cls": b"0"}, "(2, 4)"),
    "too few views": ({"npy": array_file(GOOD[:2]), "cls": b"0"}, "(2, 2, 4)"),
    "turned grid": ({"npy": array_file(GOOD.transpose(0, 2, 1)), "cls": b"0"}, "(3, 4, 2)"),
    "class too high": ({"npy": array_file(GOOD), "cls": b"5"}, "class 5"),
    "class negative": ({"npy": array_file(GOOD), "cls": b"-1"}, "class -1"),
    "class no number": ({"npy": array_file(GOOD), "cls": b"dog"}, "dog"),
    "class empty": ({"npy": array_file(GOOD), "cls": b""}, "cls"),
    "no class": ({"npy": array_file(GOOD)}, "no .cls member"),
    "no codes": ({"cls": b"0"}, "no .npy member"),
    "empty file": ({"npy": b"", "cls": b"0"}, "cannot be read"),
    "half a file": ({"npy": array_file(GOOD)[:150], "cls": b"0"}, "cannot be read"),
    "no array file": ({"npy": b"not an array", "cls": b"0"}, "cannot be read"),
    "pickled objects": ({"npy": array_file(np.array([None, 1])), "cls": b"0"}, "cannot be read"),
    "zip file": ({"npy": b"PK\x03\x04" + bytes(40), "cls": b"0"}, "cannot be read"),
}


@pytest.mark.parametrize(("split", "number"), [("train", 0), ("train", 5), ("train", 8), ("val", 3)])
@pytest.mark.parametrize("bad", BAD_PARTS)
def test_a_sample_that_does_not_fit_its_description_is_refused_by_setup(
    tmp_path: Path, split: str, number: int, bad: str
) -> None:
    parts, phrase = BAD_PARTS[bad]
    write_codes(tmp_path, {(split, number): parts})
    with pytest.raises(ValueError) as error:
        code_data(tmp_path)
    assert_one_line(error, tmp_path / split, f"{split}{number}", phrase)


BAD_META: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    **{
        f"without {entry}": (lambda meta, entry=entry: meta.pop(entry), "does not describe codes")
        for entry in ("format", "vocabulary", "grid", "views", "num_classes", "tokenizer", "splits")
    },
    "another format": (lambda meta: meta.update(format="llamagen-images"), "does not describe codes"),
    "more samples": (lambda meta: meta["splits"]["val"].update(count=5), "says 5"),
    "fewer samples": (lambda meta: meta["splits"]["train"].update(count=8), "says 8"),
    "no such split": (lambda meta: meta["splits"].pop("val"), "says None"),
    "smaller vocabulary": (lambda meta: meta.update(vocabulary=10), "vocabulary of 10"),
    "fewer classes": (lambda meta: meta.update(num_classes=2), "2 classes"),
    "another grid": (lambda meta: meta.update(grid=[4, 4]), "(3, 4, 4)"),
    "other views": (lambda meta: meta.update(views=1), "(1, 2, 4)"),
    "grid no list": (lambda meta: meta.update(grid=8), META_FILE),
    "vocabulary no number": (lambda meta: meta.update(vocabulary="many"), META_FILE),
    "splits no object": (lambda meta: meta.update(splits=["train", "val"]), META_FILE),
}


@pytest.mark.parametrize("bad", BAD_META)
def test_a_description_that_does_not_fit_is_refused_by_setup(tmp_path: Path, bad: str) -> None:
    change, phrase = BAD_META[bad]
    write_codes(tmp_path)
    change_meta(tmp_path, change)
    with pytest.raises(ValueError) as error:
        code_data(tmp_path)
    assert_one_line(error, tmp_path, phrase)


def test_missing_shards_and_codes_not_written_to_their_end_are_refused(tmp_path: Path) -> None:
    write_codes(tmp_path)
    (tmp_path / "train" / "train-000001.tar").unlink()
    with pytest.raises(ValueError) as error:
        code_data(tmp_path)
    assert_one_line(error, tmp_path / "train", "5 samples", "says 9", CodeDataModule.hint)
    (tmp_path / META_FILE).unlink()
    with pytest.raises(ValueError) as error:
        code_data(tmp_path)
    assert_one_line(error, tmp_path, META_FILE, "not written to its end", CodeDataModule.hint)
    with pytest.raises(ValueError) as error:
        code_data(tmp_path / "nowhere")
    assert_one_line(error, tmp_path / "nowhere", "does not exist", CodeDataModule.hint)
