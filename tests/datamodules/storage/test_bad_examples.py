"""Bad examples are skipped, counted by reason, and fatal if there are too many."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from datamodules.datasets.base import MAX_ATTEMPTS, ExampleDataset
from datamodules.images import ImageDataModule, ImageDataset
from datamodules.loading.loader import SKIPPED
from datamodules.loading.order import NO_EPOCH, SHARD_BITS, epoch_order
from datamodules.loading.stream import StreamIndex
from datamodules.storage.bad_examples import MAX_LISTED, REASONS, BadExampleError, Skipped, Tally
from datamodules.storage.index import ExampleIndex
from datamodules.storage.remote import ShardCache
from datamodules.storage.sources import Source
from datamodules.storage.tar_index import index_shard
from tests.datamodules.shard_files import assert_one_line, grey_image, write_shards

pytestmark = pytest.mark.filterwarnings("ignore:.*worker processes in total.*")


def bad(count: int, reason: str = "empty file", first: int = 0) -> list[Skipped]:
    return [Skipped(n, f"key{n}", reason, f"example key{n} is bad") for n in range(first, first + count)]


def test_bad_example_error_is_a_value_error_with_a_reason() -> None:
    error = BadExampleError("empty file", "the image of x is empty")
    assert isinstance(error, ValueError)
    assert (error.reason, str(error)) == ("empty file", "the image of x is empty")


def test_tally_counts_by_reason() -> None:
    tally = Tally("train", 100, rejected=bad(2, "no label"), max_share=0.1)
    tally.add(bad(3))
    tally.add([])
    tally.add(bad(1, "broken image", 3))
    assert tally.total == 102
    assert tally.counts == {"empty file": 3, "broken image": 1}
    assert tally.by_reason() == {"empty file": 3, "broken image": 1, "no label": 2}
    assert tally.describe() == "broken image: 1, empty file: 3, no label: 2; e.g. example key0 is bad"


def test_one_bad_example_more_exceeds_the_share() -> None:
    tally = Tally("train", 100, max_share=0.05)
    tally.add(bad(5))
    with pytest.raises(ValueError) as error:
        tally.add(bad(1, "broken image", 5))
    assert_one_line(error, "6 of 100 examples of train", "max_bad_share 0.05", "broken image: 1, empty file: 5", "key0")


@pytest.mark.parametrize(("known", "count", "fits"), [(5, 95, True), (6, 94, False), (0, 0, True), (1, 0, False)])
def test_rejected_examples_count(known: int, count: int, fits: bool) -> None:
    if fits:
        assert Tally("val", count, bad(known)).by_reason().total() == known
    else:
        with pytest.raises(ValueError) as error:
            Tally("val", count, bad(known))
        assert_one_line(error, f"{known} of {known + count} examples of val", f"empty file: {known}")


def test_rejected_and_skipped_examples_add_up() -> None:
    tally = Tally("val", 98, bad(2), max_share=0.05)
    tally.add(bad(3))
    with pytest.raises(ValueError, match=r"6 of 100 examples of val"):
        tally.add(bad(1))


@pytest.mark.parametrize(("max_share", "tolerated"), [(0.0, 0), (0.5, 10), (1.0, 20)])
def test_maximum_bad_share_is_an_option(max_share: float, tolerated: int) -> None:
    tally = Tally("train", 20, max_share=max_share)
    tally.add(bad(tolerated))
    if tolerated < 20:
        with pytest.raises(ValueError):
            tally.add(bad(1))


def test_bad_share_is_checked_over_all_ranks() -> None:
    tally = Tally("train", 98, bad(2), max_share=0.05)
    tally.add(bad(2))
    tally.check([3, *[0] * (len(REASONS) - 1)])
    with pytest.raises(ValueError, match=r"6 of 100 examples of train"):
        tally.check([3, 1, *[0] * (len(REASONS) - 2)])


def test_reset_keeps_only_rejected_examples() -> None:
    tally = Tally("train", 98, bad(2, "no label"), max_share=0.05)
    for _ in range(3):
        tally.add(bad(3))
        tally.reset()
    assert (tally.counts, tally.skipped) == ({}, [])
    assert tally.by_reason() == {"no label": 2}


@pytest.mark.parametrize("keep", [False, True])
def test_first_few_or_all_skipped_examples_are_kept(keep: bool) -> None:
    tally = Tally("train", 1000, keep=keep)
    tally.add(bad(3))
    tally.add(bad(20, first=3))
    assert tally.skipped == bad(23 if keep else MAX_LISTED)


class Picky(ExampleDataset):
    """Dataset with some bad examples."""

    def __init__(self, examples: Any, bad: set[int], never_empty: bool = False) -> None:
        super().__init__(examples, never_empty)
        self.bad = bad
        self.asked: list[tuple[int, int]] = []

    def read(self, number: int, epoch: int) -> dict[str, Any]:
        self.asked.append((number, epoch))
        if number in self.bad:
            raise BadExampleError("broken image", f"example {number} is broken")
        return {"value": 10 * number + epoch, "labels": number % 3}

    def collate(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        assert examples
        return {name: torch.tensor([example[name] for example in examples]) for name in examples[0]}


COUNT = 12


@pytest.fixture
def examples(tmp_path: Path) -> ExampleIndex:
    """Examples with keys k00 to k11."""
    shards = write_shards(tmp_path / "train", [(f"k{n:02d}", {"png": grey_image(n)}) for n in range(COUNT)])
    return ExampleIndex.concatenate([index_shard(shard) for shard in shards])


def skip(number: int) -> Skipped:
    return Skipped(number, f"k{number:02d}", "broken image", f"example {number} is broken")


@pytest.mark.parametrize("never_empty", [False, True])
def test_batch_leaves_out_and_lists_bad_examples(examples: ExampleIndex, never_empty: bool) -> None:
    dataset = Picky(examples, {2, 7, 8}, never_empty)
    batch = dataset.__getitems__([(7, 1), (3, 1), (2, 1), (11, 1)])
    assert batch.keys() == {"value", "labels", "numbers", SKIPPED}
    assert (batch["numbers"].dtype, batch["numbers"].tolist()) == (torch.int64, [3, 11])
    assert batch["value"].tolist() == [31, 111]
    assert batch[SKIPPED] == ([skip(7), skip(2)], 0)
    assert dataset.asked == [(7, 1), (3, 1), (2, 1), (11, 1)]


def test_batch_of_good_examples_lists_nothing(examples: ExampleIndex) -> None:
    batch = Picky(examples, {2}).__getitems__([(3, NO_EPOCH), (4, NO_EPOCH)])
    assert batch.keys() == {"value", "labels", "numbers"}
    assert batch["value"].tolist() == [29, 39]


def test_batch_of_bad_examples_only_holds_the_reasons(examples: ExampleIndex) -> None:
    assert Picky(examples, {2, 3}).__getitems__([(3, 0), (2, 0)]) == {SKIPPED: ([skip(3), skip(2)], 0)}


def test_never_empty_substitutes_the_next_usable_example(examples: ExampleIndex) -> None:
    dataset = Picky(examples, {10, 11, 0, 1}, never_empty=True)
    batch = dataset.__getitems__([(10, 4), (1, 4)])
    assert batch["numbers"].tolist() == [2]
    assert batch["value"].tolist() == [24]
    assert batch[SKIPPED] == ([skip(10), skip(1)], 0)  # bad substitutes are counted when their own turn comes
    assert dataset.asked == [(10, 4), (1, 4), (11, 4), (0, 4), (1, 4), (2, 4)]


def test_search_for_a_substitute_ends(examples: ExampleIndex) -> None:
    dataset = Picky(examples, set(range(COUNT)), never_empty=True)
    with pytest.raises(ValueError, match=r"100 examples in a row are bad, .*example 5 is broken"):
        dataset.__getitems__([(5, 0)])
    assert len(dataset.asked) == 1 + MAX_ATTEMPTS


def test_single_example_is_returned_or_refused(examples: ExampleIndex) -> None:
    dataset = Picky(examples, {2})
    assert len(dataset) == COUNT
    example = dataset[7, 3]
    assert (int(example["value"]), example["labels"]) == (73, 1)
    assert type(example["labels"]) is int
    with pytest.raises(BadExampleError, match=r"example 2 is broken"):
        dataset[2, 3]


def stream(folder: Path, empty: tuple[int, ...] = ()) -> StreamIndex:
    """Four shards of three examples, with a bad example in the second."""
    parts = [(f"k{n:02d}", {"txt": b"no image"} if n == 4 else {"png": grey_image(n)}) for n in range(COUNT)]
    shards = write_shards(folder / "train", parts)
    for number in empty:
        shards[number].write_bytes(bytes(10240))
    return StreamIndex(Source("train", [str(shard) for shard in shards]), ShardCache(folder / "cache"), ("png",))


def test_bad_examples_of_a_newly_indexed_shard_are_reported_once(tmp_path: Path) -> None:
    dataset = Picky(stream(tmp_path), {(1 << SHARD_BITS) + 1})
    numbers = [(1 << SHARD_BITS), (1 << SHARD_BITS) + 1, 2]
    batch = dataset.__getitems__([(number, 0) for number in numbers])
    assert batch["numbers"].tolist() == [numbers[0], numbers[2]]
    assert [(example.key, example.reason) for example in batch[SKIPPED][0]] == [
        ("k05", "broken image"),
        ("k04", "no image"),
    ]
    assert [example.key for example in dataset.__getitems__([(numbers[1], 0)])[SKIPPED][0]] == ["k05"]


def test_stream_substitutes_an_example_of_another_shard(tmp_path: Path) -> None:
    first, second, last = 0, 1 << SHARD_BITS, 3 << SHARD_BITS
    dataset = Picky(stream(tmp_path), {last, last + 1, first}, never_empty=True)
    batch = dataset.__getitems__([(last + 1, 2)])
    assert batch["numbers"].tolist() == [second]
    assert [(example.number, example.key) for example in batch[SKIPPED][0]] == [(last + 1, "k10")]


def test_shard_of_a_stream_without_examples_is_counted_and_skipped(tmp_path: Path) -> None:
    examples = stream(tmp_path, empty=(2,))
    dataset = ImageDataset(examples, image_size=4, never_empty=True)
    batch = dataset.__getitems__([((2 << SHARD_BITS) + 5, 0), (0, 0)])
    assert batch["keys"] == ["k00"]
    assert [(example.key, example.reason) for example in batch[SKIPPED][0]] == [("", "truncated shard")]
    batch = dataset.__getitems__([((2 << SHARD_BITS) + 5, 0)])
    assert batch["keys"] == ["k09"]


def image_data(root: Path, **options: Any) -> ImageDataModule:
    data = ImageDataModule(root, **{"image_size": 4, "batch_size": 3, "num_workers": 0, "seed": 5, **options})
    data.setup("fit")
    return data


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Images; numbers 3, 8 and 13 are broken and 16 is empty."""
    parts = {n: {"png": grey_image(n), "cls": b"1"} for n in range(20)}
    parts |= {n: {"png": grey_image(n)[:50], "cls": b"1"} for n in (3, 8, 13)} | {16: {"png": b"", "cls": b"1"}}
    write_shards(tmp_path / "train", [(f"train/{n}", part) for n, part in parts.items()])
    write_shards(tmp_path / "val", [(f"val/{n}", part) for n, part in parts.items()])
    return tmp_path


