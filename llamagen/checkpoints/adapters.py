"""LoRA adapters in checkpoints, and the base weights that they belong to. Plain torch.

Format: the checkpoint of a run with LoRA is a training checkpoint of this project (see
:mod:`llamagen.checkpoints.contents`), a file or a sharded folder, with two differences:

- ``state_dict`` holds only what is trained: for each adapted layer the two factors, under peft's names
  (``gpt.layers.0.attention.wqkv.lora_A.default.weight`` (R, K) and ``….lora_B.default.weight`` (N, R)), and the class
  embeddings if they are trained. The optimizer's state, with moments and averages, is of these parameters only, too.
- ``llamagen.lora`` describes the adapters: ``rank``, ``alpha``, ``dropout``, and ``base``: ``source``, the value of
  ``init_from``, a path or ``hf://`` address, also for a published name; ``averaged``, whether its averaged (EMA)
  weights were taken; ``checksum``, the SHA-256 of these weights, see :func:`~llamagen.state_dicts.tensors_checksum`;
  and ``file``, the absolute path without symbolic links, null on the hub.

The model of such a checkpoint has the weight ``W + alpha / rank * B A`` in each adapted layer. The base weights are
read again: from ``base.pt`` (or the suffix that they had) in the run's folder or next to the checkpoint, or else from
where they were. They must have the same checksum.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llamagen.hub.address import MAIN, SCHEME, file_address, is_remote
from llamagen.models.lora import Adapters, BaseWeights, LoRAConfig, merged_entries
from llamagen.state_dicts import tensors_checksum

LORA = "lora"
"""Key of the description in ``checkpoint["llamagen"]``."""


def describe_adapters(adapters: Adapters) -> dict[str, Any]:
    """Describe adapters for a checkpoint, in primitives only."""
    config = adapters.config
    return {
        "rank": config.rank,
        "alpha": float(config.alpha),
        "dropout": float(config.dropout),
        "base": dict(adapters.base._asdict()),
    }


def base_weights(source: str | Path, averaged: bool, state: Mapping[str, Tensor]) -> BaseWeights:
    """Describe base weights.

    Args:
        source: where they were read from.
        averaged: whether averaged weights were taken.
        state: the weights.
    """
    checksum = tensors_checksum(state)
    # footgun: a published name is a path where a folder has that name, so it depends on the working directory.
    address = file_address(source) if is_remote(source) else None
    if address is None:
        return BaseWeights(str(source), checksum, averaged, str(Path(source).expanduser().resolve()))
    revision = "" if address.revision == MAIN else f"@{address.revision}"
    return BaseWeights(f"{SCHEME}{address.repository}/{address.file}{revision}", checksum, averaged)


def check_adapters(entry: Mapping[str, Any], adapters: Adapters | None) -> None:
    """Check that a checkpoint has the adapters of a model.

    Args:
        entry: ``checkpoint["llamagen"]``.
        adapters: adapters of the model; None if it has none.

    Raises:
        ValueError: in one line, if the checkpoint or the model has none, or strength or base differ.
    """
    found = entry.get(LORA)
    if found is None and adapters is None:
        return
    if adapters is None:
        assert found is not None
        raise ValueError(
            f"the checkpoint holds LoRA adapters; set model.init_args.lora to {{rank: {found['rank']}, alpha: "
            f"{found['alpha']:g}}} and init_from to {found['base']['source']}, or give it as init_from "
            "instead of ckpt_path, which merges them"
        )
    if found is None:
        raise ValueError(
            "the checkpoint holds all weights, but lora is set, whose checkpoints hold adapters; to adapt these "
            "weights, give them as init_from"
        )
    config = adapters.config
    for name, loaded, expected in (("rank", found["rank"], config.rank), ("alpha", found["alpha"], config.alpha)):
        if loaded != expected:
            raise ValueError(
                f"the checkpoint's adapters have {name} {loaded:g}, but lora.{name} is {expected:g}; set it to "
                f"{loaded:g}"
            )
    if found["base"]["checksum"] != adapters.base.checksum:
        raise ValueError(
            f"the checkpoint's adapters belong to the weights of {found['base']['source']} (checksum "
            f"{found['base']['checksum'][:12]}), but init_from has others ({adapters.base.checksum[:12]}); set "
            "init_from and init_averaged to those weights"
        )


def merge_adapters(
    path: Path, entry: Mapping[str, Any], trained: Mapping[str, Tensor], read: Callable[..., Any]
) -> dict[str, Tensor]:
    """Weights of a model without adapters that computes what a checkpoint with adapters does.

    Args:
        path: the checkpoint.
        entry: its description of the adapters.
        trained: its weights, raw or averaged.
        read: :func:`~llamagen.checkpoints.weights.read_weights`.

    Returns:
        Entries by their published names.

    Raises:
        ValueError: in one line, if the description is damaged, the base weights were not found, or are others.
    """
    try:
        config = LoRAConfig(entry["rank"], entry["alpha"], entry["dropout"])
        base = BaseWeights(**entry["base"])
    except (KeyError, TypeError, ValueError) as error:
        reason = f" ({error})" if isinstance(error, ValueError) else ""
        raise ValueError(
            f"{path}: the description of its adapters is damaged{reason}; give another checkpoint"
        ) from error
    state = _read_base(path, base, read)
    try:
        return merged_entries(state, trained, config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; it is damaged, give another checkpoint") from error


def _read_base(path: Path, base: BaseWeights, read: Callable[..., Any]) -> dict[str, Tensor]:
    reasons = list[str]()
    for place in dict.fromkeys(_places(path, base)):
        if not is_remote(place) and not Path(place).exists():
            continue
        try:
            state: dict[str, Tensor] = read(place, base.averaged, merge=False).state
        except ValueError as error:
            reasons.append(str(error))
            continue
        if tensors_checksum(state) == base.checksum:
            return state
        reasons.append(f"{place} has other weights")
    more = f" ({'; '.join(reasons)})" if reasons else ""
    raise ValueError(
        f"{path} holds LoRA adapters of {base.source} with checksum {base.checksum[:12]}, which was not found{more}; "
        f"put that file at {_places_of_a_copy(path, base.source)[0]}"
    )


def _places(path: Path, base: BaseWeights) -> Iterator[str | Path]:
    """Where the base weights may be: where they were, with the run if that has moved, or where the error asks for."""
    yield from _places_of_a_copy(path, base.source)
    if base.source.startswith(SCHEME):
        yield base.source
        return
    given = Path(base.source).expanduser()
    yield from (given, *(parent / given for parent in path.absolute().parents))
    if base.file is not None:
        yield Path(base.file)


def _places_of_a_copy(path: Path, source: str) -> list[Path]:
    """``base.pt`` in the run's folder or next to the checkpoint, with the suffix of the source.

    Not the source's own name, which may be that of the checkpoint: ``last.ckpt``.
    """
    file = source.partition("@")[0] if source.startswith(SCHEME) else source
    name, folder = f"base{Path(file).suffix}", path.absolute().parent
    return [folder.parent / name, folder / name][:: 1 if folder.name == "checkpoints" else -1]
