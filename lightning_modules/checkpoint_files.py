"""How checkpoints are written, read and removed: complete or absent, also next to a full disk or a killed process."""

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


class CheckpointFiles(TorchCheckpointIO):
    """Checkpoints in files, and, to read and to replace, sharded ones in folders.

    Lightning serializes a checkpoint in memory, writes it to the folder for temporary files, and copies it where that
    is on another file system: a copy that stops halfway has the final name. Here a checkpoint is written tensor by
    tensor into a temporary file in its own folder, synced, and renamed. Addresses such as ``s3://`` are left to
    Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint, complete or not at all.

        Raises:
            DiskFullError: in one line, if there is no room; the checkpoint of before is still there.
        """
        if storage_options is not None or not is_local(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        local = local_path(path)
        with (
            atomic_file(local, tensor_bytes(checkpoint), is_sharded_checkpoint(local)) as temporary,
            temporary.open("wb") as file,  # whose errors say why nothing can be written; PyTorch's own do not
        ):
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read everything."""
        if is_local(path) and is_sharded_checkpoint(local_path(path)):
            return read_checkpoint(local_path(path), wanted=lambda _: True)
        loaded: dict[str, Any] = super().load_checkpoint(path, map_location, weights_only)
        return loaded

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint; a folder loses its name first, so that no half of it is taken for a checkpoint."""
        if is_local(path):
            remove(local_path(path))
        else:
            super().remove_checkpoint(path)


def is_local(path: Any) -> bool:
    """Whether a path is on this machine's file systems."""
    return bool(get_protocol(str(path)) == "file")


def local_path(path: Any) -> Path:
    """The path on this machine of a path or a ``file://`` address."""
    return Path(path) if "://" not in str(path) else Path(url_to_fs(str(path))[1])


def tensor_bytes(content: Any) -> int:
    """Bytes of all tensors in nested containers, each storage once; of those spread over ranks, this rank's part.

    The size of a checkpoint, up to some thousand bytes.
    """
    storages: dict[tuple[str, int], int] = {}
    waiting = [content]
    while waiting:
        each = waiting.pop()
        if isinstance(each, DTensor):
            waiting.append(each.to_local())
        elif isinstance(each, Tensor):
            storage = each.untyped_storage()
            storages[str(each.device), storage.data_ptr()] = storage.nbytes()
        elif isinstance(each, dict):
            waiting += each.values()
        elif isinstance(each, list | tuple):
            waiting += each
    return sum(storages.values())
