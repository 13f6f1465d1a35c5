"""Atomic checkpoints: complete or absent, even after a full disk or a killed process."""

from pathlib import Path
from typing import Any

import torch
from fsspec.core import url_to_fs
from fsspec.utils import get_protocol
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor
from torch.distributed.tensor import DTensor

from llamagen.checkpoints.contents import read_checkpoint
from llamagen.checkpoints.sharded import is_sharded_checkpoint
from llamagen.files import atomic_file, remove
from llamagen.hub.download import is_remote, local_file


class CheckpointFiles(TorchCheckpointIO):
    """Writes checkpoints as files. Also reads and replaces sharded ones, which are folders.

    Lightning serialises a checkpoint in memory, writes it into the system's temporary folder, and moves it. Between
    file systems the move is a copy to the final name, which may stop halfway. This class writes a checkpoint tensor by
    tensor into a temporary file in its own folder, syncs it, and renames it. Addresses such as ``s3://`` are left to
    Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint atomically.

        Raises:
            DiskFullError: in one line, if the disk is full; the previous checkpoint is kept.
        """
        if storage_options is not None or not is_local(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        local = local_path(path)
        with (
            atomic_file(local, tensor_bytes(checkpoint), is_sharded_checkpoint(local)) as temporary,
            temporary.open("wb") as file,  # our file: PyTorch's own writer hides the reason of an error
        ):
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a file, a file of the hub, or all shards of a folder."""
        if is_remote(path):
            path = local_file(path)
        if is_local(path) and is_sharded_checkpoint(local_path(path)):
            return read_checkpoint(local_path(path), wanted=lambda _: True)
        loaded: dict[str, Any] = super().load_checkpoint(path, map_location, weights_only)
        return loaded

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint. A folder is renamed first, so that half of it is not taken for a checkpoint."""
        if is_local(path):
            remove(local_path(path))
        else:
            super().remove_checkpoint(path)


def is_local(path: Any) -> bool:
    """Whether a path is on a local file system."""
    return bool(get_protocol(str(path)) == "file")


def local_path(path: Any) -> Path:
    """The local path of a path or a ``file://`` address."""
    return Path(path) if "://" not in str(path) else Path(url_to_fs(str(path))[1])


def tensor_bytes(content: Any) -> int:
    """Bytes of all tensors in nested containers, each storage once; for sharded tensors, of this rank's part.

    Apart from a few thousand bytes, this is the size of a checkpoint.
    """
    storages: dict[tuple[str, int], int] = {}
    pending = [content]
    while pending:
        each = pending.pop()
        if isinstance(each, DTensor):
            pending.append(each.to_local())
        elif isinstance(each, Tensor):
            storage = each.untyped_storage()
            storages[str(each.device), storage.data_ptr()] = storage.nbytes()
        elif isinstance(each, dict):
            pending += each.values()
        elif isinstance(each, list | tuple):
            pending += each
    return sum(storages.values())
