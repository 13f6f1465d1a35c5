"""Read sharded training checkpoints into the layout of a single-file checkpoint. Plain torch.

A sharded checkpoint is a folder: ``torch.distributed.checkpoint`` writes one file per rank, and Lightning adds
``meta.pt`` with everything that is not a tensor.
"""

import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

META_FILE = "meta.pt"
INDEX_FILE = ".metadata"
MOMENTS = ("exp_avg", "exp_avg_sq")

# The classes that an index needs; nothing else is unpickled.
ALLOWED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}


def is_sharded_checkpoint(path: Path) -> bool:
    """Whether a path is the folder of a complete sharded checkpoint."""
    return (path / META_FILE).is_file() and (path / INDEX_FILE).is_file()


def not_moments(name: str) -> bool:
    """Whether an entry is not a moment of the optimizer. Only resuming a run needs the moments."""
    return not name.endswith(MOMENTS)


def read_sharded(path: Path, rest: Mapping[str, Any], wanted: Callable[[str], bool]) -> dict[str, Any]:
    """Read a sharded checkpoint into the layout of a single-file checkpoint, without running code from a file.

    Args:
        path: folder of the checkpoint.
        rest: content of :data:`META_FILE`.
        wanted: selects tensors by name, for example ``state_dict.gpt.norm.weight`` or
            ``optimizer_0.state.gpt.norm.weight.exp_avg``. The others are returned on the meta device.

    Returns:
        ``rest`` with ``state_dict`` and, if there are any, ``optimizer_states`` with numbered parameters; on the CPU.

    Raises:
        ValueError: in one line, if a file is damaged or missing.
    """
    reader = _Reader(path)
    try:
        index = reader.read_metadata()
        tensors = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype, device="cpu" if wanted(name) else "meta")
            for name, entry in index.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        plain: dict[str, Any] = {
            name: None
            for name, entry in index.state_dict_metadata.items()
            if isinstance(entry, BytesStorageMetadata) and not name.endswith("_extra_state")
        }
        requested = {name: tensor for name, tensor in tensors.items() if not tensor.is_meta} | plain
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # intended
            dcp.load(requested, storage_reader=reader, planner=_Planner(False, False), no_dist=True)
        return {**rest, **_nested(tensors | {name: requested[name] for name in plain}, index)}
    except _RefusedError as error:
        raise ValueError(f"{path} is refused: {error}") from error
    except (Exception, CheckpointException) as error:  # footgun: the latter is not a subclass of Exception
        raise ValueError(
            f"{path} cannot be read as a sharded checkpoint ({type(error).__name__}: {' '.join(str(error).split())}); "
            "it is damaged, give another checkpoint"
        ) from error


def read_index(path: Path) -> Metadata:
    """Read the index of a sharded checkpoint, without running code from a file.

    Args:
        path: folder of the checkpoint.
    """
    with (path / INDEX_FILE).open("rb") as file:
        index: Metadata = _Unpickler(file).load()
    return index


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        index = read_index(Path(self.path))
        if index.storage_meta is not None:
            index.storage_meta.load_id = self.load_id
        return index


class _RefusedError(Exception):
    pass


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise _RefusedError(f"it needs {module}.{name}, and code that a file names is not run")


class _Planner(DefaultLoadPlanner):
    """Reads entries that are not tensors without running code."""

    def load_bytes(self, read_item: Any, value: Any) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


def _nested(entries: Mapping[str, Any], index: Metadata) -> dict[str, Any]:
    """Convert flat names to the ``state_dict`` and ``optimizer_states`` of a single-file Lightning checkpoint."""
    weights: dict[str, Tensor] = {}
    optimizers: dict[int, dict[str, Any]] = {}
    for name, value in entries.items():
        head, *keys = index.planner_data[name]
        if head == "state_dict":
            weights[keys[0]] = value
            continue
        optimizer = optimizers.setdefault(int(str(head).removeprefix("optimizer_")), {"state": {}, "param_groups": []})
        if keys[0] == "state":
            optimizer["state"].setdefault(keys[1], {})[keys[2]] = value
        else:
            optimizer["param_groups"] = _with_entry(optimizer["param_groups"], keys[1:], value)
    states = [numbered(optimizers[number]) for number in sorted(optimizers)]
    return {"state_dict": weights} | ({"optimizer_states": states} if states else {})


def numbered(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """Renumber the parameters of an optimizer's state in the order of its parameter groups."""
    numbers: dict[Any, int] = {}
    for group in optimizer["param_groups"]:
        numbers |= {name: len(numbers) + place for place, name in enumerate(group["params"])}
    return {
        "state": {numbers[name]: entries for name, entries in optimizer["state"].items()},
        "param_groups": [
            {**group, "params": [numbers[name] for name in group["params"]]} for group in optimizer["param_groups"]
        ],
    }


def _with_entry(groups: list[dict[str, Any]], keys: list[Any], value: Any) -> list[dict[str, Any]]:
    """Set one entry of the parameter groups; without ``keys``, ``value`` is the list of all groups."""
    if not keys:
        return list(value)
    number, name = keys
    while len(groups) <= number:
        groups.append({})
    groups[number][name] = value
    return groups
