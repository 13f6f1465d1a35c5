"""The 2-D rotary embedding: rows and columns rotate the right pairs, and moving a model does not change the table."""

import cmath
from typing import Literal

import pytest
import torch

from llamagen.models.gpt import GPT
from llamagen.models.rope import rope_table, rotate
from llamagen.models.transformer_block import Attention
from tests.golden import fill, normal_input
from tests.small_models import codes_for, condition_for, small_gpt


@pytest.mark.parametrize("head_dim", [4, 8, 64])
@pytest.mark.parametrize("base", [10000.0, 100.0])
def test_the_row_rotates_the_first_half_of_the_pairs_and_the_column_the_second(head_dim: int, base: float) -> None:
    grid, pairs = 5, head_dim // 4
    table = rope_table(grid, head_dim, base, 1, "zero")
    assert table.shape == (1 + grid**2, head_dim // 2, 2)
    for position in range(grid**2):
        row, column = divmod(position, grid)
        for pair in range(head_dim // 2):
            angle = (row if pair < pairs else column) * base ** (-(pair % pairs) / pairs)
            turn = cmath.exp(1j * angle)
            assert table[1 + position, pair].tolist() == pytest.approx([turn.real, turn.imag], abs=1e-5)


def test_interleaved_pairs_rotate_as_complex_numbers() -> None:
    table = rope_table(3, 8, 10000.0, 0, "zero")
    x = normal_input("rope/x", (2, 9, 3, 8))
    numbers = torch.view_as_complex(x.unflatten(-1, (4, 2)))
    expected = torch.view_as_real(numbers * torch.view_as_complex(table)[:, None]).flatten(-2)
    torch.testing.assert_close(rotate(x, table), expected)


def test_scores_depend_on_the_difference_of_positions_only() -> None:
    grid = 4
    table = rope_table(grid, 8, 10000.0, 0, "zero")
    query, key = normal_input("rope/query", (8,)), normal_input("rope/key", (8,))
    queries, keys = (rotate(each.expand(1, grid**2, 1, 8), table)[0, :, 0] for each in (query, key))
    scores = (queries @ keys.T).view(grid, grid, grid, grid)
    for row, column, down, right in [(0, 0, 1, 2), (2, 1, -1, 1), (3, 3, -2, -3)]:
        for top in range(max(0, -down), min(grid, grid - down)):
            for left in range(max(0, -right), min(grid, grid - right)):
                expected = scores[row, column, row + down, column + right]
                torch.testing.assert_close(scores[top, left, top + down, left + right], expected, atol=1e-5, rtol=0)
    assert abs(scores[0, 0, 0, 1] - scores[0, 0, 1, 0]) > 1e-3


def test_condition_positions_are_set_to_zero_or_not_rotated() -> None:
    x = normal_input("rope/condition", (1, 3, 2, 8))
    assert rotate(x, rope_table(2, 8, 10000.0, 3, "zero")[:3]).abs().max() == 0
    assert torch.equal(rotate(x, rope_table(2, 8, 10000.0, 3, "identity")[:3]), x)


@pytest.mark.parametrize("rotation", ["zero", "identity"])
def test_the_rotation_of_codes_does_not_depend_on_the_condition(rotation: Literal["zero", "identity"]) -> None:
    expected = rope_table(4, 8, 10000.0, 0, "zero")
    assert torch.equal(rope_table(4, 8, 10000.0, 7, rotation)[7:], expected)


@pytest.mark.parametrize("kind", ["class", "text"])
def test_zero_and_identity_rotation_are_different_models(kind: str) -> None:
    zero, identity = (small_gpt(condition=kind, rope_condition=rotation) for rotation in ("zero", "identity"))
    codes, condition = codes_for(zero, 2, 15), condition_for(zero, 2)
    with torch.no_grad():
        difference = (zero(codes, condition) - identity(codes, condition)).abs().amax(-1)
    assert (difference[:, 1:] > 1e-3).all()


@pytest.mark.parametrize(("rotation", "mean_is_all"), [("zero", True), ("identity", False)])
def test_with_zero_rotation_codes_depend_only_on_the_mean_of_the_caption(
    rotation: Literal["zero", "identity"], mean_is_all: bool
) -> None:
    gpt, lengths = small_gpt(condition="text", rope_condition=rotation), torch.tensor([3, 6])
    calls: list[tuple[Attention, tuple[torch.Tensor, ...], torch.Tensor]] = []
    for block in gpt.layers:
        block.get_submodule("attention").register_forward_hook(lambda *call: calls.append(call))
    with torch.no_grad():
        gpt(codes_for(gpt, 2, 15), condition_for(gpt, 2), caption_lengths=lengths)
        recorded = list(calls)
        assert len(recorded) == 2
        for attention, (x, *others), found in recorded:
            averaged = x.clone()
            for row, length in zip(averaged, lengths.tolist(), strict=True):
                row[6 - length : 6] = row[6 - length : 6].mean(0)
            difference = (attention(averaged, *others) - found)[:, 6:].abs().amax(-1)
            assert bool((difference < 1e-5).all()) is mean_is_all
            assert bool((difference > 1e-3).all()) is not mean_is_all


def test_with_zero_rotation_a_caption_token_attends_to_the_mean_up_to_itself() -> None:
    gpt = small_gpt(condition="text", rope_condition="zero")
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []
    for block in gpt.layers:
        attention = block.get_submodule("attention")
        attention.register_forward_hook(lambda _module, inputs, output: calls.append((inputs[0], output)))
    with torch.no_grad():
        gpt(codes_for(gpt, 2, 15), condition_for(gpt, 2), caption_lengths=torch.tensor([6, 4]))
        for block, (x, found) in zip(gpt.layers, calls, strict=True):
            attention = block.get_submodule("attention")
            values = x @ attention.get_parameter("wqkv.weight")[-32:].T @ attention.get_parameter("wo.weight").T
            for row, first in ((0, 0), (1, 2)):
                real = values[row, first:6]
                running = real.cumsum(0) / torch.arange(1, len(real) + 1)[:, None]
                torch.testing.assert_close(found[row, first:6], running, atol=1e-5, rtol=0)


def test_rotation_keeps_dtype_and_computes_in_float32() -> None:
    table = rope_table(3, 8, 10000.0, 0, "zero")
    x = normal_input("rope/dtype", (1, 9, 1, 8)).bfloat16()
    assert torch.equal(rotate(x, table), rotate(x.float(), table).bfloat16())


@pytest.mark.parametrize("rotation", ["zero", "identity"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_table_is_never_rounded_by_a_cast(rotation: str, dtype: torch.dtype) -> None:
    gpt = small_gpt(rope_condition=rotation)
    table = gpt.rope.clone()
    parent = torch.nn.ModuleDict({"gpt": gpt})
    for moved in (gpt.to(dtype), parent.to(dtype)):
        assert next(moved.parameters()).dtype == dtype
        assert gpt.rope.dtype == torch.float32
        assert torch.equal(gpt.rope, table)


@pytest.mark.parametrize("kind", ["class", "text"])
def test_the_table_is_recomputed_after_the_meta_device(kind: str) -> None:
    expected = small_gpt(condition=kind)
    with torch.device("meta"):
        gpt = GPT(expected.config)
    assert gpt.rope.is_meta
    gpt = fill(gpt.to_empty(device="cpu")).eval()
    assert torch.equal(gpt.rope, expected.rope)
    codes, condition = codes_for(gpt, 2, 15), condition_for(gpt, 2)
    with torch.no_grad():
        assert torch.equal(gpt(codes, condition), expected(codes, condition))


def test_the_table_is_not_in_the_state_dict() -> None:
    assert [name for name in small_gpt().state_dict() if "rope" in name or "freqs" in name] == []
