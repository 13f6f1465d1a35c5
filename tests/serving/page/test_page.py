"""The command of the page, its tabs, and what visitors read, without a browser."""

import io
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llamagen import LlamaGen
from serving import start
from serving.engine.dispatcher import Dispatcher
from serving.engine.embedded import EmbeddedEngine
from serving.engine.facts import ModelFacts
from serving.engine.spec import WorkerSpec
from serving.image_settings import ImageSettings, png_file
from serving.image_store import ImageStore
from serving.page import __main__ as page
from serving.page import image_settings, local, markup
from serving.page.form import Form, all_settings, class_title
from serving.page.generation import GenerationRequest
from serving.page.runs import Runs, sentence
from serving.page.uploads import mark_cut, read_upload, to_png
from tests.datamodules.shard_files import assert_one_line
from tests.pipeline import Pipeline
from tests.serving.fake_backend import FakeBackend
from tests.text_pipeline import TextPipeline


def components(runs: Runs) -> list[dict[str, Any]]:
    """Type and options of all components of a page."""
    from serving.page.layout import build_page

    return [each["props"] | {"type": each["type"]} for each in build_page(runs).config["components"]]


def runs_of(facts: ModelFacts) -> Runs:
    """Runs of a model that generates nothing."""
    backend = FakeBackend(facts)
    backend.close()
    return Runs(backend, ImageStore())


def tabs(runs: Runs) -> list[str]:
    return [each["label"] for each in components(runs) if each["type"] == "tabitem"]


def test_without_the_extra_the_command_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "find_spec", lambda name: None if name == "gradio" else object())
    with pytest.raises(
        ValueError, match=r'needs gradio, .*; pip install -c constraints.txt -e "\.\[serve\]"$'
    ) as caught:
        page.main(["c2i_B_256"])
    assert_one_line(caught)


