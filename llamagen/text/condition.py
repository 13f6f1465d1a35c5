"""Captions, or their stored features → condition of a text model. B captions, C positions, W width, T tokens in total.

Plain PyTorch, so that a server or a notebook can prompt a model without Lightning::

    text = TextCondition(gpt.config, TextEncoderConfig())
    condition = text.encode([clean_caption("A red cube on a table", "published")], device)
    codes = generate(gpt, condition.features, caption_lengths=condition.lengths)
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llamagen.models.gpt_config import GPTConfig
from llamagen.rank_zero import warn_on_rank_zero
from llamagen.text.cleaning import (
    UNKNOWN,
    Cleaning,
    RecordedCleaning,
    as_option,
    cleaning_of_option,
    in_words,
    recorded_cleaning,
)
from llamagen.text.encoder import CaptionEncoder, TextEncoderConfig
from llamagen.text.padding import pad_left, unpack_left

COMPARED = {"weights": "encoder", "tokenizer": "tokenizer"}
"""Checksums that must be equal for features to be comparable, and the name of each in messages."""


class Condition(NamedTuple):
    """Condition of a batch: features of captions, or class labels.

    Attributes:
        features: (B, C, W) floats, padded on the left with zeros; or (B,) int64 class labels.
        lengths: (B,) int64 in [1, C], number of tokens, which fill the last positions; None for class labels.
        truncated: (B,) bool on the CPU, True for captions with more than C tokens; None if unknown.
    """

    features: Tensor
    lengths: Tensor | None
    truncated: Tensor | None


class TextCondition:
    """Computes conditions from stored features, or from captions by a frozen encoder, which is loaded at first use.

    footgun: not an ``nn.Module``. As a submodule the encoder would enter state dict, optimizer and EMA, and be
    sharded and cast with the model.

    Args:
        config: shape of the text model.
        encoder: name and dtype of the encoder.

    Attributes:
        metadata: encoder and cleaning of the captions that the model was trained on; None if unknown. ``cleaned`` is
            ``published``, ``web`` or False; True, in older files, is ``web``.
    """

    def __init__(self, config: GPTConfig, encoder: TextEncoderConfig) -> None:
        self.config, self.encoder_config = config, encoder
        self.metadata: dict[str, Any] | None = None
        self._source = ""
        self._of_dataset: RecordedCleaning = UNKNOWN
        self._of_features = False
        self._encoder: CaptionEncoder | None = None
        self._warned_of_truncation = False

    @property
    def cleaning(self) -> RecordedCleaning:
        """Cleaning of the captions that the model was trained on, which its prompts need, too; None if they were not
        cleaned, ``unknown`` if no record tells.
        """
        return recorded_cleaning(self.metadata)

    @property
    def encoder(self) -> CaptionEncoder:
        """The encoder, on the CPU at first.

        Raises:
            ValueError: in one line, if it is not available or does not match the model.
        """
        if self._encoder is None:
            encoder = CaptionEncoder(self.encoder_config.name, self.config.caption_length, self.encoder_config.dtype)
            if encoder.width != self.config.caption_dim:
                raise ValueError(
                    f"the text encoder {encoder.name} has features of width {encoder.width}, but the model's "
                    f"caption_dim is {self.config.caption_dim}; set caption_dim to {encoder.width}, or choose another "
                    "text_encoder.name"
                )
            self.check_encoder(encoder.metadata(), f"the text encoder {encoder.name}")
            self._encoder = encoder
        return self._encoder

    def check_encoder(self, metadata: Mapping[str, Any], source: str) -> None:
        """Record the encoder of some features, and compare it with the one recorded earlier.

        Args:
            metadata: description of the encoder, see :meth:`~llamagen.text.CaptionEncoder.metadata`.
            source: origin of the description, for messages.

        Raises:
            ValueError: if weights or tokenizer differ.
        """
        recorded = self.metadata or {}
        for key, part in COMPARED.items():
            if key in recorded and key in metadata and recorded[key] != metadata[key]:
                raise ValueError(
                    f"{source} has another {part} ({metadata.get('encoder')}, checksum {metadata[key][:12]}) than "
                    f"{self._source} ({recorded.get('encoder')}, checksum {recorded[key][:12]}); set "
                    "model.init_args.text_encoder.name to that encoder, or extract the features again"
                )
        self.metadata, self._source = {**metadata, **recorded}, self._source or source

    def check_checkpoint(self, metadata: Mapping[str, Any]) -> None:
        """Compare the description in a checkpoint with encoder and dataset, and take over its cleaning.

        Args:
            metadata: the ``captions`` entry of the checkpoint's description.

        Raises:
            ValueError: if the encoder differs, or the dataset's captions are cleaned differently.
        """
        self.check_encoder(metadata, "the checkpoint")
        if (cleaning := recorded_cleaning(metadata)) == UNKNOWN:
            return
        if self._of_dataset not in (UNKNOWN, cleaning):
            raise ValueError(
                f"the captions of the dataset are {in_words(self._of_dataset)}, but those of the checkpoint were "
                f"{in_words(cleaning)}; {self._remedy(cleaning)}, or use other weights"
            )
        self.metadata = {**(self.metadata or {}), "cleaned": metadata["cleaned"]}

    def check_dataset(
        self, meta: Mapping[str, Any], captioned: bool, cleaning: Cleaning | None, other_cleaning: bool = False
    ) -> None:
        """Check that a dataset of codes has captions or features that match the model.

        Loads the encoder if there are only captions. Afterwards ``metadata["cleaned"]`` describes this dataset, not
        that of the initial weights.

        Args:
            meta: the dataset's ``meta.json``.
            captioned: whether the dataset has captions.
            cleaning: cleaning of the captions: that of the features, or of captions that are encoded online.
            other_cleaning: accept captions that are cleaned differently from those of the initial weights.

        Raises:
            ValueError: if the features do not match, the cleaning differs, there are no captions, or the encoder is not
                available.
        """
        features = meta.get("features")
        if features is None and not captioned:
            raise ValueError(
                "the codes have neither captions nor their features, which a text model needs; extract codes of "
                "images with captions"
            )
        self._of_features = features is not None
        if not other_cleaning and self.cleaning not in (UNKNOWN, cleaning):
            raise ValueError(
                f"the captions of the dataset are {in_words(cleaning)}, but those of {self._source} were "
                f"{in_words(self.cleaning)}; {self._remedy(self.cleaning)}, or add clean_captions to "
                "model.init_args.init_adapt to train on other captions"
            )
        if features is None:
            self.check_encoder(self.encoder.metadata(), "the text encoder")
            cleaned: Any = cleaning or False
        else:
            self._check_features(features)
            cleaned = features.get("cleaned", False)
        self.metadata, self._of_dataset = {**(self.metadata or {}), "cleaned": cleaned}, cleaning

    def _check_features(self, features: Mapping[str, Any]) -> None:
        if features["width"] != self.config.caption_dim or features["caption_length"] > self.config.caption_length:
            raise ValueError(
                f"the features have up to {features['caption_length']} tokens of width {features['width']}, but the "
                f"model's caption_length is {self.config.caption_length} and caption_dim {self.config.caption_dim}; "
                "set both to those of the features"
            )
        # Not caption_length: a model may read shorter features than it could.
        recorded = {key: features[key] for key in ("encoder", "width", "encoder_dtype", *COMPARED) if features.get(key)}
        self.check_encoder(recorded, "the encoder of the features")

    def _remedy(self, cleaning: RecordedCleaning) -> str:
        value = as_option(cleaning)
        if self._of_features:
            return f"extract the features again with data.init_args.clean_captions {value}"
        return f"set data.init_args.clean_captions to {value}"

    def check_prompts(self, option: str | bool | None) -> None:
        """Check that prompts are cleaned like the captions of training.

        Args:
            option: ``clean_captions`` of the prompts; ``auto`` follows the record, and warns if there is none.

        Raises:
            ValueError: in one line, if the record names another cleaning.
        """
        if option == "auto":
            if self.cleaning == UNKNOWN:
                warn_on_rank_zero(
                    "prompts are not cleaned, because the weights do not record how the captions of training were; set "
                    "data.init_args.clean_captions to published (for the published weights), web or false"
                )
            return
        if self.cleaning not in (UNKNOWN, cleaning := cleaning_of_option(option)):
            raise ValueError(
                f"prompts are {in_words(cleaning)}, but the captions of training were {in_words(self.cleaning)}; set "
                f"data.init_args.clean_captions to {as_option(self.cleaning)} or auto"
            )

    def from_batch(self, batch: dict[str, Any], device: torch.device) -> Condition:
        """The condition of a batch.

        Args:
            batch: ``condition`` (B, C, W) padded on the left, or ``caption_features`` (T, W) packed, either with
                ``caption_lengths`` (B,); or ``captions``, B texts, which are encoded: separately if they are prompts,
                together if they come with ``codes``.
            device: device of the model.

        Raises:
            ValueError: if the batch has none of these, or the encoder is not available.
        """
        if "caption_features" in batch:
            lengths = batch["caption_lengths"]
            features = unpack_left(batch["caption_features"], lengths, self.config.caption_length)
            return Condition(features, lengths, None)
        if (condition := batch.get("condition")) is not None and condition.dim() == 3:  # (B,) are class labels
            return Condition(condition, batch.get("caption_lengths"), None)
        if "captions" in batch:
            # Captions of training data come with codes. They are many, and rounding in their features does no harm.
            return self.encode(batch["captions"], device, separately="codes" not in batch)
        raise ValueError(f"the batch has no captions, only {', '.join(sorted(batch))}; give data with captions")

    def encode(self, captions: Sequence[str], device: torch.device, *, separately: bool = True) -> Condition:
        """Encode B captions as the condition of a model on ``device``. Warns once if captions are truncated.

        Args:
            captions: the texts.
            device: device of the model.
            separately: encode each caption in a forward pass of its own, so that its features, and with them the image
                of a seed, are the same in any batch. False is faster.

        Raises:
            ValueError: if the encoder is not available.
        """
        encoder = self.encoder
        if encoder.device != device:
            # footgun: validation runs in inference mode, and weights that were moved in it cannot be used in training.
            with torch.inference_mode(False):
                encoder.to(device)
        features, lengths, truncated = encoder(captions, separately)
        truncated = truncated.cpu()
        if truncated.any() and not self._warned_of_truncation:
            self._warned_of_truncation = True
            first = captions[int(truncated.nonzero()[0])]
            warn_on_rank_zero(
                f"{int(truncated.sum())} of {len(captions)} captions have more than {self.config.caption_length} "
                f"tokens and were truncated, first {first[:40]!r} …; those of later batches are not reported"
            )
        return Condition(pad_left(features, lengths), lengths, truncated)
