"""Captions for a text encoder. B: captions in a batch."""

import hashlib
from pathlib import Path
from typing import Any, Literal

from datamodules.base import ShardDataModule
from datamodules.datasets.captions import CaptionDataset, caption_of
from datamodules.loading.stream import StreamIndex
from datamodules.storage.index import CAPTIONS, FEATURES, ExampleIndex
from datamodules.storage.shards import CODES_FORMAT, META_FILE, read_meta
from datamodules.storage.sources import Source
from llamagen.rank_zero import warn_on_rank_zero
from llamagen.text.cleaning import (
    UNKNOWN,
    Cleaning,
    as_option,
    clean_caption,
    cleaning_of_option,
    in_words,
    recorded_cleaning,
)

__all__ = ["CaptionDataModule", "CaptionDataset", "caption_of"]


class CaptionDataModule(ShardDataModule):
    """Captions that ``predict`` encodes, from a dataset of codes, images or text files.

    In a dataset of codes, each batch also holds the codes, so that they are stored next to the features.

    Args:
        root: folder or address of a dataset of codes, as written by ``predict`` of the tokenizer, or of any shards with
            captions (``.txt``, or ``caption`` in ``.json``). If ``train`` and ``val`` name shards of a dataset of
            codes, give its folder as well.
        batch_size: captions per batch and rank. Captions of similar length are encoded together.
        clean_captions: encode cleaned captions, see :func:`llamagen.text.clean_caption`: ``published``, ``web``, or
            false; true is ``web``. Captions that an earlier extraction has cleaned are not cleaned again.
        short_captions: also return the first sentence of each caption.
    """

    extensions = CAPTIONS
    labels_needed = False
    hint = "give a folder of codes or shards whose examples have captions (.txt, or caption in .json)"

    def __init__(
        self,
        root: Path | str | None = None,
        batch_size: int = 512,
        clean_captions: Literal["published", "web"] | bool | None = False,
        short_captions: bool = False,
        **data: Any,
    ) -> None:
        super().__init__(root, batch_size, **data)
        self._option, self.short_captions = cleaning_of_option(clean_captions), short_captions
        self.source_meta: dict[str, Any] = {}
        clean_caption("", self._option)  # raises now if a package is missing

    @property
    def has_codes(self) -> bool:
        """Whether the dataset holds codes."""
        return self.source_meta.get("format") == CODES_FORMAT

    @property
    def cleaning(self) -> Cleaning | None:
        """Cleaning of the captions, by this module or by the extraction that stored them."""
        return self._option or self._stored_cleaning

    @property
    def _stored_cleaning(self) -> Cleaning | None:
        stored = recorded_cleaning(self.source_meta.get(FEATURES))
        return None if stored == UNKNOWN else stored

    def find_splits(self) -> tuple[Source | None, Source | None, dict[str, Any]]:
        """Find the splits and read ``meta.json``, if there is one.

        Raises:
            ValueError: if data are missing, ``meta.json`` is invalid, or the captions were cleaned differently.
        """
        train, val, meta = super().find_splits()
        if self.train is not None and self.root is not None:  # with `train`, the base class reads no meta.json
            meta = read_meta(self.root, self.hint)
        self.source_meta = meta
        if self._option is not None and self._stored_cleaning not in (None, self._option):
            raise ValueError(
                f"clean_captions is {self._option}, but the captions in {self.root} are already "
                f"{in_words(self._stored_cleaning)}; set it to {as_option(self._stored_cleaning)}, or give the dataset "
                "that these features were extracted from"
            )
        return train, val, meta

    def fingerprint(self, split: str) -> str:
        """SHA-256 of the keys and classes of a split, in their order, and of the offsets and sizes of its captions.

        Changed captions are detected if the length of any caption has changed.
        """
        examples = self._indexes[split]
        assert isinstance(examples, ExampleIndex)
        columns = [examples.members[name].tobytes() for name in CAPTIONS if name in examples.members]
        return hashlib.sha256(b"".join([super().fingerprint(split).encode(), *columns])).hexdigest()

    def prepare_data(self) -> None:
        """Download shards and read their headers, in one process per machine.

        Raises:
            ValueError: if data are missing, or the stage is not ``predict``.
        """
        if self.trainer is not None:
            self._check(self.trainer.state.fn)
        super().prepare_data()

    def setup(self, stage: str) -> None:
        """Index the splits.

        Raises:
            ValueError: if data are missing or empty, too many examples are bad, or the stage is not ``predict``.
        """
        self._check(stage)
        super().setup(stage)

    def _check(self, stage: str | None) -> None:
        if stage != "predict":
            name = getattr(stage, "value", stage)
            raise ValueError(
                f"CaptionDataModule is for predict, which writes caption features, not for {name}; to train on these "
                "features, use CodeDataModule"
            )

    def build_dataset(self, split: str, examples: ExampleIndex | StreamIndex, stage: str) -> CaptionDataset:
        """Build the dataset of a split."""
        if not self.has_codes and isinstance(examples, ExampleIndex) and "npy" in examples.members:
            warn_on_rank_zero(
                f"the .npy members of the {split} examples are ignored, because no {META_FILE} says that they are "
                "codes; if they are, give the folder of their dataset as root"
            )
        cleaning = None if self._option == self._stored_cleaning else self._option
        return CaptionDataset(examples, cleaning, self.short_captions, self.has_codes)
