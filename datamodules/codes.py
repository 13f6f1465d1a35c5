"""Codes for the autoregressive model: (L,) int64 and a condition. A: views of an image, h × w: grid, L = h · w."""

from pathlib import Path
from typing import Any, Literal

import numpy as np

from datamodules.base import SPLITS, ShardDataModule
from datamodules.datasets.codes import CodeDataset
from datamodules.loading.loader import ranks_wait
from datamodules.loading.order import NO_EPOCH
from datamodules.loading.stream import StreamIndex
from datamodules.storage.features import StoredFeatures
from datamodules.storage.index import FEATURES, ExampleIndex
from datamodules.storage.pairing import PairedFeatures
from datamodules.storage.shards import CAPTIONS_FORMAT, CODES_FORMAT, META_FILE, read_meta
from datamodules.storage.sources import Source
from llamagen.option_checks import check_folder_name, check_share
from llamagen.text.cleaning import Cleaning, as_option, cleaning_of_option, in_words, recorded_cleaning

PROBED = 1000
"""Examples read before training, to check that the shards match ``meta.json``."""

__all__ = ["CodeDataModule", "CodeDataset"]


class CodeDataModule(ShardDataModule):
    """Codes with class labels, captions or caption features.

    ``predict`` of the tokenizer writes the codes. ``predict`` of :class:`CaptionModule` writes the caption features
    into a second dataset, with or without copies of the codes.

    Args:
        root: folder or address that ``predict`` wrote to, with ``meta.json``, ``train`` and ``val``. The options
            ``train`` and ``val`` may name other shards that this ``meta.json`` describes.
        batch_size: images per batch and rank.
        clean_captions: cleaning of the captions, see :func:`llamagen.text.clean_caption`: ``published``, ``web``, or
            false; true is ``web``. Stored features have the cleaning that they were extracted with: another value is an
            error, false accepts any.
        short_caption_share: share of the training examples that use only the first sentence of their caption, chosen
            again in each epoch. The paper's second stage uses 0.3 (arXiv 2406.06525, section 3).
        features: folder or address of a dataset of caption features for the same images, written by ``predict`` of
            :class:`CaptionModule`. Codes and features are paired by key, see
            :class:`~datamodules.storage.pairing.PairedFeatures`. None uses the features stored with the codes, if any.
    """

    extensions = ("npy",)
    hint = "write the codes first, with `python main.py predict` of the tokenizer"

    def __init__(
        self,
        root: Path | str,
        batch_size: int = 256,
        clean_captions: Literal["published", "web"] | bool | None = False,
        short_caption_share: float = 0.0,
        features: Path | str | None = None,
        **data: Any,
    ) -> None:
        super().__init__(root, batch_size, **data)
        check_share("short_caption_share", short_caption_share)
        check_folder_name("features", features)
        if features is not None and self.resampled_epoch:
            raise ValueError(
                f"features is {features}, but with resampled_epoch features must be in the shards of the codes; "
                "extract them with these codes as root, or leave resampled_epoch out"
            )
        self._option, self.short_caption_share = cleaning_of_option(clean_captions), short_caption_share
        self.feature_root = None if features is None else str(features)
        self.code_meta: dict[str, Any] = {}
        self._features: StoredFeatures | None = None
        self._partners: dict[str, np.ndarray] = {}

    @property
    def cleaning(self) -> Cleaning | None:
        """Cleaning of the captions: that of the stored features, or else of captions that are encoded online."""
        if self._features is None:
            return self._option
        return recorded_cleaning({"cleaned": False, **self.code_meta[FEATURES]})  # type: ignore[return-value]

    def find_splits(self) -> tuple[Source | None, Source | None, dict[str, Any]]:
        """Find the splits and read ``meta.json``.

        Raises:
            ValueError: if data are missing or ``meta.json`` is invalid.
        """
        train, val, meta = super().find_splits()
        needed = {"format", "vocabulary", "grid", "views", "num_classes", "tokenizer", "splits"}
        meta = meta or read_meta(str(self.root), self.hint)  # with `train`, the base class reads no meta.json
        if meta.get("format") == CAPTIONS_FORMAT:
            raise ValueError(
                f"{self.root} holds caption features without codes; extract the codes of the images and give their "
                "dataset as root, and this one as features"
            )
        if meta.get("format") != CODES_FORMAT or needed - set(meta):
            raise ValueError(f"{META_FILE} of {self.root} does not describe codes; {self.hint}")
        numbers = [meta[name] for name in ("vocabulary", "views")]
        grid = meta["grid"]
        if not (
            isinstance(grid, list)
            and len(grid) == 2
            and all(isinstance(n, int) and n > 0 for n in numbers + grid)
            and isinstance(meta["num_classes"], int)
            and meta["num_classes"] >= 0
        ):
            raise ValueError(
                f"vocabulary, grid, views or num_classes in {META_FILE} of {self.root} are wrong; {self.hint}"
            )
        if self.feature_root is not None and self._needs_captions is not False:
            paired = PairedFeatures(self.feature_root, self.allow_pipe)
            self._features, meta = paired, {**meta, FEATURES: paired.description}  # replaces features of the codes
        else:
            self._features = StoredFeatures(meta[FEATURES], str(self.root)) if FEATURES in meta else None
        if self._features is not None:
            self._check(self._features, meta[FEATURES])
        self.code_meta = meta
        return train, val, meta

    def _check(self, features: StoredFeatures, description: Any) -> None:
        root = features.root
        stored = recorded_cleaning({"cleaned": False, **description})
        if self._option not in (None, stored):
            raise ValueError(
                f"clean_captions is {self._option}, but the captions of the features in {root} were "
                f"{in_words(stored)}; set it to {as_option(stored)}, or extract the features again with clean_captions "
                f"{self._option}"
            )
        if self.short_caption_share and not features.short:
            raise ValueError(
                f"short_caption_share is {self.short_caption_share}, but {root} has no features of short captions; "
                "extract the features again with short_captions"
            )

    def read_index(self, split: str) -> ExampleIndex:
        """Index all examples of a split, paired with features of another dataset if these are given.

        Raises:
            ValueError: if data are missing, or the pairing is ambiguous.
        """
        index = super().read_index(split)
        if isinstance(self._features, PairedFeatures):
            if not self._partners:  # a key may occur in both splits, so both are paired even if only one is read
                splits = {
                    name: index if name == split else super(CodeDataModule, self).read_index(name)
                    for name, source in self._sources_by_split().items()
                    if source is not None
                }
                columns = self._features.pair(list(splits.values()), self.cache, str(self.root))
                self._partners = dict(zip(splits, columns, strict=True))
            index.partners = self._partners.pop(split)
        return index

    @property
    def _needs_captions(self) -> bool | None:
        """Whether the model is conditioned on captions instead of classes; None without a model."""
        return getattr(getattr(self.trainer, "lightning_module", None), "needs_captions", None)

    @property
    def labels_needed(self) -> bool | None:
        """Whether the dataset has classes and the model needs them."""
        return bool(self.code_meta.get("num_classes")) and self._needs_captions is not True

    def build_dataset(self, split: str, examples: ExampleIndex | StreamIndex, stage: str) -> CodeDataset:
        """Build the dataset of a split and read some of its examples. The others are checked when they are read.

        Raises:
            ValueError: if too many of these examples are bad.
        """
        train, captions = split == SPLITS[0], self._needs_captions is not False
        dataset = CodeDataset(
            examples,
            self.code_meta,
            choose_view=train,
            seed=self.seed,
            labels=self._needs_captions is not True,
            captions=captions and self.captioned,
            cleaning=self._option,
            features=self._features if captions else None,
            short_share=self.short_caption_share if train else 0.0,
            never_empty=(train and stage == "fit") or ranks_wait(self.trainer),
        )
        if isinstance(examples, ExampleIndex):
            probe = range(0, len(examples), -(-len(examples) // PROBED))
            skipped = dataset.read_many([(number, NO_EPOCH) for number in probe])[2]
            if len(skipped) > self.max_bad_share * len(probe):
                raise ValueError(
                    f"{len(skipped)} of {len(probe)} examples read as a check are bad: {skipped[0].message}"
                )
        return dataset
