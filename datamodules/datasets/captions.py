"""Captions by number. Apart from their DataModule: worker processes import this file, and not Lightning. B captions."""

from typing import TYPE_CHECKING, Any

import torch

from datamodules.datasets.base import ExampleDataset
from datamodules.storage.bad_examples import BadExampleError
from datamodules.storage.index import Example, ExampleIndex
from llamagen.text.cleaning import clean_caption, first_sentence

if TYPE_CHECKING:
    from datamodules.loading.stream import StreamIndex


def caption_of(example: Example, clean: bool = False, short: bool = False) -> str:
    """The caption of an example, or its first sentence.

    Args:
        example: with a txt or json member.
        clean: as :func:`~llamagen.text.cleaning.clean_caption` has it.
        short: the first sentence alone, found before cleaning, which takes away the capitals that tell where it ends;
            the whole caption where cleaning leaves nothing of that sentence.

    Raises:
        BadExampleError: if it has none, or cleaning leaves nothing of it.
    """
    found = example.read_caption()
    texts = [first_sentence(found), found] if short else [found]
    text = next(filter(None, map(clean_caption, texts) if clean else texts), "")
    if not text:
        fault = "" if found else example.caption_fault()
        what = f"has no caption that can be read: {fault}" if fault else "has no caption"
        if found:
            what = f"has a caption of which cleaning leaves nothing: {found[:40]!r}"
        raise BadExampleError("no caption", f"example {example.key} of {example.source} {what}")
    return text


class CaptionDataset(ExampleDataset):
    """Reads captions, and what else of their examples goes with their features.

    Args:
        examples: with a txt or json member.
        clean: as :func:`~llamagen.text.cleaning.clean_caption` has it.
        short: give the first sentences, too.
        codes: give the bytes of the codes, which each example must then have.
    """

    def __init__(
        self, examples: "ExampleIndex | StreamIndex", clean: bool = False, short: bool = False, codes: bool = False
    ) -> None:
        super().__init__(examples)
        self.clean, self.short, self.codes = clean, short, codes

    def read(self, number: int, epoch: int) -> dict[str, Any]:
        """Caption, label and key of an example.

        Raises:
            BadExampleError: if it has no caption, or lacks the codes.
        """
        example = self.examples[number]
        parts = {"captions": caption_of(example, self.clean), "labels": example.label, "keys": example.key}
        if self.short:
            parts["short_captions"] = caption_of(example, self.clean, short=True)
        return {**parts, "codes": example.read("npy")} if self.codes else parts

    def join(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """``captions``, ``short_captions``, ``keys``, ``labels`` (B,) int64 (−1 for none), ``codes`` as bytes."""
        batch: dict[str, Any] = {name: [example[name] for example in examples] for name in examples[0]}
        return {**batch, "labels": torch.tensor(batch["labels"])}
