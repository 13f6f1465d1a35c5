"""The caption of a sample, as it is meant to be read by a text encoder."""

from datamodules.bad_samples import BadSampleError
from datamodules.index import Sample
from llamagen.text.cleaning import clean_caption, first_sentence


def caption_of(sample: Sample, clean: bool = False, short: bool = False) -> str:
    """The caption of a sample, or its first sentence.

    Args:
        sample: with a txt or json member.
        clean: as :func:`~llamagen.text.cleaning.clean_caption` has it.
        short: the first sentence alone, found before cleaning, which takes away the capitals that tell where it ends.

    Raises:
        BadSampleError: if it has none, or cleaning leaves nothing of it.
    """
    found = sample.read_caption()
    text = first_sentence(found) if short else found
    text = clean_caption(text) if clean else text
    if not text:
        what = f"has a caption of which cleaning leaves nothing: {found[:40]!r}" if found else "has no caption"
        raise BadSampleError("no caption", f"sample {sample.key} of {sample.source} {what}")
    return text
