"""Caption features in a dataset of their own: paired with the codes by key, or refused if ambiguous."""

import json
import pickle
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from datamodules import CodeDataModule
from datamodules.loading.order import NO_EPOCH
from datamodules.storage import pairing
from datamodules.storage.index import ExampleIndex, Strings
from datamodules.storage.shards import META_FILE, read_meta
from tests.datamodules.feature_datasets import FEATURES, WIDTH, Splits, codes, tokens, write_dataset
from tests.datamodules.shard_files import assert_one_line
from tests.datamodules.storage.test_remote import Server

pytestmark = pytest.mark.filterwarnings("ignore:.*worker processes in total.*")

NUMBER_OF = {codes(number)[view].tobytes(): number for number in range(60) for view in range(2)}
SOURCE = [(f"some/{number}", number) for number in range(30)]
SPLITS = {"train": SOURCE[:23], "val": SOURCE[23:]}


def code_data(root: Path, features: Path | str | None = None, stage: str = "fit", **options: Any) -> CodeDataModule:
    data = CodeDataModule(root, **{"batch_size": 4, "num_workers": 0, "features": features, **options})
    data.setup(stage)
    return data


def pairs(batches: Iterable[dict[str, Any]]) -> list[tuple[int, list[list[float]]]]:
    """Number (from the codes) and features of each example, in order."""
    found = []
    for batch in batches:
        numbers = [NUMBER_OF[row.astype(np.uint16).tobytes()] for row in batch["codes"].numpy()]
        features = batch["caption_features"].split(batch["caption_lengths"].tolist())
        found += [(number, part.tolist()) for number, part in zip(numbers, features, strict=True)]
    return found


