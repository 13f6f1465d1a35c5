"""Features of captions: what is stored, and resuming after a stop on any number of ranks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import main
from callbacks import FeatureWriter
from datamodules import CaptionDataModule, CodeDataModule
from datamodules.storage.index import Example
from datamodules.storage.shards import META_FILE, read_meta
from datamodules.storage.tar_index import index_shard
from lightning_modules import CaptionModule
from llamagen.text import CaptionEncoder, TextEncoderConfig, clean_caption, first_sentence
from tests.datamodules.caption_datasets import DESCRIPTION, caption, codes, write_captioned_codes
from tests.datamodules.shard_files import assert_one_line
from tests.lightning_modules.runs import evaluator
from tests.ranks import succeeds, two_processes
from tests.tiny_t5 import WIDTH, save_tiny_t5

COUNTS = {"train": 33, "val": 8}
PER_SHARD = 10
LENGTH = 12


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Codes with captions."""
    return write_captioned_codes(tmp_path_factory.mktemp("source") / "codes", COUNTS)


def module_of(t5: Path, dtype: Any = "float32", caption_length: int = LENGTH) -> CaptionModule:
    return CaptionModule(TextEncoderConfig(str(t5), dtype), caption_length)


def extract(
    module: CaptionModule, source: Path, out: Path, per_shard: int = PER_SHARD, dtype: Any = "bfloat16", **data: Any
) -> None:
    """Run ``predict``."""
    run = evaluator(FeatureWriter(per_shard, dtype), default_root_dir=out)
    options = {"batch_size": 4, "num_workers": 0, **data}
    run.predict(module, CaptionDataModule(str(source), **options), return_predictions=False)


@pytest.fixture(scope="module")
def module(t5: Path) -> CaptionModule:
    """A module that no test changes."""
    return module_of(t5)


