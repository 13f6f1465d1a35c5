"""Texts as people's editors write them."""

MARK = "\ufeff"
"""Byte order mark: no part of a text, but some editors put it before one."""


def decode_text(data: bytes) -> str:
    """A text in UTF-8, without a byte order mark before it.

    Raises:
        UnicodeDecodeError: if it is in another encoding.
    """
    return data.decode("utf-8-sig").removeprefix(MARK)
