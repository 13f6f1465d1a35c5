"""Crops have the size, the place and the pixels that ADM gives them."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from datamodules.crops import centre_crop, random_crop, random_flip


def random_grey(height: int, width: int, multiple: int) -> np.ndarray:
    """Levels whose mean over ``multiple`` pixels is a whole number."""
    return np.random.default_rng(1).integers(0, 256 // multiple, (height, width)).astype(np.uint8) * multiple


def block_means(levels: np.ndarray, side: int) -> np.ndarray:
    height, width = levels.shape
    return levels.reshape(height // side, side, width // side, side).mean((1, 3))


@pytest.mark.parametrize("size", [1, 7, 32])
@pytest.mark.parametrize("source", [(32, 32), (33, 32), (31, 97), (97, 31), (500, 375), (64, 64), (5, 3), (1, 40)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_the_crop_has_the_size_and_the_mode(source: tuple[int, int], size: int, mode: str) -> None:
    cropped = centre_crop(Image.new(mode, source, 200 if mode == "L" else (200, 100, 0)), size)
    assert (cropped.size, cropped.mode) == ((size, size), mode)
    assert cropped.getextrema() == ((200, 200) if mode == "L" else ((200, 200), (100, 100), (0, 0)))


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"),
    [
        (8, 8, slice(0, 8), slice(0, 8)),
        (8, 12, slice(0, 8), slice(2, 10)),
        (12, 8, slice(2, 10), slice(0, 8)),
        (8, 11, slice(0, 8), slice(1, 9)),
        (11, 8, slice(1, 9), slice(0, 8)),
    ],
)
def test_a_picture_whose_short_side_fits_is_cut_and_not_resized(
    height: int, width: int, rows: slice, columns: slice
) -> None:
    source = random_grey(height, width, 1)
    assert np.array_equal(np.asarray(centre_crop(Image.fromarray(source), 8)), source[rows, columns])


@pytest.mark.parametrize(("height", "width", "side"), [(16, 16, 2), (16, 24, 2), (24, 16, 2), (32, 32, 4), (32, 48, 4)])
def test_a_large_picture_is_halved_by_means_of_boxes(height: int, width: int, side: int) -> None:
    source = random_grey(height, width, side * side)
    means = block_means(source, side)
    top, left = (means.shape[0] - 8) // 2, (means.shape[1] - 8) // 2
    assert np.array_equal(np.asarray(centre_crop(Image.fromarray(source), 8)), means[top : top + 8, left : left + 8])


@pytest.mark.parametrize("side", [3, 5, 9, 15])
def test_a_picture_of_less_than_twice_the_size_is_resized_bicubically(side: int) -> None:
    source = Image.fromarray(random_grey(side, side, 1))
    assert np.array_equal(
        np.asarray(centre_crop(source, 8)), np.asarray(source.resize((8, 8), Image.Resampling.BICUBIC))
    )


@pytest.mark.parametrize(("height", "width", "size"), [(40, 60, 16), (60, 40, 16), (10, 20, 16), (128, 64, 24)])
def test_the_crop_is_centred(height: int, width: int, size: int) -> None:
    y, x = np.mgrid[:height, :width]
    hill = 255 - 4 * np.hypot(y - (height - 1) / 2, x - (width - 1) / 2)
    cropped = np.asarray(centre_crop(Image.fromarray(hill.clip(0, 255).astype(np.uint8)), size)).astype(int)
    assert abs(cropped - cropped[::-1]).max() <= 1
    assert abs(cropped - cropped[:, ::-1]).max() <= 1
    assert cropped.max() - cropped.min() > 20


SIZE, SHORT_SIDES = 16, range(16, 21)


def coordinates(height: int, width: int) -> Image.Image:
    """A picture whose red says the column and whose green says the row."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, 0 * x], axis=2).astype(np.uint8))


