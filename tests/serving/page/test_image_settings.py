"""The settings inside a PNG file: they come back as they were, and hostile files are refused in one line."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from serving.engine.facts import ModelFacts
from serving.image_settings import KEY, ImageSettings, png_file
from serving.page.image_settings import read_settings
from tests.datamodules.shard_files import assert_one_line

PIXELS = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))


@pytest.fixture
def settings(facts: ModelFacts) -> ImageSettings:
    own = {"guidance_scale": 3.25, "guidance_steps": 9, "top_k": 20, "guidance_schedule": "cosine"}
    sampling = facts.settings(own).image_settings()
    return ImageSettings(facts.name, "generation", (3, 7), 2, 123456789, 3, 0, sampling)


def test_settings_come_back_and_pixels_stay(facts: ModelFacts, settings: ImageSettings, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(png_file(PIXELS, settings, "7 “seven” 七", "float32"))
    assert read_settings(file, facts, "generation") == settings
    with Image.open(file) as image:
        assert np.array_equal(image, PIXELS)
        content = json.loads(image.text[KEY])  # type: ignore[attr-defined]
    assert content["condition"] == "7 “seven” 七"
    assert content["dtype"] == "float32"
    assert content["version"]


def with_text(text: str, key: str = KEY) -> bytes:
    info, buffer = PngInfo(), BytesIO()
    info.add_itxt(key, text)
    PIXELS.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def changed(**values: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda content: {**content, **values}


def sampling(**values: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda content: {**content, "settings": {**content["settings"], **values}}


HOSTILE: list[tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = [
    (changed(model="c2i_L_384"), "'c2i_L_384', not by argen; open the page of that model"),
    (changed(model=["x"] * 1000), "not by argen"),
    (changed(kind="completion"), "choose it on the tab Complete"),
    (changed(format="other"), "of another program"),
    (changed(conditions="3"), "conditions must be a list"),
    (changed(conditions=[]), "choose at least one class"),
    (changed(conditions=[10]), "class is 10; it must be an integer from 0 to 9"),
    (changed(conditions=["3"]), "class is '3'"),
    (changed(conditions=[True]), "class is True"),
    (changed(conditions=[3] * 9), "9 × 2 are 18 images"),
    (changed(images_per_prompt=0), "the number of images is 0"),
    (changed(images_per_prompt=1e9), "the number of images is 1000000000.0"),
    (changed(seed=-1), "seed is -1"),
    (changed(seed=None), "the seed is empty"),
    (changed(seed=2**70), "seed is"),
    (changed(index=16), "index is 16"),
    (changed(keep_rows=5), "keep_rows is 5"),
    (changed(settings=[]), "incomplete"),
    (sampling(extra=1), "incomplete"),
    (sampling(temperature=float("nan")), "temperature is nan; it must be a number"),
    (sampling(temperature=float("inf")), "temperature is inf"),
    (sampling(temperature=2.5), "temperature is 2.5; it must be a number from 0 to 2"),
    (sampling(temperature=10**400), f"temperature is {'1' + '0' * 39}; it must be a number from 0 to 2"),
    (sampling(guidance_scale=-(10**400)), "guidance_scale is -1000"),
    (sampling(temperature="1"), "temperature is '1'"),
    (sampling(guidance_scale=1e308), "guidance_scale is"),
    (sampling(top_p=0), "top_p is 0"),
    (sampling(top_k=2.5), "top_k is 2.5"),
    (sampling(top_k=10**12), "top_k is 1000000000000"),
    (sampling(guidance_steps="x"), "guidance_steps is 'x'"),
    (sampling(guidance_schedule="<b>"), "guidance_schedule is '<b>'"),
    (lambda content: {key: value for key, value in content.items() if key != "seed"}, "lack seed"),
]


@pytest.mark.parametrize(("change", "message"), HOSTILE, ids=[message for _, message in HOSTILE])
def test_settings_that_are_changed_are_refused(
    facts: ModelFacts,
    settings: ImageSettings,
    tmp_path: Path,
    change: Callable[[dict[str, Any]], dict[str, Any]],
    message: str,
) -> None:
    content = {"format": "llamagen-lightning image 1", **asdict(settings)}
    file = tmp_path / "a.png"
    file.write_bytes(with_text(json.dumps(content)))
    assert read_settings(file, facts, "generation") == replace(settings)  # the unchanged ones are accepted
    file.write_bytes(with_text(json.dumps(change(content))))
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_settings(file, facts, "generation")
    assert_one_line(caught)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (b"", "is not a readable PNG file"),
        (b"\x89PNG\r\n\x1a\n" + b"\x00" * 30, "is not a readable PNG file"),
        (with_text("{}")[:60], "is not a readable PNG file"),
        (with_text("x", "other"), "has no settings inside"),
        (with_text("not json"), "are damaged"),
        (with_text("[" * 60000), "are damaged"),
        (with_text("9" * 60000), "are damaged"),
        (with_text(" " * 70000), "are damaged"),
        (with_text("[]"), "of another program"),
        (with_text("null"), "of another program"),
    ],
    ids=["empty", "broken", "cut", "other text", "no JSON", "deep", "long number", "long", "list", "null"],
)
def test_files_without_valid_settings_are_refused(facts: ModelFacts, tmp_path: Path, file: bytes, message: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(file)
    with pytest.raises(ValueError, match=message) as caught:
        read_settings(path, facts, "generation")
    assert_one_line(caught)
