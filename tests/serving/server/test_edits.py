"""Masks: what the backend is asked for, OpenAI's client, the page with a server, and wrong masks and forms."""

import base64
import io
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from llamagen.sampling import SamplingConfig
from serving.engine.dispatcher import Dispatcher
from serving.engine.embedded import EmbeddedEngine
from serving.engine.requests import ImageRequest
from serving.image_store import ImageStore
from serving.page.form import Form
from serving.page.generation import GenerationRequest
from serving.page.remote import RemoteBackend
from serving.page.runs import Runs
from serving.page.uploads import to_png
from tests.serving.fake_backend import CLASS_FACTS, FakeBackend
from tests.serving.inpainting_model import inpainting_model, mask_of, noise
from tests.serving.page.visitor import same
from tests.serving.running_server import Running, running

SETTINGS = SamplingConfig(guidance_scale=2.0, top_k=16)  # the model's


@pytest.fixture(scope="module")
def inpainter() -> Iterator[Running]:
    with running(FakeBackend(replace(CLASS_FACTS, can_inpaint=True))) as server:
        yield server


@pytest.fixture
def http(inpainter: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=inpainter.url, timeout=30) as client:
        yield client


def transparent(*places: tuple[int, int], size: tuple[int, int] = (16, 16)) -> bytes:
    """PNG of (H, W) pixels that are transparent at these places, and nearly transparent at another."""
    pixels = np.full((*size, 4), 255, np.uint8)
    pixels[-1, -1, 3] = 1
    for place in places:
        pixels[place][3] = 0
    return to_png(Image.fromarray(pixels))


def photo(size: tuple[int, int], orientation: int = 1) -> bytes:
    """JPEG of (H, W) pixels with an EXIF orientation."""
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size[::-1]).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def text(file: bytes) -> str:
    return base64.b64encode(file).decode()


def test_transparent_pixels_name_the_codes_to_generate(http: httpx.Client, inpainter: Running) -> None:
    image, mask = photo((32, 64)), transparent((0, 16), (31, 47), (5, 2), size=(32, 64))
    body = {"prompt": 2, "n": 2, "seed": 1, "image": text(image), "mask": text(mask)}
    content = http.post("/v1/images/generations", json=body).json()
    request = inpainter.backend.tickets[-1].request
    assert request == ImageRequest((2, 2), (0, 1), 1, SETTINGS, image, mask=(0, 15))
    assert (content["usage"]["input_tokens"], content["usage"]["output_tokens"]) == (28, 4)


def test_the_mask_of_a_photo_has_its_upright_size(http: httpx.Client, inpainter: Running) -> None:
    mask = transparent((0, 0), size=(32, 16))
    body = {"prompt": 2, "image": text(photo((16, 32), orientation=6)), "mask": text(mask)}
    assert http.post("/v1/images/generations", json=body).status_code == 200
    assert inpainter.backend.tickets[-1].request.mask == ()  # cut off
    body["image"] = text(photo((16, 32)))
    answer = http.post("/v1/images/generations", json=body)
    assert answer.json()["error"]["message"].startswith("the mask has 16 × 32 pixels, but the image 32 × 16")


def test_the_client_of_openai_edits_images(inpainter: Running) -> None:
    image, mask = photo((16, 16)), transparent((4, 4))
    with openai.OpenAI(base_url=f"{inpainter.url}/v1", api_key="any", max_retries=0, timeout=30) as client:
        answer = client.images.edit(
            image=("a.jpg", image), mask=("mask.png", mask), prompt="goldfish", n=2,
            extra_body={"seed": 7, "guidance_scale": 4.5},
        )  # fmt: skip
        assert answer.data is not None
        assert len(answer.data) == 2
        expected = ImageRequest((5, 5), (0, 1), 7, replace(SETTINGS, guidance_scale=4.5), image, mask=(5,))
        assert inpainter.backend.tickets[-1].request == expected
        client.images.edit(image=[("a.png", mask)], prompt="5", extra_body={"seed": 7})  # its own transparency
        expected = ImageRequest((5,), (0,), 7, SETTINGS, mask, mask=(5,))
        assert inpainter.backend.tickets[-1].request == expected
        stream = client.images.edit(image=("a.png", mask), prompt="5", stream=True, partial_images=1)
        assert [event.type for event in stream] == ["image_edit.partial_image", "image_edit.completed"]
        with pytest.raises(openai.BadRequestError, match="seed is 'x'; give an integer of 64 bits"):
            client.images.edit(image=("a.png", mask), prompt="5", extra_body={"seed": "x"})


