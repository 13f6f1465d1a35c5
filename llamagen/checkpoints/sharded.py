"""Sharded training checkpoints, which are folders, as what a checkpoint in one file holds. Plain torch.

``torch.distributed.checkpoint`` writes them, a file for each rank, and Lightning puts ``meta.pt`` with all that is no
tensor beside them.
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

# All that an index is made of.
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
    """Whether a path is the folder of a sharded checkpoint that was written to its end."""
    return (path / META_FILE).is_file() and (path / INDEX_FILE).is_file()


def not_moments(name: str) -> bool:
    """Whether an entry is more than a moment of the optimizer: enough for everything but going on with the training."""
    return not name.endswith(MOMENTS)


def read_sharded(path: Path, rest: Mapping[str, Any], wanted: Callable[[str], bool]) -> dict[str, Any]:
    """A sharded checkpoint as if it were in one file.

    Args:
        path: its folder.
        rest: what :data:`META_FILE` holds.
        wanted: which tensors to read, by their name: ``state_dict.gpt.norm.weight``,
            ``optimizer_0.state.gpt.norm.weight.exp_avg``. The others are on the meta device.

    Returns:
        ``rest``, with ``state_dict`` and, if there are any, ``optimizer_states``, whose parameters have numbers; on the
        CPU. No code of a file is run.

    Raises:
        ValueError: in one line, if something is damaged or missing.
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
        asked = {name: tensor for name, tensor in tensors.items() if not tensor.is_meta} | plain
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it should be
            dcp.load(asked, storage_reader=reader, planner=_Planner(False, False), no_dist=True)
        return {**rest, **_nested(tensors | {name: asked[name] for name in plain}, index)}
    except _RefusedError as error:
        raise ValueError(f"{path} is refused: {error}") from error
    except (Exception, CheckpointException) as error:  # of files that may hold anything; the latter is no Exception
        raise ValueError(
            f"{path} cannot be read as a sharded checkpoint ({type(error).__name__}: {' '.join(str(error).split())}); "
            "it is damaged, take another one"
        ) from error


def read_index(path: Path) -> Metadata:
    """What is in the files of a sharded checkpoint, and where; no code of a file is run.

    Args:
        path: its folder.
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
    """Reads what is no tensor without running code."""

    def load_bytes(self, read_item: Any, value: Any) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


def _nested(entries: Mapping[str, Any], index: Metadata) -> dict[str, Any]:
    """``state_dict`` and ``optimizer_states`` out of flat names, as Lightning has them in one file."""
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
            optimizer["param_groups"] = _grown(optimizer["param_groups"], keys[1:], value)
    states = [numbered(optimizers[number]) for number in sorted(optimizers)]
    return {"state_dict": weights} | ({"optimizer_states": states} if states else {})


def numbered(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """The state of an optimizer whose parameters have other numbers or names: numbered as they stand in its groups."""
    numbers: dict[Any, int] = {}
    for group in optimizer["param_groups"]:
        numbers |= {name: len(numbers) + place for place, name in enumerate(group["params"])}
    return {
        "state": {numbers[name]: entries for name, entries in optimizer["state"].items()},
        "param_groups": [
            {**group, "params": [numbers[name] for name in group["params"]]} for group in optimizer["param_groups"]
        ],
    }


def _grown(groups: list[dict[str, Any]], keys: list[Any], value: Any) -> list[dict[str, Any]]:
    """Parameter groups, with an entry at its place; the whole list at once if there is no place."""
    if not keys:
        return list(value)
    number, name = keys
    while len(groups) <= number:
        groups.append({})
    groups[number][name] = value
    return groups
