"""Names under which image metrics report their results."""

from typing import Literal, NamedTuple, get_args

Purpose = Literal["generation", "reconstruction"]
"""Whether images are generated, or reconstructed by a tokenizer."""
PURPOSES: tuple[Purpose, ...] = get_args(Purpose)
INCEPTION = "inception"
"""The extractor of published values. Result names include only other extractors."""


class ResultName(NamedTuple):
    """Name of one result of a metric.

    Attributes:
        symbol: short name in lower case, for example ``kid_std``.
        has_purpose: whether the name starts with ``g`` for generated images and ``r`` for reconstructions. Set it for
            distances: gFID and rFID are measured against different references and must not be confused.
        has_reference: whether the name ends with that of the reference.
    """

    symbol: str
    has_purpose: bool = False
    has_reference: bool = True

    def stem(self, purpose: Purpose) -> str:
        """The name without extractor and reference: ``gfid``, ``rkid_std``, ``precision``."""
        return f"{purpose[0]}{self.symbol}" if self.has_purpose else self.symbol

    def full(self, purpose: Purpose, extractor: str, reference: str) -> str:
        """The name as logged: ``gfid/imagenet256-adm``, ``rfid/val``, ``precision_digits-classifier/digits-train``.

        Args:
            purpose: whether the images are generated or reconstructed.
            extractor: name of the extractor.
            reference: name of the reference.
        """
        name = with_extractor(self.stem(purpose), extractor)
        return f"{name}/{reference}" if self.has_reference else name


def with_extractor(name: str, extractor: str) -> str:
    """A metric's name followed by its extractor's, unless that is Inception."""
    return name if extractor == INCEPTION else f"{name}_{extractor}"


def check_name(name: str, what: str) -> str:
    """Check that a name can be part of result names, and return it.

    Args:
        name: name of a reference or an extractor.
        what: kind of object that has this name, for the message.

    Raises:
        ValueError: if the name is empty, or has a slash or white space.
    """
    if not name or "/" in name or any(letter.isspace() for letter in name):
        raise ValueError(f"a {what} cannot be named {name!r}; give a name without slashes and white space")
    return name
