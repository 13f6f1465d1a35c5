"""The cleaning of captions that the published text models were trained with. The ``diffusers`` library contains it."""

import re
import warnings
from collections.abc import Callable
from functools import cache
from urllib.parse import unquote_plus

VERSIONS = ">=0.42,<0.43"
"""Versions of diffusers whose cleaning was compared with the published one."""
PASSES = 2
"""The published code applies its cleaning twice."""
MAX_RUN = 100_000
MARKUP = re.compile(r"[<&＆%]")
INSTALL = 'pip install -c constraints.txt -e ".[text]"'


def clean_as_published(text: str) -> str:
    """Clean a caption exactly as for the published text models.

    The result is plain lower-case text. The rules also remove Chinese characters, brackets and some phrases, such as
    ``free shipping`` and ``page 3``.

    The published code fails for some texts. Here halves of surrogate pairs then become U+FFFD, and the special
    characters of markup that cannot be parsed, such as ``<![a``, become spaces. It takes quadratic time for long runs
    without spaces. Here runs are cut after 100,000 characters.

    Args:
        text: any text.

    Returns:
        The text in one line, possibly empty.

    Raises:
        ValueError: if the extra ``text`` is not installed, or diffusers has another version.
    """
    clean = _load()
    if len(text) > MAX_RUN:
        text = re.sub(rf"\S{{{MAX_RUN},}}|\s{{{MAX_RUN},}}", lambda run: run[0][:MAX_RUN], text)
    for prepare in (_unchanged, _without_surrogates, _without_markup):
        cleaned = prepare(text)
        try:
            for _ in range(PASSES):
                cleaned = clean(cleaned)
        except Exception:  # whatever the parsers raise
            continue
        return cleaned
    return ""


def _unchanged(text: str) -> str:
    return text


def _without_surrogates(text: str) -> str:
    """Pairs of surrogates become their character, halves U+FFFD: the published code does it last, if it gets there."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _without_markup(text: str) -> str:
    return MARKUP.sub(" ", unquote_plus(_without_surrogates(text)))


@cache
def _load() -> Callable[[str], str]:
    """One pass of the cleaning. It is a private method, so its name may change in other versions of diffusers."""
    try:
        import ftfy  # noqa: F401  diffusers imports this one and bs4 only if they are installed
        from bs4 import MarkupResemblesLocatorWarning, XMLParsedAsHTMLWarning
        from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import PixArtAlphaPipeline
    except ImportError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the published cleaning needs diffusers{VERSIONS} ({reason}); {INSTALL}") from error
    method = getattr(PixArtAlphaPipeline, "_clean_caption", None)
    if method is None or not hasattr(PixArtAlphaPipeline, "bad_punct_regex"):
        from diffusers import __version__

        raise ValueError(
            f"the published cleaning needs diffusers{VERSIONS}, but {__version__} is installed, where it is missing; "
            f"{INSTALL}"
        )
    for category in (MarkupResemblesLocatorWarning, XMLParsedAsHTMLWarning):  # captions are not names of files
        warnings.filterwarnings("ignore", category=category)

    def clean(text: str) -> str:
        cleaned: str = method(PixArtAlphaPipeline, text)  # reads only an attribute of the class
        return cleaned

    return clean
