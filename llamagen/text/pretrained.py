"""Models and tokenizers of transformers, from a folder or the Hugging Face Hub, and what all of them here share."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from llamagen.finite import broken_weight

T = TypeVar("T")

LONGEST_REASON = 300


class PretrainedKind(NamedTuple):
    """What is to be loaded.

    Attributes:
        name: of the kind of model, as ``T5``.
        model: class of transformers.
        what: the model is here, as ``caption encoder``.
        user: what needs it, with its article.
        example: of a name on the Hub.
    """

    name: str
    model: str
    what: str
    user: str
    example: str


def load_pretrained(
    name: str | Path,
    kind: PretrainedKind,
    dtype: torch.dtype,
    check: Callable[[Any, Any, str, bool], T],
) -> tuple[Any, Any, T]:
    """A model on the CPU and its tokenizer.

    Args:
        name: a folder, or a name on the Hub.
        kind: what it must be.
        dtype: of the weights.
        check: configuration, tokenizer, folder or name, and whether it is a folder → what else is to be known of it; a
            ``ValueError`` if they do not belong together.

    Raises:
        ValueError: in one line, if transformers is not installed, or they cannot be had or are something else.
    """
    try:
        import transformers  # takes seconds, and few need it
    except ImportError as error:
        raise ValueError(
            f'{kind.user} needs transformers ({error}); pip install -c constraints.txt -e ".[text]"'
        ) from error
    source, local = _folder_or_name(name, kind)
    try:
        config = transformers.AutoConfig.from_pretrained(source, local_files_only=local)
        if config.model_type != kind.name.lower():
            raise ValueError(f"it is a {config.model_type}, not a {kind.name}")
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=local)
        model, report = getattr(transformers, kind.model).from_pretrained(
            source, local_files_only=local, dtype=dtype, output_loading_info=True
        )
        if missing := sorted(report["missing_keys"]):  # which transformers draws at random
            raise ValueError(f"it lacks {len(missing)} weights, such as {missing[0]}")
        if (broken := broken_weight(model)) is not None:
            raise ValueError(f"its weight {broken} is not finite; get it again")
        return model, tokenizer, check(config, tokenizer, source, local)
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(_why_not(kind, source, local, error)) from error


def readable(text: str) -> str:
    """A text that a tokenizer can read: half a surrogate pair counts as a "?"."""
    return text.encode("utf-8", "replace").decode("utf-8")


def tokenized(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Tokens of each text with the end, however many they are."""
    if not texts:  # which tokenizers refuse
        return []
    # verbose: it would warn of texts that are longer than the model's training sequences; they are cut, and reported.
    tokens: list[list[int]] = tokenizer(list(texts), padding=False, truncation=False, verbose=False)["input_ids"]
    return tokens


def cut(tokens: list[int], most: int) -> list[int]:
    """At most so many tokens, the last of which is the end."""
    return tokens if len(tokens) <= most else [*tokens[: most - 1], tokens[-1]]


def _folder_or_name(name: str | Path, kind: PretrainedKind) -> tuple[str, bool]:
    """What to give to transformers, and whether it is a folder, so that nothing is looked for in a network."""
    text = str(name)  # a path is what exists, or cannot be a name on the Hub
    local = isinstance(name, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1 or Path(text).is_dir()
    source = str(Path(name).expanduser()) if local else text
    if local and not Path(source).is_dir():
        raise ValueError(
            f"the {kind.what} {name} does not exist; give a folder as save_pretrained writes it, or a name on the "
            f"Hugging Face Hub such as {kind.example}"
        )
    return source, local


def _why_not(kind: PretrainedKind, source: str, local: bool, error: Exception) -> str:
    """One line that says why something could not be loaded, and what to do."""
    reason = " ".join(str(error).split()) or type(error).__name__
    reason = reason if len(reason) <= LONGEST_REASON else f"{reason[:LONGEST_REASON]}…"
    if local:
        hint = f"give a {kind.name}'s folder as save_pretrained writes it"
        return f"the {kind.what} {source} cannot be used: {reason}; {hint}"
    return (
        f"the {kind.what} {source} could not be had from Hugging Face's Hub or cache (~/.cache/huggingface, or "
        f"HF_HOME): {reason}; run `hf download {source}` where there is a network, or give a folder's path as name"
    )
