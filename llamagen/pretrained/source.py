"""From a name, folder or file to the weights of a model and the settings that belong to it."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llamagen.hub.download import is_remote, local_file, local_repository
from llamagen.hub.published import PUBLISHED, PublishedModel
from llamagen.pretrained.exported_config import CONFIG_FILE, MODEL_FILE, SAVED, TOKENIZER_FILE, read_config
from llamagen.pretrained.run_folder import Run, find_run, run_of

CLASS_SAMPLING = {"guidance_scale": 4.0, "top_k": 2000}
TEXT_SAMPLING = {"guidance_scale": 7.5, "top_k": 1000}
"""Settings for images to look at, as in the published demos. The paper's tables use others."""


@dataclass(frozen=True)
class Source:
    """Files of a model, and its settings.

    Attributes:
        name: name for messages, pages and file names.
        model: file of the autoregressive model; None for a tokenizer alone.
        tokenizer: file of the tokenizer; None if it is not known.
        resolution: side of the images in pixels, for files that do not record it; None if the file does.
        sampling: default settings of sampling, fields of :class:`~llamagen.sampling.SamplingConfig`.
        dtype: default dtype, ``float32``, ``bfloat16`` or ``mixed``.
        classes: names of the classes; empty if unknown.
        text_encoder: ``name`` and ``dtype`` of the caption encoder, if known.
    """

    name: str
    model: Path | None
    tokenizer: Path | None
    resolution: int | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    classes: tuple[str, ...] = ()
    text_encoder: Mapping[str, Any] = field(default_factory=dict)


def find_source(source: str | Path, tokenizer: str | Path | None = None) -> Source:
    """Find a model, downloading it if it is remote.

    Args:
        source: a published name; a file of weights, local or ``hf://owner/repository/file[@revision]``; a folder
            written by ``python -m llamagen.checkpoints.export``, local or a repository of the hub; or the folder of a
            run.
        tokenizer: file or published name of the tokenizer, instead of the one that belongs to the model.

    Raises:
        ValueError: in one line, if there is no such model.
    """
    given = None if tokenizer is None else local_file(tokenizer)
    path = _existing(source)
    if path is not None:
        found = _from_folder(path, given) if path.is_dir() else _from_file(path, given)
    elif isinstance(source, str) and _is_repository(source):
        found = _from_repository(source)
    elif is_remote(text := str(source)):
        published = PUBLISHED.get(text)
        found = _from_file(local_file(text), given) if published is None else _from_published(published, None, given)
    else:
        with suppress(OSError):  # too long for a path
            local_file(text)  # raises an error with near names for what looks like a published one
        raise ValueError(
            f"{text[:200]} does not exist; give a published name such as c2i_B_256, a file of weights, a folder "
            "or a repository of the hub"
        )
    if given is not None and found.model is None:
        raise ValueError(f"tokenizer is {tokenizer}, but {source} is a tokenizer itself; leave it out")
    return found if given is None else replace(found, tokenizer=given)


def _existing(source: str | Path) -> Path | None:
    """The path of a source that exists; None for all others."""
    if not isinstance(source, str | Path):
        raise ValueError(f"the source of a model is {source!r:.60}; give a published name, a path or a repository")
    try:
        path = Path(source).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long, an unknown user, NUL
        return None


def _is_repository(text: str) -> bool:
    """Whether a text can be ``owner/repository``, with or without ``hf://`` and ``@revision``."""
    name = text.removeprefix("hf://").partition("@")[0]
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and all(name.split("/"))


def _from_repository(text: str) -> Source:
    try:
        folder = local_repository(text)
    except ValueError as error:
        if text.startswith("hf://"):
            raise
        raise ValueError(f"{text} is not a file or folder here; as a repository of the hub: {error}") from error
    return replace(_from_export(folder), name=text.partition("@")[0].rpartition("/")[2])


def _from_published(model: PublishedModel, file: Path | None, tokenizer: Path | None) -> Source:
    """A published model, from its file if there is one here; with its tokenizer, unless another one is given."""
    path = _download(model) if file is None else file
    if model.kind == "tokenizer":
        return Source(model.name, None, path)
    if tokenizer is None:
        assert model.tokenizer is not None
        published = PUBLISHED[model.tokenizer]
        beside = path.with_name(published.file)  # both files were downloaded by hand
        tokenizer = beside if file is not None and beside.is_file() else _download(published)
    return Source(
        model.name,
        path,
        tokenizer,
        resolution=model.resolution,
        sampling=CLASS_SAMPLING if model.kind == "class" else TEXT_SAMPLING,
        dtype="bfloat16",
    )


def _download(model: PublishedModel) -> Path:
    # By its address, because a file or folder here may have the name.
    return local_file(f"hf://{model.repository}/{model.file}")


def _from_file(path: Path, tokenizer: Path | None) -> Source:
    for model in PUBLISHED.values():
        if model.file == path.name:
            return _from_published(model, path, tokenizer)
    run = run_of(path)
    return Source(path.stem, path, tokenizer) if run is None else _from_run(run, path, tokenizer)


def _from_folder(folder: Path, tokenizer: Path | None) -> Source:
    if (folder / CONFIG_FILE).is_file():
        return _from_export(folder)
    if folder.suffix == ".ckpt":  # a sharded checkpoint
        return _from_file(folder, tokenizer)
    run = find_run(folder)
    return replace(_from_run(run, run.checkpoint, tokenizer), name=folder.absolute().name)


def _from_run(run: Run, path: Path, tokenizer: Path | None) -> Source:
    name = run.folder.absolute().name
    if run.model == "VQGANModule":
        return Source(name, None, path)
    own, encoder = run.options.get("tokenizer"), dict(run.options.get("text_encoder") or {})
    if encoder.get("name"):
        encoder["name"] = run.locate(encoder["name"])
    if tokenizer is None and own is not None:  # a run next to this one may have the published name, too
        tokenizer = _download(PUBLISHED[own]) if own in PUBLISHED else local_file(run.locate(own))
    return Source(
        name,
        path,
        tokenizer,
        sampling=run.options.get("sampling") or {},
        dtype=run.dtype,
        text_encoder=encoder,
    )


def _from_export(folder: Path) -> Source:
    config = read_config(folder)
    has_model = (folder / MODEL_FILE).is_file()
    return Source(
        config.get("name") or folder.absolute().name,
        folder / MODEL_FILE if has_model else None,
        folder / TOKENIZER_FILE,
        **{key: config[key] for key in SAVED if config.get(key) is not None},
    )
