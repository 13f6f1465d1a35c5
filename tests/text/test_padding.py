"""Left padding and packing of features, compared with plain loops."""

import pytest
import torch
from torch import Tensor

from llamagen.text import pack, pad_left, unpack_left

LENGTHS = torch.tensor([0, 1, 3, 7, 5, 7])


def random_features(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(len(LENGTHS), 7, 4, generator=torch.Generator().manual_seed(0)).to(dtype)


def pad_left_by_rolling(features: Tensor, lengths: Tensor) -> Tensor:
    """The published method: roll each caption, then multiply by the flipped mask."""
    rows = []
    for row, length in zip(features, lengths.tolist(), strict=True):
        mask = torch.arange(len(row)) >= len(row) - length
        rows.append(torch.cat([row[length:], row[:length]]) * mask.unsqueeze(1))
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_left_padding_equals_the_published_method(dtype: torch.dtype) -> None:
    features = random_features(dtype)
    moved = pad_left(features, LENGTHS)
    assert moved.dtype is dtype
    assert torch.equal(moved, pad_left_by_rolling(features, LENGTHS))


def test_values_in_the_padding_are_ignored() -> None:
    features = random_features()
    spoiled = features.masked_fill((torch.arange(7) >= LENGTHS.unsqueeze(1)).unsqueeze(2), torch.nan)
    assert torch.equal(pad_left(spoiled, LENGTHS), pad_left(features, LENGTHS))
    assert torch.equal(pack(spoiled, LENGTHS), pack(features, LENGTHS))


def test_left_padding_has_the_gradient_of_a_copy() -> None:
    features = random_features().requires_grad_()
    pad_left(features, LENGTHS).sum().backward()
    expected = (torch.arange(7) < LENGTHS.unsqueeze(1)).float().unsqueeze(2).expand(-1, -1, 4)
    assert features.grad is not None
    assert torch.equal(features.grad, expected)


def test_packing_keeps_the_order_of_tokens_and_can_be_undone() -> None:
    features = random_features()
    tokens = pack(features, LENGTHS)
    assert torch.equal(tokens, torch.cat([row[:length] for row, length in zip(features, LENGTHS, strict=True)]))
    assert torch.equal(unpack_left(tokens, LENGTHS, 7), pad_left(features, LENGTHS))
    wider = unpack_left(tokens, LENGTHS, 9)
    assert torch.equal(wider[:, 2:], pad_left(features, LENGTHS))
    assert (wider[:, :2] == 0).all()


@pytest.mark.parametrize("lengths", [[1, 2], [0, 1, 3, 8, 5, 7], [0, 1, 3, -1, 5, 7]])
def test_rejects_invalid_lengths(lengths: list[int]) -> None:
    for move in (pad_left, pack):
        with pytest.raises(ValueError) as error:
            move(random_features(), torch.tensor(lengths))
        assert "need 6 lengths in [0, 7]" in str(error.value)


def test_rejects_features_without_a_batch_dimension() -> None:
    with pytest.raises(ValueError) as error:
        pad_left(torch.zeros(7, 4), torch.tensor([3]))
    assert "(7, 4)" in str(error.value)


def test_rejects_tokens_that_do_not_match_the_lengths() -> None:
    with pytest.raises(ValueError) as error:
        unpack_left(torch.zeros(5, 4), torch.tensor([3, 3]), 7)
    assert "sum 6" in str(error.value)
    with pytest.raises(ValueError) as error:
        unpack_left(torch.zeros(8, 4), torch.tensor([8]), 7)
    assert "need 1 lengths in [0, 7]" in str(error.value)
    with pytest.raises(ValueError) as error:
        unpack_left(torch.zeros(1, 8, 4), torch.tensor([8]), 8)
    assert "(1, 8, 4)" in str(error.value)


def test_an_empty_batch_stays_empty() -> None:
    empty = torch.zeros(0, 7, 4)
    none = torch.zeros(0, dtype=torch.int64)
    assert pad_left(empty, none).shape == (0, 7, 4)
    assert unpack_left(pack(empty, none), none, 7).shape == (0, 7, 4)
    assert torch.equal(unpack_left(torch.zeros(0, 4), torch.tensor([0, 0]), 7), torch.zeros(2, 7, 4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_padding_on_the_gpu_equals_the_cpu() -> None:
    features, lengths = random_features(torch.bfloat16), LENGTHS
    on_gpu = features.cuda(), lengths.cuda()
    assert torch.equal(pad_left(*on_gpu).cpu(), pad_left(features, lengths))
    assert torch.equal(pack(*on_gpu).cpu(), pack(features, lengths))
    assert torch.equal(unpack_left(pack(*on_gpu), on_gpu[1], 7).cpu(), pad_left(features, lengths))
