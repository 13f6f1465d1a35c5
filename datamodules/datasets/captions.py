"""Dataset of captions. B: captions in a batch.

Separate from the DataModule, so that worker processes import it without Lightning.
"""

from typing import TYPE_CHECKING, Any

import torch

from datamodules.datasets.base import ExampleDataset
from datamodules.storage.bad_examples import BadExampleError
from datamodules.storage.index import Example, ExampleIndex
from llamagen.text.cleaning import Cleaning, clean_caption, first_sentence

if TYPE_CHECKING:
    from datamodules.loading.stream import StreamIndex


def caption_of(example: Example, cleaning: Cleaning | None = None, short: bool = False) -> str:
    """Caption of an example, or its first sentence.

    Args:
        example: example with a txt or json member.
        cleaning: cleaning of the caption, see :func:`~llamagen.text.cleaning.clean_caption`.
        short: use only the first sentence. It is found before cleaning, which removes the capitals that mark its end.
            If it is empty after cleaning, the whole caption is used.

    Raises:
        BadExampleError: if there is no caption, or it is empty after cleaning.
    """
    caption = example.read_caption()
    texts = [first_sentence(caption), caption] if short else [caption]
    text = next(filter(None, (clean_caption(text, cleaning) for text in texts)), "")
    if not text:
        fault = "" if caption else example.caption_fault()
        problem = f"has no readable caption: {fault}" if fault else "has no caption"
        if caption:
            problem = f"has a caption that is empty after cleaning: {caption[:40]!r}"
        raise BadExampleError("no caption", f"example {example.key} of {example.source} {problem}")
    return text


class CaptionDataset(ExampleDataset):
    """Dataset of captions, with the labels, keys and codes that are stored next to their features.

    Args:
        examples: examples with a txt or json member.
        cleaning: cleaning of the captions, see :func:`~llamagen.text.cleaning.clean_caption`.
        short: also return the first sentences.
        codes: also return the bytes of the codes; an example without codes is then bad.
    """

    def __init__(
        self,
        examples: "ExampleIndex | StreamIndex",
        cleaning: Cleaning | None = None,
        short: bool = False,
        codes: bool = False,
    ) -> None:
        super().__init__(examples)
        self.cleaning, self.short, self.codes = cleaning, short, codes

    def read(self, number: int, epoch: int) -> dict[str, Any]:
        """Read caption, label and key of an example.

        Raises:
            BadExampleError: if it has no caption or no codes.
        """
        example = self.examples[number]
        parts = {"captions": caption_of(example, self.cleaning), "labels": example.label, "keys": example.key}
        if self.short:
            parts["short_captions"] = caption_of(example, self.cleaning, short=True)
        return {**parts, "codes": example.read("npy")} if self.codes else parts

    def collate(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """``captions``, ``short_captions``, ``keys``, ``labels`` (B,) int64 (−1 for none), ``codes`` as bytes."""
        batch: dict[str, Any] = {name: [example[name] for example in examples] for name in examples[0]}
        return {**batch, "labels": torch.tensor(batch["labels"])}
