"""Cleaning of web captions, and their first sentences."""

import random
import sys

import pytest

from llamagen.text import clean_caption, first_sentence

CLEANED = [
    ("", ""),
    (" \t\n ", ""),
    ("!!!", ""),
    ("IMG_2031.JPG", ""),
    ("A Cat", "a cat"),
    ("a   \t\n cat", "a cat"),
    ("a&nbsp;cat", "a cat"),
    ("A cat &amp;amp; a dog", "a cat & a dog"),
    ("&lt;b&gt;Bold&lt;/b&gt; cat", "bold cat"),
    ("<p class='x'>a <br/>cat</p><!-- note -->", "a cat"),
    ("see https://example.com/a?b=c for more", "see for more"),
    ("a cat (http://x.y/z).", "a cat."),
    ("Buy at www.shop.com!", "buy at!"),
    ("visit example.com/cats today", "visit today"),
    ("the end.it was", "the end.it was"),
    ("mail joe.doe@mail.example.com now", "mail now"),
    ("cats by @user_1, 2019", "cats by, 2019"),
    ("meet @ 5 o'clock", "meet @ 5 o'clock"),
    ("photo (1).jpg of a dog", "photo of a dog"),
    ("猫.jpg", "猫"),
    ("id 123456789 cat", "id cat"),
    ("dsc01234567 dog", "dog"),
    ("a cat | stock photo | 12345678", "a cat | stock photo"),
    ("pi is 3.14159265", "pi is 3.14159265"),
    ("1,234,567 people in 2019", "1,234,567 people in 2019"),
    ("#sunset #Beach at 5pm", "sunset beach at 5pm"),
    ("the #1 dog writes C#", "the #1 dog writes c#"),
    ("cat () [ ] {}", "cat"),
    ("cat ( black ) (", "cat (black)"),
    ("Wow!!! What?? what?!?!", "wow! what? what?!"),
    ("wait....... ok", "wait... ok"),
    ("a -- b --- c - - - d", "a - b - c - d"),
    ("a_cat_on_a_mat", "a cat on a mat"),
    ("***SALE*** == cat ==", "sale cat"),
    ("cat , dog ;; bird .", "cat, dog; bird."),
    ("hello :) i <3 cats", "hello :) i <3 cats"),
    ("- a cat -", "a cat"),
    ("-5 degrees, .5 mm lens", "-5 degrees, .5 mm lens"),
    ("f/2.8 at 1/200 s, 50% off, $19.99", "f/2.8 at 1/200 s, 50% off, $19.99"),
    ("schÃ¶n â€“ cafÃ©", "schön – café"),
    ("itâ€™s a dog", "it's a dog"),
    ("It’s “a” dog", "it's “a” dog"),
    ("cat\x00\x07 \x1b[31mred\x1b[0m", "cat red"),
    ("\ud800cat zero\u200bwidth\ufeff", "cat zerowidth"),
    ("猫が座っている。「はい！」", "猫が座っている。「はい！」"),
    ("他说“你好”，再见！！", "他说“你好”，再见！！"),
    ("看https://a.com/b这个", "看 这个"),
    ("Кошка СИДИТ на стуле!!!", "кошка сидит на стуле!"),
    ("مرحبا بالعالم!!", "مرحبا بالعالم!"),
    ("👩‍👩‍👧 family ❤️", "👩‍👩‍👧 family ❤️"),
]

SHORTENED = [
    ("", ""),
    (" A cat ", "A cat"),
    ("A cat. A dog.", "A cat."),
    ("a cat sits. it purrs.", "a cat sits."),
    ("A cat!! It purrs.", "A cat!!"),
    ("Really? Yes.", "Really?"),
    ("(A cat sits.) A dog runs.", "(A cat sits.)"),
    ('"Stop!" she said. He ran.', '"Stop!" she said.'),
    ("Dr. Smith sits. He reads.", "Dr. Smith sits."),
    ("Mrs. Smith and St. Nicholas. End.", "Mrs. Smith and St. Nicholas."),
    ("J. K. Rowling writes. She sits.", "J. K. Rowling writes."),
    ("А. С. Пушкин пишет. Он сидит.", "А. С. Пушкин пишет."),
    ("A U.S. Navy ship. Big.", "A U.S. Navy ship."),
    ("A lens of 3.5 mm. It is new.", "A lens of 3.5 mm."),
    ("It costs 5. That is much.", "It costs 5."),
    ("1. A cat sits. 2. A dog.", "1. A cat sits."),
    ("No. 5 is red. Ok.", "No. 5 is red."),
    ("She said no. Then left.", "She said no."),
    ("Cats, dogs, etc. are here. Ok.", "Cats, dogs, etc. are here."),
    ("Cats, dogs, etc. They run.", "Cats, dogs, etc."),
    ("At 5 p.m. the sun sets. Night.", "At 5 p.m. the sun sets."),
    ("A cat ... and a dog. Then.", "A cat ... and a dog."),
    ("A cat… Then a dog.", "A cat…"),
    ("... a cat. A dog.", "... a cat."),
    ("Title\n\nA cat sits.", "Title"),
    ("A cat\nsits. It purrs.", "A cat\nsits."),
    ("A cat.Next", "A cat.Next"),
    ("猫が座っている。犬もいる。", "猫が座っている。"),
    ("看！那只猫。", "看！"),
    ("「猫だ。」犬だ。", "「猫だ。」"),
    ("नमस्ते दुनिया। दूसरा।", "नमस्ते दुनिया।"),
    ("هل هذا قط؟ نعم.", "هل هذا قط؟"),
]


@pytest.mark.parametrize(("text", "expected"), CLEANED)
def test_cleans_captions_and_cleaning_again_changes_nothing(text: str, expected: str) -> None:
    assert clean_caption(text) == expected
    assert clean_caption(expected) == expected


def test_cleaning_random_texts_again_changes_nothing() -> None:
    generator = random.Random(0)
    pieces = [piece for text, _ in CLEANED for piece in text.split(" ")]
    pieces += [
        "&amp;",
        "lt;",
        "#",
        "@",
        ".",
        "..",
        ",",
        "(",
        ")",
        "-",
        "_",
        "http://",
        ".jpg",
        "1234567",
        "<",
        ">",
        "\n",
    ]
    for _ in range(600):
        text = "".join(
            generator.choice(pieces) + generator.choice(["", "", " "]) for _ in range(generator.randint(1, 9))
        )
        cleaned = clean_caption(text)
        assert clean_caption(cleaned) == cleaned, text


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "part", ["&amp;", "(", "<a", "<!--", "a.", "a@", "a.b@", "http://..", "x( ", " ,", "- ", "1", "\n "]
)
def test_long_captions_take_linear_time(part: str) -> None:
    assert len(clean_caption(part * 4000 + "x")) <= len(part * 4000 + "x")
    assert first_sentence("x" + part * 4000).startswith("x")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("part", [". ", "! ?", "Dr. ", "x."])
def test_the_first_sentence_of_many_marks_takes_linear_time(part: str) -> None:
    assert first_sentence(part * 50_000) == (part * 50_000).strip()


@pytest.mark.parametrize(("text", "expected"), SHORTENED)
def test_the_first_sentence_ends_where_a_reader_would_end_it(text: str, expected: str) -> None:
    assert first_sentence(text) == expected
    assert first_sentence(expected) == expected


def test_without_ftfy_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(ValueError) as error:
        clean_caption("a cat")
    assert 'pip install -c constraints.txt -e ".[text]"' in str(error.value)
    assert first_sentence("A cat. A dog.") == "A cat."
