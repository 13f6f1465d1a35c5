"""Implausible images are found, unusual ones lead to warnings."""

import numpy as np
import torch

from evaluation.image_content import ImageContent


def noise(count: int = 6, size: int = 4) -> np.ndarray:
    """(N, 3, H, W) uint8."""
    return np.random.default_rng(0).integers(0, 256, (count, 3, size, size), np.uint8)


def seen(images: np.ndarray, batch_size: int = 4, copies: bool = False) -> ImageContent:
    content = ImageContent()
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        digests = [int.from_bytes(image.tobytes()[:32], "big") for image in batch] if copies else []
        content.add(torch.from_numpy(np.ascontiguousarray(batch)), digests)
    return content


def test_finds_implausible_images() -> None:
    floats = noise() / 255
    cases = {
        "all 6 images are black (level 0 everywhere); floats in [0, 1]": floats.astype(np.uint8) * 0,
        "all 6 images are white (level 255 everywhere)": np.full_like(noise(), 255),
        "all 6 images are grey (level 7 everywhere)": np.full_like(noise(), 7),
        "all 6 images are the same image": noise(1).repeat(6, 0),
        "the only levels are 0 and 1, as if floats in [0, 1] were cast to bytes; multiply": floats.round().astype("u1"),
        "the only levels are 0, 1 and 255, as if floats in [-1, 1]": np.array([0, 1, 255], "u1")[noise() % 3],
    }
    for fault, images in cases.items():
        content = seen(images)
        assert not content.is_settled
        assert fault in (content.fault() or "")
        assert "\n" not in (content.fault() or "")
        assert content.doubts() == []


def test_accepts_usual_images() -> None:
    binarised = (noise() > 127) * np.uint8(255)
    grey = noise()[:, :1].repeat(3, 1)
    two = np.zeros((2, 3, 4, 4), np.uint8)
    two[1] = 255
    nearly_black = np.zeros_like(noise())
    nearly_black[-1, 0, 0, 0] = 2
    for images in (noise(), noise(2), grey, binarised, two, nearly_black, noise(1)):
        assert seen(images).fault() is None
    for images in (noise(), grey):
        assert seen(images, copies=True).doubts() == []
    assert ImageContent().fault() is None
    assert ImageContent().doubts() == []


def test_the_check_ends_after_two_ordinary_images() -> None:
    assert seen(noise(2)).is_settled
    assert not seen(noise(1)).is_settled, "one image may be the first of many equal ones"


def test_warns_of_unusual_images() -> None:
    constant = noise()
    constant[:, 1] = 7
    copied = np.concatenate([noise(), noise(1)])
    cases = {
        "the only levels are 0, 255; that is right for masks and binarised images": (noise() > 127) * np.uint8(255),
        "no level is above 15 of 255, so the images are nearly black": noise() // 16,
        "each image is of a single colour": np.broadcast_to(noise()[:, :, :1, :1], noise().shape),
        "the green channel is the same everywhere": constant,
        "1 of 7 images are exact copies of others": copied,
    }
    for doubt, images in cases.items():
        (found,) = seen(images, copies=True).doubts()
        assert doubt in found
        assert "\n" not in found
    assert seen(copied).doubts() == [], "copies are found by their digests"


def test_does_not_warn_of_a_few_copies() -> None:
    assert seen(np.concatenate([noise(200), noise(1)]), copies=True).doubts() == []


def test_a_difference_in_the_last_image_is_noticed() -> None:
    images = np.zeros_like(noise(9))
    assert seen(images, 2).fault()
    images[8, 2, 3, 3] = 200
    assert seen(images, 2).fault() is None
