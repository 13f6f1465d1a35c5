"""The tab Inpaint: there for models that can, and its images are those of Python."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser

from llamagen import LlamaGen
from serving.engine.dispatcher import Dispatcher
from serving.engine.embedded import EmbeddedEngine
from serving.engine.facts import ModelFacts
from serving.image_store import ImageStore
from serving.page.form import Form
from serving.page.generation import GenerationRequest
from serving.page.runs import Runs
from serving.page.uploads import painted_codes, to_canvas, to_png
from tests.serving.inpainting_model import inpainting_model, mask_of, noise
from tests.serving.page.conftest import page_of
from tests.serving.page.test_page import runs_of, tabs
from tests.serving.page.visitor import Visitor, an_image, same, settings_inside


@pytest.fixture(scope="module")
def inpainter() -> LlamaGen:
    return inpainting_model()


@pytest.fixture
def dispatcher(inpainter: LlamaGen) -> Iterator[Dispatcher]:
    found = Dispatcher(lambda: EmbeddedEngine(inpainter))
    yield found
    found.close()


def test_there_is_a_tab_if_the_model_can(inpainter: LlamaGen) -> None:
    assert tabs(runs_of(ModelFacts.from_model(inpainter))) == ["Generate", "Complete", "Inpaint", "Reconstruct"]


def test_images_are_those_of_python(dispatcher: Dispatcher, inpainter: LlamaGen) -> None:
    runs, mask = Runs(dispatcher, ImageStore()), (5, 6, 7, 10, 11)
    request = GenerationRequest((3, 1), 2, 7, {"temperature": 0.9}, to_png(noise(0)), mask=mask)
    updates = list(runs.run("me", "inpaint", Form(runs.facts, "inpainting"), request))
    assert "Finished 4 images" in str(updates[-1].status)
    shown = [each.finished for each in updates if each.finished][-1]
    files = [runs.store.get(part.partition(".png")[0]) or b"" for part in shown.split('<img src="image/')[1:]]
    arguments = noise(0), mask_of(*mask), [3, 1]
    expected = inpainter.inpaint(*arguments, images_per_prompt=2, seed=7, temperature=0.9, progress=False)
    assert same(files, expected)
    assert settings_inside(files[0])["temperature"] == 0.9
    with Image.open(io.BytesIO(files[0])) as image:
        assert '"kind": "inpainting"' in image.info["llamagen"]


def test_progress_counts_the_known_codes_as_rows() -> None:
    counts = [GenerationRequest((1,), 1, 0, image=b"", mask=tuple(range(count))).kept_rows(4) for count in (0, 5, 16)]
    assert counts == [4, 2, 0]


def test_painted_squares_are_generated_again(inpainter: LlamaGen) -> None:
    facts = ModelFacts.from_model(inpainter)
    canvas = to_canvas(noise(0))
    assert canvas.size == (256, 256)
    pixels = np.zeros((256, 256, 4), np.uint8)
    pixels[100:140, 70, 3] = 9  # a faint line over the edge between two rows of codes
    layers = [Image.fromarray(pixels), Image.new("RGBA", (256, 256))]
    assert painted_codes({"background": canvas, "layers": layers, "composite": canvas}, facts) == (5, 9)
    for nothing in (None, {"layers": []}, {"layers": layers[1:]}):
        with pytest.raises(ValueError, match="nothing is painted; paint over the part of the image to generate again"):
            painted_codes(nothing, facts)


@pytest.mark.slow
def test_a_visitor_paints_and_gets_the_images_of_python(
    browser: Browser, dispatcher: Dispatcher, inpainter: LlamaGen, tmp_path: Path
) -> None:
    path = an_image(tmp_path)
    with page_of(dispatcher) as served:
        visitor = Visitor(browser, served)
        visitor.tab("Inpaint")
        visitor.upload(path, "inpaint")
        visitor.page.locator("#inpaint-note").get_by_text("4 × 4 pixels").wait_for()
        visitor.choose("3", tab="inpaint")
        visitor.start("inpaint")
        visitor.wait("Nothing is painted; paint over the part", "inpaint")
        canvas = visitor.page.locator("#inpaint-editor canvas").first
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        assert box is not None
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        visitor.page.mouse.move(x - 20, y)
        visitor.page.mouse.down()
        visitor.page.mouse.move(x + 20, y, steps=5)
        visitor.page.mouse.up()
        visitor.start("inpaint")
        visitor.wait("Finished 4 images", "inpaint")
        expected = inpainter.inpaint(path, mask_of(5, 6, 9, 10), 3, images_per_prompt=4, progress=False)
        assert same(visitor.files("inpaint"), expected)
        visitor.close()
