"""Compiled blocks: the same training, the same names, and one compilation for all of them."""

from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from lightning_modules import AdamWConfig, ARGenModule
from llamagen.models.gpt import GPT, GPTConfig
from llamagen.sampling import generate
from tests.lightning_modules.runs import argen_module, assert_moved_alike, train
from tests.pipeline import GPT_NET, Pipeline
from tests.small_models import codes_for, condition_for, small_gpt


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_train_like_eager_ones(
    checkpointing: bool, pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_fast(part: torch.nn.Module) -> None:  # traces graphs and gradients, but generates no machine code
        part._compiled_call_impl = torch.compile(part._call_impl, backend="aot_eager_decomp_partition")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_fast)
    without = dict.fromkeys(("token_dropout", "resid_dropout", "ffn_dropout", "condition_dropout"), 0.0)
    start = argen_module(**without, drop_path=0.0).state_dict()
    states = []
    for flag in (False, True):
        module = ARGenModule(
            GPTConfig(**GPT_NET, **without),
            AdamWConfig(lr=1e-3),
            compile=flag,
            activation_checkpointing=checkpointing,
        )
        module.load_state_dict(start)
        train(module, pipeline, tmp_path / str(flag), max_steps=4, limit_val_batches=1)
        blocks = [block._compiled_call_impl is not None for block in module.gpt.layers]
        assert blocks == [flag] * 2
        states.append(module.state_dict())
        names = torch.load(tmp_path / str(flag) / "checkpoints/last.ckpt", weights_only=True)["state_dict"].keys()
        assert names == start.keys()
    assert_moved_alike(start, *states)


def test_all_blocks_share_one_compilation_and_sampling_needs_none() -> None:
    torch._dynamo.reset()
    gpt = small_gpt(n_layer=12, drop_path=0.2).train()
    counter = CompileCounter()
    for block in gpt.layers:
        block._compiled_call_impl = torch.compile(block._call_impl, backend=counter)
    codes, condition = codes_for(gpt, 3, 15), condition_for(gpt, 3)
    gpt(codes, condition).sum().backward()
    assert counter.frame_count == 2  # the first block drops no path
    torch.manual_seed(0)
    gpt(codes, condition).sum().backward()
    assert counter.frame_count == 2
    codes = generate(gpt, condition, seed=3)
    assert counter.frame_count == 2
    plain = GPT(gpt.config)
    plain.load_state_dict(gpt.state_dict())
    assert torch.equal(codes, generate(plain, condition, seed=3))
    torch._dynamo.reset()
