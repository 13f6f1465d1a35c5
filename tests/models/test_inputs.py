"""What people pass to the models is taken where it has one meaning, and else refused in one line."""

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


def refused(call: Callable[[Any], Any], given: Any, *phrases: str) -> None:
    with pytest.raises(ValueError) as error:
        call(given)
    message = str(error.value)
    assert "\n" not in message
    for phrase in phrases:
        assert phrase in message, message


def test_codes_of_any_whole_type_are_decoded(vqgan: VQGAN) -> None:
    codes = torch.arange(16).view(1, 4, 4)
    expected = vqgan.decode_codes(codes)
    frozen = codes.numpy().astype(np.uint16)
    frozen.flags.writeable = False
    for given in (
        *(codes.to(dtype) for dtype in (torch.uint8, torch.int16, torch.int32, torch.uint16)),
        *(codes.numpy().astype(dtype) for dtype in ("<u2", ">u2", np.int64)),
        frozen,
        codes[0],
        codes.tolist(),
        codes[0].numpy().astype(np.uint16),
        [codes[0].to(torch.uint16)],
    ):
        assert torch.equal(vqgan.decode_codes(given), expected)
    assert vqgan.decode_codes(np.zeros((0, 4, 4), np.uint16)).shape == (0, 3, SIDE, SIDE)


def test_what_are_no_codes_is_refused(vqgan: VQGAN) -> None:
    high = SMALL_VQGAN.codebook_size
    refused(vqgan.decode_codes, np.full((1, 2, 2), high, np.uint16), f"{high} … {high}", f"0 to {high - 1}")
    refused(vqgan.decode_codes, torch.full((1, 2, 2), -1), "-1 … -1")
    refused(vqgan.decode_codes, torch.zeros(1, 2, 2), "integers", "float32")
    refused(vqgan.decode_codes, torch.zeros(1, 2, 2, dtype=torch.bool), "integers", "bool")
    refused(vqgan.decode_codes, torch.zeros(2, 16, dtype=torch.int64), "(2, 16)", "reshape(-1, 4, 4)")
    refused(vqgan.decode_codes, [[1, 2], [3]], "one shape")
    refused(vqgan.decode_codes, [torch.zeros(2, 2), torch.zeros(4, 4)], "(2, 2) and (4, 4)")
    refused(vqgan.decode_codes, "codes.tar", "codes must be numbers", "'codes.tar'")
    refused(vqgan.decode_codes, None, "codes must be numbers", "NoneType")
    refused(vqgan.decode, torch.zeros(1, 4, 4, dtype=torch.int64), "give codes to decode_codes")


def test_levels_and_other_floats_are_encoded_as_the_same_image(vqgan: VQGAN) -> None:
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


def test_what_are_no_images_is_refused(vqgan: VQGAN) -> None:
    refused(vqgan.encode, (FLOATS + 1) * 127.5, "[-1, 1]", "not 0 to 255", "images / 127.5 - 1")
    refused(vqgan.encode, torch.from_numpy(LEVELS).permute(2, 0, 1)[None].long(), "int64", "uint8")
    refused(vqgan.encode, LEVELS > 3, "bool")
    refused(vqgan.encode, LEVELS[:, :, 0], "(16, 16)", "grey images")
    refused(vqgan.encode, np.dstack([LEVELS, LEVELS[..., :1]]), "(16, 16, 4)", "transparency")
    refused(vqgan.encode, LEVELS[:15], "(15, 16, 3)", "multiples of 4")
    refused(vqgan.encode, FLOATS[..., :0], "at least 4")
    refused(vqgan.encode, [LEVELS, LEVELS[:8, :8]], "one shape")
    refused(vqgan.encode, [], "an empty list")
    refused(vqgan.encode, "image.png", "'image.png'")
    refused(to_uint8, torch.from_numpy(LEVELS), "uint8")
    vqgan.encode(FLOATS * 3)  # what a decoder gives may leave [-1, 1]


def test_tokens_and_labels_of_any_whole_type_are_taken(gpt: GPT) -> None:
    codes, labels = torch.arange(6).view(2, 3), torch.tensor([1, 4])
    expected = gpt(codes, labels)
    assert torch.equal(gpt(codes.to(torch.uint16), labels.to(torch.uint8)), expected)


def test_tokens_and_labels_out_of_range_are_refused(gpt: GPT) -> None:
    codes, labels = torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    refused(lambda given: gpt(given, labels), codes + 64, "tokens 64 … 64 are out of range", "0 to 63")
    refused(lambda given: gpt(given, labels), codes - 1, "tokens -1 … -1")
    refused(lambda given: gpt(given, labels), codes.float(), "tokens must be integers, not float32")
    refused(lambda given: gpt(codes, given), labels + 5, "class labels 5 … 5", "0 to 4")
    refused(lambda given: gpt(codes, given), labels.float(), "class labels must be integers, not float32")


def test_values_are_not_looked_at_in_compiled_graphs(vqgan: VQGAN, gpt: GPT) -> None:
    """A look would break the graph."""

    def codes_of(tokens: Tensor, labels: Tensor) -> Tensor:
        return gpt(tokens, labels)

    compiled = torch.compile(codes_of, fullgraph=True, backend="eager")
    tokens, labels = torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    assert torch.equal(compiled(tokens, labels), gpt(tokens, labels))
    encode = torch.compile(lambda images: vqgan.encode(images).codes, fullgraph=True, backend="eager")
    assert torch.equal(encode(FLOATS), vqgan.encode(FLOATS).codes)
