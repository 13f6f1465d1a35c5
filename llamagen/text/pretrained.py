"""Loading of models and tokenizers of transformers, from a folder or the Hugging Face Hub, and tokenization."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from llamagen.finite import broken_weight

T = TypeVar("T")

MAX_REASON = 300
"""Characters of a library's message that are kept."""


class PretrainedKind(NamedTuple):
    """The kind of model to load, and its names in messages.

    Attributes:
        name: name of the architecture, such as ``T5``.
        model: class of transformers.
        role: role of the model, such as ``caption encoder``.
        user: the feature that needs transformers, with its article, such as ``a caption encoder``.
        example: a name on the Hub.
    """

    name: str
    model: str
    role: str
    user: str
    example: str


def load_pretrained(
    name: str | Path,
    kind: PretrainedKind,
    dtype: torch.dtype,
    check: Callable[[Any, Any, str, bool], T],
) -> tuple[Any, Any, T]:
    """Load a model on the CPU, and its tokenizer.

    Args:
        name: a folder, or a name on the Hub. A model in the Hub's cache is loaded without network access.
        kind: the expected kind of model.
        dtype: dtype of the weights.
        check: called with configuration, tokenizer, folder or name, and whether it is a folder. It raises a
            ``ValueError`` if configuration and tokenizer do not match.

    Returns:
        Model, tokenizer, and the result of ``check``.

    Raises:
        ValueError: in one line, if transformers is not installed, or the model is not available or of another kind.
    """
    try:
        import transformers  # slow to import, and optional
    except ImportError as error:
        raise ValueError(
            f'{kind.user} needs transformers ({error}); pip install -c constraints.txt -e ".[text]"'
        ) from error
    source, is_folder = _folder_or_name(name, kind)

    def load(class_name: str, **options: Any) -> Any:
        from_pretrained = getattr(transformers, class_name).from_pretrained
        if not is_folder:  # the cache first: without a network, each request is retried for half a minute
            with suppress(Exception):
                return from_pretrained(source, local_files_only=True, **options)
        return from_pretrained(source, local_files_only=is_folder, **options)

    try:
        config = load("AutoConfig")
        if config.model_type != kind.name.lower():
            raise ValueError(f"it is a {config.model_type}, not a {kind.name}")
        tokenizer = load("AutoTokenizer")
        model, report = load(kind.model, dtype=dtype, output_loading_info=True)
        # footgun: transformers initialises missing weights at random and only logs it.
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"it lacks {len(missing)} weights, such as {missing[0]}")
        if (broken := broken_weight(model)) is not None:
            raise ValueError(f"its weight {broken} is not finite; download it again")
        return model, tokenizer, check(config, tokenizer, source, is_folder)
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(_load_error(kind, source, is_folder, error)) from error


def replace_surrogates(text: str) -> str:
    """A text that a tokenizer can read: half a surrogate pair becomes a "?"."""
    return text.encode("utf-8", "replace").decode("utf-8")


def tokenize(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text with the end token, not truncated."""
    if not texts:  # tokenizers raise an error
        return []
    # verbose=False: no warnings about long texts, which are truncated and reported later.
    tokens: list[list[int]] = tokenizer(list(texts), padding=False, truncation=False, verbose=False)["input_ids"]
    return tokens


def truncate(tokens: list[int], maximum: int) -> list[int]:
    """Keep at most ``maximum`` tokens, of which the last one is the end token."""
    return tokens if len(tokens) <= maximum else [*tokens[: maximum - 1], tokens[-1]]


def _folder_or_name(name: str | Path, kind: PretrainedKind) -> tuple[str, bool]:
    """Folder or name for transformers, and whether it is a folder, which is loaded without network access."""
    text = str(name)  # a folder if it exists or cannot be a name on the Hub
    is_folder = isinstance(name, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1 or Path(text).is_dir()
    source = str(Path(name).expanduser()) if is_folder else text
    if is_folder and not Path(source).is_dir():
        raise ValueError(
            f"the {kind.role} {name} does not exist; give a folder written by save_pretrained, or a name on the "
            f"Hugging Face Hub such as {kind.example}"
        )
    return source, is_folder


def _load_error(kind: PretrainedKind, source: str, is_folder: bool, error: Exception) -> str:
    """One line that says why a model could not be loaded, and what to do."""
    reason = " ".join(str(error).split()) or type(error).__name__
    reason = reason if len(reason) <= MAX_REASON else f"{reason[:MAX_REASON]}…"
    if is_folder:
        hint = f"give a {kind.name}'s folder written by save_pretrained"
        return f"the {kind.role} {source} cannot be used: {reason}; {hint}"
    return (
        f"the {kind.role} {source} is neither in the cache (~/.cache/huggingface, or HF_HOME) nor available from the "
        f"Hugging Face Hub: {reason}; run `hf download {source}` with network access, or give a folder's path as name"
    )
