"""Captions of a batch → the condition of a text model. B captions, C positions, W the features' width."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from llamagen.models.gpt_config import GPTConfig
from llamagen.text import CaptionEncoder, TextEncoderConfig, pad_left, unpack_left

SAME = {"weights": "encoder", "tokenizer": "tokenizer"}
"""Checksums that make features comparable, and what they are of."""


class Condition(NamedTuple):
    """What a text model is asked with.

    Attributes:
        features: (B, C, W), padded on the left with zeros.
        lengths: (B,) int64 in [1, C], how many of the last positions are tokens.
        truncated: (B,) bool on the CPU, whose captions had more tokens than C; None if it is not known.
    """

    features: Tensor
    lengths: Tensor | None
    truncated: Tensor | None


class TextCondition:
    """Makes conditions of stored features, or of captions by a frozen encoder, which is loaded when it is needed.

    It is no module: the encoder is in no state dict, optimizer or average, is not sharded and not cast.

    Args:
        config: of the text model.
        encoder: which one reads captions.
    """

    def __init__(self, config: GPTConfig, encoder: TextEncoderConfig) -> None:
        self.config, self.encoder_config = config, encoder
        self.facts: dict[str, Any] | None = None
        """What is known of the features that the model is trained on: of encoder and cleaning."""
        self._known_of = ""
        self._encoder: CaptionEncoder | None = None
        self._told_of_cuts = False

    @property
    def encoder(self) -> CaptionEncoder:
        """The encoder, on the CPU at first.

        Raises:
            ValueError: in one line, if it cannot be had or does not fit the model.
        """
        if self._encoder is None:
            encoder = CaptionEncoder(self.encoder_config.name, self.config.caption_length, self.encoder_config.dtype)
            if encoder.width != self.config.caption_dim:
                raise ValueError(
                    f"the text encoder {encoder.name} has features of width {encoder.width}, but the model's "
                    f"caption_dim is {self.config.caption_dim}; set caption_dim to {encoder.width}, or choose another "
                    "text_encoder.name"
                )
            self.check(encoder.facts(), f"the text encoder {encoder.name}")
            self._encoder = encoder
        return self._encoder

    def check(self, facts: Mapping[str, Any], what: str) -> None:
        """Remember of which encoder features are, or see that they are of the same.

        Args:
            facts: of the encoder, see :meth:`~llamagen.text.CaptionEncoder.facts`.
            what: has them.

        Raises:
            ValueError: if they are of another one.
        """
        known = self.facts or {}
        for key, part in SAME.items():
            if key in known and key in facts and known[key] != facts[key]:
                raise ValueError(
                    f"{what} has another {part} ({facts.get('encoder')}, checksum {facts[key][:12]}) than "
                    f"{self._known_of} ({known.get('encoder')}, checksum {known[key][:12]}); set "
                    "model.init_args.text_encoder.name to that encoder, or extract the features again"
                )
        self.facts, self._known_of = {**facts, **known}, self._known_of or what

    def check_set(self, meta: Mapping[str, Any], captioned: bool, cleaned: bool) -> None:
        """See that a set of codes tells captions that the model can read; loads the encoder if it has to.

        Whether captions are cleaned is from now on what it is of this set, whatever the weights were trained on before.

        Args:
            meta: of the set.
            captioned: whether it has captions.
            cleaned: whether captions are cleaned before they are encoded here.

        Raises:
            ValueError: if it does not, or the encoder cannot be had.
        """
        if (features := meta.get("features")) is None:
            if not captioned:
                raise ValueError(
                    "the codes have neither captions nor their features, which a text model needs; extract codes of "
                    "images with captions"
                )
            self.check(self.encoder.facts(), "the text encoder")
            self.facts = {**(self.facts or {}), "cleaned": cleaned}
            return
        if features["width"] != self.config.caption_dim or features["caption_length"] > self.config.caption_length:
            raise ValueError(
                f"the features are of up to {features['caption_length']} tokens of width {features['width']}, but the "
                f"model's caption_length is {self.config.caption_length} and caption_dim {self.config.caption_dim}; "
                "set them to these"
            )
        # The length is the model's own business.
        facts = {key: features[key] for key in ("encoder", "width", "encoder_dtype", *SAME) if features.get(key)}
        self.check(facts, "the encoder of the features")
        self.facts = {**(self.facts or {}), "cleaned": features.get("cleaned", False)}

    def warn_of_uncleaned(self, cleaned: bool) -> None:
        """Say that prompts are not cleaned as the captions were that the model learned, or the other way round."""
        if self.facts is not None and self.facts.get("cleaned", cleaned) != cleaned:
            was, wanted = ("cleaned", "true") if self.facts["cleaned"] else ("not cleaned", "false")
            rank_zero_warn(f"the model's captions were {was}; set data.init_args.clean_captions to {wanted}")

    def of_batch(self, batch: dict[str, Any], device: torch.device) -> Condition:
        """The condition of a batch.

        Args:
            batch: has ``condition`` (B, C, W) padded on the left, or ``caption_features`` (T, W) packed, either with
                ``caption_lengths`` (B,); or ``captions``, B texts.
            device: of the model.

        Raises:
            ValueError: if it has none of these, or the encoder cannot be had.
        """
        if "caption_features" in batch:
            lengths = batch["caption_lengths"]
            features = unpack_left(batch["caption_features"], lengths, self.config.caption_length)
            return Condition(features, lengths, None)
        if (condition := batch.get("condition")) is not None and condition.dim() == 3:  # else it is a class
            return Condition(condition, batch.get("caption_lengths"), None)
        if "captions" in batch:
            return self.encode(batch["captions"], device)
        raise ValueError(f"the batch has no captions, only {', '.join(sorted(batch))}; give data with captions")

    def encode(self, captions: Sequence[str], device: torch.device) -> Condition:
        """The condition that captions make.

        Raises:
            ValueError: if the encoder cannot be had.
        """
        encoder = self.encoder
        if encoder.device != device:
            with torch.inference_mode(False):  # in which validation may be: training follows
                encoder.to(device)
        features, lengths, truncated = encoder(captions)
        truncated = truncated.cpu()
        if truncated.any() and not self._told_of_cuts:
            self._told_of_cuts = True
            first = captions[int(truncated.nonzero()[0])]
            most = self.config.caption_length
            rank_zero_warn(
                f"{int(truncated.sum())} of {len(captions)} captions have more than {most} tokens and were cut, the "
                f"first is {first[:40]!r} …; those of later batches are not told of"
            )
        return Condition(pad_left(features, lengths), lengths, truncated)
