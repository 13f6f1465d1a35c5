"""The cleaning of the published text models, and the names of cleanings in options and records."""

import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llamagen.text import clean_caption, published_cleaning
from llamagen.text.cleaning import cleaning_of_option, recorded_cleaning
from tests.datamodules.shard_files import assert_one_line

PAIRS = json.loads((Path(__file__).parents[1] / "fixtures/clean_captions.json").read_text())["pairs"]
LONG_REFERENCE = f"a &#{'1' * 5000}; CAT"
"""Python refuses to convert that many digits."""


@pytest.fixture
def not_loaded() -> Iterator[None]:
    published_cleaning._load.cache_clear()
    yield
    published_cleaning._load.cache_clear()


def test_captions_are_cleaned_as_for_the_published_models() -> None:
    assert len(PAIRS) == 96
    assert [(text, cleaned) for text, cleaned in PAIRS if clean_caption(text, "published") != cleaned] == []


def test_the_published_cleaning_is_applied_twice() -> None:
    assert clean_caption("- - a cat", "published") == "a cat"  # "- a cat" after the first time
    assert clean_caption("100%2525 sure", "published") == "100% sure"


def test_the_two_cleanings_differ() -> None:
    assert sum(clean_caption(text) != cleaned for text, cleaned in PAIRS) == 52
    assert all(clean_caption(text) == clean_caption(text, "web") for text, _ in PAIRS)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("A Cat <![ on a mat", "a cat ! on a mat"),  # bs4 refuses the markup
        ("<![a", "<! a"),
        ("%3C!%5B A cat", "! a cat"),
        (LONG_REFERENCE, "a ; cat"),
        ("\ud800 A Cat \udc00", "\ufffd a cat \ufffd"),  # bs4 encodes texts without tags
        ("A <b>\udc00</b> Cat", "a \ufffd cat"),
        ("\ud83d\udc15 A Dog", "🐕 a dog"),
        ("\udc15\ud83d", "\ufffd\ufffd"),
        ("\ud83d", "\ufffd"),
        ("<![a \ud83d\udc15", "! a 🐕"),
        ("a\x00b\x1f", "ab"),
        ("None", "none"),
        ("12", "12"),
        ("<b>" * 5000 + "Cat", "cat"),
        ("A Cat, " * 5000, "a cat, " * 4999 + "a cat"),
    ],
    ids=lambda value: ascii(value)[:20],
)
def test_no_text_makes_the_published_cleaning_fail(text: str, cleaned: str) -> None:
    assert ascii(clean_caption(text, "published")) == ascii(cleaned)  # pytest cannot report broken surrogates


def test_long_runs_without_spaces_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    # Cleaning them takes quadratic time: seconds for 100,000 characters.
    assert clean_caption("A" * 3000, "published") == "a" * 3000
    monkeypatch.setattr(published_cleaning, "MAX_RUN", 5)
    assert clean_caption("A Cat " + "x" * 9 + " " * 9 + "sits", "published") == "a cat xxxxx sits"


def test_our_cleaning_accepts_references_of_thousands_of_digits() -> None:
    assert clean_caption(LONG_REFERENCE) == "a cat"


@pytest.mark.usefixtures("not_loaded")
def test_captions_that_look_like_file_names_cause_no_warnings() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert clean_caption("index.html", "published") == "index. html"
        clean_caption("<?xml version='1.0'?> a cat", "published")
    assert not [warning for warning in caught if "bs4" in str(warning.category)]


@pytest.mark.usefixtures("not_loaded")
@pytest.mark.parametrize(
    "module",
    ["diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha", "bs4", "ftfy"],
    ids=["diffusers", "bs4", "ftfy"],
)
def test_a_missing_package_is_reported_with_the_command_that_installs_it(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError) as error:
        clean_caption("a cat", "published")
    assert_one_line(error, module, 'pip install -c constraints.txt -e ".[text]"')
    assert clean_caption("A cat", None) == "A cat"


@pytest.mark.usefixtures("not_loaded")
def test_another_version_of_diffusers_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import PixArtAlphaPipeline

    monkeypatch.delattr(PixArtAlphaPipeline, "_clean_caption")
    with pytest.raises(ValueError) as error:
        clean_caption("a cat", "published")
    assert_one_line(error, f"diffusers{published_cleaning.VERSIONS}, but 0.", "pip install")


def test_the_declared_versions_of_diffusers_are_those_of_the_message() -> None:
    assert f'"diffusers{published_cleaning.VERSIONS}"' in Path("pyproject.toml").read_text()


def test_an_unknown_cleaning_is_refused() -> None:
    name: Any = "other"
    with pytest.raises(ValueError) as error:
        clean_caption("a cat", name)
    assert_one_line(error, "cleaning is 'other'", "published or web")


@pytest.mark.parametrize(
    ("value", "cleaning"),
    [(True, "web"), (False, None), (None, None), ("web", "web"), ("published", "published")],
)
def test_options_and_records_name_a_cleaning(value: Any, cleaning: str | None) -> None:
    assert cleaning_of_option(value) == cleaning
    assert recorded_cleaning({"cleaned": value}) == cleaning


def test_a_missing_record_is_unknown_and_a_strange_one_is_refused() -> None:
    assert recorded_cleaning(None) == recorded_cleaning({"encoder": "t5"}) == "unknown"
    with pytest.raises(ValueError) as error:
        recorded_cleaning({"cleaned": "newer"})
    assert_one_line(error, "'newer'", "use the version that wrote the record")
    with pytest.raises(ValueError) as error:
        cleaning_of_option("other")
    assert_one_line(error, "clean_captions is 'other'", "published, web or false")
