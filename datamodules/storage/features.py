"""Stored caption features. B: captions in a batch, W: width, T: tokens of all B captions together."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.storage.bad_examples import BadExampleError
from datamodules.storage.index import FEATURES, SHORT_FEATURES, Example, ExampleIndex
from datamodules.storage.shards import META_FILE

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
EXPONENTS = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
"""Exponent bits, which are all set in values that are not finite."""


class StoredFeatures:
    """Reader of caption features. Batches stay packed, without padding tokens, which are added on the device.

    Args:
        description: entry ``features`` of ``meta.json``: ``width``, ``caption_length``, ``dtype``, ``short``.
        root: folder or address of the dataset, for messages.

    Raises:
        ValueError: if the entry is invalid.
    """

    def __init__(self, description: Mapping[str, Any], root: str) -> None:
        self.root = root
        try:
            self.width, self.caption_length = int(description["width"]), int(description["caption_length"])
            self.dtype, self.short = DTYPES[description["dtype"]], bool(description["short"])
            if min(self.width, self.caption_length) < 1:
                raise ValueError("a size below 1")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"features in {META_FILE} of {root} is invalid ({type(error).__name__}: {error}); extract them again"
            ) from error

    def example_with_features(self, index: ExampleIndex, number: int) -> Example:
        """Example that holds the features of example ``number``: here the example itself."""
        example: Example = index[number]
        return example

    def read(self, example: Example, short: bool) -> np.ndarray:
        """Read the features of a caption.

        Args:
            example: example with features.
            short: read the features of the first sentence, if they are stored separately.

        Returns:
            (n, W) uint16, the bits of each value; n from 1 to ``caption_length``.

        Raises:
            BadExampleError: if there are none, their size is wrong, or some are not finite.
        """
        data = example.read(SHORT_FEATURES if short and SHORT_FEATURES in example.members else FEATURES)
        tokens = int(self.count_tokens(np.array(len(data))))
        if not tokens:
            raise BadExampleError(
                "broken features",
                f"example {example.key} of {example.source} has {len(data)} bytes of features, not 1 to "
                f"{self.caption_length} tokens of width {self.width}; extract the features again",
            )
        bits = np.frombuffer(data, "<u2")
        exponent = EXPONENTS[self.dtype]
        if (bits & exponent).max() == exponent:
            raise BadExampleError(
                "broken features",
                f"example {example.key} of {example.source} has features that are not finite; extract them again",
            )
        return bits.reshape(tokens, self.width)

    def count_tokens(self, sizes: np.ndarray) -> np.ndarray:
        """Number of tokens for each size in bytes; 0 for invalid sizes."""
        tokens, rest = np.divmod(sizes, 2 * self.width)
        return np.where((rest == 0) & (tokens >= 1) & (tokens <= self.caption_length), tokens, 0)

    def collate(self, features: list[np.ndarray]) -> dict[str, Tensor]:
        """Pack the features of a batch: ``caption_features`` (T, W), and ``caption_lengths`` (B,) int64 with sum T."""
        bits = torch.from_numpy(np.concatenate(features))
        lengths = torch.tensor([len(tokens) for tokens in features])
        return {"caption_features": bits.view(self.dtype), "caption_lengths": lengths}
