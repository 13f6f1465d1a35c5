"""Progress of sampling: a callback gets each complete row of codes, and may stop the call."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from llamagen.sampling import ImageSampler, Sampler, SamplingConfig
from llamagen.sampling.decoder import PooledCodeDecoder
from tests.small_models import codes_for, small_gpt, small_vqgan

ENGINES = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
GUIDED = SamplingConfig(0.9, 30, 0.95, 2.0, guidance_steps=6)


class Rows:
    """Records the calls of ``on_row``, and keeps the codes without a copy."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []
        self.codes: list[Tensor] = []

    def __call__(self, codes: Tensor, count: int, start: int) -> None:
        self.calls.append((count, start))
        self.codes.append(codes)

    def assert_parts_of(self, codes: Tensor) -> None:
        for (count, start), partial in zip(self.calls, self.codes, strict=True):
            assert torch.equal(partial[:, :count], codes[start : start + len(partial), :count])
            assert not partial[:, count:].any()


@ENGINES
@pytest.mark.parametrize(
    ("kept", "first", "window"), [(0, 4, 1), (0, 4, 5), (3, 4, 1), (4, 4, 3), (11, 8, 1), (11, 8, 99), (16, 16, 1)]
)
def test_each_complete_row_is_reported_once(kept: int, first: int, window: int, compiled: bool) -> None:
    gpt, labels, rows = small_gpt(), torch.arange(3), Rows()
    sampler, given = Sampler(gpt, 2, compiled=compiled), codes_for(gpt, 3, kept)
    expected = sampler(labels, GUIDED, kept=given)
    found = sampler(labels, replace(GUIDED, window=window), kept=given, on_row=rows)
    assert torch.equal(found, expected)
    assert rows.calls == [(count, start) for start in (0, 2) for count in range(first, 17, 4)]
    assert [len(codes) for codes in rows.codes[:: len(rows.codes) // 2]] == [2, 1]
    rows.assert_parts_of(expected)


def test_copies_that_fill_a_batch_are_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, rows = Sampler(small_gpt(), 4), Rows()
    monkeypatch.setattr(sampler.decoder, "full_batches", True)
    rows_of_five = sampler(torch.arange(5), GUIDED, on_row=rows)
    assert [len(codes) for codes in rows.codes] == [4] * 4 + [1] * 4
    rows.assert_parts_of(rows_of_five)


def test_an_image_sampler_counts_the_images_of_the_whole_call() -> None:
    sampler, rows = ImageSampler(small_gpt(vocab_size=64), small_vqgan(), 2), Rows()
    _, codes = sampler(torch.arange(5), GUIDED, on_row=rows)
    assert rows.calls == [(count, start) for start in (0, 2, 4) for count in (4, 8, 12, 16)]
    rows.assert_parts_of(codes)


def test_previews_do_not_change_the_images() -> None:
    sampler, shapes = ImageSampler(small_gpt(vocab_size=64), small_vqgan(), 2), list[tuple[int, ...]]()
    expected, _ = sampler(torch.arange(3), GUIDED)
    images, _ = sampler(
        torch.arange(3),
        GUIDED,
        on_row=lambda codes, count, _: shapes.append(tuple(sampler.pixels.preview(codes, count // 4).shape)),
    )
    assert torch.equal(images.tensor(), expected.tensor())
    assert shapes == [(images, 4 * rows, 16, 3) for images in (2, 1) for rows in (1, 2, 3, 4)]


@ENGINES
@pytest.mark.parametrize(("error", "window"), [(ArithmeticError, 1), (KeyboardInterrupt, 1), (ArithmeticError, 3)])
def test_an_exception_of_the_callback_stops_sampling_and_frees_its_memory(
    error: type[Any], window: int, compiled: bool
) -> None:
    gpt, labels = small_gpt(), torch.arange(5)
    sampler, seen = Sampler(gpt, 2, compiled=compiled), list[int]()
    expected = sampler(labels, GUIDED)

    def stop(codes: Tensor, count: int, start: int) -> None:
        seen.append(count)
        if (start, count) == (2, 8):
            raise error

    gpt.train()
    with pytest.raises(error):
        sampler(labels, replace(GUIDED, window=window), on_row=stop)
    assert gpt.training
    assert seen == [4, 8, 12, 16, 4, 8]
    assert isinstance(sampler.decoder, PooledCodeDecoder)
    assert len(sampler.decoder.caches.free) == 1
    assert torch.equal(sampler(labels, GUIDED), expected)