@pytest.mark.parametrize("port", ["-1", "65536", "x", "²"])
def test_a_wrong_port_is_one_line(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        page.main(["c2i_B_256", f"--port={port}"])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{port} is not a port" in error


def test_a_port_in_use_is_reported_before_the_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"127.0.0.1, port {port} .*in use") as caught:
            page.main(["no such model", f"--port={port}"])
    assert_one_line(caught)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the page has no model; give a MODEL, or a server with --server URL"),
        (["c2i_B_256", "--server=http://a"], "both the model c2i_B_256 and --server are given; give one of them"),
        (["c2i_B_256", "--api-key-file=a"], "--api-key-file is for --server"),
        (["--server=http://a", "--text-encoder=b"], "--text-encoder is for a MODEL; give it to the server"),
        (["--server=http://a", "--window=auto"], "--window is for a MODEL; give it to the server"),
        (["--server=a:1", "--port=0"], "'a:1' is not the address of a server"),
        (["--server=http://a", "--port=0", "--api-key-file=none"], "the API keys in none cannot be read"),
    ],
)
def test_a_model_and_a_server_exclude_each_other(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        page.main(arguments)
    assert_one_line(caught)


def test_the_options_of_the_model_reach_its_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = list[WorkerSpec]()

    class StoppedError(Exception):
        pass

    def stop(load: Callable[[], object], queue: int) -> None:
        load()
        raise StoppedError

    monkeypatch.setattr(local, "Dispatcher", stop)
    monkeypatch.setattr(local, "load_engine", specs.append)
    given = ["--tokenizer=vq", "--text-encoder=t5", "--device=cpu", "--dtype=bfloat16"]
    for more in ([], ["--window=6"], ["--window=auto"]):
        with pytest.raises(StoppedError):
            page.main(["c2i_B_256", "--port=0", *given, *more])
    expected = WorkerSpec("c2i_B_256", "vq", "t5", "cpu", "bfloat16", 4, window="auto")
    assert specs == [expected, replace(expected, window=6), expected]


def test_a_class_model_has_all_tabs_and_its_own_settings_as_defaults(model: LlamaGen, facts: ModelFacts) -> None:
    runs = runs_of(facts)
    assert tabs(runs) == ["Generate", "Complete", "Reconstruct"]
    values = {each.get("label"): each.get("value") for each in components(runs)}
    assert values["Guidance scale"] == model.sampling.guidance_scale
    assert values["Top-p"] == model.sampling.top_p
    assert values["Temperature"] == model.sampling.temperature
    assert values["Guidance schedule"] == model.sampling.guidance_schedule


@pytest.mark.parametrize(
    ("own", "low"),
    [
        ({}, 0.5),
        ({}, 0.1),
        ({"guidance_scale": 7.51, "top_p": 0.955, "temperature": 0.123, "guidance_power": 0.3}, 0.5),
        ({"guidance_scale": 30.02, "top_p": 0.005, "temperature": 2.25, "guidance_power": 21.7}, 0.5),
    ],
    ids=["defaults", "another range", "inside the ranges", "outside"],
)
def test_sliders_reach_their_defaults_and_their_ends(
    facts: ModelFacts, monkeypatch: pytest.MonkeyPatch, own: dict[str, float], low: float
) -> None:
    monkeypatch.setitem(image_settings.RANGES, "guidance_power", (low, 20.0))
    runs = runs_of(replace(facts, sampling={**facts.sampling, **own}))
    sliders = [each for each in components(runs) if each["type"] == "slider"]
    assert len(sliders) == 2 * 6 + 1
    for slider in sliders:
        for value in (slider["value"], slider["maximum"]):
            steps = (value - slider["minimum"]) / slider["step"]  # browsers count from the minimum
            assert steps == pytest.approx(round(steps), abs=1e-6), slider["label"]


def test_guidance_up_to_the_last_code_is_guidance_to_the_end(facts: ModelFacts, tmp_path: Path) -> None:
    import gradio as gr

    with gr.Blocks():
        form = Form(facts, "generation")
        form.build_request()
        form.build_settings()
    values = [[3], *(each.value for each in form.components[1:])]
    field = next(i for i, each in enumerate(form.components) if each.label == "First code without guidance")
    assert None not in values  # Gradio shows an empty number as 0 in an accordion
    assert values[field] == 16
    for shown, meant, back in [(16.0, None, 16), (99, None, 16), (None, None, 16), (15, 15, 15), (0, 0, 0)]:
        values[field] = shown
        request = form.request(*values)
        assert request.settings["guidance_steps"] == meant
        inside = ImageSettings(facts.name, "generation", (3,), 4, 0, 0, 0, all_settings(facts, request))
        (tmp_path / "a.png").write_bytes(png_file(Image.new("RGB", (8, 8)), inside, "3", "float32"))
        assert form.put_back(str(tmp_path / "a.png"))[0][field] == back
    values[field] = -1
    with pytest.raises(ValueError, match="guidance_steps is -1"):
        form.request(*values)


@pytest.mark.parametrize("times", [(0.01, 0.01), (3600, 3600)], ids=["on schedule", "at the end"])
def test_uploads_are_deleted(facts: ModelFacts, monkeypatch: pytest.MonkeyPatch, times: tuple[float, float]) -> None:
    from fastapi.testclient import TestClient

    from serving.page import layout
    from serving.page.app import build_app, upload_folder

    assert min(layout.DELETE_UPLOADS) > 0  # 0 is off
    assert max(layout.DELETE_UPLOADS) <= 3600
    monkeypatch.setattr(layout, "DELETE_UPLOADS", times)
    with upload_folder() as folder:
        with TestClient(build_app(runs_of(facts))) as client:
            answer = client.post("/gradio_api/upload", files={"files": ("a.png", b"mine")})
            (path,) = map(Path, answer.json())
            assert path.is_relative_to(folder)
            on_schedule = times[1] < 1
            for _ in range(500 if on_schedule else 0):
                if not path.exists():
                    break
                time.sleep(0.01)
            assert path.exists() != on_schedule
        assert not path.exists()
    assert not folder.exists()


def test_a_tokenizer_alone_reconstructs_only(pipeline: Pipeline) -> None:
    assert tabs(runs_of(ModelFacts.from_model(LlamaGen.from_pretrained(pipeline.tokenizer)))) == ["Reconstruct"]


def test_prompts_are_texts_and_their_settings_come_back(
    text_pipeline: TextPipeline, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    import gradio as gr

    model = LlamaGen.from_pretrained(text_pipeline.root / "argen", batch_size=2)
    backend = Dispatcher(lambda: EmbeddedEngine(model))
    request.addfinalizer(backend.close)
    runs = Runs(backend, ImageStore())
    with gr.Blocks():
        form = Form(runs.facts, "generation")
        form.build_request()
        form.build_settings()
    values = [each.value for each in form.components]
    values[:3] = [" a <b>three</b>\n\none ", 1.0, 3]
    wanted = form.request(*values)
    assert wanted.conditions == ("a <b>three</b>", "one")
    updates = list(runs.run("someone", "generate", form, wanted))
    shown = [each.finished for each in updates if each.finished]
    assert "a &lt;b&gt;three&lt;/b&gt;" in shown[-1]
    assert not any("<b>" in str(part) for update in updates for part in update)
    expected = model.generate(wanted.conditions, seed=3, progress=False)
    files = list(runs.store._files.values())
    (tmp_path / "a.png").write_bytes(files[1])
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(image, expected[1])
    values[0] = "a <b>three</b>\none"
    back, kept = form.put_back(str(tmp_path / "a.png"))
    assert (back, kept) == (values, 0)


def test_a_run_of_one_visitor_is_stopped_only_by_that_visitor() -> None:
    backend = FakeBackend()
    backend.gate.clear()
    runs = Runs(backend, ImageStore())
    form = Form(runs.facts, "generation")
    mine = runs.run("me", "generate", form, GenerationRequest((1,), 4, 0))
    next(mine)
    next(mine)
    runs.stop("other", "generate")
    runs.stop("me", "complete")
    runs.stop_all("other")
    assert not backend.tickets[0].cancelled.is_set()
    runs.stop("me", "generate")
    assert "Stopped after 0 of 4 images" in str(list(mine)[-1].status)
    assert runs._tickets == {}
    backend.close()


def test_bugs_are_not_explained_to_visitors(caplog: pytest.LogCaptureFixture) -> None:
    assert sentence(RuntimeError("secret /path")).startswith("something went wrong")
    assert "secret /path" in caplog.text
    assert markup.error_message("a <b> & c") == '<p class="error" role="alert">A &lt;b&gt; &amp; c.</p>'


def test_the_store_forgets_the_oldest_images() -> None:
    store = ImageStore(max_bytes=10)
    names = [store.add(bytes([number]) * 4) for number in range(3)]
    assert [store.get(name) for name in names] == [None, bytes([1]) * 4, bytes([2]) * 4]
    assert store.get("") is None
    large = store.add(b"x" * 20)
    assert store.get(large) == b"x" * 20


def write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "there is no image"),
        (lambda folder: str(folder / "a.png"), "the file a.png is no longer kept; choose it again"),
        (lambda folder: write(folder / "a.jpg", b"GIF89a"), "the file a.jpg is not a readable JPEG, PNG or WebP image"),
        (lambda folder: save(folder / "a.png", (8000, 6000)), "the file a.png is too large; .* 40,000,000 pixels"),
        (
            lambda folder: write(folder / "a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
            "not a readable",
        ),
    ],
    ids=["none", "deleted", "other file", "large", "program"],
)
def test_uploads_that_are_no_usable_images_are_refused(
    facts: ModelFacts, tmp_path: Path, make: Callable[[Path], str | None], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_upload(make(tmp_path), facts)
    assert_one_line(caught)
    assert str(tmp_path) not in str(caught.value)


def save(path: Path, size: tuple[int, int]) -> str:
    Image.new("1", size).save(path)
    return str(path)


def test_an_upload_is_seen_as_the_model_sees_it(model: LlamaGen, pipeline: Pipeline, tmp_path: Path) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    Image.fromarray(levels).save(tmp_path / "a.png")
    image = read_upload(str(tmp_path / "a.png"), ModelFacts.from_model(model))
    assert image.size == (8, 8)
    assert np.array_equal(model.encode(image).cpu(), model.encode(tmp_path / "a.png").cpu())
    marked = np.asarray(mark_cut(image, 2, 2))
    assert np.array_equal(marked[:3], np.asarray(image)[:3])
    assert (marked[3] == (220, 38, 38)).all()
    assert (marked[4:] >= 144).all()
    with Image.open(io.BytesIO(to_png(image))) as opened:
        assert np.array_equal(opened, image)
    tokenizer = ModelFacts.from_model(LlamaGen.from_pretrained(pipeline.tokenizer))
    assert read_upload(save(tmp_path / "b.png", (2000, 1000)), tokenizer).size == (512, 256)


def test_a_class_is_shown_by_number_and_name() -> None:
    assert class_title(207, "golden retriever") == "207 golden retriever"
    assert class_title(3, "3") == "3"
