"""Settings of the page in a real browser: they stay as they are shown, and so do messages about them."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llamagen import LlamaGen
from serving.image_settings import ImageSettings, png_file
from tests.serving.page.visitor import Gate, Visitor, an_image, same, settings_inside

pytestmark = pytest.mark.slow
PIXELS = Image.new("RGB", (8, 8))


@pytest.mark.parametrize("tab", ["generate", "complete"])
def test_opening_more_about_guidance_changes_no_setting(
    visitor: Visitor, model: LlamaGen, tmp_path: Path, tab: str
) -> None:
    path, inside = an_image(tmp_path), tmp_path / "settings.png"
    own = {**model.sampling.image_settings(), "guidance_scale": 2.5}
    kind = "generation" if tab == "generate" else "completion"
    other = {**own, "guidance_schedule": "power_cosine", "guidance_power": 3.3, "temperature": 0.93, "top_p": 0.955}
    other |= {"guidance_start": 2, "guidance_steps": 9, "top_k": 12}
    inside.write_bytes(png_file(PIXELS, ImageSettings("argen", kind, (7,), 4, 3, 0, 2, other), "7", "float32"))

    def images(settings: dict[str, Any]) -> list[Image.Image]:
        if tab == "generate":
            return model.generate(7, images_per_prompt=4, seed=3, progress=False, **settings)
        return model.complete(path, 2, 7, images_per_prompt=4, seed=3, progress=False, **settings)

    def check(settings: dict[str, Any]) -> None:
        visitor.start(tab)
        visitor.wait("Finished 4 images", tab)
        files = visitor.files(tab)
        assert settings_inside(files[0]) == settings
        assert same(files, images(settings))

    def open_accordion() -> None:
        visitor.panel(tab).get_by_role("button", name="More about guidance").click()
        visitor.panel(tab).get_by_label("First code without guidance").wait_for()

    def open_tab() -> None:
        if tab == "complete":
            visitor.tab("Complete")
            visitor.upload(path, tab)

    open_tab()
    visitor.choose("7", tab=tab)
    visitor.fill("Seed", 3, tab)
    visitor.fill("Guidance scale", 2.5, tab)
    open_accordion()
    check(own)
    visitor.put_back(inside, tab)  # while it is open
    visitor.wait("The settings of the image are in the form", tab)
    check(other)
    visitor.open()
    open_tab()
    visitor.put_back(inside, tab)  # before it was opened
    visitor.wait("The settings of the image are in the form", tab)
    open_accordion()
    check(other)


def test_the_preview_of_the_cut_leaves_the_status_alone(
    visitor: Visitor, gate: Gate, model: LlamaGen, tmp_path: Path
) -> None:
    path, inside, broken = an_image(tmp_path), tmp_path / "settings.png", tmp_path / "broken.png"
    settings = ImageSettings("argen", "completion", (7,), 4, 3, 0, 1, model.sampling.image_settings())
    inside.write_bytes(png_file(PIXELS, settings, "7", "float32"))
    broken.write_bytes(b"no image")
    cut = visitor.page.locator("#complete-cut")
    visitor.tab("Complete")
    visitor.upload(path, "complete")
    cut.get_by_text("2 of 4 rows are kept").wait_for()
    visitor.put_back(inside, "complete")
    cut.get_by_text("1 of 4 rows are kept").wait_for()
    visitor.page.wait_for_timeout(200)
    visitor.wait("The settings of the image are in the form", "complete")
    visitor.start("complete")
    assert gate.reached.wait(30)
    visitor.wait("row 1 of 4", "complete")
    visitor.fill("Rows to keep", 3, "complete")
    cut.get_by_text("3 of 4 rows are kept").wait_for()
    visitor.panel("complete").get_by_label("Clear").first.click()
    visitor.upload(broken, "complete")
    cut.get_by_text("The file broken.png is not a readable").wait_for()
    visitor.wait("row 1 of 4", "complete")
    gate.open.set()
    visitor.wait("Finished 4 images", "complete")
