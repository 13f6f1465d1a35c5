"""The base of every DataModule that reads images or codes."""

import hashlib
import os
from abc import abstractmethod
from collections.abc import Collection
from pathlib import Path
from typing import Any, get_args

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import Dataset

from datamodules.loading.loader import EvaluationLoader, TrainLoader, ranks_wait
from datamodules.loading.order import EpochPlan, Remainder, StreamPlan, evaluation_batches, shared_batches
from datamodules.loading.stream import StreamIndex
from datamodules.storage.bad_examples import REASONS, Tally
from datamodules.storage.class_order import CLASS_ORDERS, ClassOrder
from datamodules.storage.index import CAPTIONS, ExampleIndex
from datamodules.storage.remote import ShardCache, check_presence, is_remote
from datamodules.storage.sources import SPLITS, Source, find_sources, hold_out
from llamagen.option_checks import (
    check_choice,
    check_folder_name,
    check_integer,
    check_positive,
    check_share,
)


class ShardDataModule(pl.LightningDataModule):
    """Examples from folders and shards, near or far; training in a reproducible, resumable order.

    ``fit`` trains on ``train`` and validates on ``val``, ``validate`` and ``test`` read ``val``, ``predict`` reads
    both, in the order of :attr:`predict_splits`. Remote shards are fetched whole into ``cache_dir`` before training.

    Args:
        root: folder or address of the set. Within it ``train`` and ``val`` (or ``training``, ``Train``, ``validation``,
            ``dev`` and so on), each a folder of class folders or of shards; or the class folders or shards themselves;
            or shards by a pattern, as for ``train``.
        batch_size: examples a rank and batch.
        train: instead of all of ``root``, a folder, or shards by path or address (``http(s)://``, ``s3://``, ``gs://``)
            with patterns like ``{000..123}``; or a list of these.
        val: the same for validation, instead of what is in ``root``.
        val_share: share of the training examples that is kept for validation where there is nothing else for it, drawn
            by their keys.
        num_workers: processes a rank that prepare batches; 0 for none.
        seed: decides the order of each training epoch, and random choices within an example.
        remainder: of an epoch's examples that do not fill a batch on every rank: ``keep`` them, so that the last batches
            are smaller, ``drop`` them, or ``repeat`` the first ones to fill up.
        resampled_epoch: None reads every training example once an epoch. A number draws shards at random with
            replacement, without end, for sets that are too large to be fetched or shuffled whole; it says after how
            many examples an epoch is over.
        max_bad_share: share of examples that may be broken and are skipped; more is an error.
        cache_dir: where remote shards and the indexes of shards are kept; None for ``~/.cache/llamagen``.
        cache_gb: with ``resampled_epoch``, gigabytes of remote shards to keep.
        allow_pipe: let addresses like ``pipe:aws s3 cp … -`` run their command.
        class_order: how class folders are numbered. ``auto``: folders whose names are all whole numbers are the classes
            of these numbers, others are numbered in the order of their names. ``number``: each name must be a whole
            number. ``name``: always in the order of the names, as text.
    """

    extensions: tuple[str, ...] = ()
    """An example needs one of these members."""

    hint = "give the folder that holds the data of each split"
    """What to do if there are no data; ends the error message."""

    predict_splits = SPLITS

    def __init__(
        self,
        root: Path | str | None = None,
        batch_size: int = 16,
        train: str | list[str] | None = None,
        val: str | list[str] | None = None,
        val_share: float = 0.05,
        num_workers: int = 4,
        seed: int = 0,
        remainder: Remainder = "keep",
        resampled_epoch: int | None = None,
        max_bad_share: float = 0.05,
        cache_dir: Path | str | None = None,
        cache_gb: float = 100.0,
        allow_pipe: bool = False,
        class_order: ClassOrder = "auto",
    ) -> None:
        super().__init__()
        check_integer("batch_size", batch_size, 1)
        check_integer("num_workers", num_workers, 0)
        check_integer("seed", seed, 0)
        if resampled_epoch is not None:
            check_integer("resampled_epoch", resampled_epoch, 1)
        check_share("val_share", val_share, with_ends=False)
        check_share("max_bad_share", max_bad_share)
        check_positive("cache_gb", cache_gb)
        check_choice("remainder", remainder, get_args(Remainder))
        check_choice("class_order", class_order, CLASS_ORDERS)
        check_folder_name("cache_dir", cache_dir)
        for name, value in (("root", root), ("train", train), ("val", val)):
            if value is not None and not str(value).strip():
                raise ValueError(f"{name} is {str(value)!r}; {self.hint}")
        self.root = None if root is None else os.path.expanduser(str(root))
        self.train, self.val, self.val_share = train, val, val_share
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.remainder, self.resampled_epoch, self.max_bad_share = remainder, resampled_epoch, max_bad_share
        self.allow_pipe, self.class_order = allow_pipe, class_order
        self.cache = ShardCache(cache_dir, allow_pipe, int(cache_gb * 1e9) if resampled_epoch else None)
        self.allow_zero_length_dataloader_with_multiple_devices = True  # a rank without work in predict
        self.class_names: list[str] = []
        self.numbering: list[str] = []
        self.captioned = False
        self.tallies: dict[str, Tally] = {}
        self.datasets: dict[str, Dataset[Any]] = {}
        self._sources: dict[str, Source | None] | None = None
        self._indexes: dict[str, ExampleIndex | StreamIndex] = {}
        self._train_loader: TrainLoader | None = None
        self._place: dict[str, int] | None = None
        self._shards: dict[str, tuple[int, Collection[int]]] = {}

    @abstractmethod
    def build_dataset(self, split: str, examples: ExampleIndex | StreamIndex, stage: str) -> Dataset[Any]:
        """The dataset of a split's examples; it is asked for (number, epoch) and has a length."""

    @property
    def rank(self) -> int:
        """Of this process."""
        return self.trainer.global_rank if self.trainer is not None else 0

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.trainer.world_size if self.trainer is not None else 1

    def prepare_data(self) -> None:
        """Fetch shards and read their headers, in one process of each machine.

        Raises:
            ValueError: if something is missing.
        """
        stage = self.trainer.state.fn if self.trainer is not None else None
        if stage is not None:
            for split in _splits_of(stage):
                self._index(split)

    def setup(self, stage: str) -> None:
        """Index the splits that the stage reads.

        Raises:
            ValueError: if something is missing, empty, or too much of it cannot be used.
        """
        if stage == "predict" and self.resampled_epoch:
            raise ValueError("predict reads each example once; leave resampled_epoch out")
        self.tallies = {}
        for split in _splits_of(stage):
            examples = self._index(split)
            bad = examples.bad if isinstance(examples, ExampleIndex) else ()
            self.captioned = self.captioned or not set(CAPTIONS).isdisjoint(examples.members)
            count = self.resampled_epoch if isinstance(examples, StreamIndex) else len(examples)
            if self._found()["val"] is None:  # two parts of one source: few held-out examples say little of its share
                count = sum(len(index) for index in self._indexes.values())
            keep, alone = stage == "predict", self.world_size == 1
            self.tallies[split] = Tally(split, count or 0, bad, self.max_bad_share, keep, alone)
            if not len(examples):
                source = self._found()[split] or self._found()["train"]
                raise ValueError(f"the {split} data in {source.name} hold no examples that can be used; {self.hint}")
            self.datasets[split] = self.build_dataset(split, examples, stage)

    def find(self) -> tuple[Source | None, Source | None, dict[str, Any]]:
        """Make out training and validation split, and the set's description.

        Raises:
            ValueError: if there is nothing.
        """
        places = self.root, self.train, self.val
        return find_sources(*places, self.hint, self.allow_pipe, self.class_order, self._run_folder)

    @property
    def _run_folder(self) -> Path | None:
        folder = getattr(self.trainer, "default_root_dir", None)
        return None if folder is None or is_remote(str(folder)) else Path(folder)

    def _found(self) -> dict[str, Any]:
        if self._sources is None:
            train, val, _ = self.find()
            self.numbering = []
            for source in (train, val):
                if source is not None and source.folder is not None:
                    self._check_folder(source.folder, source.numbering)
            self._sources = {"train": train, "val": val}
            self.class_names = list(train.classes) if train is not None else []
        return self._sources

    def _check_folder(self, folder: Path, numbering: str) -> None:
        if self._run_folder is not None and folder.resolve() == self._run_folder.resolve():
            raise ValueError(
                f"trainer.default_root_dir is {self._run_folder}, the folder of the images: what the run writes there "
                "would become a part of them; choose another folder"
            )
        if numbering:
            self.numbering.append(f"{folder}: {numbering}")
            rank_zero_info(self.numbering[-1])

    def _index(self, split: str) -> ExampleIndex | StreamIndex:
        if split not in self._indexes:
            source = self._found()[split]
            if source is None and (split == "train" or self.resampled_epoch):
                raise ValueError(f"there are no {split} data; {self.hint}")
            if split == "train" and self.resampled_epoch:
                check_presence(source.shards)
                self._indexes[split] = StreamIndex(source, self.cache, self.extensions, self.labels_needed)
            elif source is None or (split == "train" and self._found()["val"] is None):
                train = self._whole("train")
                held_out = hold_out(train, self.val_share)
                # What is bad is counted with the training examples.
                validation = train.select(np.flatnonzero(held_out))
                validation.bad = []
                self._indexes |= {"train": train.select(np.flatnonzero(~held_out)), "val": validation}
            else:
                self._indexes[split] = self._whole(split)
        return self._indexes[split]

    def _whole(self, split: str) -> ExampleIndex:
        if self._found()[split] is None:
            raise ValueError(f"there are no training data; {self.hint}")
        return self.read_index(split).usable(self.extensions, self.labels_needed)

    def read_index(self, split: str) -> ExampleIndex:
        """All examples of a split that is there, also those that cannot be used.

        Raises:
            ValueError: if something is missing.
        """
        index: ExampleIndex = self._found()[split].index(self.cache)
        return index

    @property
    def labels_needed(self) -> bool | None:
        """Whether each example needs a class; None if it is enough that all have one or none has."""
        return None

    def _plan(self) -> EpochPlan | StreamPlan:
        examples, ranks = self._indexes["train"], (self.rank, self.world_size)
        if isinstance(examples, StreamIndex):
            size = examples.shards, examples.examples_per_shard, self.resampled_epoch or 0
            return StreamPlan(*size, self.batch_size, self.seed, *ranks)
        return EpochPlan(len(examples), self.batch_size, self.seed, *ranks, self.remainder)

    def train_dataloader(self) -> TrainLoader:
        """Shuffled by (seed, epoch), from the saved place if a checkpoint brought one."""
        if self._train_loader is not None and self.trainer is not None and self.trainer.current_epoch > 0:
            self._place = self._train_loader.state_dict()  # reload_dataloaders_every_n_epochs
        self._train_loader = TrainLoader(
            self.datasets["train"], self._plan(), self.num_workers, torch.cuda.is_available(), self.tallies["train"]
        )
        if self._place is not None:
            self._train_loader.load_state_dict(self._place)
            self._place = None
        return self._train_loader

    def _evaluation_loader(self, split: str, batches: list[Any], never_empty: bool = False) -> EvaluationLoader:
        pin_memory = torch.cuda.is_available()
        tally = self.tallies[split]
        return EvaluationLoader(self.datasets[split], batches, self.num_workers, pin_memory, tally, never_empty)

    def val_dataloader(self) -> EvaluationLoader:
        """The validation split, in order: rank r takes every world_size-th example, from the r-th on.

        Raises:
            ValueError: if a rank would get no example, and so nothing to take into the mean.
        """
        count = len(self._indexes["val"])
        if count < self.world_size:
            raise ValueError(
                f"{count} validation examples cannot be shared out over {self.world_size} ranks; use fewer ranks "
                "(trainer.devices), or more validation examples (val, or val_share)"
            )
        batches = shared_batches(count, self.batch_size, self.rank, self.world_size, ranks_wait(self.trainer))
        return self._evaluation_loader("val", batches, never_empty=True)

    def test_dataloader(self) -> EvaluationLoader:
        """The validation split, in order, like :meth:`val_dataloader`."""
        return self.val_dataloader()

    def plan_shards(self, split: str, samples_per_shard: int, done: Collection[int]) -> None:
        """Let ``predict`` read a split in pieces, each piece on one rank, and leave out those that are done.

        Args:
            split: of the data.
            samples_per_shard: size of a piece.
            done: numbers of the pieces to leave out.
        """
        self._shards[split] = samples_per_shard, done

    def predict_dataloader(self) -> list[EvaluationLoader]:
        """Each of :attr:`predict_splits`, in order; no batch holds examples of two pieces of :meth:`plan_shards`."""
        loaders = []
        for split in self.predict_splits:
            count = len(self._indexes[split])
            size, done = self._shards.get(split, (None, ()))
            if size is None:
                batches = shared_batches(count, self.batch_size, self.rank, self.world_size)
            else:
                left = [number for number in range(-(-count // size)) if number not in done]
                batches = [
                    batch
                    for number in left[self.rank :: self.world_size]
                    for batch in evaluation_batches(
                        range(number * size, min((number + 1) * size, count)), self.batch_size
                    )
                ]
            loaders.append(self._evaluation_loader(split, batches))
        return loaders

    def fingerprint(self, split: str) -> str:
        """Checksum of keys and classes of a split's examples, in their order."""
        index = self._indexes[split]
        assert isinstance(index, ExampleIndex)
        columns = index.keys.block, index.keys.ends.tobytes(), index.labels.tobytes()
        return hashlib.sha256(b"".join(columns)).hexdigest()

    def batches_done(self, state_dict: dict[str, Any]) -> tuple[int, int] | None:
        """Of the epoch of a saved state: how many batches a rank would have seen here, and of how many."""
        if "train" not in state_dict:
            return None
        plan = self._plan()
        whole = len(plan.ends(0))
        return whole - len(plan.ends(state_dict["train"]["consumed"])), whole

    def finish_tally(self, split: str) -> dict[str, int]:
        """End an epoch of a split: what was skipped by reason, over all ranks, judged and set back to zero.

        Raises:
            ValueError: if it was too much.
        """
        tally = self.tallies[split]
        counts = torch.tensor([*(tally.counts[reason] for reason in REASONS), tally.opened])
        if self.world_size > 1:
            strategy = self.trainer.strategy  # type: ignore[union-attr]
            counts = strategy.reduce(counts.to(strategy.root_device), reduce_op="sum")
        *read, opened = counts.tolist()
        tally.check(read, opened)
        total = {reason: tally.by_reason()[reason] for reason in REASONS}
        tally.reset()
        return {reason: count for reason, count in total.items() if count}

    # Lightning restores the place of a resumable loader only if it takes the checkpoint for one from within an epoch;
    # a DataModule's state it always restores.
    def state_dict(self) -> dict[str, Any]:
        """Place of the training data."""
        if self._train_loader is None:
            return {} if self._place is None else {"train": self._place}
        place = self._train_loader.state_dict()
        if self.trainer is not None and self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            # The epoch is over, also where `limit_train_batches` leaves examples of it.
            place["consumed"] = self._train_loader.plan.count
        return {"train": place}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at a saved place."""
        self._place = state_dict.get("train")


def _splits_of(stage: str) -> tuple[str, ...]:
    return ("val",) if stage in ("validate", "validating", "test", "testing") else SPLITS
