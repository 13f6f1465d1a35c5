"""Captions by number. Apart from their DataModule: worker processes import this file, and not Lightning. B captions."""

from typing import TYPE_CHECKING, Any

import torch

from datamodules.datasets.dataset import SampleDataset
from datamodules.storage.bad_samples import BadSampleError
from datamodules.storage.index import Sample, SampleIndex
from llamagen.text.cleaning import clean_caption, first_sentence

if TYPE_CHECKING:
    from datamodules.loading.stream import StreamIndex


def caption_of(sample: Sample, clean: bool = False, short: bool = False) -> str:
    """The caption of a sample, or its first sentence.

    Args:
        sample: with a txt or json member.
        clean: as :func:`~llamagen.text.cleaning.clean_caption` has it.
        short: the first sentence alone, found before cleaning, which takes away the capitals that tell where it ends;
            the whole caption where cleaning leaves nothing of that sentence.

    Raises:
        BadSampleError: if it has none, or cleaning leaves nothing of it.
    """
    found = sample.read_caption()
    texts = [first_sentence(found), found] if short else [found]
    text = next(filter(None, map(clean_caption, texts) if clean else texts), "")
    if not text:
        fault = "" if found else sample.caption_fault()
        what = f"has no caption that can be read: {fault}" if fault else "has no caption"
        if found:
            what = f"has a caption of which cleaning leaves nothing: {found[:40]!r}"
        raise BadSampleError("no caption", f"sample {sample.key} of {sample.source} {what}")
    return text


class CaptionDataset(SampleDataset):
    """Reads captions, and what else of their samples goes with their features.

    Args:
        samples: with a txt or json member.
        clean: as :func:`~llamagen.text.cleaning.clean_caption` has it.
        short: give the first sentences, too.
        codes: give the bytes of the codes, which each sample must then have.
    """

    def __init__(
        self, samples: "SampleIndex | StreamIndex", clean: bool = False, short: bool = False, codes: bool = False
    ) -> None:
        super().__init__(samples)
        self.clean, self.short, self.codes = clean, short, codes

    def read(self, number: int, epoch: int) -> dict[str, Any]:
        """Caption, label and key of a sample.

        Raises:
            BadSampleError: if it has no caption, or lacks the codes.
        """
        sample = self.samples[number]
        parts = {"captions": caption_of(sample, self.clean), "labels": sample.label, "keys": sample.key}
        if self.short:
            parts["short_captions"] = caption_of(sample, self.clean, short=True)
        return {**parts, "codes": sample.read("npy")} if self.codes else parts

    def join(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """``captions``, ``short_captions``, ``keys``, ``labels`` (B,) int64 (−1 for none), ``codes`` as bytes."""
        batch: dict[str, Any] = {name: [sample[name] for sample in samples] for name in samples[0]}
        return {**batch, "labels": torch.tensor(batch["labels"])}
