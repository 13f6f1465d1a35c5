"""The images of a report do not depend on order, batches or ranks; neighbours are the nearest."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from evaluation.gallery import CLASSES, NEIGHBOURED, NEIGHBOURS, PER_CLASS, RANDOM, RECONSTRUCTED, Gallery
from evaluation.reference import Reference
from llamagen.grids import MARGIN, captioned_grid, grid_image
from tests.metrics.extractors import SIZE, random_images

COUNT, KINDS = 500, 23


def shown(index: Tensor, batch_size: int = 64, labels: bool = True, gallery: Gallery | None = None) -> Gallery:
    """A gallery with some of 500 images of 23 classes."""
    gallery = Gallery() if gallery is None else gallery
    batch = random_images(COUNT, 0)
    for some in index.split(batch_size):
        features = batch[some].flatten(1).float()
        gallery.add(batch[some], some, features, some % KINDS if labels else None)
    return gallery


def content(gallery: Gallery) -> tuple[list[int], dict[int, list[int]]]:
    """The positions of its images; checks their content."""
    batch = random_images(COUNT, 0).permute(0, 2, 3, 1).numpy()
    for some in (gallery.chosen, *gallery.by_class.values()):
        for number, exhibit in some.items():
            assert np.array_equal(exhibit.image, batch[number])
            assert np.array_equal(exhibit.features, batch[number].transpose(2, 0, 1).ravel())
    return list(gallery.chosen), {label: list(gallery.by_class[label]) for label in sorted(gallery.by_class)}


def cells(image: Image.Image, side: int = SIZE) -> list[list[np.ndarray]]:
    """The images of a grid."""
    array, step = np.asarray(image), side + MARGIN
    assert (array.shape[0] - MARGIN) % step == (array.shape[1] - MARGIN) % step == 0
    return [
        [array[top : top + side, left : left + side] for left in range(MARGIN, array.shape[1], step)]
        for top in range(MARGIN, array.shape[0], step)
    ]


def test_the_selection_does_not_depend_on_order_batches_and_ranks() -> None:
    expected = content(shown(torch.arange(COUNT)))
    shuffled = torch.randperm(COUNT, generator=torch.Generator().manual_seed(1))
    assert content(shown(shuffled, 7)) == expected
    assert content(shown(torch.arange(COUNT).flip(0), 1)) == expected
    assert content(shown(torch.cat([shuffled, shuffled[:50]]))) == expected
    for ranks in (2, 3):
        galleries = [shown(torch.arange(rank, COUNT, ranks)) for rank in range(ranks)]
        assert content(Gallery().merge(galleries)) == expected
        assert content(Gallery().merge(galleries[::-1])) == expected


def test_keeps_few_images_spread_over_all() -> None:
    gallery = Gallery()
    for start in range(0, COUNT, 50):
        shown(torch.arange(start, start + 50), gallery=gallery)
        held = {number for some in (gallery.chosen, *gallery.by_class.values()) for number in some}
        assert len(held) <= RANDOM + CLASSES * PER_CLASS
    chosen, by_class = content(gallery)
    assert len(set(chosen)) == RANDOM
    assert min(chosen) < COUNT / 10
    assert max(chosen) > COUNT * 9 / 10
    assert len(by_class) == CLASSES
    assert by_class == {label: list(range(label, COUNT, KINDS))[:PER_CLASS] for label in by_class}


@pytest.mark.parametrize("rows_last", [False, True])
def test_keeps_copies_and_not_views_of_the_batch(rows_last: bool) -> None:
    gallery, batch, features = Gallery(), random_images(9, 0), torch.zeros(9, 2)
    if rows_last:
        batch = batch.to(memory_format=torch.channels_last)
    gallery.add(batch, torch.arange(9), features, originals=batch)
    batch.fill_(0)
    features.fill_(1)
    for number, exhibit in gallery.chosen.items():
        before = random_images(9, 0)[number].permute(1, 2, 0).numpy()
        assert np.array_equal(exhibit.image, before)
        assert np.array_equal(exhibit.original, before)  # type: ignore[arg-type]
        assert not exhibit.features.any()


def test_shows_all_images_of_a_small_dataset() -> None:
    chosen, by_class = content(shown(torch.arange(11)))
    assert sorted(chosen) == list(range(11))
    assert len(by_class) == CLASSES


@pytest.mark.parametrize("given", [False, True])
def test_images_without_classes_have_no_class_grid(given: bool) -> None:
    gallery, batch = Gallery(), random_images(5, 0)
    gallery.add(batch, torch.arange(5), torch.zeros(5, 2), torch.full((5,), -1) if given else None)
    assert set(gallery.grids(None)) == {"random"}


def test_random_images_have_captions() -> None:
    def shown_with(captions: list[str] | None) -> Image.Image:
        gallery = Gallery()
        for number in torch.arange(3).split(1):
            text = None if captions is None else [captions[int(number)]]
            gallery.add(random_images(3, 0)[number], number, torch.zeros(1, 2), captions=text)
        return gallery.grids(None)["random"]

    batch, texts = random_images(3, 0).permute(0, 2, 3, 1).numpy(), ["a dog", "", "a red house"]
    order = list(shown(torch.arange(3)).chosen)
    expected = captioned_grid([[batch[number] for number in order]], [[texts[number] for number in order]])
    assert np.array_equal(shown_with(texts), expected)
    for unknown in (None, [""] * 3):
        assert np.array_equal(shown_with(unknown), grid_image([[batch[number] for number in order]]))


def test_an_empty_gallery_has_no_grids() -> None:
    assert Gallery().grids(None) == {}


def test_each_class_has_a_row() -> None:
    gallery = shown(torch.arange(COUNT))
    rows = cells(gallery.grids(None)["classes"])
    batch = random_images(COUNT, 0).permute(0, 2, 3, 1).numpy()
    expected = [[batch[number] for number in numbers] for numbers in content(gallery)[1].values()]
    assert np.array_equal(np.array(rows), np.array(expected))


def reference(features: Tensor, thumbnails: np.ndarray) -> Reference:
    nothing = torch.zeros(1), torch.zeros(1, 1)
    return Reference(
        "a", "generation", None, None, None, "a", None, "a", None, nothing, features=features, thumbnails=thumbnails
    )


def test_neighbours_have_the_nearest_features() -> None:
    gallery = shown(torch.arange(COUNT))
    selected = list(gallery.chosen)[:NEIGHBOURED]
    batch = random_images(COUNT, 0)
    known, thumbnails = [], []
    # Of each image that is shown, there are some at growing distances: the farther, the darker.
    for step in reversed(range(NEIGHBOURS + 1)):
        for number in selected:
            known.append(batch[number].flatten().float() + step * torch.eye(3 * SIZE * SIZE)[0])
            thumbnails.append(np.full((SIZE, SIZE, 3), 250 - 10 * step - selected.index(number), np.uint8))
    rows = cells(gallery.grids(reference(torch.stack(known), np.stack(thumbnails)))["neighbours"])
    assert len(rows) == NEIGHBOURED
    for place, row in enumerate(rows):
        assert np.array_equal(row[0], batch[selected[place]].permute(1, 2, 0).numpy())
        assert [int(each[0, 0, 0]) for each in row[1:]] == [250 - 10 * step - place for step in range(NEIGHBOURS)]


def test_shows_fewer_neighbours_of_a_small_reference() -> None:
    gallery = shown(torch.arange(20))
    grids = gallery.grids(reference(torch.zeros(2, 3 * SIZE * SIZE), np.zeros((2, SIZE, SIZE, 3), np.uint8)))
    assert len(cells(grids["neighbours"])[0]) == 3


def test_shrinks_large_images_to_the_size_of_their_neighbours() -> None:
    gallery = Gallery()
    gallery.add(torch.zeros(3, 3, 128, 128, dtype=torch.uint8), torch.arange(3), torch.zeros(3, 2))
    grids = gallery.grids(reference(torch.zeros(2, 2), np.full((2, 64, 64, 3), 7, np.uint8)))
    rows = cells(grids["neighbours"], 64)
    assert [int(each[0, 0, 0]) for each in rows[0]] == [0, 7, 7]
    assert grids["random"].size == (3 * (128 + MARGIN) + MARGIN, 128 + 2 * MARGIN)


def test_reconstructions_are_below_their_originals() -> None:
    gallery, batch = Gallery(), random_images(40, 0)
    gallery.add(255 - batch, torch.arange(40), torch.zeros(40, 2), torch.zeros(40).long(), batch)
    grids = gallery.grids(None)
    assert set(grids) == {"reconstructions"}
    rows = cells(grids["reconstructions"])
    originals = [each for row in rows[::2] for each in row]
    below = [each for row in rows[1::2] for each in row]
    expected = [batch[number].permute(1, 2, 0).numpy() for number in list(gallery.chosen)[:RECONSTRUCTED]]
    assert np.array_equal(np.array(originals), np.array(expected))
    assert np.array_equal(np.array(below), 255 - np.array(expected))
