"""Captions for the text encoder, from all kinds of shards."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from callbacks import FeatureWriter
from datamodules import CaptionDataModule
from datamodules.storage.shards import read_meta
from lightning_modules import CaptionModule
from llamagen.text import TextEncoderConfig
from tests.datamodules.caption_datasets import DESCRIPTION, caption, codes, write_captioned_codes
from tests.datamodules.shard_files import assert_one_line, grey_image, write_shards
from tests.datamodules.storage.test_remote import Server
from tests.lightning_modules.runs import evaluator
from tests.tiny_t5 import save_tiny_t5

Examples = list[tuple[str, dict[str, bytes]]]


def read(data: CaptionDataModule) -> dict[str, list[Any]]:
    """Everything that ``predict`` reads, by name."""
    data.setup("predict")
    whole: dict[str, list[Any]] = {}
    for loader in data.predict_dataloader():
        for batch in loader:
            for name, part in batch.items():
                whole.setdefault(name, []).extend(part.tolist() if hasattr(part, "tolist") else part)
    return whole


def captions_of(root: str, **options: Any) -> dict[str, list[Any]]:
    return read(CaptionDataModule(root, batch_size=4, num_workers=0, **options))


def texts(count: int) -> Examples:
    return [(f"{number:03d}", {"txt": caption(number).encode()}) for number in range(count)]


def test_dataset_of_codes_gives_captions_codes_classes_and_keys(tmp_path: Path) -> None:
    write_captioned_codes(tmp_path, {"train": 9, "val": 3})
    batch = captions_of(str(tmp_path))
    numbers = [*range(9), *range(3)]
    assert batch["captions"] == [caption(number) for number in numbers]
    assert batch["codes"] == [codes(number) for number in numbers]
    assert batch["labels"] == [-1 if number % 2 else number % 5 for number in numbers]
    assert batch["keys"] == [f"train/{number}" for number in range(9)] + [f"val/{number}" for number in range(3)]
    assert batch["numbers"] == numbers
    assert "short_captions" not in batch


def test_byte_order_mark_is_dropped_and_other_encodings_are_reported(tmp_path: Path) -> None:
    said = {f"{number}": caption(number).encode() for number in range(40)}
    said |= {"0": b"\xef\xbb\xbfwith a mark\r\n", "1": "süß".encode("latin-1"), "2": "wide".encode("utf-16")}
    write_shards(tmp_path, [(key, {"txt": text}) for key, text in said.items()], per_shard=40)
    data = CaptionDataModule(tmp_path, num_workers=0, max_bad_share=0.1)
    found = read(data)
    texts_of = dict(zip(found["keys"], found["captions"], strict=True))
    assert texts_of["0"] == "with a mark"
    assert not {"1", "2"} & set(texts_of)
    messages = [example.message for tally in data.tallies.values() for example in tally.skipped]
    assert len(messages) == 2
    assert all("its .txt is not in UTF-8" in message and "convert it" in message for message in messages)


def test_first_sentences_are_found_before_cleaning(tmp_path: Path) -> None:
    said = [b"A Cat. A Dog.", b"one sentence", b"https://cats.com/x. A dog sits", b"by Dr. Smith  on a TREE. And more"]
    said.append(b"A cat, a dog etc. Two birds.")
    write_shards(tmp_path, [(str(number), {"txt": text}) for number, text in enumerate(said)], per_shard=9)
    batch = captions_of(str(tmp_path), clean_captions=True, short_captions=True)
    pairs = dict(zip(batch["keys"], zip(batch["captions"], batch["short_captions"], strict=True), strict=True))
    assert pairs == {
        "0": ("a cat. a dog.", "a cat."),
        "1": ("one sentence", "one sentence"),
        "2": ("a dog sits", "a dog sits"),
        "3": ("by dr. smith on a tree. and more", "by dr. smith on a tree."),
        "4": ("a cat, a dog etc. two birds.", "a cat, a dog etc."),  # only the capital shows that the sentence ends
    }
    plain = captions_of(str(tmp_path), short_captions=True)
    assert dict(zip(plain["keys"], plain["short_captions"], strict=True))["0"] == "A Cat."


def test_shards_of_img2dataset_are_read(tmp_path: Path) -> None:
    examples: Examples = []
    for number in range(6):
        said = json.dumps({"caption": f"json {number}", "url": "http://a.b/c.jpg", "status": "success"}).encode()
        parts = {"jpg": grey_image(number), "txt": f"text {number}".encode(), "json": said}
        if number == 2:
            del parts["txt"]
        examples.append((f"{number:09d}", parts))
    write_shards(tmp_path, examples)
    batch = captions_of(str(tmp_path))
    found = dict(zip(batch["keys"], batch["captions"], strict=True))
    assert found == {f"{n:09d}": f"json {n}" if n == 2 else f"text {n}" for n in range(6)}
    assert set(batch["labels"]) == {-1}
    assert "codes" not in batch


def test_fingerprint_detects_changed_captions(tmp_path: Path) -> None:
    def fingerprint(folder: str, *captions: bytes) -> str:
        write_shards(
            tmp_path / folder / "train", [(str(number), {"txt": text}) for number, text in enumerate(captions)]
        )
        write_shards(tmp_path / folder / "val", texts(1))
        data = CaptionDataModule(tmp_path / folder, num_workers=0)
        data.setup("predict")
        return data.fingerprint("train")

    first = fingerprint("first", b"a dog", b"a cat")
    assert fingerprint("copy", b"a dog", b"a cat") == first
    assert fingerprint("other", b"a dog", b"a black cat") != first


def test_share_is_held_out_without_a_validation_split(tmp_path: Path) -> None:
    write_shards(tmp_path, texts(40))
    data = CaptionDataModule(str(tmp_path), num_workers=0)
    batch = read(data)
    counts = [len(data.datasets[split]) for split in ("train", "val")]  # type: ignore[arg-type]
    assert sum(counts) == 40
    assert 1 <= counts[1] <= 8
    assert sorted(batch["captions"]) == sorted(caption(number) for number in range(40))


def test_named_shards_of_codes_keep_their_meta_json(tmp_path: Path) -> None:
    write_captioned_codes(tmp_path, {"train": 20, "val": 3})
    named = f"{tmp_path}/train/train-{{000000..000001}}.tar"
    batch = captions_of(str(tmp_path), train=named)
    assert sorted(batch["codes"]) == sorted(codes(number) for number in range(14))


def test_npy_members_without_meta_json_are_ignored_with_a_warning(tmp_path: Path) -> None:
    write_captioned_codes(tmp_path, {"train": 20, "val": 3})
    with pytest.warns(UserWarning, match=r"the \.npy members of the train examples are ignored"):
        batch = captions_of(f"{tmp_path}/train/train-{{000000..000001}}.tar")
    assert "codes" not in batch
    assert len(batch["captions"]) == 14


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_t5(tmp_path_factory.mktemp("t5"))


def extract(t5: Path, data: CaptionDataModule, out: Path) -> None:
    run = evaluator(FeatureWriter(5), default_root_dir=out)
    run.predict(CaptionModule(TextEncoderConfig(str(t5), "float32"), 12), data, return_predictions=False)


def test_features_of_remote_codes_equal_those_of_local_codes(t5: Path, tmp_path: Path) -> None:
    write_captioned_codes(tmp_path / "codes", {"train": 12, "val": 4})
    extract(t5, CaptionDataModule(str(tmp_path / "codes"), num_workers=0), tmp_path / "here")
    with Server(tmp_path) as server:
        far = CaptionDataModule(f"{server.address}/codes", num_workers=0, cache_dir=tmp_path / "cache")
        extract(t5, far, tmp_path / "far")
        server.shutdown()
    here, there = (
        {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.*")}
        for root in (tmp_path / "here", tmp_path / "far")
    )
    assert here == there
    assert len(here) == 1 + 3 + 1


def test_dataset_of_caption_features_can_be_read_again(t5: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "texts", texts(20))
    extract(t5, CaptionDataModule(f"{tmp_path}/texts/texts-{{000000..000006}}.tar", num_workers=0), tmp_path / "out")
    meta = read_meta(tmp_path / "out", "")
    assert (meta["format"], meta["num_classes"], meta["classes"]) == ("llamagen-captions", 0, [])
    assert "tokenizer" in meta["features"]
    assert not set(meta) & (set(DESCRIPTION) - {"format", "num_classes", "classes"})
    with Server(tmp_path) as server:
        batch = captions_of(f"{server.address}/out", cache_dir=tmp_path / "cache")
        server.shutdown()
    assert sorted(batch["captions"]) == sorted(caption(number) for number in range(20))
    np.testing.assert_equal(batch["labels"], [-1] * 20)


def test_too_many_examples_without_captions_are_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, [("0", {"png": grey_image(0)}), ("1", {"png": grey_image(1)})])
    with pytest.raises(ValueError) as error:
        captions_of(str(tmp_path))
    assert_one_line(error, "2 of 2 examples", "no caption: 2", "none of txt, json")


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_other_stages_than_predict_are_refused(tmp_path: Path, stage: str) -> None:
    write_shards(tmp_path, texts(4))
    with pytest.raises(ValueError) as error:
        CaptionDataModule(str(tmp_path)).setup(stage)
    assert_one_line(error, "CaptionDataModule is for predict", f"not for {stage}", "CodeDataModule")


def test_cleaning_without_the_extra_is_refused_before_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    CaptionDataModule("nowhere")
    with pytest.raises(ValueError) as error:
        CaptionDataModule("nowhere", clean_captions=True)
    assert_one_line(error, 'pip install -c constraints.txt -e ".[text]"')
