"""Models accept images, codes and labels in several forms, and reject what is ambiguous or wrong in one line."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from llamagen.models.gpt import GPT, GPTConfig
from llamagen.models.vqgan import VQGAN, to_uint8
from tests.golden import fill
from tests.small_models import SMALL_VQGAN

SIDE = 16
LEVELS = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
FLOATS = torch.from_numpy(LEVELS).permute(2, 0, 1)[None] / 127.5 - 1


@pytest.fixture(scope="module")
def vqgan() -> VQGAN:
    return fill(VQGAN(SMALL_VQGAN)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def gpt() -> GPT:
    config = GPTConfig(dim=32, n_layer=1, n_head=2, multiple_of=32, vocab_size=64, block_size=16, num_classes=4)
    return GPT(config).eval().requires_grad_(False)


def assert_rejects(call: Callable[[Any], Any], given: Any, *phrases: str) -> None:
    with pytest.raises(ValueError) as error:
        call(given)
    message = str(error.value)
    assert "\n" not in message
    for phrase in phrases:
        assert phrase in message, message


def test_decodes_codes_of_any_integer_type(vqgan: VQGAN) -> None:
    codes = torch.arange(16).view(1, 4, 4)
    expected = vqgan.decode_codes(codes)
    frozen = codes.numpy().astype(np.uint16)
    frozen.flags.writeable = False
    for given in (
        *(codes.to(dtype) for dtype in (torch.uint8, torch.int16, torch.int32, torch.uint16, torch.uint32)),
        *(codes.numpy().astype(dtype) for dtype in ("<u2", ">u2", np.uint32, ">u4", np.int64)),
        frozen,
        codes[0],
        codes.tolist(),
        codes[0].numpy().astype(np.uint16),
        [codes[0].to(torch.uint16)],
    ):
        assert torch.equal(vqgan.decode_codes(given), expected)
    assert vqgan.decode_codes(np.zeros((0, 4, 4), np.uint16)).shape == (0, 3, SIDE, SIDE)


def test_rejects_invalid_codes(vqgan: VQGAN) -> None:
    high = SMALL_VQGAN.codebook_size
    assert_rejects(vqgan.decode_codes, np.full((1, 2, 2), high, np.uint16), f"{high} … {high}", f"0 to {high - 1}")
    assert_rejects(vqgan.decode_codes, torch.full((1, 2, 2), -1), "-1 … -1")
    assert_rejects(vqgan.decode_codes, torch.zeros(1, 2, 2), "integers", "float32")
    assert_rejects(vqgan.decode_codes, torch.zeros(1, 2, 2, dtype=torch.bool), "integers", "bool")
    assert_rejects(vqgan.decode_codes, torch.zeros(2, 16, dtype=torch.int64), "(2, 16)", "reshape(-1, 4, 4)")
    assert_rejects(vqgan.decode_codes, [[1, 2], [3]], "one shape")
    assert_rejects(vqgan.decode_codes, [torch.zeros(2, 2), torch.zeros(4, 4)], "(2, 2) and (4, 4)")
    assert_rejects(vqgan.decode_codes, "codes.tar", "codes must be numbers", "'codes.tar'")
    assert_rejects(vqgan.decode_codes, None, "codes must be numbers", "NoneType")
    assert_rejects(vqgan.decode, torch.zeros(1, 4, 4, dtype=torch.int64), "give codes to decode_codes")


def test_levels_and_floats_of_an_image_have_the_same_codes(vqgan: VQGAN) -> None:
    expected = vqgan.encode(FLOATS).codes
    planes = torch.from_numpy(LEVELS).permute(2, 0, 1)
    for given in (
        LEVELS,
        LEVELS[None],
        [LEVELS],
        planes,
        planes[None],
        Image.fromarray(LEVELS),
        [Image.fromarray(LEVELS)],
        FLOATS.double(),
        FLOATS.numpy(),
        FLOATS.permute(0, 2, 3, 1),
    ):
        assert torch.equal(vqgan.encode(given).codes, expected)
    assert torch.equal(vqgan(LEVELS).reconstruction, vqgan(FLOATS).reconstruction)
    transparent = Image.fromarray(LEVELS).convert("RGBA")
    assert torch.equal(vqgan.encode(transparent).codes, expected)
    assert vqgan.encode([LEVELS, LEVELS]).codes.shape[0] == 2


def test_rejects_invalid_images(vqgan: VQGAN) -> None:
    assert_rejects(vqgan.encode, (FLOATS + 1) * 127.5, "[-1, 1]", "not 0 to 255", "images / 127.5 - 1")
    assert_rejects(vqgan.encode, torch.from_numpy(LEVELS).permute(2, 0, 1)[None].long(), "int64", "uint8")
    assert_rejects(vqgan.encode, LEVELS > 3, "bool")
    assert_rejects(vqgan.encode, LEVELS[:, :, 0], "(16, 16)", "grey images")
    assert_rejects(vqgan.encode, np.dstack([LEVELS, LEVELS[..., :1]]), "(16, 16, 4)", "transparency")
    assert_rejects(vqgan.encode, LEVELS[:15], "(15, 16, 3)", "multiples of 4")
    assert_rejects(vqgan.encode, FLOATS[..., :0], "at least 4")
    assert_rejects(vqgan.encode, [LEVELS, LEVELS[:8, :8]], "one shape")
    assert_rejects(vqgan.encode, [], "an empty list")
    assert_rejects(vqgan.encode, "image.png", "'image.png'")
    assert_rejects(to_uint8, torch.from_numpy(LEVELS), "uint8")
    vqgan.encode(FLOATS * 3)  # decoder outputs may exceed [-1, 1]


def test_accepts_tokens_and_labels_of_any_integer_type(gpt: GPT) -> None:
    codes, labels = torch.arange(6).view(2, 3), torch.tensor([1, 4])
    expected = gpt(codes, labels)
    for dtype in (torch.uint16, torch.uint32):
        assert torch.equal(gpt(codes.to(dtype), labels.to(torch.uint8)), expected)


def test_rejects_tokens_and_labels_out_of_range(gpt: GPT) -> None:
    codes, labels = torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    assert_rejects(lambda given: gpt(given, labels), codes + 64, "tokens 64 … 64 are out of range", "0 to 63")
    assert_rejects(lambda given: gpt(given, labels), codes - 1, "tokens -1 … -1")
    assert_rejects(lambda given: gpt(given, labels), codes.float(), "tokens must be integers, not float32")
    assert_rejects(lambda given: gpt(codes, given), labels + 5, "class labels 5 … 5", "0 to 4")
    assert_rejects(lambda given: gpt(codes, given), labels.float(), "class labels must be integers, not float32")


def test_values_are_not_checked_in_compiled_graphs(vqgan: VQGAN, gpt: GPT) -> None:
    """A check of values would break the graph."""

    def codes_of(tokens: Tensor, labels: Tensor) -> Tensor:
        return gpt(tokens, labels)

    compiled = torch.compile(codes_of, fullgraph=True, backend="eager")
    tokens, labels = torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    assert torch.equal(compiled(tokens, labels), gpt(tokens, labels))
    encode = torch.compile(lambda images: vqgan.encode(images).codes, fullgraph=True, backend="eager")
    assert torch.equal(encode(FLOATS), vqgan.encode(FLOATS).codes)
