"""The engine of the server's workers: its images are those of ``LlamaGen``, whatever else it does at the same time."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from llamagen import LlamaGen
from llamagen.sampling import SamplingConfig
from serving.engine.engine import FailureReport, Report, RowsReport, Work
from serving.engine.spec import WorkerSpec
from serving.vllm.engine import VLLMEngine, load_engine
from tests.small_models import small_gpt
from tests.vllm.models import CASES, checkpoint_files, export_small
from tests.vllm.workloads import ScriptedInbox, images, rows_of

SETTINGS = [SamplingConfig(**case.settings) for case in CASES]


@contextmanager
def started(*arguments: Any, **options: Any) -> Iterator[VLLMEngine]:
    """An engine. A process can have one at a time."""
    engine = VLLMEngine(*arguments, **options, device="cpu", capacity=4)
    try:
        yield engine
    finally:
        engine.close()


def run(engine: VLLMEngine, inbox: ScriptedInbox) -> list[Report]:
    """Run an engine until all of its work is reported."""
    engine.run(inbox.start(), inbox.reports.append)
    assert not engine._running
    assert engine.engine.get_num_unfinished_requests() == 0
    return inbox.reports


def png(model: LlamaGen, name: int) -> bytes:
    side = model.resolution
    assert side is not None
    pixels = np.random.default_rng(name).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def expected(model: LlamaGen, work: Work) -> torch.Tensor:
    """Codes (h, w) of an image from our own sampler, alone."""
    assert work.settings is not None
    kept = None
    if work.image is not None:
        kept = model.encode(Image.open(io.BytesIO(work.image)))[0, : work.keep_rows]
    arguments = {"kept": kept, "seed": work.seed, "indices": [work.index], "progress": False}
    return model.generate_codes([work.condition], **arguments, **asdict(work.settings))[0]


def assert_images(model: LlamaGen, works: list[Work], reports: list[Report]) -> None:
    """Assert that images are those of our own sampler and decoder, and rows are reported in order."""
    found, keys, grid = images(reports), {work.key for work in works}, model.gpt.config.grid_size  # type: ignore[union-attr]
    failures = [report for report in reports if isinstance(report, FailureReport) and report.keys[0] in keys]
    assert failures == []
    assert found.keys() == keys
    for work in works:
        codes = expected(model, work)
        assert np.array_equal(found[work.key].codes, codes.numpy()), work
        assert np.array_equal(found[work.key].pixels, np.asarray(model.decode(codes)[0]))
        assert rows_of(reports, work.key) == list(range(max(work.keep_rows, 1), grid + 1))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[VLLMEngine, LlamaGen]]:
    folder = tmp_path_factory.mktemp("engine") / "model"
    export_small(folder, dim=64, n_head=2, vocab_size=64)
    engine = load_engine(WorkerSpec(str(folder), engine="vllm", device="cpu", batch_size=8))
    yield engine, LlamaGen.from_pretrained(folder, device="cpu", compile=False)
    engine.close()


def test_24_requests_of_all_settings_at_staggered_times(loaded: tuple[VLLMEngine, LlamaGen]) -> None:
    engine, model = loaded
    works = [
        Work(key, key % 7, seed=-3 + key, index=2**33 * key, settings=SETTINGS[key % len(SETTINGS)], previews=key == 5)
        for key in range(24)
    ]
    for key in range(2, 24, 5):
        works[key] = replace(works[key], image=png(model, key), keep_rows=1 + key % 3)
    portions: list[list[Work]] = []
    for start in range(0, 24, 3):  # while earlier ones run, and more than there is room for
        portions += [works[start : start + 3], [], []]
    reports = run(engine, ScriptedInbox(portions))
    assert_images(model, works, reports)
    previews = [report for report in reports if isinstance(report, RowsReport) and report.previews is not None]
    assert {report.keys for report in previews} == {(5,)}
    shown = Image.open(io.BytesIO(previews[0].previews[0]))  # type: ignore[index]
    assert shown.size == (16, 16)


def test_cancelled_images_end_and_the_others_go_on(loaded: tuple[VLLMEngine, LlamaGen]) -> None:
    engine, model = loaded
    works = [Work(key, 3, seed=1, index=key, settings=SETTINGS[6]) for key in range(100, 112)]

    def after_two_rows(reports: list[Report]) -> set[int]:
        return (
            {100, 103, 111} if any(isinstance(report, RowsReport) and report.row == 2 for report in reports) else set()
        )

    reports = run(engine, ScriptedInbox([works], after_two_rows))
    assert_images(model, [work for work in works if work.key not in (100, 103, 111)], reports)


def test_a_closed_inbox_ends_at_once(loaded: tuple[VLLMEngine, LlamaGen]) -> None:
    engine, _ = loaded
    inbox = ScriptedInbox([[Work(key, 3, settings=SETTINGS[3]) for key in range(200, 204)]])
    inbox.start().expected = set()  # closed after the first step
    engine.run(inbox, inbox.reports.append)
    assert engine.engine.get_num_unfinished_requests() == 0
    assert images(inbox.reports) == {}


def test_an_image_is_reconstructed_or_kept_whole(loaded: tuple[VLLMEngine, LlamaGen]) -> None:
    engine, model = loaded
    file = png(model, 0)
    reports = run(engine, ScriptedInbox([[Work(300, None, image=file), Work(301, 2, 0, 0, SETTINGS[0], file, 4)]]))
    codes = model.encode(Image.open(io.BytesIO(file)))[0]
    for report in images(reports).values():
        assert np.array_equal(report.codes, codes.numpy())
        assert np.array_equal(report.pixels, np.asarray(model.decode(codes)[0]))
    assert len(images(reports)) == 2


def test_wrong_work_fails_with_one_sentence_and_the_others_go_on(loaded: tuple[VLLMEngine, LlamaGen]) -> None:
    engine, model = loaded
    good = Work(400, 1, settings=SETTINGS[6])
    wrong = [Work(401, 7, settings=SETTINGS[0]), Work(402, 1, 0, 0, SETTINGS[0], b"no image", 1)]
    reports = run(engine, ScriptedInbox([[wrong[0], good, wrong[1]]]))
    failures = {report.keys[0]: report for report in reports if isinstance(report, FailureReport)}
    assert failures.keys() == {401, 402}
    assert all(report.is_users and "\n" not in report.message for report in failures.values())
    assert_images(model, [good], reports)


def test_captions_of_several_lengths_with_kept_rows(tmp_path: Path) -> None:
    gpt = small_gpt(condition="text", dim=64, n_head=2, n_kv_head=1, vocab_size=64)
    files = checkpoint_files(gpt, tmp_path / "model")
    model = LlamaGen.from_pretrained(files["checkpoint"], tokenizer=files["tokenizer"], device="cpu", compile=False)

    def encode(prompts: list[str], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Stands for T5: features of a prompt's length."""
        lengths = [len(prompt) for prompt in prompts]
        features = [torch.randn(6, 12, generator=torch.Generator().manual_seed(length)) for length in lengths]
        return torch.stack(features), torch.tensor(lengths)

    works = [Work(key, "abcdef"[: key + 1], seed=9, index=key, settings=SETTINGS[key]) for key in range(6)]
    works += [replace(works[key], key=10 + key, image=png(model, key), keep_rows=2) for key in range(6)]
    with started(files["checkpoint"], tokenizer=files["tokenizer"]) as engine:  # not an exported folder
        engine._conditions = model._text = encode  # type: ignore[assignment]
        assert_images(model, works, run(engine, ScriptedInbox([works[:5], [], works[5:]])))


def test_logits_that_are_not_finite_fail_their_image(loaded: tuple[VLLMEngine, LlamaGen]) -> None:
    engine, model = loaded
    works = [Work(500 + key, key, settings=SETTINGS[key % 2 * 6]) for key in range(4)]
    works[2] = replace(works[2], settings=SamplingConfig(guidance_scale=3e38))
    reports = run(engine, ScriptedInbox([works]))
    (failure,) = (report for report in reports if isinstance(report, FailureReport))
    assert (failure.keys, failure.is_users) == ((502,), False)
    assert failure.message == "the logits of the autoregressive model are not finite in float32; use float32"
    assert_images(model, [work for work in works if work.key != 502], reports)