def assert_each_has_its_own(data: CodeDataModule, train: Iterable[int], val: Iterable[int]) -> None:
    """Assert that the splits hold the expected examples, each with its own features."""
    for loader, expected in ((data.train_dataloader(), train), (data.val_dataloader(), val)):
        assert sorted(pairs(loader)) == [(number, tokens(number).tolist()) for number in sorted(expected)]


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A dataset with codes and features, one with codes only and one with features only, in shards of other sizes."""
    folder = tmp_path_factory.mktemp("roots")
    combined = write_dataset(folder / "combined", SPLITS)
    return (
        combined,
        write_dataset(folder / "codes", SPLITS, "codes"),
        write_dataset(folder / "features", SPLITS, "features", 7),
    )


@pytest.fixture
def root(roots: tuple[Path, Path, Path]) -> Path:
    """The dataset with codes only, for tests that do not change it."""
    return roots[1]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_paired_features_give_the_same_batches_as_features_stored_with_codes(
    roots: tuple[Path, Path, Path], num_workers: int
) -> None:
    combined, root, features = roots
    one, two = (
        code_data(*sets, short_caption_share=0.5, num_workers=workers)
        for sets, workers in (((combined,), 0), ((root, features), num_workers))
    )
    loaders = [(data.train_dataloader(), data.val_dataloader()) for data in (one, two)]
    for _ in range(2):
        for expected, loader in zip(*loaders, strict=True):
            for batch, other in zip(expected, loader, strict=True):
                assert batch.keys() == other.keys()
                for name in batch:
                    same = torch.equal if name in ("codes", "caption_features", "caption_lengths") else np.array_equal
                    assert same(batch[name], other[name]), name
    lengths = [len(part) for _, part in pairs(loaders[1][0])]
    assert lengths.count(1) > 0  # of short captions


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_features_with_other_splits_are_paired(root: Path, tmp_path: Path, stage: str) -> None:
    features = write_dataset(tmp_path / "features", {"train": SOURCE[::-1][:25], "val": SOURCE[:5]}, "features", 3)
    data = code_data(root, features, stage)
    assert sorted(pairs(data.val_dataloader())) == [(number, tokens(number).tolist()) for number in range(23, 30)]
    if stage == "fit":
        assert_each_has_its_own(data, range(23), range(23, 30))


def test_codes_without_a_validation_split_hold_examples_out(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "codes", {"train": SOURCE}, "codes")
    data = code_data(root, write_dataset(tmp_path / "features", SPLITS, "features"), val_share=0.2)
    train, val = (dict(pairs(loader)) for loader in (data.train_dataloader(), data.val_dataloader()))
    assert len(val) > 1
    assert {**train, **val} == {number: tokens(number).tolist() for number in range(30)}
    assert not set(train) & set(val)


def test_named_shards_of_codes_get_their_features(root: Path, tmp_path: Path) -> None:
    features = write_dataset(tmp_path / "features", SPLITS, "features")
    shards = [str(root / f"train/train-00000{number}.tar") for number in (3, 1)]
    data = code_data(root, features, train=shards, val=str(root / "val"))
    assert_each_has_its_own(data, [*range(4, 8), *range(12, 16)], range(23, 30))


LOCAL = [(f"{number % 5:03d}", number) for number in range(30)]
"""Keys that are unique only within groups of five examples."""


@pytest.mark.parametrize(("codes_per_shard", "features_per_shard"), [(4, 30), (30, 7), (5, 5)])
def test_kth_example_of_a_key_has_the_kth_features(
    tmp_path: Path, codes_per_shard: int, features_per_shard: int
) -> None:
    splits = {"train": LOCAL[:21], "val": LOCAL[21:]}
    root = write_dataset(tmp_path / "codes", splits, "codes", codes_per_shard)
    features = write_dataset(tmp_path / "features", splits, "features", features_per_shard)
    assert_each_has_its_own(code_data(root, features), range(21), range(21, 30))
    assert [number for number, _ in pairs(code_data(root, features, "validate").val_dataloader())] == [*range(21, 30)]


def test_only_a_repeated_key_without_features_is_left_out(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "codes", {"train": LOCAL[:20], "val": LOCAL[20:]}, "codes")
    rest = [[example for example in part if example[0] != "003"] for part in (LOCAL[:20], LOCAL[20:])]
    features = write_dataset(tmp_path / "features", dict(zip(("train", "val"), rest, strict=True)), "features")
    data = code_data(root, features, max_bad_share=0.2)
    assert_each_has_its_own(data, [number for _, number in rest[0]], [number for _, number in rest[1]])


def reordered(*numbers: int) -> list[tuple[str, int]]:
    return [LOCAL[number] for number in numbers]


UNCLEAR: dict[str, tuple[Splits, str]] = {
    "one is missing": ({"train": LOCAL[:7] + LOCAL[8:20], "val": LOCAL[20:]}, "occurs 6 times in the codes"),
    "one is missing in val": ({"train": LOCAL[:20], "val": LOCAL[21:]}, "but 5 times in the features"),
    "one is left": ({"train": LOCAL[:5], "val": []}, "but 1 times in the features"),
    "one too many": ({"train": LOCAL[:20], "val": [*LOCAL[20:], ("002", 40)]}, "but 7 times in the features"),
    "another split": ({"train": LOCAL[:4] + LOCAL[5:20], "val": [*LOCAL[20:], LOCAL[4]]}, "in another order"),
    "shuffled": ({"train": reordered(*range(19, -1, -1)), "val": LOCAL[20:]}, "in another order"),
    "others are missing": ({"train": [*LOCAL[:20], ("004", 50)], "val": LOCAL[20:29]}, "in another order"),
}


@pytest.fixture(scope="module")
def repeated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Codes with repeated keys."""
    return write_dataset(tmp_path_factory.mktemp("repeated"), {"train": LOCAL[:20], "val": LOCAL[20:]}, "codes")


@pytest.mark.parametrize("case", UNCLEAR)
def test_repeated_keys_with_ambiguous_features_are_refused(repeated: Path, tmp_path: Path, case: str) -> None:
    splits, phrase = UNCLEAR[case]
    features = write_dataset(tmp_path / "features", splits, "features")
    for stage in ("fit", "validate"):
        with pytest.raises(ValueError) as error:
            code_data(repeated, features, stage)
        assert_one_line(error, repeated, features, phrase, "ambiguous; extract the features again")


GAPS = {"train": SOURCE[:3] + SOURCE[5:23], "val": SOURCE[23:]}


def test_examples_without_features_are_rejected_before_reading(root: Path, tmp_path: Path) -> None:
    features = write_dataset(tmp_path / "features", GAPS, "features")
    data = code_data(root, features, max_bad_share=0.1)
    assert data.tallies["train"].by_reason() == {"no caption": 2}
    assert "example some/3 of" in data.tallies["train"].describe()
    assert [len(batch["codes"]) for batch in data.train_dataloader()] == [4, 4, 4, 4, 4, 1]
    assert data.finish_tally("train") == {"no caption": 2}
    assert_each_has_its_own(data, [number for _, number in GAPS["train"]], range(23, 30))
    with pytest.raises(ValueError) as error:
        code_data(root, features, max_bad_share=0.08)
    assert_one_line(error, "2 of 23 examples of train", "no caption: 2", "has no caption features")


