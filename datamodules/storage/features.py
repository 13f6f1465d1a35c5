"""Stored features of captions, as shards of codes hold them. B captions, W wide, T tokens of all of them."""

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
"""Bits that are all set in what is no finite number."""


class StoredFeatures:
    """Reads the features of one example, and joins those of many. They stay packed: padding is made on the device.

    Args:
        described: what ``meta.json`` says under ``features``: ``width``, ``caption_length``, ``dtype``, ``short``.
        root: where it says so.

    Raises:
        ValueError: if it is not as it should be.
    """

    def __init__(self, described: Mapping[str, Any], root: str) -> None:
        self.root = root
        try:
            self.width, self.caption_length = int(described["width"]), int(described["caption_length"])
            self.dtype, self.short = DTYPES[described["dtype"]], bool(described["short"])
            if min(self.width, self.caption_length) < 1:
                raise ValueError("a size below 1")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"features in {META_FILE} of {root} are wrong ({type(error).__name__}: {error}); extract them again"
            ) from error

    def example_of(self, index: ExampleIndex, place: int) -> Example:
        """The example that has the features of example ``place``: it has them itself."""
        example: Example = index[place]
        return example

    def read(self, example: Example, short: bool) -> np.ndarray:
        """Features of the caption of an example, or of its first sentence, where that is another text.

        Returns:
            (n, W) uint16, the bits of each number; n from 1 to ``caption_length``.

        Raises:
            BadExampleError: if there are none, not as many as there should be, or some that are not finite.
        """
        data = example.read(SHORT_FEATURES if short and SHORT_FEATURES in example.members else FEATURES)
        tokens = int(self.tokens_in(np.array(len(data))))
        if not tokens:
            raise BadExampleError(
                "broken features",
                f"example {example.key} of {example.source} has {len(data)} bytes of features, which are not 1 to "
                f"{self.caption_length} tokens of width {self.width}; extract the features again",
            )
        bits = np.frombuffer(data, "<u2")
        exponent = EXPONENTS[self.dtype]
        if (bits & exponent).max() == exponent:
            raise BadExampleError(
                "broken features",
                f"example {example.key} of {example.source} has features that are not finite; extract the features again",
            )
        return bits.reshape(tokens, self.width)

    def tokens_in(self, sizes: np.ndarray) -> np.ndarray:
        """How many tokens so many bytes hold, each; 0 for what is no possible size."""
        tokens, rest = np.divmod(sizes, 2 * self.width)
        return np.where((rest == 0) & (tokens >= 1) & (tokens <= self.caption_length), tokens, 0)

    def join(self, features: list[np.ndarray]) -> dict[str, Tensor]:
        """``caption_features`` (T, W), caption after caption, and ``caption_lengths`` (B,) int64, of sum T."""
        bits = torch.from_numpy(np.concatenate(features))
        lengths = torch.tensor([len(tokens) for tokens in features])
        return {"caption_features": bits.view(self.dtype), "caption_lengths": lengths}
