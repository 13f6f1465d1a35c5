"""Decoding of text files in UTF-8."""

BYTE_ORDER_MARK = "\ufeff"
"""Some editors write it at the start of a file; it is not part of the text."""


def decode_text(data: bytes) -> str:
    """Decode UTF-8 text, without a byte order mark at its start.

    Raises:
        UnicodeDecodeError: if the text is in another encoding.
    """
    return data.decode("utf-8-sig").removeprefix(BYTE_ORDER_MARK)