def test_examples_without_features_in_the_other_dataset_do_not_count(root: Path, tmp_path: Path) -> None:
    features = write_dataset(tmp_path / "features", GAPS, "features")
    with_codes_alone = write_dataset(tmp_path / "more", {"train": SOURCE[3:5], "val": SOURCE[:0]}, "codes")
    meta = read_meta(features, "")
    (note,) = read_meta(with_codes_alone, "")["splits"]["train"]["shards"]
    meta["splits"]["train"]["shards"].append({**note, "name": "more.tar"})
    (with_codes_alone / "train" / note["name"]).rename(features / "train/more.tar")
    (features / META_FILE).write_text(json.dumps(meta))
    data = code_data(root, features, max_bad_share=0.1)
    assert data.tallies["train"].by_reason() == {"no caption": 2}


def test_captions_stored_with_codes_are_not_required(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "codes", SPLITS, "codes", silent=[4, 27])
    data = code_data(root, write_dataset(tmp_path / "features", SPLITS, "features"))
    assert_each_has_its_own(data, range(23), range(23, 30))


def trainer_of_model(needs_captions: bool) -> Any:
    """A trainer whose model needs captions or not."""
    module = SimpleNamespace(needs_captions=needs_captions)
    return SimpleNamespace(lightning_module=module, global_rank=0, world_size=1)


def test_class_conditional_model_ignores_the_features(root: Path, tmp_path: Path) -> None:
    data = CodeDataModule(root, 4, num_workers=0, features=tmp_path / "nowhere")
    data.trainer = trainer_of_model(needs_captions=False)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert "caption_features" not in batch
    assert "features" not in data.code_meta
    asking = CodeDataModule(root, 4, num_workers=0, features=tmp_path / "nowhere")
    asking.trainer = trainer_of_model(needs_captions=True)
    with pytest.raises(ValueError) as error:
        asking.setup("fit")
    assert_one_line(error, tmp_path / "nowhere", "does not exist", pairing.HINT)


def test_given_features_replace_those_stored_with_the_codes(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "codes", SPLITS, encoder="old")
    others = {split: [(key, number + 30) for key, number in examples] for split, examples in SPLITS.items()}
    features = write_dataset(tmp_path / "features", others, "codes features", encoder="new")
    before = (root / META_FILE).read_bytes()
    data = code_data(root, features)
    assert dict(pairs(data.val_dataloader())) == {n: tokens(n + 30).tolist() for n in range(23, 30)}
    assert data.code_meta["features"] == {**FEATURES, "encoder": "new"}
    assert {**data.code_meta, "features": None} == {**read_meta(root, ""), "features": None}
    assert (root / META_FILE).read_bytes() == before
    assert code_data(root).code_meta["features"]["encoder"] == "old"


@pytest.mark.parametrize("same", ["some/4", "some/4 some/25"])
def test_hash_collision_loses_an_example_and_mixes_no_captions(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same: str
) -> None:
    key_hash = pairing.key_hash
    monkeypatch.setattr(pairing, "key_hash", lambda key: 7 if key.decode() in (*same.split(), "x") else key_hash(key))
    splits = {"train": [("x" if number == 4 else key, number) for key, number in SOURCE[:23]], "val": SOURCE[23:]}
    features = write_dataset(tmp_path / "features", splits, "features")
    data = code_data(root, features, max_bad_share=0.2)
    assert_each_has_its_own(data, set(range(23)) - {4}, range(23, 30))
    assert data.tallies["train"].by_reason() == {"no caption": 1}
    assert "key x has the same hash" in data.tallies["train"].describe()


def test_keys_with_a_hash_collision_and_different_counts_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key_hash = pairing.key_hash
    monkeypatch.setattr(pairing, "key_hash", lambda key: 7 if key in (b"some/4", b"some/9") else key_hash(key))
    root = write_dataset(tmp_path / "codes", {"train": SOURCE[:9] + SOURCE[10:23], "val": SOURCE[23:]}, "codes")
    data = code_data(root, write_dataset(tmp_path / "features", SPLITS, "features"))
    assert_each_has_its_own(data, set(range(23)) - {4, 9}, range(23, 30))


def test_resumed_run_continues_with_the_next_batch(roots: tuple[Path, Path, Path]) -> None:
    combined, root, features = roots
    loader = code_data(combined).train_dataloader()
    expected = [batch["keys"] for _ in range(2) for batch in loader]
    stopped = code_data(root, features)
    batches = iter(stopped.train_dataloader())
    before = [next(batches)["keys"] for _ in range(2)]
    resumed = code_data(root, features)
    resumed.load_state_dict(stopped.state_dict())
    loader = resumed.train_dataloader()
    rest = [batch for _ in range(2) for batch in loader]
    assert before + [batch["keys"] for batch in rest] == expected
    assert all(features == tokens(number).tolist() for number, features in pairs(rest))


