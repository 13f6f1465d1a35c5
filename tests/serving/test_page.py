"""The command of the page, its tabs, and what visitors read, without a browser."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llamagen import LlamaGen
from serving import markup, page
from serving.form import Form, class_title
from serving.generation import GenerationRequest
from serving.image_store import ImageStore
from serving.runs import Runs, sentence
from serving.uploads import mark_cut, read_upload
from serving.worker import Worker
from tests.datamodules.shard_files import assert_one_line
from tests.pipeline import Pipeline
from tests.text_pipeline import TextPipeline


def components(runs: Runs) -> list[dict[str, Any]]:
    """Type and options of all components of a page."""
    from serving.layout import build_page

    return [each["props"] | {"type": each["type"]} for each in build_page(runs).config["components"]]


def tabs(runs: Runs) -> list[str]:
    return [each["label"] for each in components(runs) if each["type"] == "tabitem"]


def test_without_the_extra_the_command_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "find_spec", lambda name: None if name == "gradio" else object())
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


def test_a_class_model_has_all_tabs_and_its_own_settings_as_defaults(model: LlamaGen, worker: Worker) -> None:
    runs = Runs(model, worker, ImageStore())
    assert tabs(runs) == ["Generate", "Complete", "Reconstruct"]
    values = {each.get("label"): each.get("value") for each in components(runs)}
    assert values["Guidance scale"] == model.sampling.guidance_scale
    assert values["Top-p"] == model.sampling.top_p
    assert values["Temperature"] == model.sampling.temperature
    assert values["Guidance schedule"] == model.sampling.guidance_schedule


def test_a_tokenizer_alone_reconstructs_only(pipeline: Pipeline, worker: Worker) -> None:
    assert tabs(Runs(LlamaGen.from_pretrained(pipeline.tokenizer), worker, ImageStore())) == ["Reconstruct"]


def test_prompts_are_texts_and_their_settings_come_back(
    text_pipeline: TextPipeline, worker: Worker, tmp_path: Path
) -> None:
    import gradio as gr

    model = LlamaGen.from_pretrained(text_pipeline.root / "argen", batch_size=2)
    page.prepare(model, worker)
    runs = Runs(model, worker, ImageStore())
    with gr.Blocks():
        form = Form(model, "generation")
        form.build_request()
        form.build_settings()
    values = [each.value for each in form.components]
    values[:3] = [" a <b>three</b>\n\none ", 1.0, 3]
    request = form.request(*values)
    assert request.conditions == ("a <b>three</b>", "one")
    updates = list(runs.run("someone", "generate", form, request))
    shown = [each.finished for each in updates if each.finished]
    assert "a &lt;b&gt;three&lt;/b&gt;" in shown[-1]
    assert not any("<b>" in str(part) for update in updates for part in update)
    expected = model.generate(request.conditions, seed=3, progress=False)
    files = list(runs.store._files.values())
    (tmp_path / "a.png").write_bytes(files[1])
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(image, expected[1])
    values[0] = "a <b>three</b>\none"
    back, kept = form.put_back(str(tmp_path / "a.png"))
    assert (back, kept) == (values, 0)


def test_a_run_of_one_visitor_is_stopped_only_by_that_visitor(model: LlamaGen, worker: Worker) -> None:
    runs = Runs(model, worker, ImageStore())
    form = Form(model, "generation")
    mine = runs.run("me", "generate", form, GenerationRequest((1,), 4, 0))
    next(mine)
    next(mine)
    runs.stop("other", "generate")
    runs.stop("me", "complete")
    runs.stop_all("other")
    assert "Finished 4 images" in str(list(mine)[-1].status)
    yours = runs.run("me", "generate", form, GenerationRequest((1,), 16, 0))
    next(yours)
    next(yours)
    runs.stop("me", "generate")
    assert "Stopped after" in str(list(yours)[-1].status)
    assert runs._jobs == {}


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
        (lambda folder: write(folder / "a.jpg", b"GIF89a"), "the file a.jpg is not a readable JPEG, PNG or WebP image"),
        (lambda folder: save(folder / "a.png", (8000, 6000)), "the file a.png is too large; .* 40,000,000 pixels"),
        (
            lambda folder: write(folder / "a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
            "not a readable",
        ),
    ],
    ids=["none", "other file", "large", "program"],
)
def test_uploads_that_are_no_usable_images_are_refused(
    model: LlamaGen, tmp_path: Path, make: Callable[[Path], str | None], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_upload(make(tmp_path), model)
    assert_one_line(caught)
    assert str(tmp_path) not in str(caught.value)


def save(path: Path, size: tuple[int, int]) -> str:
    Image.new("1", size).save(path)
    return str(path)


def test_an_upload_is_seen_as_the_model_sees_it(model: LlamaGen, pipeline: Pipeline, tmp_path: Path) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    Image.fromarray(levels).save(tmp_path / "a.png")
    image = read_upload(str(tmp_path / "a.png"), model)
    assert image.size == (8, 8)
    assert np.array_equal(model.encode(image).cpu(), model.encode(tmp_path / "a.png").cpu())
    marked = np.asarray(mark_cut(image, 2, 2))
    assert np.array_equal(marked[:3], np.asarray(image)[:3])
    assert (marked[3] == (220, 38, 38)).all()
    assert (marked[4:] >= 144).all()
    tokenizer = LlamaGen.from_pretrained(pipeline.tokenizer)
    assert read_upload(save(tmp_path / "b.png", (2000, 1000)), tokenizer).size == (512, 256)


def test_a_class_is_shown_by_number_and_name() -> None:
    assert class_title(207, "golden retriever") == "207 golden retriever"
    assert class_title(3, "3") == "3"
