"""Codes for the autoregressive model: (L,) int64 and a condition. A views of a picture, h × w grid, L = h · w."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from datamodules.base import SPLITS, ShardDataModule
from datamodules.loader import NO_EPOCH, Address
from datamodules.shards import CODES_FORMAT, META_FILE, Sample, read_meta

MOST_CHECKED = 20_000


class CodeDataset(Dataset[dict[str, Any]]):
    """Reads the codes of shard samples; in training a view is drawn at random for each sample and epoch.

    Args:
        samples: with an npy member (A, h, w) uint16 and a cls member.
        meta: description of the set: vocabulary, grid, number of classes, views.
        draw_view: within an epoch, draw one of the views by (seed, epoch, sample); else take the first.
        seed: of the draws.
    """

    def __init__(self, samples: list[Sample], meta: dict[str, Any], draw_view: bool, seed: int) -> None:
        self.samples, self.draw_view, self.seed = samples, draw_view, seed
        self.vocabulary, self.num_classes = meta["vocabulary"], meta["num_classes"]
        self.shape = (meta["views"], *meta["grid"])

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, number: int) -> tuple[np.ndarray, int]:
        """Codes (A, h, w) uint16 and label of a sample.

        Raises:
            ValueError: if they are not what ``meta.json`` says.
        """
        sample = self.samples[number]
        where = f"sample {sample.key} of {sample.shard}"
        again = f"extract the codes again, or correct {META_FILE}"
        data = sample.read("npy")
        try:
            codes = np.lib.format.read_array(BytesIO(data), allow_pickle=False)
        except (EOFError, OSError, ValueError) as error:
            raise ValueError(f"the codes of {where} cannot be read ({error}); {again}") from error
        label = sample.read_label()
        if codes.shape != self.shape or codes.dtype != np.uint16:
            raise ValueError(
                f"{where} holds {codes.dtype} codes of shape {codes.shape}, not uint16 of {self.shape}; {again}"
            )
        if codes.max() >= self.vocabulary:
            raise ValueError(
                f"{where} holds code {codes.max()}, outside of the vocabulary of {self.vocabulary}; {again}"
            )
        if not 0 <= label < self.num_classes:
            raise ValueError(f"{where} has class {label}, outside of the {self.num_classes} classes; {again}")
        return codes, label

    def __getitem__(self, address: Address) -> dict[str, Any]:
        """``codes`` (L,) int64, ``condition`` int and ``keys`` of a sample."""
        number, epoch = address
        codes, label = self.read(number)
        draw = self.draw_view and epoch != NO_EPOCH
        view = np.random.default_rng([self.seed, epoch, number]).integers(len(codes)) if draw else 0
        return {
            "codes": torch.from_numpy(codes[view].astype(np.int64).flatten()),
            "condition": label,
            "keys": self.samples[number].key,
        }


class CodeDataModule(ShardDataModule):
    """Codes with class labels, from the shards that ``predict`` of the tokenizer wrote.

    Args:
        root: folder that ``predict`` wrote: ``meta.json``, ``train`` and ``val``.
        batch_size: pictures a rank and batch.
        num_workers: processes a rank that read codes; 0 for none.
        seed: decides the order of each training epoch and the views.
    """

    hint = "write the codes first, with `python main.py predict` of the tokenizer"

    def __init__(self, root: Path | str, batch_size: int = 256, num_workers: int = 4, seed: int = 0) -> None:
        super().__init__(root, batch_size, num_workers, seed)
        self.code_meta: dict[str, Any] = {}

    def setup(self, stage: str) -> None:
        """Read the description, index the shards and check what is in them.

        Raises:
            ValueError: if something is missing, not complete, or not what ``meta.json`` says.
        """
        meta = read_meta(self.root, self.hint)
        needed = {"format", "vocabulary", "grid", "views", "num_classes", "tokenizer", "splits"}
        if meta.get("format") != CODES_FORMAT or needed - set(meta):
            raise ValueError(f"{self.root / META_FILE} does not describe codes; {self.hint}")
        numbers = [meta[name] for name in ("vocabulary", "views", "num_classes")]
        grid, splits = meta["grid"], meta["splits"]
        if not (
            isinstance(grid, list) and len(grid) == 2 and all(isinstance(n, int) and n > 0 for n in numbers + grid)
        ):
            raise ValueError(
                f"vocabulary, grid, views or num_classes of {self.root / META_FILE} are wrong; {self.hint}"
            )
        if not (isinstance(splits, dict) and all(isinstance(split, dict) for split in splits.values())):
            raise ValueError(f"splits of {self.root / META_FILE} is wrong; {self.hint}")
        self.code_meta = meta
        super().setup(stage)

    def build_dataset(self, split: str, samples: list[Sample]) -> Dataset[Any]:
        """Codes of a split, after a look at up to 20,000 of them; the others are checked as they are read."""
        expected = self.code_meta["splits"].get(split, {}).get("count")
        if len(samples) != expected:
            raise ValueError(
                f"{self.root / split} holds {len(samples)} samples, but {META_FILE} says {expected}; {self.hint}"
            )
        dataset = CodeDataset(samples, self.code_meta, draw_view=split == SPLITS[0], seed=self.seed)
        for number in range(0, len(samples), -(-len(samples) // MOST_CHECKED)):
            dataset.read(number)
        return dataset
