"""Cleaning of captions: web text → plain lower-case text; and the first sentence of a caption. Both are optional.

There are two cleanings: ``web``, of this project, and ``published``, of the published text models. A model should read
prompts that are cleaned like its training captions, so checkpoints and caption features record the cleaning.
"""

import html
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

Cleaning = Literal["published", "web"]
"""Name of a cleaning; None stands for captions that are not cleaned."""
CLEANINGS: tuple[str, ...] = get_args(Cleaning)
RecordedCleaning = Cleaning | Literal["unknown"] | None
"""Cleaning in a record; ``unknown`` if there is none, as in other files of the published layout."""
UNKNOWN: Literal["unknown"] = "unknown"

MAX_PASSES = 8
"""Removing one pattern may expose another. More than two passes are rarely needed."""
DOMAINS = r"com|org|net|edu|gov|io|co\.uk"
"""Top-level domains that mark an address without http:// and www. Many others are words, as in "the end.it was"."""
FILES = "jpe?g|png|gif|bmp|webp|tiff?|svg|heic|psd|pdf|mp4|mov|avi|webm"

# Addresses and names are ASCII, so adjacent text in a script without spaces is kept.
INVISIBLE = re.compile("[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff\ufffd]")
ADDRESS = re.compile(
    rf"(?:https?|ftp)://[!-~]*|(?<![a-z0-9.@-])www\.[!-~]+"
    rf"|(?<![a-z0-9.@-])(?:[a-z0-9-]+\.)+(?:{DOMAINS})(?:/[!-~]*|(?![a-z0-9-]))"
)
ADDRESS_END = re.compile(r"""[.,;:!?)\]}>'"]*\Z""")
MAIL = re.compile(r"(?:mailto:)?(?<![a-z0-9._%+-])[a-z0-9._%+-]+@(?:[a-z0-9-]+\.)+[a-z]{2,}")
HANDLE = re.compile(r"(?<![a-z0-9])@[a-z0-9_][a-z0-9_.]*(?<!\.)(?:@[a-z0-9.-]+)?")
LONG_REFERENCE = re.compile(r"&#\d{8,};?")
TAG = re.compile(r"</?[a-z][^<>]*>|<!--[^<>]*-->")
FILE = re.compile(rf"(?<![a-z0-9_.-])[a-z0-9_.-]*(?:\(\d+\))?\.(?:{FILES})(?![a-z0-9])")
NUMBER = re.compile(r"(?<![a-z0-9_.,-])[a-z0-9_-]*\d{7,}[a-z0-9_-]*")
HASHTAG = re.compile(r"#+(?=[^\W\d])")
APOSTROPHE = re.compile(r"(?<=[a-z])[’‘ʼ`´](?=[a-z])")
BRACKET_SPACE = re.compile(r"(?<=[(\[{])\s+|\s+(?=[)\]}])")
EMPTY_BRACKETS = re.compile(r"\(\s*\)|\[\s*\]|\{\s*\}|<\s*>")
AS_SPACE = re.compile(r"[\x00-\x1f\x7f]|_+|\*{2,}|={2,}|\|{2,}|~{2,}|\+{2,}|/{2,}|\\+")
DOTS = re.compile(r"\.{2,}")
REPEATED_MARKS = re.compile(r"[!?]{2,}")
COMMAS = re.compile(r"([,;:])(?:\s*[,;:])+")
DASHES = re.compile(r"-{2,}|(?:-\s+)+-(?=\s)")
SPACE_BEFORE = re.compile(r"\s+([,.;:!?]+)(?=\s|$)")
LEADING = re.compile(r"(?:[\s,;:|/*~=+•·)\]}>!?]|-(?!\d)|\.(?!\d))+")
TRAILING = " ,;:|/*~=+•·([{<-"