GOOD = [n for n in range(20) if n not in (3, 8, 13, 16)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_dataset_is_read_without_its_broken_images(root: Path, num_workers: int) -> None:
    data = image_data(root, max_bad_share=0.2, num_workers=num_workers, batch_size=4)
    for split, loader in (("train", data.train_dataloader()), ("val", data.val_dataloader())):
        keys = [key for batch in loader for key in batch["keys"]]
        assert sorted(keys) == sorted(f"{split}/{n}" for n in GOOD)
        assert data.tallies[split].counts == {"broken image": 3}
        assert data.tallies[split].by_reason() == {"broken image": 3, "empty file": 1}
        assert {example.key for example in data.tallies[split].skipped} == {f"{split}/{n}" for n in (3, 8, 13)}
        assert data.finish_tally(split) == {"broken image": 3, "empty file": 1}
        assert data.finish_tally(split) == {"empty file": 1}  # rejected examples stay


def test_too_many_broken_images_end_the_run(root: Path) -> None:
    data = image_data(root, max_bad_share=0.19)
    for split, loader in (("train", data.train_dataloader()), ("val", data.val_dataloader())):
        with pytest.raises(ValueError) as error:
            list(loader)
        assert_one_line(error, f"4 of 20 examples of {split}", "broken image: 3, empty file: 1", f"example {split}/")


def test_too_many_rejected_examples_end_the_run_before_reading(root: Path) -> None:
    with pytest.raises(ValueError) as error:
        image_data(root, max_bad_share=0.04)
    assert_one_line(error, "1 of 20 examples of train", "empty file: 1", "train/16")


def test_no_training_batch_is_empty_on_several_ranks(root: Path) -> None:
    order = epoch_order(19, 6, 0).tolist()  # the empty file is the last but three, and has no number
    instead = {3: 4, 8: 9, 13: 14}
    assert set(order[:16]) >= set(instead)
    for rank in range(2):
        data = ImageDataModule(root, image_size=4, batch_size=1, num_workers=0, seed=6, max_bad_share=0.5)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2)  # type: ignore[assignment]
        data.setup("fit")
        loader = data.train_dataloader()
        batches = list(loader)
        assert len(batches) == len(loader) == 9
        planned = order[rank:16:2]
        assert [batch["numbers"].item() for batch in batches[:-1]] == [instead.get(n, n) for n in planned]
        assert {example.number for example in data.tallies["train"].skipped} == set(order[rank::2]) & set(instead)
        # Ranks do not wait in validation, so empty batches are left out.
        assert sum(len(batch["keys"]) for batch in data.val_dataloader()) == len(range(rank, 19, 2)) - len(
            data.tallies["val"].skipped
        )


