"""``predict``: captions → features of a frozen T5. B captions, C positions, W the encoder's width."""

from typing import Any, ClassVar, NamedTuple

import lightning.pytorch as pl

from llamagen.text import CaptionEncoder, EncodedCaptions, TextEncoderConfig


class CaptionFeatures(NamedTuple):
    """Features of the captions of B examples.

    Attributes:
        captions: features of the captions, (B, C, W).
        short_captions: features of their first sentences, if the batch has them.
    """

    captions: EncodedCaptions
    short_captions: EncodedCaptions | None


class CaptionModule(pl.LightningModule):
    """The frozen caption encoder, for ``predict`` only (arXiv 2406.06525, section 2.3).

    It needs no checkpoint.

    Args:
        encoder: name and dtype of the T5.
        caption_length: number of positions C; longer captions are truncated.

    Raises:
        ValueError: in one line, if the extra ``text`` is not installed or the encoder is not available.
    """

    is_frozen: ClassVar[bool] = True
    """Predict-only: the command line accepts neither other stages nor a checkpoint."""

    def __init__(self, encoder: TextEncoderConfig, caption_length: int = 120) -> None:
        super().__init__()
        # footgun: not a submodule, or Lightning would cast it and save its billion weights. A tuple hides it.
        self._encoder = (CaptionEncoder(encoder.name, caption_length, encoder.dtype),)

    @property
    def encoder(self) -> CaptionEncoder:
        """The encoder."""
        return self._encoder[0]

    def on_predict_start(self) -> None:
        """Move the encoder to the device."""
        self.encoder.to(self.device)

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> CaptionFeatures:
        """Features of ``captions`` and, if the batch has them, ``short_captions``, each a list of B texts."""
        short = batch.get("short_captions")
        return CaptionFeatures(self.encoder(batch["captions"]), None if short is None else self.encoder(short))