TITLES = re.compile(
    r"dr|mr|mrs|ms|mx|u[.]s|u[.]k|prof|st|rev|hon|gen|col|sgt|lt|capt|cmdr|gov|sen|rep|pres|mt|vs|e[.]g|i[.]e|cf|ca"
)
"""Abbreviations after which the sentence continues."""
BEFORE_NUMBERS = re.compile(r"no|nos|fig|figs|vol|p|pp|ch|sec|nr|art|pl|approx")
POSSIBLE_ENDS = re.compile(r"etc|inc|ltd|co|corp|jr|sr|bros|dept|ave|blvd|rd|ft|a[.]m|p[.]m|d[.]c|b[.]c|a[.]d|al|est")
"""Abbreviations that end a sentence if a capital letter follows."""
WIDE_STOPS = "。！？｡।॥۔؟"
CLOSERS = "\"'”’»)\\]」』）】》"
SENTENCE_END = re.compile(rf"[{WIDE_STOPS}]+[{CLOSERS}]*|(?<![.!?…])[.!?…]+[{CLOSERS}]*(?=\s|\Z)|\n\s*\n")
WORD_BEFORE = re.compile(r"[^\s(\[{\"'“‘«]*\Z")
NEXT = re.compile(r"\s*(.?)", re.DOTALL)
NEXT_LETTER = re.compile(r"[ \"'“‘«(\[]*(.?)", re.DOTALL)
MAX_WORD = 40


def clean_caption(text: str, cleaning: Cleaning | None = "web") -> str:
    """Clean a caption from the web, or a prompt for a model trained on such captions: plain lower-case text.

    ``web`` repairs wrongly decoded text and resolves HTML entities. It removes HTML tags, addresses (of pages, mail and
    users), file names, words with numbers of seven or more digits, hashtag signs, empty brackets, and repeated
    punctuation and spaces. Letters, words and punctuation of other scripts are kept.

    ``published`` gives exactly the captions of the published text models, see
    :func:`~llamagen.text.published_cleaning.clean_as_published`.

    Args:
        text: any text.
        cleaning: ``published``, ``web``, or None, which returns the text unchanged.

    Returns:
        The text in one line, possibly empty. Cleaning it again with ``web`` changes nothing, except for deeply nested
        markup.

    Raises:
        ValueError: if the cleaning is unknown, or the extra ``text`` is not installed.
    """
    if cleaning is None:
        return text
    if cleaning not in CLEANINGS:
        raise ValueError(f"cleaning is {cleaning!r}; it must be {' or '.join(CLEANINGS)}, or None for no cleaning")
    if cleaning == "web":
        return _clean_web(text)
    from llamagen.text.published_cleaning import clean_as_published  # its libraries load slowly

    return clean_as_published(text)


def cleaning_of_option(value: Any) -> Cleaning | None:
    """The cleaning that an option ``clean_captions`` selects.

    Args:
        value: ``published`` or ``web``; false or None for no cleaning; true for ``web``, as in configurations from
            before there were two cleanings.

    Raises:
        ValueError: in one line, for any other value.
    """
    if value is None or value is False:
        return None
    if value is True:
        return "web"
    if value not in CLEANINGS:
        raise ValueError(f"clean_captions is {value!r}; it must be {', '.join(CLEANINGS)} or false")
    cleaning: Cleaning = value
    return cleaning


def recorded_cleaning(record: Mapping[str, Any] | None) -> RecordedCleaning:
    """The cleaning that a checkpoint or a dataset of caption features records.

    Args:
        record: has ``cleaned``: the name of a cleaning, or false. True, in older files, is ``web``. None: no record.

    Raises:
        ValueError: in one line, for any other value.
    """
    if record is None or "cleaned" not in record:
        return UNKNOWN
    try:
        return cleaning_of_option(record["cleaned"])
    except ValueError as error:
        raise ValueError(
            f"captions are recorded as cleaned with {record['cleaned']!r}, which this version does not know; use the "
            "version that wrote the record"
        ) from error


def in_words(cleaning: RecordedCleaning) -> str:
    """``cleaned with web`` or ``not cleaned``, for messages."""
    return "not cleaned" if cleaning is None else f"cleaned with {cleaning}"


def as_option(cleaning: RecordedCleaning) -> str:
    """The value of ``clean_captions`` that selects a cleaning, for messages."""
    return "false" if cleaning is None else cleaning


