"""The embedded engine inpaints: images of Python whatever shares a batch, previews, and wrong requests."""

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from serving.engine.checks import check_request
from serving.engine.embedded import EmbeddedEngine
from serving.engine.engine import Work
from serving.engine.facts import ModelFacts
from serving.engine.previews import GREY, MaskedImages
from serving.engine.requests import ImageRequest, Rows
from serving.page.uploads import to_png
from tests.serving.engine.conftest import Start
from tests.serving.engine.scripted import Heard
from tests.serving.inpainting_model import inpainting_model, mask_of, noise


def test_masks_of_equally_many_codes_share_a_batch_and_give_the_images_of_python(start: Start) -> None:
    model, heard = inpainting_model(), [Heard() for _ in range(4)]
    masks: list[tuple[int, ...]] = [(5, 6, 9), (0, 1, 15), (2,), ()]
    dispatcher = start(lambda: EmbeddedEngine(model, window=3))
    for seed, (mask, each) in enumerate(zip(masks, heard, strict=True)):
        image = to_png(noise(seed))
        request = ImageRequest((3, "class 1"), (0, 1), seed, model.settings(), image, previews=seed == 1, mask=mask)
        dispatcher.submit(request, each)
    for seed, (mask, each) in enumerate(zip(masks, heard, strict=True)):
        expected = model.inpaint([noise(seed)] * 2, mask_of(*mask), [3, 1], seed=seed, progress=False)
        assert [each.finished[index].pixels.tolist() for index in (0, 1)] == [np.asarray(x).tolist() for x in expected]
    shown = [event for event in heard[1].events if isinstance(event, Rows) and event.previews]
    assert len(shown) == 1
    settings = model.settings()
    groups = [Work(0, 1, settings=settings, image=b"", mask=mask).group for mask in (*masks, (7, 8, 9))]
    assert [groups.index(group) for group in groups] == [0, 0, 2, 3, 0]
    assert Work(0, 1, settings=settings, image=b"").group not in groups


def test_a_preview_shows_the_known_part_once() -> None:
    shown = MaskedImages([noise(0)], [(1, 14)], 4)
    (file,) = shown.update(None, 1, None)  # type: ignore[arg-type]
    assert shown.update(None, 2, None) == []  # type: ignore[arg-type]
    with Image.open(io.BytesIO(file)) as image:
        found = np.asarray(image).astype(int)
    grey = (abs(found - np.array(GREY)).max(-1) < 40).reshape(4, 4, 4, 4).mean((1, 3)) > 0.9
    assert np.array_equal(grey, mask_of(1, 14))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": None}, "a mask needs an image, and no keep_rows"),
        ({"keep_rows": 1}, "a mask needs an image, and no keep_rows"),
        ({"mask": (3, 16)}, "mask is 16; it must be at most 15"),
        ({"mask": (3, 3)}, "the mask names a code twice"),
    ],
)
def test_a_wrong_mask_is_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    facts = ModelFacts.from_model(inpainting_model())
    right = ImageRequest((1,), (0,), 0, facts.settings({}), b"image", mask=(3,))
    assert check_request(right, facts) == right
    with pytest.raises(ValueError, match=message) as caught:
        check_request(replace(right, **change), facts)
    assert "\n" not in str(caught.value)


def test_a_model_of_the_raster_order_refuses_masks() -> None:
    facts = ModelFacts.from_model(inpainting_model(target_aware=False))
    request = ImageRequest((1,), (0,), 0, facts.settings({}), b"image", mask=(3,))
    with pytest.raises(ValueError, match="small generates in raster order only here, so it cannot inpaint; keep the"):
        check_request(request, facts)