def shrunk(image: Image.Image, short_side: int) -> np.ndarray:
    """The whole picture as ADM resizes it."""
    width, height = image.size
    while min(width, height) >= 2 * short_side:
        width, height = width // 2, height // 2
        image = image.resize((width, height), Image.Resampling.BOX)
    scale = short_side / min(width, height)
    return np.asarray(image.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC))


def places(source: Image.Image, draws: int) -> list[tuple[int, int, int]]:
    """Short side, row and column of random crops: each is looked up among all that there can be."""
    known = {}
    for side in SHORT_SIDES:
        whole = shrunk(source, side)
        for top in range(whole.shape[0] - SIZE + 1):
            for left in range(whole.shape[1] - SIZE + 1):
                known[whole[top : top + SIZE, left : left + SIZE].tobytes()] = (side, top, left)
    generator = np.random.default_rng(0)
    return [known[np.asarray(random_crop(source, SIZE, generator)).tobytes()] for _ in range(draws)]


# Of these (32 to 40 pixels) some short sides are reached by a halving and others not.
@pytest.mark.parametrize("source", [(16, 16), (18, 27), (27, 18), (34, 34), (37, 50), (150, 100), (9, 6)], ids=str)
def test_a_random_crop_is_a_piece_of_the_shrunk_picture_with_every_length_and_place(source: tuple[int, int]) -> None:
    picture = coordinates(*source)
    found = places(picture, 2000)
    sides = Counter(side for side, _, _ in found)
    assert sorted(sides) == list(SHORT_SIDES)
    assert all(330 < count < 470 for count in sides.values())  # 400 ± 18
    for side in SHORT_SIDES:
        for axis, length in enumerate(shrunk(picture, side).shape[:2], start=1):
            counts = Counter(place[axis] for place in found if place[0] == side)
            assert sorted(counts) == list(range(length - SIZE + 1))
            assert min(counts.values()) > 0.4 * sides[side] / len(counts)
    # Row and column are drawn independently.
    corners = Counter((top, left) for side, top, left in found if side == 20)
    assert len(corners) >= 25


@pytest.mark.parametrize("size", [1, 7, 30, 32, 256])
def test_the_short_side_is_drawn_up_to_size_by_eight_tenths(size: int) -> None:
    # On a ramp over the whole picture, one pixel of a short side s rises by 1 / s.
    generator = np.random.default_rng(0)
    source = Image.fromarray((np.arange(512, dtype=np.float32) / 512)[None].repeat(512, 0))
    crops = [np.asarray(random_crop(source, size, generator)) for _ in range(60)]
    assert {crop.shape for crop in crops} == {(size, size)}
    if size > 20:
        middle = slice(3, size - 3)  # the filter has no neighbours at the edge of the picture
        sides = [1 / np.diff(crop[0, middle]).mean() for crop in crops]
        assert size - 0.1 < min(sides) < 1.05 * size
        assert 1.2 * size < max(sides) < np.ceil(1.25 * size) + 0.1


@pytest.mark.parametrize("source", [(5, 3), (3, 5), (1, 40), (40, 1), (1, 1), (500, 375)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_random_crop_has_the_size_and_the_mode_also_of_small_pictures(source: tuple[int, int], mode: str) -> None:
    colour = 200 if mode == "L" else (200, 100, 0)
    generator = np.random.default_rng(0)
    for _ in range(20):
        cropped = random_crop(Image.new(mode, source, colour), 32, generator)
        assert (cropped.size, cropped.mode) == ((32, 32), mode)
        assert cropped.getextrema() == ((200, 200) if mode == "L" else ((200, 200), (100, 100), (0, 0)))


def test_half_of_the_pictures_are_mirrored() -> None:
    source = coordinates(4, 6)
    generator = np.random.default_rng(0)
    flipped = [np.asarray(random_flip(source, generator)) for _ in range(1000)]
    mirrored = [np.array_equal(picture, np.asarray(source)[:, ::-1]) for picture in flipped]
    assert all(was or np.array_equal(picture, source) for was, picture in zip(mirrored, flipped, strict=True))
    assert 430 < sum(mirrored) < 570  # 500 ± 16