def test_skipped_examples_of_all_ranks_are_summed(root: Path) -> None:
    data = image_data(root, max_bad_share=0.35)
    list(data.val_dataloader())
    strategy = SimpleNamespace(root_device="cpu", reduce=lambda counts, reduce_op: {"sum": 2 * counts}[reduce_op])
    data.trainer = SimpleNamespace(global_rank=0, world_size=2, strategy=strategy)  # type: ignore[assignment]
    assert data.finish_tally("val") == {"broken image": 6, "empty file": 1}  # each rank rejects the same empty file
    data.max_bad_share = data.tallies["val"].max_share = 0.3
    data.tallies["val"].add([Skipped(3, "val/3", "broken image", "")] * 3)
    with pytest.raises(ValueError, match="7 of 20 examples of val are bad"):
        data.finish_tally("val")


def test_rejected_examples_of_an_unsplit_dataset_count_in_the_training_split(tmp_path: Path) -> None:
    write_shards(tmp_path, [(f"{n}", {"png": grey_image(n) if n else b""}) for n in range(60)])
    data = image_data(tmp_path, val_share=0.3)
    assert [example.key for example in data.tallies["train"].rejected] == ["0"]
    assert data.tallies["val"].rejected == []


@pytest.mark.parametrize("stray", [{"txt": b"read me"}, {"cls": b"1"}], ids=str)
def test_files_next_to_images_do_not_require_labels(tmp_path: Path, stray: dict[str, bytes]) -> None:
    images = [(f"{n}", {"png": grey_image(n)}) for n in range(30)]
    write_shards(tmp_path, [*images, ("README", stray)], per_shard=31)
    data = image_data(tmp_path)
    assert [(example.key, example.reason) for example in data.tallies["train"].rejected] == [("README", "no image")]