@pytest.fixture(scope="module")
def whole(module: CaptionModule, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The features of an uninterrupted extraction."""
    out = tmp_path_factory.mktemp("whole") / "features"
    extract(module, source, out)
    return out


def samples(root: Path, split: str) -> list[Example]:
    return [sample for shard in sorted((root / split).glob("*.tar")) for sample in index_shard(shard)]


def features(sample: Example, dtype: torch.dtype = torch.bfloat16, part: str = "features") -> Tensor:
    numbers = np.frombuffer(sample.read(part), "<i2").astype(np.int16)
    return torch.from_numpy(numbers).view(dtype).reshape(-1, WIDTH)


def encoded_alone(encoder: CaptionEncoder, text: str) -> Tensor:
    """Features of the tokens of a caption, encoded in a batch of one."""
    encoded = encoder([text])
    return encoded.features[0, : int(encoded.lengths[0])]


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


class InterruptedRunError(Exception):
    """Stands for a sudden end of the process."""


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Make the encoder fail after a number of batches, until the patch is undone."""
    predict_step = CaptionModule.predict_step
    with monkeypatch.context() as patch:

        def stop(batches: int) -> pytest.MonkeyPatch:
            done: list[int] = []

            def step(self: CaptionModule, *args: Any) -> Any:
                if len(done) == batches:
                    raise InterruptedRunError
                done.append(1)
                return predict_step(self, *args)

            patch.setattr(CaptionModule, "predict_step", step)
            return patch

        yield stop


def test_features_equal_those_of_each_caption_encoded_alone(module: CaptionModule, whole: Path) -> None:
    encoder = module.encoder
    lengths = set()
    for split, count in COUNTS.items():
        found = samples(whole, split)
        assert [sample.key for sample in found] == [f"{split}/{number}" for number in range(count)]
        for number, sample in enumerate(found):
            # In float32 a batch rounds differently than a single caption, which may change the rounding to bfloat16.
            stored, expected = features(sample), encoded_alone(encoder, caption(number))
            torch.testing.assert_close(stored.float(), expected, rtol=2**-8, atol=1e-6)
            lengths.add(len(stored))
    assert min(lengths) <= 4
    assert max(lengths) == LENGTH


def test_features_in_bfloat16_are_stored_exactly(t5: Path, source: Path, tmp_path: Path) -> None:
    module = module_of(t5, "bfloat16")
    extract(module, source, tmp_path, batch_size=1)
    for number, sample in enumerate(samples(tmp_path, "train")):
        assert torch.equal(features(sample), encoded_alone(module.encoder, caption(number)))


def test_float16_is_more_precise(module: CaptionModule, source: Path, tmp_path: Path) -> None:
    extract(module, source, tmp_path, dtype="float16")
    for number, sample in enumerate(samples(tmp_path, "val")):
        stored, expected = features(sample, torch.float16), encoded_alone(module.encoder, caption(number))
        torch.testing.assert_close(stored.float(), expected, rtol=2**-11, atol=1e-6)
    assert read_meta(tmp_path, "")["features"]["dtype"] == "float16"


def test_codes_classes_and_captions_are_kept(source: Path, whole: Path) -> None:
    for split in COUNTS:
        for number, sample in enumerate(samples(whole, split)):
            assert sample.read("npy") == codes(number)
            assert sample.read("txt").decode() == caption(number)
            assert sample.label == (-1 if number % 2 else number % 5)
            assert sorted(sample.members) == sorted(["features", "npy", "txt", *([] if number % 2 else ["cls"])])


def test_meta_describes_codes_and_encoder(t5: Path, module: CaptionModule, whole: Path) -> None:
    meta, facts = read_meta(whole, ""), module.encoder.metadata()
    expected = {
        "encoder": str(t5),
        "width": WIDTH,
        "caption_length": LENGTH,
        "dtype": "bfloat16",
        "encoder_dtype": "float32",
        "weights": facts["weights"],
        "tokenizer": facts["tokenizer"],
        "cleaned": False,
        "short": False,
    }
    truncated = meta["features"].pop("truncated")
    assert truncated > 0
    assert meta == {**DESCRIPTION, "features": expected, "count": sum(COUNTS.values()), "splits": meta["splits"]}
    shards = meta["splits"]["train"]["shards"]
    assert [shard["count"] for shard in shards] == [10, 10, 10, 3]
    assert {name for shard in shards for name in shard} == {"name", "count", "bytes", "sha256"}
    assert [len(list((whole / split).iterdir())) for split in COUNTS] == [4, 1]


def test_the_dataset_of_features_is_also_a_dataset_of_codes(whole: Path) -> None:
    data = CodeDataModule(whole, num_workers=0, max_bad_share=0.6)  # every second one has no class
    data.setup("fit")
    keys = [data.datasets["train"][place, 0]["keys"] for place in range(17)]
    assert keys == [f"train/{number}" for number in range(0, COUNTS["train"], 2)]


@pytest.mark.parametrize("batches", [0, 5, 9])
def test_a_stopped_extraction_resumes_with_the_remaining_shards(
    module: CaptionModule, source: Path, whole: Path, tmp_path: Path, stop_after: Any, batches: int
) -> None:
    patch = stop_after(batches)
    with pytest.raises(InterruptedRunError):
        extract(module, source, tmp_path)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")}
    assert len(kept) == max(0, batches - 1) // 3
    assert not (tmp_path / META_FILE).exists()
    patch.undo()
    extract(module, source, tmp_path)
    assert files(tmp_path) == files(whole)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_a_removed_shard_is_written_again(
    module: CaptionModule, source: Path, whole: Path, tmp_path: Path, stop_after: Any
) -> None:
    patch = stop_after(9)
    with pytest.raises(InterruptedRunError):
        extract(module, source, tmp_path)
    patch.undo()
    (tmp_path / "train/train-000000.tar").unlink()
    extract(module, source, tmp_path)
    assert files(tmp_path) == files(whole)


def test_rejects_to_resume_with_other_settings(
    t5: Path, module: CaptionModule, source: Path, tmp_path: Path, stop_after: Any
) -> None:
    patch, out = stop_after(7), tmp_path / "out"
    with pytest.raises(InterruptedRunError):
        extract(module, source, out)
    patch.undo()
    before = files(out)
    other_words = write_captioned_codes(tmp_path / "words", COUNTS, {1: {"txt": b"a cat"}})
    fewer = write_captioned_codes(tmp_path / "fewer", {**COUNTS, "train": 32})
    changes: list[tuple[str, dict[str, Any]]] = [
        ("another encoder", {"module": module_of(save_tiny_t5(tmp_path / "t5", seed=1))}),
        ("another encoder", {"module": module_of(t5, caption_length=LENGTH + 1)}),
        ("another encoder", {"module": module_of(t5, "bfloat16")}),
        ("another samples_per_shard", {"per_shard": 11}),
        ("another dtype", {"dtype": "float16"}),
        ("another clean_captions", {"clean_captions": True}),
        ("another short_captions", {"short_captions": True}),
        ("another captions, source", {"source": other_words}),
        ("another captions, source", {"source": fewer}),
    ]
    for phrase, change in changes:
        with pytest.raises(ValueError) as error:
            extract(**{"module": module, "source": source, "out": out, **change})
        assert_one_line(error, out, f"started with {phrase};", "delete it or choose another folder")
        assert files(out) == before, change


def arguments(t5: Path, source: Path, out: Path) -> list[str]:
    return [
        *("predict", "--config", "configs/text/extract.yaml", f"--data.init_args.root={source}"),
        *(f"--trainer.default_root_dir={out}", f"--model.init_args.encoder.name={t5}"),
        *("--trainer.accelerator=cpu", f"--model.init_args.caption_length={LENGTH}", "--data.init_args.num_workers=0"),
        *("--trainer.callbacks.init_args.samples_per_shard=4", "--data.init_args.batch_size=3"),
        *("--trainer.enable_progress_bar=false", "--data.init_args.short_captions=true"),
    ]


@pytest.mark.slow
def test_two_ranks_write_the_same_files_as_one(t5: Path, source: Path, tmp_path: Path) -> None:
    main.main(arguments(t5, source, tmp_path / "one"))
    done = two_processes(arguments(t5, source, tmp_path / "two"))
    succeeds(done)
    truncated = read_meta(tmp_path / "one", "")["features"]["truncated"]
    assert truncated > 0
    assert done.stderr.count(f"{truncated} captions have more tokens than caption_length {LENGTH}") == 1
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == ["predict.yaml"]
    assert len(one) == 2 + 9 + 2


def test_first_sentences_have_features_if_they_differ_from_the_caption(
    module: CaptionModule, source: Path, tmp_path: Path
) -> None:
    extract(module, source, tmp_path, short_captions=True)
    for number, sample in enumerate(samples(tmp_path, "train")):
        sentence = first_sentence(caption(number))
        assert ("shortfeatures" in sample.members) is (sentence != caption(number)) is (number % 3 == 0)
        if number % 3 == 0:
            short = features(sample, part="shortfeatures")
            torch.testing.assert_close(short.float(), encoded_alone(module.encoder, sentence), rtol=2**-8, atol=1e-6)
        torch.testing.assert_close(
            features(sample).float(), encoded_alone(module.encoder, caption(number)), rtol=2**-8, atol=1e-6
        )
    assert read_meta(tmp_path, "")["features"]["short"] is True


def test_cleaned_captions_are_stored_and_encoded_as_cleaned(module: CaptionModule, tmp_path: Path) -> None:
    dirty = "A <b>Cat</b> on www.cats.com/1 the TREE"
    source = write_captioned_codes(tmp_path / "codes", COUNTS, {2: {"txt": dirty.encode()}})
    extract(module, source, tmp_path / "out", clean_captions=True)
    sample = samples(tmp_path / "out", "train")[2]
    assert sample.read("txt").decode() == clean_caption(dirty) == "a cat on the tree"
    expected = encoded_alone(module.encoder, "a cat on the tree")
    torch.testing.assert_close(features(sample).float(), expected, rtol=2**-8, atol=1e-6)
    assert read_meta(tmp_path / "out", "")["features"]["cleaned"] == "web"
    # The mark is kept when the captions are encoded again.
    extract(module, tmp_path / "out", tmp_path / "again")
    assert read_meta(tmp_path / "again", "")["features"]["cleaned"] == "web"
    with pytest.raises(ValueError) as error:
        extract(module, tmp_path / "out", tmp_path / "other", clean_captions="published")
    assert_one_line(error, "clean_captions is published", "are already cleaned with web; set it to web")


ODD: dict[int, dict[str, bytes | None]] = {
    1: {"txt": None},
    4: {"txt": b""},
    5: {"txt": b" \n\t "},
    6: {"txt": b"\xff\xfe\xff"},
    7: {"txt": b"<br> https://cats.com/1.jpg"},
    8: {"npy": None},
    9: {"npy": b""},
    10: {"txt": None, "json": b'{"caption": "a red house"}'},
    11: {"txt": "日本 🙂 \ud7ff".encode()},
    12: {"txt": b"a photo " * 5000},
    **{number: {"txt": b"..."} for number in range(20, 31)},  # all of the third shard, when they are cleaned
}


@pytest.mark.parametrize("batches", [None, 4])
def test_examples_without_caption_or_codes_are_skipped_and_counted(
    module: CaptionModule, tmp_path: Path, stop_after: Any, batches: int | None
) -> None:
    source, out = write_captioned_codes(tmp_path / "codes", COUNTS, ODD), tmp_path / "out"
    options: dict[str, Any] = {"clean_captions": True, "max_bad_share": 0.6}
    if batches is not None:
        patch = stop_after(batches)
        with pytest.raises(InterruptedRunError):
            extract(module, source, out, **options)
        patch.undo()
    extract(module, source, out, **options)
    bad = {1, 4, 5, 6, 7, 8, 9}
    written = {sample.key: sample for sample in samples(out, "train")}
    gone = {number for number in range(COUNTS["train"]) if f"train/{number}" not in written}
    assert gone == bad | set(range(20, 31))
    assert [len(index_shard(shard)) for shard in sorted((out / "train").iterdir())] == [4, 9, 0, 2]
    assert written["train/10"].read("txt") == b"a red house"
    assert len(features(written["train/12"])) == LENGTH
    skipped = read_meta(out, "")["splits"]["train"]["skipped"]
    assert skipped == {"no caption": 5 + 11, "no codes": 1, "empty file": 1}
    listed = (out / "skipped.tsv").read_text().splitlines()[1:]
    assert {line.split("\t")[1] for line in listed} == {f"train/{number}" for number in gone}
    assert len(listed) == len(gone)


def test_truncated_captions_are_counted_over_all_runs_and_reported_once(
    module: CaptionModule, source: Path, whole: Path, tmp_path: Path, stop_after: Any
) -> None:
    texts = [caption(number) for count in COUNTS.values() for number in range(count)]
    expected = int(module.encoder(texts).truncated.sum())
    patch = stop_after(7)
    with pytest.raises(InterruptedRunError):
        extract(module, source, tmp_path)
    patch.undo()
    with pytest.warns(
        UserWarning, match=f"^{expected} captions have more tokens than caption_length {LENGTH} and were truncated"
    ):
        extract(module, source, tmp_path)
    assert read_meta(tmp_path, "")["features"]["truncated"] == expected
    assert 0 < expected < len(texts)


def test_does_not_warn_if_no_caption_is_truncated(
    t5: Path, source: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    extract(module_of(t5, caption_length=200), source, tmp_path)
    assert read_meta(tmp_path, "")["features"]["truncated"] == 0
    assert [str(warning.message) for warning in recwarn if "tokens" in str(warning.message)] == []


@pytest.mark.parametrize(
    ("scale", "dtype", "phrases"),
    [
        (1e6, "float16", ["features of example train/0 exceed the range of float16", "set dtype of FeatureWriter to"]),
        (float("nan"), "bfloat16", ["the features of the caption encoder", "are not finite", "(precision float32)"]),
        (float("nan"), "float16", ["weight encoder.final_layer_norm.weight is not finite", "(precision float32)"]),
    ],
)
def test_rejects_features_that_cannot_be_stored(
    t5: Path, source: Path, tmp_path: Path, scale: float, dtype: str, phrases: list[str]
) -> None:
    module = module_of(t5)
    module.encoder.model.encoder.final_layer_norm.weight.mul_(scale)
    with pytest.raises(ValueError if scale == 1e6 else FloatingPointError) as error:
        extract(module, source, tmp_path, dtype=dtype)
    assert_one_line(error, *phrases)
    assert list(tmp_path.rglob("*.tar*")) == []


def test_large_features_are_stored_as_bfloat16(t5: Path, source: Path, tmp_path: Path) -> None:
    module = module_of(t5)
    module.encoder.model.encoder.final_layer_norm.weight.mul_(1e6)
    extract(module, source, tmp_path)
    assert features(samples(tmp_path, "train")[0]).abs().max() > 65504


@pytest.mark.parametrize("option", [{"samples_per_shard": 0}, {"dtype": "float32"}, {"dtype": "float8"}], ids=str)
def test_rejects_invalid_options(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as error:
        FeatureWriter(**option)
    assert_one_line(error, next(iter(option)), str(next(iter(option.values()))), "must be")


def test_rejects_a_complete_dataset(module: CaptionModule, source: Path, whole: Path) -> None:
    before = files(whole)
    with pytest.raises(ValueError) as error:
        extract(module, source, whole)
    assert_one_line(error, whole, "already holds a complete dataset")
    assert files(whole) == before
