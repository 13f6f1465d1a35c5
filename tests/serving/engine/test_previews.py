"""Previews: their share of the time, and what they show."""

import io
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from llamagen import LlamaGen
from serving.engine.previews import GREY, GrowingImages, PreviewBudget


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class Decoder:
    """Stands in for a model: a row of codes becomes 4 rows of pixels of that level. Decoding takes time."""

    resolution = 64
    tokenizer = SimpleNamespace(config=SimpleNamespace(downsampling=4))

    def __init__(self, clock: Clock, seconds: float = 0.0) -> None:
        self.clock, self.seconds = clock, seconds
        self.decoded: list[tuple[int, int]] = []

    def preview(self, codes: Tensor, rows: int) -> list[Image.Image]:
        self.clock.advance(self.seconds * rows * len(codes))
        self.decoded.append((len(codes), rows))
        levels = codes.view(len(codes), 16, 16)[:, :rows].repeat_interleave(4, 1).repeat_interleave(4, 2)
        return [Image.fromarray(each.numpy().astype(np.uint8)).convert("RGB") for each in levels]


CODES = (torch.arange(16) * 15).repeat_interleave(16).expand(4, -1)


def levels(file: bytes) -> list[int]:
    """Level of the middle of each row of codes."""
    return [int(np.asarray(Image.open(io.BytesIO(file)))[4 * row + 2, 32, 0]) for row in range(16)]


def watch(seconds_of_a_row: float, seconds_of_decoding: float) -> tuple[Decoder, float, list[list[bytes]]]:
    """Show 16 rows of 4 images; decoder, share of the time for previews, files after each row."""
    clock = Clock()
    decoder, budget = Decoder(clock, seconds_of_decoding), PreviewBudget(clock)
    growing = GrowingImages(cast(Any, decoder), [None] * 4)
    files = []
    for row in range(1, 16):
        clock.advance(seconds_of_a_row)
        files.append(growing.update(CODES, row, budget))
    return decoder, 1 - 15 * seconds_of_a_row / clock.now, files


@pytest.mark.parametrize("cost", [0.001, 0.01, 0.03, 0.06, 0.2, 1.0])
def test_previews_take_at_most_a_quarter_of_the_time_after_the_first(cost: float) -> None:
    decoder, share, files = watch(0.4, cost)
    first = 4 * cost / decoder.clock.now
    assert share <= max(0.25, first) + 1e-9
    assert files[0]  # the first row is shown at once


def test_cheap_previews_show_every_row_of_every_image() -> None:
    decoder, _, files = watch(0.4, 0.001)
    assert all(files)
    assert decoder.decoded == [(4, 1), (4, 2), *[(4, 3)] * 13]  # the new row and two above it
    for file in files[-1]:
        assert np.allclose(levels(file), [*range(0, 225, 15), GREY[0]], atol=4)


def test_costly_previews_show_fewer_images_first() -> None:
    decoder, _, files = watch(0.4, 0.06)
    assert {count for count, _ in decoder.decoded[1:]} == {1}
    last = [file for file in files if file][-1]
    shown = [sum(abs(level - GREY[0]) > 4 or row in (8, 9) for row, level in enumerate(levels(file))) for file in last]
    assert shown[0] > 8
    assert shown[1:] == [3, 3, 3]  # the first row, and those that are as grey as the rest


def test_a_completion_starts_with_the_kept_rows_without_decoding() -> None:
    clock = Clock()
    decoder = Decoder(clock)
    image = Image.new("RGB", (64, 64), (250, 250, 250))
    growing = GrowingImages(cast(LlamaGen, decoder), [image] * 2, 6)
    files = growing.update(CODES[:2], 6, PreviewBudget(clock))
    assert decoder.decoded == []
    assert np.allclose(levels(files[0]), [250] * 6 + [GREY[0]] * 10, atol=4)
    growing.update(CODES[:2], 7, PreviewBudget(clock))
    assert decoder.decoded == [(2, 3)]
