"""Captions, as they are meant to be read by a text encoder. B captions."""

import hashlib
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from datamodules.base import ShardDataModule
from datamodules.datasets.captions import CaptionDataset, caption_of
from datamodules.loading.stream import StreamIndex
from datamodules.storage.index import CAPTIONS, ExampleIndex
from datamodules.storage.shards import CODES_FORMAT, META_FILE, read_meta
from datamodules.storage.sources import Source
from llamagen.text.cleaning import clean_caption

__all__ = ["CaptionDataModule", "CaptionDataset", "caption_of"]


class CaptionDataModule(ShardDataModule):
    """Captions for a text encoder, by ``predict``: of codes, images or texts alone.

    A set of codes keeps them: they go with the captions.

    Args:
        root: folder or address of a set of codes, as ``predict`` of the tokenizer wrote it, or of any shards with
            captions (``.txt``, or ``caption`` in ``.json``). Where ``train`` and ``val`` name shards of a set of codes,
            its folder all the same.
        batch_size: captions a rank and batch; those of about equal length are encoded together.
        clean_captions: encode plain lower-case text, without what is no part of a caption: addresses, tags, file names.
        short_captions: give the first sentence of each caption, too.
    """

    extensions = CAPTIONS
    labels_needed = False
    hint = "give a folder of codes or shards whose examples have captions (.txt, or caption in .json)"

    def __init__(
        self,
        root: Path | str | None = None,
        batch_size: int = 512,
        clean_captions: bool = False,
        short_captions: bool = False,
        **data: Any,
    ) -> None:
        super().__init__(root, batch_size, **data)
        self.clean_captions, self.short_captions = clean_captions, short_captions
        self.source_meta: dict[str, Any] = {}
        if clean_captions:
            clean_caption("")  # says now what is not installed

    @property
    def has_codes(self) -> bool:
        """Whether the examples are of a set of codes."""
        return self.source_meta.get("format") == CODES_FORMAT

    def find(self) -> tuple[Source | None, Source | None, dict[str, Any]]:
        """Make out the splits and read the description, if there is one.

        Raises:
            ValueError: if something is missing or not as it should be.
        """
        train, val, meta = super().find()
        if self.train is not None and self.root is not None:  # where shards are named, it is not read yet
            meta = read_meta(self.root, self.hint)
        self.source_meta = meta
        return train, val, meta

    def fingerprint(self, split: str) -> str:
        """Checksum of keys and classes of a split's examples, in their order, and of where their captions lie.

        So captions that were written anew are seen to be others, as long as one has another length.
        """
        examples = self._indexes[split]
        assert isinstance(examples, ExampleIndex)
        columns = [examples.members[name].tobytes() for name in CAPTIONS if name in examples.members]
        return hashlib.sha256(b"".join([super().fingerprint(split).encode(), *columns])).hexdigest()

    def prepare_data(self) -> None:
        """Fetch shards and read their headers, in one process of each machine.

        Raises:
            ValueError: if something is missing, or the stage is not ``predict``.
        """
        if self.trainer is not None:
            self._check(self.trainer.state.fn)
        super().prepare_data()

    def setup(self, stage: str) -> None:
        """Index the splits.

        Raises:
            ValueError: if something is missing, empty, or too much of it cannot be used; if the stage is not
                ``predict``.
        """
        self._check(stage)
        super().setup(stage)

    def _check(self, stage: str | None) -> None:
        if stage != "predict":
            name = getattr(stage, "value", stage)
            raise ValueError(
                f"CaptionDataModule is for predict, which writes features of captions, not for {name}; train on "
                "what it wrote, with CodeDataModule"
            )

    def build_dataset(self, split: str, examples: ExampleIndex | StreamIndex, stage: str) -> CaptionDataset:
        """Captions of a split."""
        if not self.has_codes and isinstance(examples, ExampleIndex) and "npy" in examples.members:
            rank_zero_warn(
                f"the .npy parts of the {split} examples are left out, for no {META_FILE} says that they are codes; if "
                "they are, give the folder of the set as root"
            )
        return CaptionDataset(examples, self.clean_captions, self.short_captions, self.has_codes)
