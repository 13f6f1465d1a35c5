"""Captions → features of a frozen T5, by ``predict``. B captions, C positions, W the encoder's width."""

from typing import Any, ClassVar, NamedTuple

import lightning.pytorch as pl

from llamagen.text import CaptionEncoder, EncodedCaptions, TextEncoderConfig


class CaptionFeatures(NamedTuple):
    """What becomes of B samples.

    Attributes:
        captions: features of the captions, (B, C, W).
        short_captions: of their first sentences, where the batch has these.
    """

    captions: EncodedCaptions
    short_captions: EncodedCaptions | None


class CaptionModule(pl.LightningModule):
    """The frozen encoder of captions, for ``predict`` (arXiv 2406.06525, section 2.3).

    It needs no checkpoint, and is in none.

    Args:
        encoder: which T5 reads captions.
        caption_length: number of positions C; more tokens are cut off.

    Raises:
        ValueError: in one line, if the extra ``text`` is not installed or the encoder cannot be had.
    """

    is_frozen: ClassVar[bool] = True
    """There is nothing to train or measure: the command line takes ``predict`` alone, and no checkpoint."""

    def __init__(self, encoder: TextEncoderConfig, caption_length: int = 120) -> None:
        super().__init__()
        # A tuple hides it: its billion of weights is in no state dict, and nobody casts it.
        self._encoder = (CaptionEncoder(encoder.name, caption_length, encoder.dtype),)

    @property
    def encoder(self) -> CaptionEncoder:
        """The encoder."""
        return self._encoder[0]

    def on_predict_start(self) -> None:
        """Move the encoder to the device."""
        self.encoder.to(self.device)

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> CaptionFeatures:
        """The features of ``captions`` and, if there are any, ``short_captions``, each a list of B texts."""
        short = batch.get("short_captions")
        return CaptionFeatures(self.encoder(batch["captions"]), None if short is None else self.encoder(short))