def test_pickled_dataset_reads_the_same(roots: tuple[Path, Path, Path]) -> None:
    _, root, features = roots
    dataset = code_data(root, features).datasets["val"]
    copied = pickle.loads(pickle.dumps(dataset))
    addresses = [(number, NO_EPOCH) for number in range(7)]
    assert pairs([copied.__getitems__(addresses)]) == pairs([dataset.__getitems__(addresses)])  # type: ignore[attr-defined]


def test_datasets_are_paired_with_little_memory() -> None:
    count = 100_000
    numbers = np.random.default_rng(0).permutation(count)
    here, there = (
        Strings.from_strings([f"some/folder/{n:012d}" for n in order]) for order in (range(count), numbers.tolist())
    )
    tracemalloc.start()
    partners = pairing._match(here, there, "", "")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.array_equal(numbers[partners], np.arange(count))
    assert peak < 150 * count  # strings of such keys take 200 bytes in a dictionary


def test_only_feature_columns_of_the_other_dataset_are_kept(roots: tuple[Path, Path, Path]) -> None:
    _, root, features = roots
    data = code_data(root, features)
    kept = data.datasets["train"].features._index  # type: ignore[attr-defined]
    assert isinstance(kept, ExampleIndex)
    assert sorted(kept.members) == ["features", "shortfeatures"]
    partners = data.datasets["train"].examples.partners  # type: ignore[attr-defined]
    assert (partners.dtype, partners.tolist()) == (np.int64, [*range(23)])


def test_remote_features_equal_local_features(roots: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, root, features = roots
    with Server(features.parent) as server:
        data = code_data(root, f"{server.address}/features", cache_dir=tmp_path / "cache")
        server.shutdown()
    assert_each_has_its_own(data, range(23), range(23, 30))


REFUSED: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "a stream": (
        lambda path: CodeDataModule(path / "codes", features=path / "features", resampled_epoch=100),
        ("features is", "with resampled_epoch features must be in the shards of the codes"),
    ),
    "captions as codes": (lambda path: code_data(path / "features"), ("without codes", "this one as features")),
    "codes as features": (
        lambda path: code_data(path / "codes", path / "codes"),
        ("does not describe caption features",),
    ),
    "shards without a description": (
        lambda path: code_data(path / "codes", path / "features/train"),
        (f"has no {META_FILE}", pairing.HINT),
    ),
    "features of other images": (
        lambda path: code_data(path / "codes", path / "others"),
        ("none of the 30 examples", "'some/0'", "'other/0'", "same images"),
    ),
    "captions that were not cleaned": (
        lambda path: code_data(path / "codes", path / "features", clean_captions=True),
        ("clean_captions is web", "features in", "were not cleaned; set it to false"),
    ),
    "no short captions": (
        lambda path: code_data(path / "codes", path / "others", short_caption_share=0.1),
        ("short_caption_share is 0.1", "others has no features of short captions"),
    ),
    "a command": (
        lambda path: code_data(path / "codes", "pipe:cat features"),
        ("pipe:cat features", "allow_pipe"),
    ),
    "a broken description": (
        lambda path: code_data(path / "codes", path / "broken"),
        ("features in meta.json of", "broken is invalid", "extract them again"),
    ),
}


@pytest.fixture(scope="module")
def mismatched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets that do not belong together."""
    folder = tmp_path_factory.mktemp("mismatched")
    write_dataset(folder / "codes", SPLITS, "codes")
    write_dataset(folder / "features", SPLITS, "features")
    write_dataset(folder / "others", {"train": [("other/0", 0)]}, "features", short=False)
    write_dataset(folder / "broken", SPLITS, "features", width=0)
    return folder


@pytest.mark.parametrize("case", REFUSED)
def test_mismatched_features_are_refused_in_one_line(mismatched: Path, case: str) -> None:
    make, phrases = REFUSED[case]
    with pytest.raises(ValueError) as error:
        make(mismatched)
    assert_one_line(error, *phrases)


def test_broken_features_are_skipped_and_counted(root: Path, tmp_path: Path) -> None:
    features = write_dataset(tmp_path / "features", SPLITS, "features", width=WIDTH, caption_length=4)  # some have 5
    data = code_data(root, features, max_bad_share=0.3)
    found = pairs(data.train_dataloader())
    assert all(number % 4 < 3 and part == tokens(number).tolist() for number, part in found)
    assert data.tallies["train"].by_reason() == {"broken features": 5}
