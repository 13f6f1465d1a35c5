"""Prompts as users give them → texts that a text encoder can read."""

import unicodedata

BYTE_ORDER_MARK = "\ufeff"
REPLACEMENTS = {"Cc": " ", "Zl": " ", "Zp": " ", "Cs": "\ufffd"}
"""Replacement by Unicode category: controls, line and paragraph separators, halves of surrogate pairs."""


def clean_prompt(text: str) -> str:
    """Remove or replace characters that cannot be part of a prompt.

    Joins surrogate pairs, which some JSON has. Drops a byte order mark at the start and white space at both ends. NUL,
    other control characters and line separators become spaces, halves of surrogate pairs become U+FFFD. Everything else
    stays, including emoji and their joiners.
    """
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").removeprefix(BYTE_ORDER_MARK)
    return "".join(REPLACEMENTS.get(unicodedata.category(character), character) for character in text).strip()
