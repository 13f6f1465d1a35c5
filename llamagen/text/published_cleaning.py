"""The cleaning of captions that the published text models were trained with. The ``diffusers`` library contains it."""

import re
import warnings
from collections.abc import Callable
from functools import cache

VERSIONS = ">=0.42,<0.43"
"""Versions of diffusers whose cleaning was compared with the published one."""
PASSES = 2
"""The published code applies its cleaning twice."""
MAX_RUN = 100_000
LONG_RUN = re.compile(rf"\S{{{MAX_RUN + 1},}}|\s{{{MAX_RUN + 1},}}")
MARKUP = re.compile(r"[<&＆%]")
INSTALL = 'pip install -c constraints.txt -e ".[text]"'


def clean_as_published(text: str) -> str:
    """Clean a caption exactly as for the published text models.

    The result is plain lower-case text. The rules also remove Chinese characters, most brackets and some common words
    (``free``, ``page 3``). Halves of surrogate pairs stay; the caption encoder replaces them.

    The published code fails for markup that cannot be parsed, such as ``<![``. Here its special characters become
    spaces. It takes quadratic time for long runs without spaces. Here runs above 100,000 characters are cut.

    Args:
        text: any text.

    Returns:
        The text in one line, possibly empty.

    Raises:
        ValueError: if the extra ``text`` is not installed, or diffusers has another version.
    """
    clean = _load()
    text = LONG_RUN.sub(lambda run: run[0][:MAX_RUN], text)
    for attempt in (text, MARKUP.sub(" ", text)):
        try:
            cleaned = attempt
            for _ in range(PASSES):
                cleaned = clean(cleaned)
            return cleaned
        except Exception:  # whatever parsers raise for broken markup
            continue
    return ""


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