class Steps(pl.LightningModule):
    """Records the keys of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.number = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[str, list[str]]] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        self.seen.append(("train", batch["keys"]))
        loss: torch.Tensor = self.number * batch["images"].sum()
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.seen.append(("val", batch["keys"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_epoch_with_a_bad_training_batch_ends_with_its_validation(tmp_path: Path) -> None:
    # Lightning validates after the planned number of batches, so validation would not run if one were missing.
    parts = [(f"{n}", {"png": b"broken" if n == 2 else grey_image(n)}) for n in range(4)]
    write_shards(tmp_path / "train", parts)
    write_shards(tmp_path / "val", [("val", {"png": grey_image(9)})])
    data = ImageDataModule(tmp_path, image_size=4, batch_size=1, num_workers=0, max_bad_share=0.5)
    steps = Steps()
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(steps, data)
    assert [split for split, _ in steps.seen] == [*["train"] * 4, "val"] * 2
    for epoch in (steps.seen[:4], steps.seen[5:9]):
        assert sorted(key for _, keys in epoch for key in keys) == ["0", "1", "3", "3"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_predict_does_not_substitute_a_bad_batch(root: Path, world_size: int) -> None:
    keys: dict[str, list[str]] = {"train": [], "val": []}
    for rank in range(world_size):
        data = ImageDataModule(root, image_size=4, batch_size=1, num_workers=0, max_bad_share=0.5)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)  # type: ignore[assignment]
        data.setup("predict")
        for split, loader in zip(data.predict_splits, data.predict_dataloader(), strict=True):
            keys[split] += [key for batch in loader for key in batch["keys"]]
    assert {split: sorted(found) for split, found in keys.items()} == {
        split: sorted(f"{split}/{n}" for n in GOOD) for split in keys
    }


def test_reasons_of_an_earlier_version_have_their_current_name() -> None:
    assert Skipped.from_record([3, "a", "broken picture", "…"]) == Skipped(3, "a", "broken image", "…")
    assert Skipped.from_record([-1, "", "no label", "…"]).reason == "no label"
