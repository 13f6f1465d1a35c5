"""The embedded engine with a small model: images of Python whatever shares a batch, and errors of one image."""

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from llamagen import LlamaGen
from llamagen.class_names import ClassNames
from llamagen.finite import NotFiniteError
from llamagen.sampling import IMAGE_SETTINGS, decoder
from llamagen.sampling.config import SamplingConfig
from llamagen.sampling.cpu.decoder import CPUCodeDecoder
from llamagen.sampling.window_choice import PassTimes, WindowChoice
from llamagen.sampling.windows import WindowLoop
from serving.engine.embedded import EmbeddedEngine, load_engine
from serving.engine.engine import FailureReport, ImageReport, Report, RowsReport, Work
from serving.engine.facts import ModelFacts
from serving.engine.failures import BUG, NO_MEMORY
from serving.engine.inbox import WorkInbox
from serving.engine.requests import ImageRequest, ReconstructionRequest, Rows
from serving.engine.spec import WorkerSpec
from tests.pipeline import Pipeline
from tests.serving.engine.conftest import Start
from tests.serving.engine.scripted import Heard


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def noise(seed: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(levels)


def run(engine: EmbeddedEngine, works: Sequence[Work], hear: Callable[[Report], None] = lambda report: None) -> Any:
    """Reports of one batch."""
    inbox, reports = WorkInbox(), list[Report]()

    def report(message: Report) -> None:
        reports.append(message)
        hear(message)
        if not isinstance(message, RowsReport):
            ended.update([message.key] if isinstance(message, ImageReport) else message.keys)
        if len(ended) == len(works):
            inbox.close()

    ended = set[int]()
    inbox.put(works)
    engine.run(inbox, report)
    return reports


def failures(reports: list[Report]) -> list[FailureReport]:
    return [each for each in reports if isinstance(each, FailureReport)]


def images(reports: list[Report]) -> dict[int, np.ndarray]:
    return {each.key: each.pixels for each in reports if isinstance(each, ImageReport)}


def works(model: LlamaGen, count: int, **changes: Any) -> list[Work]:
    return [Work(key, key, seed=key, settings=model.settings(), **changes) for key in range(count)]


def expected(model: LlamaGen, work: Work) -> np.ndarray:
    assert work.condition is not None
    codes = model.generate_codes(work.condition, seed=work.seed, indices=[work.index], progress=False)
    return np.asarray(model.decode(codes)[0])


def test_requests_that_share_batches_get_the_images_of_python(model: LlamaGen, start: Start) -> None:
    settings = {"top_k": 20, "guidance_scale": 3.0}
    dispatcher = start(lambda: EmbeddedEngine(model, window=3))
    heard = [Heard() for _ in range(3)]
    for seed, each in enumerate(heard):
        values = ImageRequest((3, "7", 1), (0, 1, 2), seed, model.settings(**settings), previews=seed == 1)
        dispatcher.submit(values, each)
    for seed, each in enumerate(heard):
        images = model.generate([3, 7, 1], seed=seed, progress=False, **settings)
        codes = model.generate_codes([3, 7, 1], seed=seed, progress=False, **settings).numpy()
        assert sorted(each.finished) == [0, 1, 2]
        for index, event in each.finished.items():
            assert np.array_equal(event.pixels, np.asarray(images[index]))
            assert np.array_equal(event.codes, codes[index])
        assert set(each.rows) == {1, 2, 3, 4}
        previews = [event.previews for event in each.events if isinstance(event, Rows)]
        assert any(previews) is (seed == 1)
    files = next(event for event in heard[1].events if isinstance(event, Rows) and event.previews)
    assert files.previews is not None
    assert len(files.previews) == len(files.images)
    assert Image.open(io.BytesIO(files.previews[0])).size == (8, 8)


def test_completions_of_different_images_share_a_batch(model: LlamaGen) -> None:
    uploads = [noise(0, (20, 30)), noise(1)]
    batch = [
        Work(key, 4, 5, key, model.settings(), png(uploads[key % 2]), keep_rows=2, previews=key > 0) for key in range(3)
    ]
    reports = run(EmbeddedEngine(model), batch)
    assert set(images(reports)) == {0, 1, 2}
    for key, pixels in images(reports).items():
        encoded = model.encode(uploads[key % 2])[:, :2]
        codes = model.generate_codes(4, kept=encoded, seed=5, indices=[key], progress=False)
        assert np.array_equal(pixels, np.asarray(model.decode(codes)[0]))
    assert np.array_equal(images(reports)[0], np.asarray(model.complete(uploads[0], 2, 4, seed=5, progress=False)))
    rows = [each for each in reports if isinstance(each, RowsReport)]
    assert {each.row for each in rows} == {2, 3, 4}
    assert {each.keys for each in rows if each.previews} == {(1, 2)}


def test_reconstructions_are_those_of_python(model: LlamaGen, pipeline: Pipeline) -> None:
    tokenizer = LlamaGen.from_pretrained(pipeline.tokenizer)
    for loaded, size in ((model, (20, 30)), (tokenizer, (14, 10))):
        uploads = [noise(3, size), noise(4)]
        batch = [Work(key, None, image=png(image)) for key, image in enumerate(uploads)]
        batch.append(Work(2, None, image=b"no image"))
        reports = run(EmbeddedEngine(loaded), batch)
        for key, pixels in images(reports).items():
            assert np.array_equal(pixels, np.asarray(loaded.reconstruct(uploads[key])))
        assert len(images(reports)) == 2
        assert [(each.keys, each.is_users) for each in failures(reports)] == [((2,), True)]


def test_a_reconstruction_is_answered(model: LlamaGen, start: Start) -> None:
    heard = Heard()
    start(lambda: EmbeddedEngine(model)).submit(ReconstructionRequest(png(noise(1))), heard)
    assert np.array_equal(heard.finished[0].pixels, np.asarray(model.reconstruct(noise(1))))
    assert heard.finished[0].codes.shape == (4, 4)


def test_an_image_with_values_that_are_not_finite_takes_no_others_with_it(pipeline: Pipeline) -> None:
    model = LlamaGen.from_pretrained(pipeline.root / "argen", batch_size=4)
    batch = works(model, 4)
    right = [expected(model, work) for work in batch]
    assert model.gpt is not None
    with torch.no_grad():
        model.gpt.cls_embedding.embedding_table.weight[2] = torch.nan  # type: ignore[union-attr,operator]
    reports = run(EmbeddedEngine(model), batch)
    assert [(each.keys, each.is_users) for each in failures(reports)] == [((2,), False)]
    assert "not finite" in failures(reports)[0].message
    assert {key: pixels.tolist() for key, pixels in images(reports).items()} == {
        key: right[key].tolist() for key in (0, 1, 3)
    }


def test_pixels_that_are_not_finite_fail_one_image(model: LlamaGen, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = model.pixels

    def broken(codes: torch.Tensor) -> Any:
        if len(codes) == 3:
            raise NotFiniteError("the pixels are not finite", [1])
        return pixels(codes)

    batch = works(model, 3)
    right = {key: expected(model, batch[key]).tolist() for key in (0, 2)}
    monkeypatch.setattr(model, "pixels", broken)
    reports = run(EmbeddedEngine(model), batch)
    assert [each.keys for each in failures(reports)] == [(1,)]
    assert {key: image.tolist() for key, image in images(reports).items()} == right


@pytest.mark.parametrize(
    ("error", "failed", "message", "calls"),
    [
        (RecursionError("deep"), {2}, BUG, 5),
        (ValueError("of a library"), {2}, BUG, 5),
        (FileNotFoundError(2, "no such file", "/home/llamagen/secret"), {2}, BUG, 5),
        (torch.OutOfMemoryError("no room on GPU 0"), {0, 1, 2, 3}, NO_MEMORY, 1),
    ],
)
def test_an_error_fails_as_few_images_as_possible(
    model: LlamaGen, monkeypatch: pytest.MonkeyPatch, error: Exception, failed: set[int], message: str, calls: int
) -> None:
    generate_codes, sizes = model.generate_codes, list[int]()

    def fail(conditions: list[int], **arguments: Any) -> torch.Tensor:
        sizes.append(len(conditions))
        if 2 in conditions:
            raise error
        return generate_codes(conditions, **arguments)

    monkeypatch.setattr(model, "generate_codes", fail)
    reports = run(EmbeddedEngine(model), works(model, 4))
    assert {key for each in failures(reports) for key in each.keys} == failed
    assert all(each.message == message and not each.is_users for each in failures(reports))
    assert set(images(reports)) == {0, 1, 2, 3} - failed
    assert len(sizes) == calls


def test_an_error_of_the_device_ends_the_worker(model: LlamaGen, monkeypatch: pytest.MonkeyPatch) -> None:
    class AcceleratorError(RuntimeError):
        pass

    def fail(*conditions: Any, **arguments: Any) -> torch.Tensor:
        raise AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(model, "generate_codes", fail)
    with pytest.raises(AcceleratorError):
        run(EmbeddedEngine(model), works(model, 2))


def test_a_batch_that_nobody_wants_stops_at_a_row_and_cancelled_images_are_not_decoded(model: LlamaGen) -> None:
    engine, inbox, reports = EmbeddedEngine(model), WorkInbox(), list[Report]()
    first, second = works(model, 2), [Work(9, 1, settings=model.settings()), Work(8, 1, settings=model.settings())]

    def report(message: Report) -> None:
        reports.append(message)
        if len(reports) == 2:
            inbox.cancel(work.key for work in first)
            inbox.cancel([8])
        if isinstance(message, ImageReport):
            inbox.close()

    inbox.put(first)
    inbox.put(second)
    engine.run(inbox, report)
    assert [each.row for each in reports if isinstance(each, RowsReport)] == [1, 2, 1, 2, 3, 4]
    assert set(images(reports)) == {9}
    assert {key for each in reports if isinstance(each, RowsReport) for key in each.keys} == {0, 1, 9}


def test_a_gpu_decodes_while_the_next_batch_is_sampled(model: LlamaGen, monkeypatch: pytest.MonkeyPatch) -> None:
    batches, order = [works(model, 2), [Work(7, 1, settings=model.settings())]], list[str]()
    inbox, pixels = WorkInbox(), model.pixels

    class Later:
        def __init__(self, codes: torch.Tensor) -> None:
            self.images = pixels(codes)

        def numpy(self) -> np.ndarray:
            order.append("wait")
            return self.images.numpy()

    monkeypatch.setattr(model, "pixels", Later)

    def report(message: Report) -> None:
        order.append(f"row {message.row}" if isinstance(message, RowsReport) else "image")
        if isinstance(message, ImageReport) and message.key == 7:
            inbox.close()

    for batch in batches:
        inbox.put(batch)
    engine = EmbeddedEngine(model)
    engine.decodes_later = True
    engine.run(inbox, report)
    rows = ["row 1", "row 2", "row 3", "row 4"]
    assert order == [*rows, "wait", "image", "image", *rows, "wait", "image"]


def test_a_cpu_reports_finished_images_before_it_begins_the_next_batch(model: LlamaGen) -> None:
    batches, order = [works(model, 1), [Work(7, 1, settings=model.settings())]], list[str]()

    class Noted(WorkInbox):
        def take(self, block: bool) -> list[Work]:
            found = super().take(block)
            order.append("take")
            return found

    inbox = Noted()

    def report(message: Report) -> None:
        if isinstance(message, ImageReport):
            order.append("image")
            if message.key == 7:
                inbox.close()

    for batch in batches:
        inbox.put(batch)
    EmbeddedEngine(model).run(inbox, report)
    assert order == ["take", "image", "take", "image", "take"]


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The windows of all batches."""
    found, sample = list[Any](), WindowLoop.run

    def run_loop(loop: WindowLoop, window: Any, report: Callable[[int], None]) -> None:
        found.append(window)
        sample(loop, window, report)

    monkeypatch.setattr(WindowLoop, "run", run_loop)
    return found


def test_on_a_cpu_a_server_compiles_small_models_too_and_bfloat16_images_do_not_depend_on_their_batch(
    pipeline: Pipeline, windows: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spec = WorkerSpec(str(pipeline.root / "argen"), device="cpu", dtype="bfloat16", batch_size=4, window=3)
    engine = load_engine(spec)
    together = images(run(engine, works(engine.model, 4)))
    for work in works(engine.model, 4):
        assert np.array_equal(images(run(engine, [work]))[work.key], together[work.key])
    assert caplog.text == ""

    def fail(self: CPUCodeDecoder, *arguments: Any) -> None:
        raise ValueError("there is no\ncompiler")

    monkeypatch.setattr(CPUCodeDecoder, "__init__", fail)
    for dtype in ("bfloat16", "float32"):
        assert run(load_engine(replace(spec, dtype=dtype)), works(engine.model, 1))
    assert caplog.messages == [
        "sampling in bfloat16 is not compiled (ValueError: there is no compiler), so it is slower, and images may "
        "depend on their batch; use float32 to avoid this",
        "sampling in float32 is not compiled (ValueError: there is no compiler), so it is slower",
    ]
    assert windows == [3] * 7  # five compiled batches, two others


def test_requests_do_not_know_the_window_of_the_server(model: LlamaGen, windows: list[Any]) -> None:
    engine, batch = EmbeddedEngine(model, window=6), works(model, 2)
    found = images(run(engine, batch))
    assert windows == [6]
    assert all(np.array_equal(found[work.key], expected(model, work)) for work in batch)
    assert engine.facts.sampling.keys() == set(IMAGE_SETTINGS)
    with pytest.raises(ValueError, match="there is no setting 'window' of sampling; the settings are temperature, "):
        engine.facts.settings({"window": 6})


def test_the_times_of_passes_are_measured_before_the_first_request(
    pipeline: Pipeline, windows: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = LlamaGen.from_pretrained(pipeline.root / "argen", batch_size=4)
    calls, measure = list[SamplingConfig](), decoder.measure_passes

    def measured(engine: Any, config: SamplingConfig) -> PassTimes:
        calls.append(config)
        return measure(engine, config)

    monkeypatch.setattr(decoder, "measure_passes", measured)
    monkeypatch.setattr(WindowChoice, "pays", lambda choice, rows: True)
    engine = EmbeddedEngine(loaded, window="auto")
    engine.prepare()
    assert len(calls) == 1
    batch = works(loaded, 2)
    found = images(run(engine, batch))
    assert (len(calls), len(windows)) == (1, 1)
    assert isinstance(windows[0], WindowChoice)
    assert all(np.array_equal(found[work.key], expected(loaded, work)) for work in batch)


def test_facts_have_the_ids_of_classes(model: LlamaGen, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ModelFacts.from_model(model).class_ids == ()  # they are the names
    names = [f"class {number}" for number in range(10)]
    monkeypatch.setattr(model, "class_names", ClassNames(names, [f"n{number:08}" for number in range(10)]))
    assert ModelFacts.from_model(model).class_names.find("n00000007") == 7


def test_a_tokenizer_needs_no_preparation(pipeline: Pipeline) -> None:
    assert load_engine(WorkerSpec(str(pipeline.tokenizer), batch_size=2)).facts.kind == "tokenizer"
