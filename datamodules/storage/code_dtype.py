"""The dtype of stored codes."""

import numpy as np

UINT16_CODES = 2**16
"""Largest vocabulary whose codes are stored as uint16."""


def code_dtype(vocabulary: int) -> np.dtype[np.unsignedinteger]:
    """Dtype of the codes in shards: uint16 for a vocabulary of at most 65,536 codes, uint32 for a larger one.

    Args:
        vocabulary: number of codes of the tokenizer.
    """
    return np.dtype(np.uint16 if vocabulary <= UINT16_CODES else np.uint32)
