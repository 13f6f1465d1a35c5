"""Base class of the DataModules that read images, captions or codes."""

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
    """Examples from folders and from local or remote shards; training order is reproducible and resumable.

    ``fit`` trains on ``train`` and validates on ``val``. ``validate`` and ``test`` read ``val``. ``predict`` reads
    both, in the order of :attr:`predict_splits`. Remote shards are downloaded completely into ``cache_dir`` before
    training.

    Args:
        root: folder or address of the dataset. It contains ``train`` and ``val`` (or ``training``, ``Train``,
            ``validation``, ``dev`` and so on), each a folder of class folders or of shards; or it contains class
            folders or shards directly; or it is a pattern of shards, as for ``train``.
        batch_size: examples per batch and rank.
        train: training data, instead of ``root``: a folder, or the path or address of shards (``http(s)://``,
            ``s3://``, ``gs://``) with patterns like ``{000..123}``; or a list of these.
        val: validation data, in the same forms, instead of the validation split in ``root``.
        val_share: share of the training examples held out for validation if there is no validation split. Keys decide
            which examples are held out.
        num_workers: worker processes per rank that prepare batches; 0 prepares them in the main process.
        seed: seed of the order of each training epoch and of random choices within an example.
        remainder: what to do with the examples of an epoch that do not fill a batch on every rank: ``keep`` them in
            smaller last batches, ``drop`` them, or ``repeat`` the first examples of the epoch to fill up.
        resampled_epoch: None reads every training example once per epoch. An integer samples shards endlessly with
            replacement, for datasets too large to download or shuffle completely. It is the number of examples in an
            epoch.
        max_bad_share: maximum share of bad examples. Bad examples are skipped; more than this share is an error.
        cache_dir: folder for remote shards and for the indexes of shards; None for ``~/.cache/llamagen``.
        cache_gb: with ``resampled_epoch``, gigabytes of remote shards to keep.
        allow_pipe: let addresses like ``pipe:aws s3 cp … -`` run their command.
        class_order: how class folders are numbered. ``auto``: if all folder names are integers, they are the class
            numbers; otherwise folders are numbered in the order of their names. ``number``: each name must be an
            integer. ``name``: always in the order of the names, as text.
    """

    extensions: tuple[str, ...] = ()
    """An example needs at least one of these members."""

    hint = "give the folder that holds the data of each split"
    """Remedy that ends the error messages about missing data."""

    predict_splits = SPLITS
    """Splits that ``predict`` reads, in this order."""

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
        self.allow_zero_length_dataloader_with_multiple_devices = True  # in predict a rank may have no batches
        self.class_names: list[str] = []
        self.numbering: list[str] = []
        self.captioned = False
        self.tallies: dict[str, Tally] = {}
        self.datasets: dict[str, Dataset[Any]] = {}
        self._sources: dict[str, Source | None] | None = None
        self._indexes: dict[str, ExampleIndex | StreamIndex] = {}
        self._train_loader: TrainLoader | None = None
        self._position: dict[str, int] | None = None
        self._shards: dict[str, tuple[int, Collection[int]]] = {}

    @abstractmethod
    def build_dataset(self, split: str, examples: ExampleIndex | StreamIndex, stage: str) -> Dataset[Any]:
        """Build the dataset of a split, indexed by (example number, epoch), with a length."""

    @property
    def rank(self) -> int:
        """Rank of this process."""
        return self.trainer.global_rank if self.trainer is not None else 0

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.trainer.world_size if self.trainer is not None else 1

    def prepare_data(self) -> None:
        """Download shards and read their headers, in one process per machine.

        Raises:
            ValueError: if data are missing.
        """
        stage = self.trainer.state.fn if self.trainer is not None else None
        if stage is not None:
            for split in _splits_of(stage):
                self._index(split)

    def setup(self, stage: str) -> None:
        """Index the splits that the stage reads.

        Raises:
            ValueError: if data are missing or empty, or too many examples are bad.
        """
        if stage == "predict" and self.resampled_epoch:
            raise ValueError("predict reads each example once; leave resampled_epoch out")
        self.tallies = {}
        for split in _splits_of(stage):
            examples = self._index(split)
            bad = examples.bad if isinstance(examples, ExampleIndex) else ()
            self.captioned = self.captioned or not set(CAPTIONS).isdisjoint(examples.members)
            count = self.resampled_epoch if isinstance(examples, StreamIndex) else len(examples)
            if self._sources_by_split()["val"] is None:
                # Both splits come from one source. The share of bad examples is that of the source, since the few
                # examples held out estimate it poorly.
                count = sum(len(index) for index in self._indexes.values())
            keep, alone = stage == "predict", self.world_size == 1
            self.tallies[split] = Tally(split, count or 0, bad, self.max_bad_share, keep, alone)
            if not len(examples):
                source = self._sources_by_split()[split] or self._sources_by_split()["train"]
                raise ValueError(f"the {split} data in {source.name} hold no usable examples; {self.hint}")
            self.datasets[split] = self.build_dataset(split, examples, stage)

    def find_splits(self) -> tuple[Source | None, Source | None, dict[str, Any]]:
        """Find the training split, the validation split and the content of ``meta.json``.

        Raises:
            ValueError: if there are no data.
        """
        options = self.hint, self.allow_pipe, self.class_order, self._run_folder
        return find_sources(self.root, self.train, self.val, *options)

    @property
    def _run_folder(self) -> Path | None:
        folder = getattr(self.trainer, "default_root_dir", None)
        return None if folder is None or is_remote(str(folder)) else Path(folder)

    def _sources_by_split(self) -> dict[str, Any]:
        if self._sources is None:
            train, val, _ = self.find_splits()
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
                f"trainer.default_root_dir is {self._run_folder}, the folder of the images, so files of the run would "
                "become part of the dataset; choose another folder"
            )
        if numbering:
            self.numbering.append(f"{folder}: {numbering}")
            rank_zero_info(self.numbering[-1])

    def _index(self, split: str) -> ExampleIndex | StreamIndex:
        if split not in self._indexes:
            source = self._sources_by_split()[split]
            if source is None and (split == "train" or self.resampled_epoch):
                raise ValueError(f"there are no {split} data; {self.hint}")
            if split == "train" and self.resampled_epoch:
                check_presence(source.shards)
                self._indexes[split] = StreamIndex(source, self.cache, self.extensions, self.labels_needed)
            elif source is None or (split == "train" and self._sources_by_split()["val"] is None):
                train = self._usable_index("train")
                held_out = hold_out(train, self.val_share)
                validation = train.select(np.flatnonzero(held_out))
                validation.bad = []  # bad examples of the source are counted with the training split
                self._indexes |= {"train": train.select(np.flatnonzero(~held_out)), "val": validation}
            else:
                self._indexes[split] = self._usable_index(split)
        return self._indexes[split]

    def _usable_index(self, split: str) -> ExampleIndex:
        if self._sources_by_split()[split] is None:
            raise ValueError(f"there are no training data; {self.hint}")
        return self.read_index(split).usable(self.extensions, self.labels_needed)

    def read_index(self, split: str) -> ExampleIndex:
        """Index all examples of an existing split, including those that cannot be used.

        Raises:
            ValueError: if data are missing.
        """
        index: ExampleIndex = self._sources_by_split()[split].index(self.cache)
        return index

    @property
    def labels_needed(self) -> bool | None:
        """Whether each example needs a class. None: either all examples have one, or none has."""
        return None

    def _plan(self) -> EpochPlan | StreamPlan:
        examples, ranks = self._indexes["train"], (self.rank, self.world_size)
        if isinstance(examples, StreamIndex):
            size = examples.shards, examples.examples_per_shard, self.resampled_epoch or 0
            return StreamPlan(*size, self.batch_size, self.seed, *ranks)
        return EpochPlan(len(examples), self.batch_size, self.seed, *ranks, self.remainder)

    def train_dataloader(self) -> TrainLoader:
        """Training batches, shuffled by (seed, epoch), from the position in the checkpoint if one was loaded."""
        if self._train_loader is not None and self.trainer is not None and self.trainer.current_epoch > 0:
            self._position = self._train_loader.state_dict()  # reload_dataloaders_every_n_epochs
        self._train_loader = TrainLoader(
            self.datasets["train"], self._plan(), self.num_workers, torch.cuda.is_available(), self.tallies["train"]
        )
        if self._position is not None:
            self._train_loader.load_state_dict(self._position)
            self._position = None
        return self._train_loader

    def _evaluation_loader(self, split: str, batches: list[Any], never_empty: bool = False) -> EvaluationLoader:
        pin_memory = torch.cuda.is_available()
        tally = self.tallies[split]
        return EvaluationLoader(self.datasets[split], batches, self.num_workers, pin_memory, tally, never_empty)

    def val_dataloader(self) -> EvaluationLoader:
        """Batches of the validation split, in order: rank r reads examples r, r + world_size, and so on.

        Raises:
            ValueError: if a rank would get no example, and could not contribute to the mean.
        """
        count = len(self._indexes["val"])
        if count < self.world_size:
            raise ValueError(
                f"{count} validation examples cannot be distributed over {self.world_size} ranks; use fewer ranks "
                "(trainer.devices), or more validation examples (val, or val_share)"
            )
        batches = shared_batches(count, self.batch_size, self.rank, self.world_size, ranks_wait(self.trainer))
        return self._evaluation_loader("val", batches, never_empty=True)

    def test_dataloader(self) -> EvaluationLoader:
        """Batches of the validation split, as in :meth:`val_dataloader`."""
        return self.val_dataloader()

    def plan_shards(self, split: str, samples_per_shard: int, done: Collection[int]) -> None:
        """Make ``predict`` read a split shard by shard, each shard on one rank, without finished shards.

        Args:
            split: the split to read.
            samples_per_shard: examples per shard.
            done: numbers of the finished shards.
        """
        self._shards[split] = samples_per_shard, done

    def predict_dataloader(self) -> list[EvaluationLoader]:
        """One loader per split of :attr:`predict_splits`. After :meth:`plan_shards`, each batch holds examples of a
        single shard.
        """
        loaders = []
        for split in self.predict_splits:
            count = len(self._indexes[split])
            size, done = self._shards.get(split, (None, ()))
            if size is None:
                batches = shared_batches(count, self.batch_size, self.rank, self.world_size)
            else:
                unfinished = [number for number in range(-(-count // size)) if number not in done]
                batches = [
                    batch
                    for number in unfinished[self.rank :: self.world_size]
                    for batch in evaluation_batches(
                        range(number * size, min((number + 1) * size, count)), self.batch_size
                    )
                ]
            loaders.append(self._evaluation_loader(split, batches))
        return loaders

    def fingerprint(self, split: str) -> str:
        """SHA-256 of the keys and classes of a split, in their order."""
        index = self._indexes[split]
        assert isinstance(index, ExampleIndex)
        columns = index.keys.block, index.keys.ends.tobytes(), index.labels.tobytes()
        return hashlib.sha256(b"".join(columns)).hexdigest()

    def batches_done(self, state_dict: dict[str, Any]) -> tuple[int, int] | None:
        """Number of finished batches and of all batches of the saved epoch, for the current number of ranks.

        The saved position counts examples, so it is valid for any number of ranks. Lightning counts batches per rank.
        """
        if "train" not in state_dict:
            return None
        plan = self._plan()
        total = len(plan.ends(0))
        return total - len(plan.ends(state_dict["train"]["consumed"])), total

    def finish_tally(self, split: str) -> dict[str, int]:
        """Sum the skipped examples of an epoch over all ranks, check their share, and reset the counts.

        Returns:
            Number of skipped examples by reason.

        Raises:
            ValueError: if the share is greater than ``max_bad_share``.
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

    # footgun: Lightning restores the state of a resumable loader only from checkpoints that it considers mid-epoch.
    # It always restores the state of a DataModule, so the position is saved here.
    def state_dict(self) -> dict[str, Any]:
        """Position in the training data."""
        if self._train_loader is None:
            return {} if self._position is None else {"train": self._position}
        position = self._train_loader.state_dict()
        if self.trainer is not None and self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            # The epoch is over, even if `limit_train_batches` left some examples unread.
            position["consumed"] = self._train_loader.plan.count
        return {"train": position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from a saved position."""
        self._position = state_dict.get("train")
        # footgun: with sharded parameters Lightning loads checkpoints last. If the length of the run is needed before
        # (a cosine schedule, random orders annealed over it), Lightning already has the loader and asks for no other.
        loader, trainer = self._train_loader, self.trainer
        if loader is None or trainer is None or self._position is None:
            return
        if trainer.train_dataloader is self._train_loader:
            loader.load_state_dict(self._position)


def _splits_of(stage: str) -> tuple[str, ...]:
    return ("val",) if stage in ("validate", "validating", "test", "testing") else SPLITS