def test_images_of_a_server_are_those_of_python() -> None:
    model, mask = inpainting_model(), (5, 6, 7, 10)
    with running(Dispatcher(lambda: EmbeddedEngine(model))) as server:
        remote = RemoteBackend(server.url)
        runs = Runs(remote, ImageStore())
        request = GenerationRequest((3, 1), 2, 7, {"temperature": 0.9}, to_png(noise(0)), mask=mask)
        updates = list(runs.run("me", "inpaint", Form(runs.facts, "inpainting"), request))
        remote.close()
    assert "Finished 4 images" in str(updates[-1].status)
    shown = [each.finished for each in updates if each.finished][-1]
    files = [runs.store.get(part.partition(".png")[0]) or b"" for part in shown.split('<img src="image/')[1:]]
    arguments = noise(0), mask_of(*mask), [3, 1]
    expected = model.inpaint(*arguments, images_per_prompt=2, seed=7, temperature=0.9, progress=False)
    assert same(files, expected)


PNG = to_png(noise(0))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (PNG, "the mask has no transparency; give a PNG whose transparent pixels are generated again"),
        (b"no image", "the mask is not a readable PNG image"),
        (transparent()[:60], "the mask is not a readable PNG image"),
        (photo((16, 16)), "the mask is not a readable PNG image"),
        (transparent(size=(16, 17)), "the mask has 17 × 16 pixels, but the image 16 × 16"),
    ],
)
def test_a_wrong_mask_is_one_line(http: httpx.Client, mask: bytes, message: str) -> None:
    body = {"prompt": 2, "image": text(PNG), "mask": text(mask)}
    answer = http.post("/v1/images/generations", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "mask"
    assert message in answer.json()["error"]["message"]


def test_an_unreadable_image_is_not_reported_as_its_mask(http: httpx.Client) -> None:
    body = {"prompt": 2, "image": text(b"no image"), "mask": text(transparent())}
    error = http.post("/v1/images/generations", json=body).json()["error"]
    assert error["param"] == "image"
    assert error["message"].startswith("the image is not a readable JPEG, PNG or WebP image")


FORM = {"Content-Type": "multipart/form-data; boundary=b"}
FILE = {"image": ("a.png", PNG)}


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ({"json": {"prompt": 1}}, 415, "the body has Content-Type 'application/json'; send a form with Content-Type"),
        ({"files": {"mask": ("a.png", PNG)}}, 400, "the field image is missing; give a file"),
        ({"files": FILE, "data": {"prompt": "1", "n": "1.5"}}, 400, "n is 1.5; give an integer from 1"),
        ({"files": FILE, "data": {"prompt": "1", "top_p": "NaN"}}, 400, "top_p is nan; give a number"),
        ({"files": FILE, "data": {"prompt": "1", "colour": "red"}}, 400, "there is no field 'colour'"),
        ({"files": FILE, "data": {"prompt": ["1", "2"]}}, 400, "the form has the field 'prompt' twice"),
        ({"files": FILE}, 400, "the field prompt is missing"),
        ({"files": FILE, "data": {"prompt": "1"}}, 400, "the field mask is missing, and image is not a PNG with"),
        ({"files": FILE, "data": {"prompt": "1", "keep_rows": "1"}}, 400, "keep_rows cannot be combined with a mask"),
        ({"data": {"prompt": "1", "image": "null"}, "files": {"mask": FILE["image"]}}, 400, "the field image is missi"),
        ({"files": [("image[]", ("a.png", PNG))] * 3}, 400, "the form is not valid: Too many files"),
        ({"files": FILE, "data": {"prompt": "1" * 20_000}}, 400, "the form is not valid: "),
        ({"content": b"--b\r\nnonsense", "headers": FORM}, 400, "the field image is missing"),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 400, "the form is not valid"),
        ({"content": b"", "headers": FORM}, 400, "the field image is missing"),
    ],
)
def test_a_wrong_form_is_one_line(http: httpx.Client, options: dict[str, Any], status: int, message: str) -> None:
    answer = http.post("/v1/images/edits", **options)
    assert answer.status_code == status, answer.text
    assert message in answer.json()["error"]["message"]
    assert "\n" not in answer.json()["error"]["message"]
