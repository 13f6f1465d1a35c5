"""Writer of the features that ``predict`` of the text encoder computes, as shards. W feature width."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from callbacks.protocols import CaptionOutputs, EncodesCaptions, ShardableCaptions
from callbacks.writers.shard_dataset import ShardDatasetWriter
from datamodules.storage.index import FEATURES, SHORT_FEATURES
from datamodules.storage.shards import CAPTIONS_FORMAT, ShardDataset, ShardWriter
from llamagen.text import EncodedCaptions, pack

TRUNCATED = "truncated"


class FeatureWriter(ShardDatasetWriter):
    """Write features, captions, labels and codes as shards into the run's folder: ``train``, ``val``, and finally
    ``meta.json``.

    An example is ``<key>.features``, (n, W) little-endian without a header, for the caption's n tokens without padding;
    ``<key>.txt``, the caption that was encoded; and, if they exist, ``<key>.npy`` (codes), ``<key>.cls``, and
    ``<key>.shortfeatures`` (features of the first sentence, if it differs from the caption). Codes and features form
    one dataset: its ``meta.json`` keeps the entries of the codes. Each shard holds a fixed range of the examples and is
    written by one rank. The same command resumes a stopped run with the remaining shards, on any number of ranks.

    Args:
        samples_per_shard: captions in a tar file.
        dtype: dtype of stored features: ``bfloat16``, which is exact for an encoder in bfloat16, or ``float16``, which
            is more precise and has a smaller range.
    """

    data_protocol = ShardableCaptions
    module_protocol = EncodesCaptions

    def __init__(self, samples_per_shard: int = 2_000, dtype: Literal["bfloat16", "float16"] = "bfloat16") -> None:
        super().__init__(samples_per_shard)
        if dtype not in ("bfloat16", "float16"):
            raise ValueError(f"dtype of stored features is {dtype!r}; it must be bfloat16 or float16")
        self.dtype = dtype

    def plan(self, data: ShardableCaptions, module: EncodesCaptions) -> dict[str, Any]:
        """Encoder, captions and their source, and options."""
        source = json.dumps(data.source_meta, sort_keys=True)
        return {
            "format": FEATURES,
            "encoder": module.encoder.metadata(),
            "dtype": self.dtype,
            "clean_captions": {None: False, "web": True}.get(data.cleaning, data.cleaning),  # as earlier versions wrote
            "short_captions": data.short_captions,
            "captions": {split: data.fingerprint(split) for split in data.predict_splits},
            "source": hashlib.sha256(source.encode()).hexdigest(),  # includes the checksums of its shards
        }

    def write(self, writer: ShardWriter, outputs: CaptionOutputs, batch: dict[str, Any]) -> None:
        """Append a batch of features.

        Raises:
            ValueError: if features exceed the range of the stored dtype.
            FloatingPointError: if the encoder's features are not finite.
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
        writer.counts[TRUNCATED] += int(outputs.captions.truncated.sum())

    def _bytes_of(self, encoded: EncodedCaptions, keys: list[str]) -> list[bytes]:
        """The stored bytes of each caption's tokens."""
        tokens = pack(encoded.features, encoded.lengths)
        lengths = encoded.lengths.tolist()
        stored = tokens.to(getattr(torch, self.dtype))
        if not stored.isfinite().all():
            finite = [bool(part.isfinite().all()) for part in stored.split(lengths)]
            example = f"features of example {keys[finite.index(False)]}"
            if tokens.isfinite().all():
                raise ValueError(f"{example} exceed the range of {self.dtype}; set dtype of FeatureWriter to bfloat16")
            raise FloatingPointError(f"{example} are not finite; the weights of the encoder may be damaged")
        numbers = stored.view(torch.int16).cpu().numpy().astype("<i2", copy=False)
        ends = np.cumsum(lengths)
        return [numbers[end - length : end].tobytes() for length, end in zip(lengths, ends, strict=True)]

    def describe(
        self, shards: ShardDataset, pieces: Mapping[str, int], data: ShardableCaptions, module: EncodesCaptions
    ) -> dict[str, Any]:
        """Entries of the codes, if there are any, and of the features; warns about truncated captions."""
        facts, truncated = shards.plan["encoder"], shards.total_counts(pieces)[TRUNCATED]
        if truncated:
            rank_zero_warn(
                f"{truncated} captions have more tokens than caption_length {facts['caption_length']} and were "
                "truncated"
            )
        features = {
            "encoder": facts["encoder"],
            "width": facts["width"],
            "caption_length": facts["caption_length"],
            "dtype": self.dtype,
            "encoder_dtype": facts["dtype"],
            "weights": facts["weights"],
            "tokenizer": facts["tokenizer"],
            "cleaned": data.cleaning or False,
            "short": data.short_captions,
            "truncated": truncated,
        }
        classes = {"num_classes": len(data.class_names), "classes": data.class_names}
        source = data.source_meta if data.has_codes else {"format": CAPTIONS_FORMAT, **classes}
        return {**{name: value for name, value in source.items() if name != "splits"}, FEATURES: features}
