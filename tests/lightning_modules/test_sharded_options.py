"""Models with options beyond the paper train and sample with sharded parameters (FSDP2) like others."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from llamagen.distributed.full_tensor import copy_full_
from llamagen.models.gpt import GPT, GPTConfig
from llamagen.models.sharding import is_sharded, shard
from llamagen.sampling import Sampler, SamplingConfig
from tests.golden import fill
from tests.lightning_modules.test_sharding import SHARDED, assert_alike, everything, run, tensors
from tests.pipeline import GPT_NET, Pipeline
from tests.ranks import run_on_ranks


@pytest.mark.slow
def test_qk_norm_and_adaptive_norms_train_sharded(pipeline: Pipeline, tmp_path: Path) -> None:
    options = [f"--model.init_args.net.{name}=true" for name in ("qk_norm", "adaptive_norm")]
    options.append("--model.init_args.net.code_factors=[4, 8]")
    one = run(pipeline, tmp_path / "one", 1, *options)
    two = run(pipeline, tmp_path / "two", 2, *SHARDED, *options)
    added = {"layers.0.attention.q_norm", "adaptive_norm.linear", "second_factor.output"}
    assert {f"gpt.{name}.weight" for name in added} < tensors(everything(two)).keys()
    assert_alike(one, two)


def _uneven(rank: int) -> list[Tensor]:
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    gpt = fill(
        GPT(GPTConfig(**GPT_NET, qk_norm=True, adaptive_norm=True, target_aware=True, code_factors=(4, 8)))
    ).eval()
    expected = Sampler(gpt, 2)(torch.arange(3))
    shard(gpt, mesh)
    assert is_sharded(gpt)
    sampler, labels = Sampler(gpt, 2), torch.arange(3)
    with pytest.raises(ValueError, match="window is 2, but the parameters are sharded over ranks, which need the same"):
        sampler(labels, SamplingConfig(window=2))
    codes = [expected, *(sampler(labels, SamplingConfig(window=window)) for window in ("auto", 1))]
    table = gpt.cls_embedding.embedding_table.weight
    whole = torch.arange(table.numel()).view(table.shape)
    copy_full_(table.data, whole)
    return [table.full_tensor().detach(), whole, *codes]


def test_a_full_tensor_is_copied_into_uneven_shards_and_sampling_with_them_needs_no_window(tmp_path: Path) -> None:
    for found, wanted, whole_model, automatic, one_by_one in run_on_ranks(_uneven, tmp_path):
        assert len(found) % 2
        assert torch.equal(found, wanted.float())
        assert torch.equal(automatic, whole_model)
        assert torch.equal(one_by_one, whole_model)
