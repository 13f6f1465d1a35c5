"""Crops have the size, the position and, up to rounding, the pixels of ADM's crops."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from datamodules.transforms.crops import random_crop, random_flip, ten_crops, view_names
from llamagen.centre_crop import centre_crop

TOLERANCE = 2
"""Maximum difference from Pillow's resizing, in levels."""

COLOUR = (200, 100, 0)
SMALL = [(5, 3), (3, 5), (7, 9), (1, 1), (1, 2), (2, 1), (12, 24)]
LARGE = [(97, 31), (31, 97), (64, 64), (65, 66), (41, 20), (150, 100), (100, 150), (200, 129)]
TALL = [(3, 1), (97, 31), (200, 40), (33, 16)]
"""Heights and widths; the last ones are taller than twice their width."""


def noise(height: int, width: int, multiple: int = 1) -> np.ndarray:
    """Random colours whose mean over ``multiple`` pixels is an integer."""
    levels = np.random.default_rng(1).integers(0, 256 // multiple, (height, width, 3)).astype(np.uint8)
    return levels * np.uint8(multiple)


def black_and_white(height: int, width: int) -> np.ndarray:
    """Pixels for which the filter exceeds the range of bytes."""
    return np.random.default_rng(2).integers(0, 2, (height, width, 3)).astype(np.uint8) * np.uint8(255)


def coordinates(height: int, width: int) -> np.ndarray:
    """An image whose red is the column and whose green is the row."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, 0 * x], axis=2).astype(np.uint8)


def shrunk(pixels: np.ndarray, short_side: int) -> np.ndarray:
    """The whole image, resized as in ADM with Pillow only."""
    image = Image.fromarray(pixels)
    width, height = image.size
    while min(width, height) >= 2 * short_side:
        width, height = width // 2, height // 2
        image = image.resize((width, height), Image.Resampling.BOX)
    scale = short_side / min(width, height)
    return np.asarray(image.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC))


def middle(pixels: np.ndarray, size: int) -> np.ndarray:
    top, left = ((side - size) // 2 for side in pixels.shape[:2])
    return pixels[top : top + size, left : left + size]


def difference(a: np.ndarray, b: np.ndarray) -> int:
    assert a.shape == b.shape
    return int(abs(a.astype(int) - b).max())


def is_plain(pixels: np.ndarray, size: int) -> bool:
    """Whether the image is a square of one colour."""
    return pixels.dtype == np.uint8 and pixels.shape == (size, size, 3) and bool((pixels == COLOUR).all())


@pytest.mark.parametrize("size", [1, 7, 32])
def test_crop_has_the_size_and_the_colour(size: int) -> None:
    for source in ((32, 32), (33, 32), (31, 97), (97, 31), (500, 375), (5, 3), (1, 40), (40, 1)):
        assert is_plain(centre_crop(np.full((*source, 3), COLOUR, np.uint8), size), size), source


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"),
    [
        (8, 8, slice(0, 8), slice(0, 8)),
        (8, 12, slice(0, 8), slice(2, 10)),
        (12, 8, slice(2, 10), slice(0, 8)),
        (8, 11, slice(0, 8), slice(1, 9)),
        (11, 8, slice(1, 9), slice(0, 8)),
        (20, 8, slice(6, 14), slice(0, 8)),
    ],
)
def test_image_whose_short_side_fits_is_cropped_without_resizing(
    height: int, width: int, rows: slice, columns: slice
) -> None:
    source = noise(height, width)
    assert np.array_equal(centre_crop(source, 8), source[rows, columns])


@pytest.mark.parametrize(("height", "width", "side"), [(16, 16, 2), (16, 24, 2), (24, 16, 2), (32, 32, 4), (32, 48, 4)])
def test_large_image_is_halved_with_a_box_filter(height: int, width: int, side: int) -> None:
    source = noise(height, width, side * side)
    means = source.reshape(height // side, side, width // side, side, 3).mean((1, 3))
    assert np.array_equal(centre_crop(source, 8), middle(means, 8))


@pytest.mark.parametrize("size", [8, 16, 27])
def test_pixels_match_pillow(size: int) -> None:
    for source in [*SMALL, *LARGE, *TALL]:
        for image in (noise(*source), black_and_white(*source), coordinates(*source)):
            assert difference(centre_crop(image, size), middle(shrunk(image, size), size)) <= TOLERANCE, source


@pytest.mark.parametrize("size", [8, 16, 27])
def test_image_taller_than_twice_its_width_has_exactly_the_pixels_of_pillow(size: int) -> None:
    for source in TALL:
        for image in (noise(*source), black_and_white(*source)):
            assert difference(centre_crop(image, size), middle(shrunk(image, size), size)) == 0, source


def test_crop_of_a_view_into_a_larger_image_matches_that_of_a_copy() -> None:
    source = noise(40, 50)
    piece = source[3:30, 45:12:-1]
    assert np.array_equal(centre_crop(piece, 16), centre_crop(piece.copy(), 16))


@pytest.mark.parametrize(("height", "width", "size"), [(40, 60, 16), (60, 40, 16), (10, 20, 16), (128, 64, 24)])
def test_crop_is_centred(height: int, width: int, size: int) -> None:
    y, x = np.mgrid[:height, :width]
    hill = 255 - 4 * np.hypot(y - (height - 1) / 2, x - (width - 1) / 2)
    cropped = centre_crop(np.stack(3 * [hill.clip(0, 255).astype(np.uint8)], 2), size)
    assert difference(cropped, cropped[::-1]) <= TOLERANCE
    assert difference(cropped, cropped[:, ::-1]) <= TOLERANCE
    assert int(cropped.max()) - int(cropped.min()) > 20


SIZE, SHORT_SIDES = 16, range(16, 21)


def places(source: np.ndarray, repeats: int) -> list[tuple[int, int, int]]:
    """Short side, row and column of random crops, found by search among all possible crops."""
    known = {}
    for side in SHORT_SIDES:
        whole = shrunk(source, side)
        for top in range(whole.shape[0] - SIZE + 1):
            for left in range(whole.shape[1] - SIZE + 1):
                known[side, top, left] = whole[top : top + SIZE, left : left + SIZE, :2]
    names, candidates = list(known), np.stack(list(known.values())).astype(np.int16)
    generator = np.random.default_rng(0)
    found: dict[bytes, tuple[int, int, int]] = {}
    found_places = []
    for _ in range(repeats):
        crop = random_crop(source, SIZE, generator)
        if crop.tobytes() not in found:
            fits = np.flatnonzero(abs(candidates - crop[..., :2]).max((1, 2, 3)) <= TOLERANCE)
            assert len(fits) == 1
            found[crop.tobytes()] = names[fits[0]]
        found_places.append(found[crop.tobytes()])
    return found_places


# Some of these short sides (32 to 40 pixels) involve halving and others do not.
@pytest.mark.parametrize("source", [(16, 16), (27, 18), (18, 27), (34, 34), (50, 37), (100, 150), (6, 9)], ids=str)
def test_random_crop_takes_every_length_and_position_of_the_resized_image(source: tuple[int, int]) -> None:
    image = coordinates(*source)
    found = places(image, 2000)
    sides = Counter(side for side, _, _ in found)
    assert sorted(sides) == list(SHORT_SIDES)
    assert all(330 < count < 470 for count in sides.values())  # 400 ± 18
    for side in SHORT_SIDES:
        for axis, length in enumerate(shrunk(image, side).shape[:2], start=1):
            counts = Counter(place[axis] for place in found if place[0] == side)
            assert sorted(counts) == list(range(length - SIZE + 1))
            assert min(counts.values()) > 0.4 * sides[side] / len(counts)
    # Row and column are independent.
    corners = Counter((top, left) for side, top, left in found if side == 20)
    assert len(corners) >= 25


@pytest.mark.parametrize("size", [1, 30, 32, 256])
def test_short_side_is_at_most_size_divided_by_0_8(size: int) -> None:
    # On a ramp over 512 pixels, resized to a short side s, one pixel rises by 256 / s levels.
    generator = np.random.default_rng(0)
    source = np.broadcast_to(np.arange(512)[None, :, None] // 2, (512, 512, 3)).astype(np.uint8)
    crops = [random_crop(source, size, generator) for _ in range(60 if size > 20 else 20)]
    assert {crop.shape for crop in crops} == {(size, size, 3)}
    if size > 20:
        inner = slice(3, size - 3)  # the filter has no neighbours at the edge of the image
        sides = [256 / np.polyfit(np.arange(size)[inner], crop[0, inner, 0], 1)[0] for crop in crops]
        assert size - 0.2 < min(sides) < 1.05 * size
        assert 1.2 * size < max(sides) < np.ceil(1.25 * size) + 0.2


def test_random_crop_of_small_images_has_the_size_and_the_colour() -> None:
    for source in ((5, 3), (3, 5), (1, 40), (40, 1), (1, 1), (500, 375)):
        generator = np.random.default_rng(0)
        for _ in range(20):
            assert is_plain(random_crop(np.full((*source, 3), COLOUR, np.uint8), 32, generator), 32), source


def test_random_crop_depends_on_its_generator_alone() -> None:
    source = noise(40, 50)
    found_places = [
        [random_crop(source, 16, generator).tobytes() for _ in range(5)]
        for generator in map(np.random.default_rng, (3, 3, 4))
    ]
    assert found_places[0] == found_places[1] != found_places[2]


def test_half_of_the_images_are_mirrored() -> None:
    source = coordinates(4, 6)
    generator = np.random.default_rng(0)
    flipped = [random_flip(source, generator) for _ in range(1000)]
    mirrored = [np.array_equal(image, source[:, ::-1]) for image in flipped]
    assert all(was or np.array_equal(image, source) for was, image in zip(mirrored, flipped, strict=True))
    assert 430 < sum(mirrored) < 570  # 500 ± 16


TEN = ["centre", "top-left", "top-right", "bottom-left", "bottom-right"]
TEN += [f"{name} flipped" for name in TEN]


def test_views_have_names() -> None:
    assert view_names("centre", [1.1]) == ["centre"]
    assert view_names("flip", [1.1]) == ["centre", "centre flipped"]
    assert view_names("ten_crop", [1.1, 1.05]) == [f"1.1 {name}" for name in TEN] + [f"1.05 {name}" for name in TEN]
    assert view_names("ten_crop", [2]) == [f"2 {name}" for name in TEN]


# The margins are even and odd.
@pytest.mark.parametrize(("size", "share", "side"), [(8, 1.25, 10), (8, 1.4, 11), (20, 1.05, 21), (16, 1.99, 31)])
def test_ten_crops_match_their_names(size: int, share: float, side: int) -> None:
    source = noise(side, side)
    low, half, high = slice(0, size), slice((side - size) // 2, (side - size) // 2 + size), slice(side - size, side)
    pieces = [source[half, half], source[low, low], source[low, high], source[high, low], source[high, high]]
    expected = dict(zip(TEN, [*pieces, *(piece[:, ::-1] for piece in pieces)], strict=True))
    views = ten_crops(source, size, [share])
    assert len(views) == 10
    for name, view in zip(view_names("ten_crop", [share]), views, strict=True):
        assert np.array_equal(view, expected[name.partition(" ")[2]]), name


@pytest.mark.parametrize("source", [(300, 400), (17, 13), (90, 40)], ids=str)
def test_ten_crops_of_each_range_come_from_the_centre_crop_of_that_size(source: tuple[int, int]) -> None:
    image, size, ranges = noise(*source), 64, [1.1, 1.05]
    views = ten_crops(image, size, ranges)
    assert [view.shape for view in views] == [(size, size, 3)] * 20
    for number, side in enumerate([70, 67]):  # 70.4 and 67.2
        square = centre_crop(image, side)
        centre, corner, other = (views[10 * number + place] for place in (0, 1, 4))
        assert np.array_equal(centre, square[(side - size) // 2 :, (side - size) // 2 :][:size, :size])
        assert np.array_equal(corner, square[:size, :size])
        assert np.array_equal(other, square[-size:, -size:])


def test_ten_crops_without_a_margin_are_the_centre_crop() -> None:
    image = noise(30, 40)
    centre = centre_crop(image, 16)
    views = ten_crops(image, 16, [1.0])
    assert all(np.array_equal(view, centre) for view in views[:5])
    assert all(np.array_equal(view, centre[:, ::-1]) for view in views[5:])
