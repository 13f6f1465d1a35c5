"""``LlamaGen.inpaint``: the masked codes are generated again, and all others are kept exactly."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from llamagen import LlamaGen
from llamagen.centre_crop import crop_parts
from llamagen.class_names import ClassNames
from llamagen.pretrained.inpainting import masks_of_codes
from llamagen.pretrained.loading import Parts
from llamagen.sampling import SamplingConfig
from tests.datamodules.shard_files import assert_one_line
from tests.sampling.plain import plain_loop
from tests.small_models import small_gpt, small_vqgan

SETTINGS = SamplingConfig(temperature=0.9, guidance_scale=2.0)
NAMES = ClassNames([f"class {number}" for number in range(7)])
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3), np.uint8)


def small_model(compile: bool = False, **options: Any) -> LlamaGen:
    gpt = small_gpt(**{"target_aware": True, "vocab_size": 64, **options})
    return LlamaGen(Parts("small", small_vqgan(), gpt, SETTINGS, "float32", NAMES, None), compile=compile)


@pytest.fixture(scope="module")
def model() -> LlamaGen:
    return small_model()


def masks(*cells: tuple[int, ...]) -> Tensor:
    """Masks (n, 4, 4) of the codes with these numbers."""
    found = torch.zeros(len(cells), 16, dtype=torch.bool)
    for row, each in enumerate(cells):
        found[row, list(each)] = True
    return found.view(-1, 4, 4)


MASKS = masks((5, 6, 9, 10), (0, 3, 15), (1, 2, 4, 8))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_missing_codes_are_those_of_an_uncached_model_after_the_known_ones(compiled: bool) -> None:
    model, labels = small_model(compiled), [3, 1, 6]
    codes = model.encode(list(PIXELS))
    found = model.inpaint_codes(codes, MASKS, labels, images_per_prompt=2, seed=11, progress=False)
    for number, image in enumerate(found):
        mask, known = MASKS[number % 3].flatten(), codes[number % 3].flatten()
        order = torch.cat([(~mask).nonzero()[:, 0], mask.nonzero()[:, 0]])
        arguments = torch.tensor([labels[number % 3]]), SETTINGS, None, 11, torch.tensor([number])
        expected = plain_loop(model.gpt, *arguments, known[~mask][None], order[None])  # type: ignore[arg-type]
        assert torch.equal(image.flatten()[order], expected[0])
        assert torch.equal(image.flatten()[~mask], known[~mask])


def test_an_image_does_not_depend_on_the_others(model: LlamaGen) -> None:
    codes = model.encode(list(PIXELS))
    together = model.inpaint_codes(codes, MASKS, 2, seed=5, progress=False)
    assert torch.equal(model.inpaint_codes(codes[0], MASKS[0], 2, seed=5, progress=False)[0], together[0])
    assert torch.equal(model.inpaint_codes(codes[0], MASKS, 2, seed=5, progress=False)[0], together[0])


def test_pixels_are_those_of_the_codes(model: LlamaGen) -> None:
    found = model.inpaint(list(PIXELS), MASKS, 2, images_per_prompt=2, seed=5, progress=False)
    codes = model.inpaint_codes(model.encode(list(PIXELS)), MASKS, 2, images_per_prompt=2, seed=5, progress=False)
    assert [np.asarray(image).tolist() for image in found] == [
        np.asarray(each).tolist() for each in model.decode(codes)
    ]


def test_nothing_masked_reconstructs_and_everything_masked_generates(model: LlamaGen) -> None:
    image = Image.fromarray(PIXELS[0])
    kept = model.inpaint(image, Image.new("1", (40, 40)), 2, progress=False)
    assert np.array_equal(kept, model.reconstruct(image))
    new = model.inpaint(image, Image.new("L", (40, 40), 255), "class 2", seed=4, progress=False)
    assert np.array_equal(new, model.generate(2, seed=4, progress=False)[0])


def test_engines_of_the_raster_order_leave_inpainting_to_calls_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, expected = small_model(), small_model().inpaint_codes(torch.zeros(4, 4).int(), MASKS[0], 2, progress=False)
    generated = model.generate_codes(2, progress=False)
    monkeypatch.setattr(model._sampler.sampler.decoder, "any_order", False)  # type: ignore[union-attr]
    assert torch.equal(model.inpaint_codes(torch.zeros(4, 4).int(), MASKS[0], 2, progress=False), expected)
    assert torch.equal(model.generate_codes(2, progress=False), generated)


def cells(mask: Any, size: tuple[int, int] = (16, 16)) -> list[int]:
    """Numbers of the codes that a mask of an image of ``size`` (H, W) makes the model generate again."""
    return masks_of_codes(mask, [np.zeros((*size, 3), np.uint8)], 16, 4)[0].flatten().nonzero()[:, 0].tolist()


def dots(height: int, width: int, *places: tuple[int, int]) -> np.ndarray:
    mask = np.zeros((height, width), np.bool_)
    for place in places:
        mask[place] = True
    return mask


@pytest.mark.parametrize(
    ("size", "place", "expected"),
    [
        ((16, 16), (0, 3), [0]),
        ((16, 16), (4, 15), [7]),
        ((32, 64), (0, 15), []),  # cut off
        ((32, 64), (0, 16), [0]),
        ((32, 64), (31, 47), [15]),
        ((40, 40), (9, 10), [1]),
        ((41, 41), (10, 10), [0, 1, 4, 5]),  # cells end within this pixel
        ((4, 8), (3, 2), [12]),  # enlarged
        ((2, 2), (0, 1), [2, 3, 6, 7]),
        ((200, 16), (92, 0), [0]),
    ],
)
def test_a_code_is_generated_again_if_a_pixel_of_its_cell_is_masked(
    size: tuple[int, int], place: tuple[int, int], expected: list[int]
) -> None:
    assert cells(dots(*size, place), size) == expected


@pytest.mark.parametrize("size", [(16, 16), (33, 47), (129, 70), (7, 9)])
def test_parts_of_a_crop_cover_it_in_order(size: tuple[int, int]) -> None:
    for side, parts in zip(size, crop_parts(*size, 16, 4), strict=True):
        assert parts[0][0] >= 0
        assert parts[-1][1] <= side
        assert abs((parts[-1][1] - parts[0][0]) - min(size)) <= 3
        assert all(low < high and next_low <= high for (low, high), (next_low, _) in pairwise(parts))


def test_masks_of_all_kinds_mean_the_same(tmp_path: Path) -> None:
    mask = dots(16, 16, (5, 9), (15, 0))
    levels = mask.astype(np.uint8) * 255
    Image.fromarray(levels).save(tmp_path / "mask.png")
    Image.fromarray(levels).save(tmp_path / "mask.jpg", quality=95)
    opaque = Image.fromarray(levels).convert("RGBA")
    for same in (
        mask, levels, mask.astype(np.uint8), torch.from_numpy(mask), Image.fromarray(mask), Image.fromarray(levels),
        opaque, opaque.convert("RGB"), tmp_path / "mask.png", str(tmp_path / "mask.jpg"), [mask],
        masks((6, 12))[0], masks((6, 12)).numpy(),
    ):  # fmt: skip
        assert cells(same) == [6, 12]
    assert cells(np.full((16, 16), 127, np.uint8)) == []


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda model: small_model(target_aware=False).inpaint("no.png", "no.png", 1),
         ("small generates in raster order only", "trained in random orders")),
        (lambda model: model.inpaint("no.png", "no.png", 1), ("the image no.png", "give another file")),
        (lambda model: model.inpaint(PIXELS[0], "no.png", 1), ("the mask no.png", "give another file")),
        (lambda model: model.inpaint(PIXELS[0], np.zeros((40, 39), bool), 1),
         ("39 × 40 pixels", "the image 40 × 40", "4 × 4 codes")),
        (lambda model: model.inpaint(PIXELS[0], np.zeros((40, 40), float), 1), ("shape (40, 40) and float64",)),
        (lambda model: model.inpaint(PIXELS[0], Image.new("RGBA", (40, 40)), 1), ("the mask is transparent",)),
        (lambda model: model.inpaint(PIXELS[0], 3, 1), ("a mask must be", "not int")),
        (lambda model: model.inpaint(PIXELS[0], [], 1), ("0 masks for 1 image;",)),
        (lambda model: model.inpaint(PIXELS, MASKS[:2], 1), ("2 masks for 3 images;",)),
        (lambda model: model.inpaint([], MASKS[0], 1), ("there are no images; give at least one",)),
        (lambda model: model.inpaint(PIXELS[0], PIXELS[0], 1), ("shape (40, 40, 3); give an array (H, W)",)),
        (lambda model: model.inpaint(PIXELS[0], torch.ones(40, 40, 1), 1), ("shape (40, 40, 1);", "without channels")),
        (lambda model: model.inpaint(PIXELS[0], MASKS[0].tolist(), 1), ("an array (H, W) of bool or uint8, not list",)),
        (lambda model: model.inpaint("no.png", "no.png", 1, order=range(16)), ("no setting 'order' of sampling",)),
        (lambda model: model.inpaint_codes(torch.zeros(4, 4).int(), MASKS[0], 1, on_row=print), ("setting 'on_row'",)),
        (lambda model: model.inpaint(PIXELS, MASKS, [1, 2]), ("3 images, 3 masks and 2 conditions",)),
        (lambda model: model.inpaint(PIXELS, MASKS, 1, images_per_prompt=0), ("images_per_prompt is 0",)),
        (lambda model: model.inpaint(PIXELS, MASKS, 1, window=4), ("window is 4",)),
        (lambda model: model.inpaint(torch.zeros(1, 3, 8, 8), MASKS[0], 1), ("2 × 2 codes", "16 × 16 pixels")),
        (lambda model: model.inpaint_codes(torch.zeros(4, 4).int(), [[True]], 1), ("shape (1, 1)", "(4, 4)")),
        (lambda model: model.inpaint_codes(torch.zeros(4, 4).int(), torch.ones(4, 4), 1), ("float32", "bool")),
        (lambda model: model.inpaint_codes(torch.full((4, 4), 64), MASKS, 1), ("codes 64", "64 entries")),
        (lambda model: model.generate_codes(1, kept=[[[1]]], order=range(16)), ("kept has the shape (1, 1, 1)",)),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(model: LlamaGen, call: Callable[[LlamaGen], object], parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:
        call(model)
    assert_one_line(error, *parts)
