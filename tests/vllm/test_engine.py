"""The engine of the server's workers: its images are those of ``LlamaGen``, whatever else it does at the same time."""

import io
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from llamagen import LlamaGen
from serving.engine.engine import FailureReport, Report, RowsReport, Work
from serving.engine.spec import WorkerSpec
from serving.vllm.engine import VLLMEngine, load_engine
from tests.vllm.models import export_small
from tests.vllm.workloads import SETTINGS, ScriptedInbox, assert_images, images, png, run


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
