"""Where what transformers loads lies: in a folder, or on the Hugging Face Hub; and why it could not be had."""

from pathlib import Path

LONGEST_REASON = 300


def is_folder(name: str | Path) -> bool:
    """Whether a name is a path: one that exists, or cannot be a name on the Hub."""
    text = str(name)
    return isinstance(name, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1 or Path(text).is_dir()


def folder_or_name(name: str | Path, what: str, example: str) -> tuple[str, bool]:
    """What to give to transformers.

    Args:
        name: a folder, or a name on the Hub.
        what: is looked for, for the message.
        example: of a name on the Hub.

    Returns:
        The folder or name, and whether it is a folder, so that nothing is looked for in a network.

    Raises:
        ValueError: in one line, if it is the path of a folder that does not exist.
    """
    local = is_folder(name)
    source = str(Path(name).expanduser()) if local else str(name)
    if local and not Path(source).is_dir():
        raise ValueError(
            f"the {what} {name} does not exist; give a folder as save_pretrained writes it, or a name on the Hugging "
            f"Face Hub such as {example}"
        )
    return source, local


def why_not(what: str, kind: str, source: str, local: bool, error: Exception) -> str:
    """One line that says why something could not be loaded, and what to do.

    Args:
        what: was to be loaded, as ``caption encoder``.
        kind: of model that a folder must hold, as ``T5``.
        source: folder or name.
        local: whether it is a folder.
        error: of transformers, or of a check.
    """
    reason = " ".join(str(error).split()) or type(error).__name__
    reason = reason if len(reason) <= LONGEST_REASON else f"{reason[:LONGEST_REASON]}…"
    if local:
        return f"the {what} {source} cannot be used: {reason}; give a {kind}'s folder as save_pretrained writes it"
    return (
        f"the {what} {source} could not be had from Hugging Face's Hub or cache (~/.cache/huggingface, or HF_HOME): "
        f"{reason}; run `hf download {source}` where there is a network, or give a folder's path as name"
    )
