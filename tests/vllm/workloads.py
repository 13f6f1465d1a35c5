"""Work for an engine as the dispatcher of the server gives it, and what the engine must report."""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from PIL import Image

from llamagen import LlamaGen
from llamagen.sampling import SamplingConfig
from serving.engine.engine import FailureReport, ImageReport, Report, RowsReport, Work
from serving.vllm.engine import VLLMEngine
from tests.vllm.models import CASES

SETTINGS = [SamplingConfig(**case.settings) for case in CASES]


class ScriptedInbox:
    """Gives work in portions, one at each call, and closes when all images are reported.

    Args:
        portions: work by call of ``take``; may be empty.
        cancel: called with the reports so far; returns the keys to cancel.
    """

    def __init__(self, portions: Sequence[Sequence[Work]], cancel: Callable[[list[Report]], set[int]] | None = None):
        self.portions, self.reports = [list(portion) for portion in portions], list[Report]()
        self._cancel = cancel or (lambda reports: set())

    def take(self, block: bool) -> list[Work]:
        while self.portions:
            portion = self.portions.pop(0)
            if portion or not block:
                return portion
        return []

    def cancelled(self) -> set[int]:
        return self._cancel(self.reports) - self.finished

    @property
    def closed(self) -> bool:
        return not self.portions and self.expected <= self.finished | self._cancel(self.reports)

    @property
    def finished(self) -> set[int]:
        images = {report.key for report in self.reports if isinstance(report, ImageReport)}
        failures = [report.keys for report in self.reports if isinstance(report, FailureReport)]
        return images.union(*failures)

    def start(self) -> "ScriptedInbox":
        """Remember what is expected."""
        self.expected = {work.key for portion in self.portions for work in portion}
        return self


def images(reports: Sequence[Report]) -> dict[int, ImageReport]:
    """Finished images by key; each is reported once."""
    found = [report for report in reports if isinstance(report, ImageReport)]
    assert len({report.key for report in found}) == len(found)
    return {report.key: report for report in found}


def rows_of(reports: Sequence[Report], key: int) -> list[int]:
    """Rows that were reported of an image, in order."""
    return [report.row for report in reports if isinstance(report, RowsReport) and key in report.keys]


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
