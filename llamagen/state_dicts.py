"""Comparison and checksum of tensors by name. Plain torch."""

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

MAX_LISTED = 20


def listed(names: Iterable[str]) -> str:
    """Join names for a message: the first 20, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more


def differences(loaded: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Describe how the entries of a file differ from those of a model in name, shape or kind of dtype.

    Args:
        loaded: entries of the file.
        expected: entries of the model.

    Returns:
        One line: missing and unexpected entries, shape mismatches, and entries that are not floating-point although
        the model's are; at most 20 of each. Empty if nothing differs.
    """
    common = [name for name in expected if name in loaded]
    faults = {
        "missing": [name for name in expected if name not in loaded],
        "unexpected": [name for name in loaded if name not in expected],
        "not floating-point": [
            f"{name} ({str(loaded[name].dtype).removeprefix('torch.')})"
            for name in common
            if expected[name].is_floating_point() and not loaded[name].is_floating_point()
        ],
        "shape mismatch": [
            f"{name} is {tuple(loaded[name].shape)}, expected {tuple(expected[name].shape)}"
            for name in common
            if loaded[name].shape != expected[name].shape
        ],
    }
    return "; ".join(f"{fault}: {listed(names)}" for fault, names in faults.items() if names)


@torch.inference_mode(False)  # footgun: full_tensor() fails in inference mode
@torch.no_grad()
def tensors_checksum(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> str:
    """SHA-256 over names and values, independent of device, memory format and order.

    footgun: checksums are stored in files, so the content that is hashed and its order must never change.

    Args:
        tensors: tensors by name. If they are sharded over ranks, all ranks must call this; full tensors are gathered
            one at a time.
        dtype: dtype to convert to before hashing, for a checksum that does not depend on the dtype.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        digest.update(name.encode())
        digest.update(
            tensor.to("cpu", dtype or tensor.dtype).contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()
