"""Cleaning of captions: web text → plain lower-case text; and the first sentence of a caption. Both are optional."""

import html
import re

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


def clean_caption(text: str) -> str:
    """Clean a caption from the web, or a prompt for a model trained on such captions: plain lower-case text.

    Repairs wrongly decoded text and resolves HTML entities. Removes HTML tags, addresses (of pages, mail and users),
    file names, words with numbers of seven or more digits, hashtag signs, empty brackets, and repeated punctuation and
    spaces. Letters, words and punctuation of other scripts are kept.

    Args:
        text: any text.

    Returns:
        The text in one line, possibly empty. Cleaning it again changes nothing, except for deeply nested markup.

    Raises:
        ValueError: if the extra ``text`` is not installed.
    """
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


def _clean_once(text: str) -> str:
    while (resolved := html.unescape(text)) != text:  # some texts are escaped twice
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
