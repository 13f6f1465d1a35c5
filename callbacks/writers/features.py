"""Writes the features that ``predict`` of the caption encoder yields as shards. B captions, C positions, W wide."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from callbacks.writers.shard_dataset import PlannedData, ShardSetWriter
from datamodules.storage.index import FEATURES, SHORT_FEATURES
from datamodules.storage.shards import CAPTIONS_FORMAT, ShardSet, ShardWriter
from llamagen.text import CaptionEncoder, EncodedCaptions, pack

TRUNCATED = "truncated"


class EncoderModule(Protocol):
    """A module that encodes captions."""

    @property
    def encoder(self) -> CaptionEncoder:
        """The encoder."""


class CaptionData(PlannedData, Protocol):
    """A DataModule of captions."""

    clean_captions: bool
    short_captions: bool
    source_meta: dict[str, Any]

    @property
    def has_codes(self) -> bool:
        """Whether the samples are of a set of codes."""


class CaptionOutputs(Protocol):
    """What is made of a batch of captions."""

    @property
    def captions(self) -> EncodedCaptions:
        """Features of the captions."""

    @property
    def short_captions(self) -> EncodedCaptions | None:
        """Features of their first sentences, where these were asked for."""


class FeatureWriter(ShardSetWriter):
    """Write features, captions, labels and codes as shards into the run's folder: ``train``, ``val``, at last
    ``meta.json``.

    A sample is ``<key>.features``, (n, W) of the caption's n tokens alone, in little-endian numbers without a header;
    ``<key>.txt``, the caption as it was encoded; and what there is of ``<key>.npy``, the codes, ``<key>.cls``, and
    ``<key>.shortfeatures``, of the first sentence where that is another text. So codes and features make one set, of
    which ``meta.json`` says all that it said of the codes. Each shard is of a fixed range of the samples and is written
    by one rank. The command of a stopped run goes on with the shards that are not there yet, on any number of ranks.

    Args:
        samples_per_shard: captions in a tar file.
        dtype: how features are stored: ``bfloat16``, or ``float16``, which is more exact and has a smaller range; an
            encoder in bfloat16 loses nothing by the first.
    """

    def __init__(self, samples_per_shard: int = 2_000, dtype: Literal["bfloat16", "float16"] = "bfloat16") -> None:
        super().__init__(samples_per_shard)
        if dtype not in ("bfloat16", "float16"):
            raise ValueError(f"dtype of stored features is {dtype!r}; it must be bfloat16 or float16")
        self.dtype = dtype

    def plan(self, data: CaptionData, module: EncoderModule) -> dict[str, Any]:
        """Captions, encoder, and what is done with both."""
        source = json.dumps(data.source_meta, sort_keys=True)
        return {
            "format": FEATURES,
            "encoder": module.encoder.metadata(),
            "dtype": self.dtype,
            "clean_captions": data.clean_captions,
            "short_captions": data.short_captions,
            "captions": {split: data.fingerprint(split) for split in data.predict_splits},
            "source": hashlib.sha256(source.encode()).hexdigest(),  # with the checksums of its shards
        }

    def write(self, writer: ShardWriter, outputs: CaptionOutputs, batch: dict[str, Any]) -> None:
        """Append a batch.

        Raises:
            ValueError: if features leave the range of the numbers they are stored in.
            FloatingPointError: if they are not finite as they came.
        """
        captions, keys = batch["captions"], batch["keys"]
        features = self._bytes_of(outputs.captions, keys)
        short = batch.get("short_captions", captions)
        short_features = features if outputs.short_captions is None else self._bytes_of(outputs.short_captions, keys)
        codes = batch.get("codes", [None] * len(keys))
        rows = zip(keys, batch["labels"].tolist(), captions, short, codes, features, short_features, strict=True)
        for key, label, caption, sentence, npy, whole, part in rows:
            parts = {} if npy is None else {"npy": npy}
            parts |= {"txt": caption.encode("utf-8", "replace"), FEATURES: whole}
            writer.write(key, parts | ({SHORT_FEATURES: part} if sentence != caption else {}), label)
        writer.counted[TRUNCATED] += int(outputs.captions.truncated.sum())

    def _bytes_of(self, encoded: EncodedCaptions, keys: list[str]) -> list[bytes]:
        """The tokens of each caption, as they are stored."""
        tokens = pack(encoded.features, encoded.lengths)
        lengths = encoded.lengths.tolist()
        stored = tokens.to(getattr(torch, self.dtype))
        if not stored.isfinite().all():
            finite = [bool(part.isfinite().all()) for part in stored.split(lengths)]
            sample = f"features of sample {keys[finite.index(False)]}"
            if tokens.isfinite().all():
                raise ValueError(f"{sample} leave the range of {self.dtype}; set dtype of FeatureWriter to bfloat16")
            raise FloatingPointError(f"{sample} are not finite; the weights of the encoder may be damaged")
        numbers = stored.view(torch.int16).cpu().numpy().astype("<i2", copy=False)
        ends = np.cumsum(lengths)
        return [numbers[end - length : end].tobytes() for length, end in zip(lengths, ends, strict=True)]

    def describe(
        self, shards: ShardSet, pieces: Mapping[str, int], data: CaptionData, module: EncoderModule
    ) -> dict[str, Any]:
        """All that is known of the codes, if there are any, and of the features; warns of captions that were cut."""
        facts, truncated = shards.plan["encoder"], shards.counted(pieces)[TRUNCATED]
        if truncated:
            rank_zero_warn(
                f"{truncated} captions have more tokens than caption_length {facts['caption_length']}; what is beyond "
                "was cut off"
            )
        before = data.source_meta.get(FEATURES, {})
        features = {
            "encoder": facts["encoder"],
            "width": facts["width"],
            "caption_length": facts["caption_length"],
            "dtype": self.dtype,
            "encoder_dtype": facts["dtype"],
            "weights": facts["weights"],
            "tokenizer": facts["tokenizer"],
            "cleaned": data.clean_captions or before.get("cleaned", False),
            "short": data.short_captions,
            "truncated": truncated,
        }
        classes = {"num_classes": len(data.class_names), "classes": data.class_names}
        source = data.source_meta if data.has_codes else {"format": CAPTIONS_FORMAT, **classes}
        return {**{name: value for name, value in source.items() if name != "splits"}, FEATURES: features}
