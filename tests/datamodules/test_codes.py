"""Codes: random views only in training; codes that do not match meta.json are skipped, counted or refused."""

import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.codes import CodeDataModule
from datamodules.storage.code_dtype import code_dtype
from datamodules.storage.shards import META_FILE, ShardDataset
from tests.datamodules.shard_files import assert_one_line, refusal_of, write_shards

VIEWS, HEIGHT, WIDTH, VOCABULARY, CLASSES = 3, 2, 4, 50, 5
COUNTS = {"train": 9, "val": 4}


def array_file(array: np.ndarray) -> bytes:
    buffer = BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def codes_of(split: str, number: int) -> np.ndarray:
    """Codes (A, h, w), different for each image."""
    rng = np.random.default_rng([split == "val", number])
    return rng.integers(0, VOCABULARY, (VIEWS, HEIGHT, WIDTH)).astype(np.uint16)


def write_codes(root: Path, changed: dict[tuple[str, int], dict[str, bytes]] | None = None, **meta: Any) -> None:
    """Write codes in shards of 4; ``changed`` replaces members of single examples, ``meta`` entries of meta.json."""
    shards = ShardDataset(root, {}, "")
    shards.begin(list(COUNTS))
    for split, count in COUNTS.items():
        for shard in range(-(-count // 4)):
            with shards.shard(split, shard) as writer:
                for number in range(shard * 4, min(shard * 4 + 4, count)):
                    parts = {"npy": array_file(codes_of(split, number)), "cls": str(number % CLASSES).encode()}
                    writer.write(f"{split}{number}", (changed or {}).get((split, number), parts))
    described = {
        "format": "llamagen-codes",
        "vocabulary": VOCABULARY,
        "grid": [HEIGHT, WIDTH],
        "views": VIEWS,
        "num_classes": CLASSES,
        "tokenizer": "0" * 64,
    }
    shards.finish({"train": 3, "val": 1}, described | meta, {}, 0.0)


def change_meta(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    meta = json.loads((root / META_FILE).read_text())
    change(meta)
    (root / META_FILE).write_text(json.dumps(meta))


def code_data(root: Path, stage: str = "fit", batch_size: int = 4, **options: Any) -> CodeDataModule:
    data = CodeDataModule(root, batch_size, num_workers=0, **options)
    data.setup(stage)
    return data


def chosen_views(data: CodeDataModule, epochs: int) -> list[dict[str, int]]:
    """For each epoch, the view chosen for each image."""
    loader = data.train_dataloader()
    views_by_epoch = []
    for _ in range(epochs):
        views: dict[str, int] = {}
        for batch in loader:
            for key, codes in zip(batch["keys"], batch["codes"].numpy(), strict=True):
                of_image = codes_of("train", int(key.removeprefix("train"))).reshape(VIEWS, -1)
                (views[key],) = np.flatnonzero((of_image == codes).all(axis=1)).tolist()
        views_by_epoch.append(views)
    return views_by_epoch


def test_batches_hold_codes_in_raster_order_and_their_class(tmp_path: Path) -> None:
    write_codes(tmp_path)
    batches = list(code_data(tmp_path).val_dataloader())
    (batch,) = batches
    assert (batch["codes"].dtype, batch["codes"].shape) == (torch.int64, (4, HEIGHT * WIDTH))
    assert batch["codes"].tolist() == [codes_of("val", number)[0].flatten().tolist() for number in range(4)]
    assert (batch["condition"].dtype, batch["condition"].tolist()) == (torch.int64, [0, 1, 2, 3])
    assert batch["keys"] == [f"val{number}" for number in range(4)]


def test_training_batches_hold_every_image_with_its_class(tmp_path: Path) -> None:
    write_codes(tmp_path)
    batches = list(code_data(tmp_path).train_dataloader())
    labels = {
        key: label for batch in batches for key, label in zip(batch["keys"], batch["condition"].tolist(), strict=True)
    }
    assert labels == {f"train{number}": number % CLASSES for number in range(9)}
    assert [tuple(batch["codes"].shape) for batch in batches] == [(4, 8), (4, 8), (1, 8)]


def test_views_depend_on_seed_epoch_and_image(tmp_path: Path) -> None:
    write_codes(tmp_path)
    views_by_epoch = chosen_views(code_data(tmp_path), epochs=4)
    assert {view for views in views_by_epoch for view in views.values()} == set(range(VIEWS))
    assert all(len(set(views.values())) > 1 for views in views_by_epoch)
    assert len({tuple(sorted(views.items())) for views in views_by_epoch}) == 4
    assert chosen_views(code_data(tmp_path, batch_size=2), epochs=4) == views_by_epoch
    assert chosen_views(code_data(tmp_path, seed=1), epochs=4) != views_by_epoch


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
OUTSIDE[0, -1, -1] = VOCABULARY
BAD_PARTS: dict[str, tuple[dict[str, bytes], str, str]] = {
    "code too high": ({"npy": array_file(OUTSIDE), "cls": b"0"}, "broken codes", f"code {VOCABULARY}, outside"),
    "int64 codes": ({"npy": array_file(GOOD.astype(np.int64)), "cls": b"0"}, "broken codes", "int64 codes"),
    "uint32 codes": ({"npy": array_file(GOOD.astype(np.uint32)), "cls": b"0"}, "broken codes", "uint32 codes"),
    "float codes": ({"npy": array_file(GOOD.astype(np.float16)), "cls": b"0"}, "broken codes", "float16 codes"),
    "big-endian codes": ({"npy": array_file(GOOD.astype(">u2")), "cls": b"0"}, "broken codes", ">u2 codes"),
    "without views": ({"npy": array_file(GOOD[0]), "cls": b"0"}, "broken codes", "(2, 4)"),
    "too few views": ({"npy": array_file(GOOD[:2]), "cls": b"0"}, "broken codes", "(2, 2, 4)"),
    "turned grid": ({"npy": array_file(GOOD.transpose(0, 2, 1).copy()), "cls": b"0"}, "broken codes", "(3, 4, 2)"),
    "class too high": ({"npy": array_file(GOOD), "cls": b"5"}, "wrong label", "class 5"),
    "class negative": ({"npy": array_file(GOOD), "cls": b"-1"}, "wrong label", "that is not an integer"),
    "class no number": ({"npy": array_file(GOOD), "cls": b"dog"}, "wrong label", "that is not an integer"),
    "class empty": ({"npy": array_file(GOOD), "cls": b""}, "wrong label", "that is not an integer"),
    "no class": ({"npy": array_file(GOOD)}, "no label", "no class (.cls)"),
    "no codes": ({"cls": b"0"}, "no codes", "has none of npy"),
    "empty file": ({"npy": b"", "cls": b"0"}, "empty file", "is empty"),
    "half a file": ({"npy": array_file(GOOD)[:150], "cls": b"0"}, "broken codes", "cannot be read"),
    "longer file": ({"npy": array_file(GOOD) + b"more", "cls": b"0"}, "broken codes", "cannot be read"),
    "no array file": ({"npy": b"not an array", "cls": b"0"}, "broken codes", "cannot be read"),
    "zeros": ({"npy": bytes(len(array_file(GOOD))), "cls": b"0"}, "broken codes", "cannot be read"),
    "pickled objects": ({"npy": array_file(np.array([None, 1])), "cls": b"0"}, "broken codes", "object codes"),
    "zip file": ({"npy": b"PK\x03\x04" + bytes(40), "cls": b"0"}, "broken codes", "cannot be read"),
}


@pytest.mark.parametrize(
    ("bad", "split", "number"),
    [(bad, *(("train", 5), ("val", 3))[place % 2]) for place, bad in enumerate(BAD_PARTS)],
)
def test_setup_refuses_too_many_examples_that_do_not_match_meta_json(
    tmp_path: Path, bad: str, split: str, number: int
) -> None:
    parts, _, phrase = BAD_PARTS[bad]
    write_codes(tmp_path, {(split, number): parts}, num_classes=CLASSES)
    change_meta(tmp_path, lambda meta: meta.update(num_classes=CLASSES))  # it had grown to the highest label + 1
    with pytest.raises(ValueError) as error:
        code_data(tmp_path)
    assert_one_line(error, tmp_path / split, f"example {split}{number}", phrase)


@pytest.mark.parametrize("bad", BAD_PARTS)
def test_few_examples_that_do_not_match_meta_json_are_skipped_and_counted(tmp_path: Path, bad: str) -> None:
    parts, reason, phrase = BAD_PARTS[bad]
    write_codes(tmp_path, {("train", 5): parts})
    data = code_data(tmp_path, max_bad_share=0.12)
    for _ in range(2):
        keys = [key for batch in data.train_dataloader() for key in batch["keys"]]
        assert sorted(keys) == [f"train{number}" for number in range(COUNTS["train"]) if number != 5]
        tally = data.tallies["train"]
        assert tally.by_reason() == {reason: 1}
        assert phrase in tally.describe()
        data.finish_tally("train")


def test_broken_view_is_skipped_in_epochs_that_choose_it(tmp_path: Path) -> None:
    codes = codes_of("train", 5)
    codes[2, 0, 0] = VOCABULARY
    write_codes(tmp_path, {("train", 5): {"npy": array_file(codes), "cls": b"0"}})
    whole = tmp_path / "whole"
    write_codes(whole)
    views_by_epoch = chosen_views(code_data(whole), epochs=12)
    data = code_data(tmp_path, max_bad_share=0.12)
    loader = data.train_dataloader()
    present = []
    for _ in range(12):
        present.append("train5" in [key for batch in loader for key in batch["keys"]])
        assert data.finish_tally("train") == ({} if present[-1] else {"broken codes": 1})
    assert present == [views["train5"] != 2 for views in views_by_epoch]
    assert len(set(present)) == 2


@pytest.mark.parametrize("kind", ["Fortran order", "version 2"])
def test_codes_written_by_another_program_are_read(tmp_path: Path, kind: str) -> None:
    buffer = BytesIO()
    codes = np.asfortranarray(GOOD) if kind == "Fortran order" else GOOD
    np.lib.format.write_array(buffer, codes, version=(2, 0) if kind == "version 2" else None)
    assert buffer.getvalue() != array_file(GOOD)
    write_codes(tmp_path, {("val", 1): {"npy": buffer.getvalue(), "cls": b"0"}})
    (batch,) = code_data(tmp_path, "validate").val_dataloader()
    assert batch["codes"][1].tolist() == GOOD[0].flatten().tolist()


def test_captions_are_read_without_classes(tmp_path: Path) -> None:
    parts = {
        (split, number): {"npy": array_file(codes_of(split, number)), "txt": f"number {number}".encode()}
        for split, count in COUNTS.items()
        for number in range(count)
    }
    write_codes(tmp_path, parts, num_classes=0)
    (batch,) = code_data(tmp_path, "validate").val_dataloader()
    assert batch["captions"] == [f"number {number}" for number in range(COUNTS["val"])]
    assert "condition" not in batch


BAD_META: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    **{
        f"without {entry}": (lambda meta, entry=entry: meta.pop(entry), "does not describe codes")
        for entry in ("vocabulary", "grid", "views", "num_classes", "tokenizer")
    },
    "without format": (lambda meta: meta.pop("format"), "does not describe codes"),
    "without splits": (lambda meta: meta.pop("splits"), f"splits in {META_FILE}"),
    "another format": (lambda meta: meta.update(format="llamagen-images"), "does not describe codes"),
    "more examples": (lambda meta: meta["splits"]["val"]["shards"][0].update(count=5), "says 5"),
    "fewer examples": (lambda meta: meta["splits"]["train"]["shards"][1].update(count=3), "says 3"),
    "no training split": (lambda meta: meta["splits"].pop("train"), CodeDataModule.hint),
    "smaller vocabulary": (lambda meta: meta.update(vocabulary=10), "vocabulary of 10"),
    "larger vocabulary": (
        lambda meta: meta.update(vocabulary=2**16 + 1),
        "uint16 codes of shape (3, 2, 4), not uint32",
    ),
    "fewer classes": (lambda meta: meta.update(num_classes=2), "2 classes"),
    "no classes": (lambda meta: meta.update(num_classes=0), "0 classes"),
    "another grid": (lambda meta: meta.update(grid=[4, 4]), "(3, 4, 4)"),
    "other views": (lambda meta: meta.update(views=1), "(1, 2, 4)"),
    "grid no list": (lambda meta: meta.update(grid=8), META_FILE),
    "grid of three": (lambda meta: meta.update(grid=[2, 4, 1]), META_FILE),
    "grid of zeros": (lambda meta: meta.update(grid=[0, 4]), META_FILE),
    "vocabulary no number": (lambda meta: meta.update(vocabulary="many"), META_FILE),
    "number of classes negative": (lambda meta: meta.update(num_classes=-1), META_FILE),
    "splits no object": (lambda meta: meta.update(splits=["train", "val"]), META_FILE),
    "shards no list": (lambda meta: meta["splits"]["val"].update(shards=3), META_FILE),
    "shard by a path": (lambda meta: meta["splits"]["val"]["shards"][0].update(name="../a.tar"), META_FILE),
}


def test_setup_refuses_meta_json_that_does_not_match(tmp_path: Path) -> None:
    write_codes(tmp_path)
    meta = (tmp_path / META_FILE).read_text()
    failures = {}
    for bad, (change, phrase) in BAD_META.items():
        (tmp_path / META_FILE).write_text(meta)
        change_meta(tmp_path, change)
        message = refusal_of(lambda: code_data(tmp_path))
        phrases = [phrase] if bad == "no training split" else [phrase, str(tmp_path)]
        if "\n" in message or not all(wanted in message for wanted in phrases):
            failures[bad] = message
    assert failures == {}


def test_uint32_is_used_only_where_it_is_needed() -> None:
    assert [code_dtype(size) for size in (2, 2**16, 2**16 + 1, 2**18)] == [np.uint16, np.uint16, np.uint32, np.uint32]


def test_incomplete_dataset_is_refused(tmp_path: Path) -> None:
    write_codes(tmp_path / "codes")
    (tmp_path / "codes" / META_FILE).unlink()
    with pytest.raises(ValueError) as error:
        code_data(tmp_path / "codes")
    assert_one_line(error, tmp_path / "codes", META_FILE, "it is incomplete", CodeDataModule.hint)
    with pytest.raises(ValueError) as error:
        code_data(tmp_path / "nowhere")
    assert_one_line(error, tmp_path / "nowhere", "does not exist", CodeDataModule.hint)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    write_codes(tmp_path)
    (tmp_path / "train" / "train-000001.tar").unlink()
    with pytest.raises(ValueError) as error:
        code_data(tmp_path)
    assert_one_line(error, tmp_path / "train" / "train-000001.tar", "does not exist")


def test_shard_missing_in_meta_json_is_ignored(tmp_path: Path) -> None:
    write_codes(tmp_path)
    write_shards(tmp_path / "stray", [("stray", {"npy": array_file(GOOD), "cls": b"0"})])
    (tmp_path / "stray/stray-000000.tar").rename(tmp_path / "train/train-000007.tar")
    keys = [key for batch in code_data(tmp_path).train_dataloader() for key in batch["keys"]]
    assert sorted(keys) == [f"train{number}" for number in range(COUNTS["train"])]


def test_examples_lost_by_a_truncated_shard_are_counted(tmp_path: Path) -> None:
    write_codes(tmp_path)
    shard = tmp_path / "train/train-000001.tar"
    shard.write_bytes(shard.read_bytes()[: 2 * 2048 + 600])
    data = code_data(tmp_path, max_bad_share=0.23)
    keys = [key for batch in data.train_dataloader() for key in batch["keys"]]
    assert sorted(keys) == [f"train{number}" for number in range(COUNTS["train"]) if number not in (6, 7)]
    assert data.tallies["train"].by_reason() == {"truncated shard": 2}
    with pytest.raises(ValueError) as error:
        code_data(tmp_path, max_bad_share=0.22)
    assert_one_line(error, "2 of 9 examples of train", "truncated shard: 2", shard, "max_bad_share 0.22")
