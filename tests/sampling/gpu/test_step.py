"""A decode step in Triton kernels computes what the model computes without a cache."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llamagen.models.gpt import GPT
from llamagen.models.kv_cache import KVCache
from llamagen.sampling.decode_weights import DecodeWeights, quantize
from llamagen.sampling.gpu.attention_launch import choose_attention_block
from llamagen.sampling.gpu.step import GPUStep, Product, Tile, choose_tile
from tests.small_models import caption_lengths_for, codes_for, condition_for, small_gpt

GROUPED = {"dim": 128, "n_head": 4, "n_kv_head": 2, "rope_condition": "identity"}
HEAD_SIZES = [32, 64, 100, 128]
ROWS = [1, 2, 7, 16, 33, 128]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 4.5e-2}

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@torch.no_grad()
def rounded(gpt: GPT, dtype: torch.dtype, int8: bool) -> GPT:
    """A copy whose linear layers have the values of :class:`DecodeWeights`, in float32."""
    gpt = copy.deepcopy(gpt)
    for name, module in gpt.named_modules():
        if isinstance(module, nn.Linear) and not name.startswith("cls_embedding"):
            values, scale = quantize(module.weight)
            module.weight.copy_(values * scale[:, None] if int8 else module.weight.to(dtype))
    return gpt


@torch.no_grad()
def decoded(
    gpt: GPT,
    dtype: torch.dtype,
    device: str,
    batch: int,
    steps: int,
    *,
    int8: bool = False,
    rows: int = 0,
    **options: Any,
) -> Tensor:
    """Logits (``rows`` or B, ``steps``, V) after the first codes, step by step. Unused cache entries are NaN."""
    codes, condition, lengths = _inputs(gpt, device, batch, steps)
    positions = gpt.config.condition_length
    cache = KVCache.allocate(gpt.config, batch, torch.device(device))
    rounded(gpt, dtype, int8)(None, condition, caption_lengths=lengths, cache=cache)
    first = None if lengths is None else (positions - lengths).int()
    for part in (cache.keys, cache.values):
        part[:, :, :, positions:] = torch.nan
        if first is not None:
            part.movedim(3, 2)[:, torch.arange(part.shape[3], device=device) < first[:, None]] = torch.nan
    batch = rows or batch
    codes, first, cache = codes[:batch], None if first is None else first[:batch], cache.first_rows(batch)
    spare = torch.full_like(cache.keys[:, :1], torch.nan)  # caches may have more rows than a call
    keys, values = (torch.cat([part, spare], 1).to(dtype) for part in (cache.keys, cache.values))
    step = GPUStep(DecodeWeights.from_gpt(gpt, dtype, int8), batch + 2, **options)
    position = torch.tensor(positions, device=device)
    logits = []
    for code in codes.unbind(1):
        logits.append(step(gpt.tok_embeddings(code).float(), position, first, keys, values))
        position += 1
    assert keys[:, batch:].isnan().all(), "rows that are not decoded are left alone"
    assert keys[:, :, :, int(position) :].isnan().all(), "nothing is written after the position"
    return torch.stack(logits, 1)


@torch.no_grad()
def expected(gpt: GPT, device: str, batch: int, steps: int) -> Tensor:
    """The same logits from the model, without a cache."""
    codes, condition, lengths = _inputs(gpt, device, batch, steps)
    return gpt(codes, condition, caption_lengths=lengths)[:, 1:]


def _inputs(gpt: GPT, device: str, batch: int, steps: int) -> tuple[Tensor, Tensor, Tensor | None]:
    lengths = caption_lengths_for(gpt, batch)
    lengths = None if lengths is None else lengths.to(device)
    return codes_for(gpt, batch, steps).to(device), condition_for(gpt, batch).to(device), lengths


def assert_decodes(
    gpt: GPT, dtype: torch.dtype, device: str, batch: int, steps: int, *, int8: bool = False, **options: Any
) -> float:
    """Assert that step and model agree. Returns the largest difference over the spread of the logits."""
    gpt = gpt.to(device)
    found = decoded(gpt, dtype, device, batch, steps, int8=int8, **options)
    logits = expected(rounded(gpt, dtype, int8), device, batch, steps)
    error = float((found - logits).abs().max() / logits.std())
    assert error < TOLERANCE[dtype]
    return error


def assert_rows_are_independent(gpt: GPT, device: str, counts: list[int], steps: int) -> None:
    """Assert that in float32 the first rows of a large batch have the bits of a small batch."""
    gpt = gpt.to(device)
    largest = decoded(gpt, torch.float32, device, max(counts), steps)
    for count in counts:
        found = decoded(gpt, torch.float32, device, max(counts), steps, rows=count)
        assert torch.equal(found, largest[:count]), count


def sized(head_size: int, **options: Any) -> GPT:
    """A small GPT with two heads of width ``head_size``."""
    return small_gpt(dim=2 * head_size, n_head=2, multiple_of=32, **options)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_each_head_size(head_size: int, dtype: torch.dtype) -> None:
    assert_decodes(sized(head_size), dtype, "cuda", 7, 15)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_number_of_rows_with_padded_captions(rows: int, dtype: torch.dtype) -> None:
    assert_decodes(sized(64, condition="text"), dtype, "cuda", rows, 4)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("int8", [False, True], ids=["full", "int8"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("condition", ["class", "text"])
def test_grouped_queries(condition: str, dtype: torch.dtype, int8: bool) -> None:
    assert_decodes(small_gpt(**GROUPED, condition=condition), dtype, "cuda", 7, 6, int8=int8)
    assert_decodes(small_gpt(**GROUPED, condition=condition), dtype, "cuda", 70, 2, int8=int8)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head_size", [64, 100])
def test_qk_norm(head_size: int, dtype: torch.dtype, early: bool) -> None:
    if early and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("kernels that start early need compute capability 9.0")
    assert_decodes(sized(head_size, qk_norm=True, n_kv_head=1), dtype, "cuda", 7, 15, early=early)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize("shape", [{"dim": 768, "n_head": 24, "n_kv_head": 12}, {"dim": 1000, "n_head": 10}], ids=str)
def test_more_heads_than_the_device_attends_to_at_a_time(shape: dict[str, int], rows: int) -> None:
    gpt = small_gpt(**shape, multiple_of=32, condition="text", rope_condition="identity")
    assert_decodes(gpt, torch.bfloat16, "cuda", rows, 3)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("parts", [1, 4])
def test_every_split_of_the_sums_gives_the_same_codes(splits: int, parts: int, early: bool) -> None:
    if early and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("kernels that start early need compute capability 9.0")
    tiles = {name: Tile(32, 32, 64, parts, splits, 4, 3) for name in ("wo", "w2")}
    assert_decodes(sized(100), torch.bfloat16, "cuda", 20, 4, tiles=tiles, early=early)


@pytest.mark.gpu
@on_gpu
def test_float32_rows_do_not_depend_on_the_batch() -> None:
    assert_rows_are_independent(sized(64, condition="text"), "cuda", [1, 2, 7, 33, 128], 3)


@pytest.mark.gpu
@on_gpu
@torch.no_grad()
def test_a_captured_step_reads_the_current_position() -> None:
    gpt = sized(64, block_size=64).to("cuda")
    codes, condition, _ = _inputs(gpt, "cuda", 16, 60)
    cache = KVCache.allocate(gpt.config, 16, torch.device("cuda"))
    gpt(None, condition, cache=cache)
    step = GPUStep(DecodeWeights.from_gpt(gpt, torch.float32), 16)
    position = torch.tensor(1, device="cuda", dtype=torch.int32)
    x = torch.zeros(16, gpt.config.dim, device="cuda")
    step(x, position, None, cache.keys, cache.values)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step(x, position, None, cache.keys, cache.values)
    found = []
    for code in codes.unbind(1):
        x.copy_(gpt.tok_embeddings(code))
        graph.replay()
        found.append(logits.clone())
        position += 1
    torch.testing.assert_close(torch.stack(found, 1), expected(gpt, "cuda", 16, 60), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("outputs, inputs", [(2304, 768), (1280, 3584), (3200, 8704), (400, 400)])
def test_a_tile_fits_into_shared_memory_and_covers_its_rows(outputs: int, inputs: int, rows: int) -> None:
    for matrices, may_split in ((1, False), (2, False), (1, True)):
        tile = choose_tile(Product(outputs, inputs, matrices, may_split), rows, torch.bfloat16, 2, 132)
        assert tile.stages * tile.inputs * (2 * tile.rows + 2 * matrices * tile.outputs) <= 160 << 10
        assert min(rows, 128) <= tile.rows <= max(16, 2 * rows)
        assert tile.inputs % tile.parts == 0
        assert may_split or tile.splits == 1


def test_in_float32_the_tile_does_not_depend_on_the_number_of_rows() -> None:
    tiles = {choose_tile(Product(1280, 3584, may_split=True), rows, torch.float32, 4, 132) for rows in ROWS}
    assert len(tiles) == 1


def test_in_float32_the_attention_block_does_not_depend_on_the_number_of_rows() -> None:
    assert len({choose_attention_block(12 * rows, torch.float32, 132) for rows in ROWS}) == 1
    assert len({choose_attention_block(12 * rows, torch.bfloat16, 132) for rows in ROWS}) == 3