def first_sentence(text: str) -> str:
    """The first sentence of a caption, as its short form.

    Abbreviations ("Dr."), initials, numbers ("3.5", the "1." of a list) and an ellipsis within a sentence do not end
    it. The full stops of other scripts (。！？।) and empty lines do.

    Args:
        text: any text.

    Returns:
        The sentence with its full stop, without surrounding space; the whole text if there is only one sentence.
    """
    text = text.strip()
    # Punctuation before the first letter or digit ends no sentence.
    first = next((place for place, letter in enumerate(text) if letter.isalnum()), len(text))
    for match in SENTENCE_END.finditer(text, first):
        if _ends_sentence(text, match):
            return text[: match.end()].strip()
    return text


def _clean_web(text: str) -> str:
    try:
        from ftfy import TextFixerConfig, fix_text  # optional
    except ImportError as error:
        raise ValueError(f'clean_caption needs ftfy ({error}); pip install -c constraints.txt -e ".[text]"') from error
    # Full-width punctuation and curly quotes are normal in other scripts.
    config = TextFixerConfig(unescape_html=False, fix_character_width=False, uncurl_quotes=False)
    for _ in range(MAX_PASSES):
        before, text = text, _clean_once(fix_text(text, config))
        if text == before:
            break
    return text


def _clean_once(text: str) -> str:
    while (resolved := _unescape(text)) != text:  # some texts are escaped twice
        text = resolved
    text = INVISIBLE.sub("", text.lower())
    text = TAG.sub(" ", text)
    text = ADDRESS.sub(_without_address, text)
    for pattern in (MAIL, HANDLE, FILE, NUMBER):
        text = pattern.sub(" ", text)
    text = HASHTAG.sub("", text)
    text = APOSTROPHE.sub("'", text)
    for pattern in (AS_SPACE, EMPTY_BRACKETS):
        text = pattern.sub(" ", text)
    text = DOTS.sub("...", text)
    text = REPEATED_MARKS.sub(_single_mark, text)
    text = COMMAS.sub(r"\1", text)
    text = DASHES.sub("-", text)
    text = SPACE_BEFORE.sub(r"\1", BRACKET_SPACE.sub("", " ".join(text.split())))
    leading = LEADING.match(text)
    return (text[leading.end() :] if leading else text).rstrip(TRAILING)


def _unescape(text: str) -> str:
    try:
        return html.unescape(text)
    except ValueError:  # Python refuses to convert thousands of digits
        return LONG_REFERENCE.sub(" ", text)


def _without_address(match: re.Match[str]) -> str:
    """A space and the punctuation after the address, which belongs to the sentence."""
    end = ADDRESS_END.search(match[0])
    return f" {end[0] if end else ''}"


def _single_mark(match: re.Match[str]) -> str:
    return "?!" if len(set(match[0])) > 1 else match[0][0]


def _ends_sentence(text: str, match: re.Match[str]) -> bool:
    """Whether a mark ends the first sentence. Copies no text: there may be many marks."""
    mark, following = match[0], _after(NEXT, text, match)
    if mark.startswith(("..", "…")):
        return _capital_follows(text, match)
    if mark[-1] in CLOSERS and following.islower():  # "Stop!" she said.
        return False
    if mark[0] != ".":
        return True
    found = WORD_BEFORE.search(text[max(0, match.start() - MAX_WORD) : match.start()])
    word = found[0].lower() if found else ""
    if TITLES.fullmatch(word) or (len(word) == 1 and word != word.upper()):
        return not following
    if BEFORE_NUMBERS.fullmatch(word):
        return not following.isdigit()
    if POSSIBLE_ENDS.fullmatch(word):
        return _capital_follows(text, match)
    return not (word.isdigit() and match.start() == len(word))


def _capital_follows(text: str, match: re.Match[str]) -> bool:
    """Whether a capital letter, a new line or nothing follows a mark."""
    following = _after(NEXT_LETTER, text, match)
    return not following or following.isupper() or following == "\n"


def _after(pattern: re.Pattern[str], text: str, match: re.Match[str]) -> str:
    """The first character after a mark, without those that the pattern skips; '' at the end."""
    found = pattern.match(text, match.end())
    return found[1] if found else ""
