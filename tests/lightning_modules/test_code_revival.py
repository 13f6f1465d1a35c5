"""Unused codes are moved to latents, identically on all ranks."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.code_revival import CodeRevival
from llamagen.models.quantizer import Quantized
from llamagen.models.vector_quantizer import VectorQuantizer
from tests.golden import normal_input
from tests.lightning_modules.runs import train, vqgan_module
from tests.pipeline import Pipeline
from tests.ranks import run_on_ranks
from tests.rounding import Rounding

SIZE, WIDTH = 40, 4


class Broadcast:
    """Broadcasts as Lightning's strategies do."""

    @staticmethod
    def broadcast(value: Any) -> Any:
        if not dist.is_initialized():
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]


def revived(rank: int) -> dict[str, Any]:
    """Revive the unused entries of a codebook; its state before and after."""
    torch.manual_seed(0)
    quantizer = VectorQuantizer(SIZE, WIDTH)
    weight = quantizer.embedding.weight
    optimizer = torch.optim.AdamW([weight], lr=0.01)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    optimizer.state[weight]["ema"] = torch.full_like(weight, 7.0)
    revival = CodeRevival(quantizer, every=1)
    latent = normal_input(f"latents/{rank}", (1, WIDTH, 3, 5))
    parts = quantizer(latent)
    revival.update(parts)
    before = weight.detach().clone()
    count = revival.revive(quantizer, optimizer, Broadcast)
    state = optimizer.state[weight]
    return {
        "before": before,
        "after": weight.detach().clone(),
        "codes": parts.codes,
        "latent": parts.latent.movedim(1, -1).flatten(0, -2),
        "count": count,
        **{name: state[name].clone() for name in ("exp_avg", "exp_avg_sq", "ema")},
    }


def check(found: dict[str, Any], used: Tensor, latent: Tensor) -> None:
    unused = torch.ones(SIZE, dtype=torch.bool)
    unused[used.flatten()] = False
    moved = (found["before"] != found["after"]).any(1)
    assert not (moved & ~unused).any()
    assert found["count"] == moved.sum() == min(int(unused.sum()), len(latent))
    # Each moved code is one of the latents, and no latent was used twice.
    near = (found["after"][moved] @ latent.T).max(1)
    torch.testing.assert_close(near.values, torch.ones(len(near.values)))
    assert len(set(near.indices.tolist())) == len(near.indices)
    assert (found["exp_avg"][moved] == 0).all()
    assert (found["exp_avg_sq"][moved] == 0).all()
    assert (found["exp_avg"][~moved] != 0).all()
    assert torch.equal(found["ema"][moved], found["after"][moved])
    assert (found["ema"][~moved] == 7).all()


def test_unused_codes_become_latents_and_their_optimizer_state_is_reset() -> None:
    found = revived(0)
    check(found, found["codes"], found["latent"])


def test_all_ranks_revive_the_codes_that_no_rank_used(tmp_path: Path) -> None:
    found = run_on_ranks(revived, tmp_path)
    used = torch.cat([rank["codes"].flatten() for rank in found])
    assert len(used.unique()) > max(len(rank["codes"].unique()) for rank in found)
    for rank in found:
        check(rank, used, found[0]["latent"])
    assert torch.equal(found[0]["after"], found[1]["after"])


def test_only_codes_unused_since_the_last_revival_are_moved() -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(SIZE, WIDTH)
    optimizer = torch.optim.AdamW([quantizer.embedding.weight])
    revival = CodeRevival(quantizer, every=1)
    counts = []
    for used in (range(0, 30), range(10, 40)):
        codes = torch.tensor(list(used)).view(1, 5, 6)
        vectors = F.normalize(normal_input(f"since/{used[0]}", (1, WIDTH, 5, 6)), dim=1)
        revival.update(Quantized(vectors, codes, vectors, {}))
        before = quantizer.embedding.weight.detach().clone()
        counts.append(revival.revive(quantizer, optimizer, Broadcast))
        moved = (before != quantizer.embedding.weight).any(1).nonzero().flatten().tolist()
        assert moved == [code for code in range(SIZE) if code not in used]
    assert counts == [10, 10]


@pytest.mark.parametrize(("step", "due"), [(1, False), (4, True), (6, False), (8, True)])
def test_revival_is_due_every_few_optimizer_steps(step: int, due: bool) -> None:
    quantizer = VectorQuantizer(SIZE, WIDTH)
    optimizer: Any = SimpleNamespace(state={quantizer.embedding.weight: {"step": torch.tensor(float(step))}})
    assert CodeRevival(quantizer, every=4).is_due(optimizer, quantizer) == due


def test_revival_increases_codebook_usage(pipeline: Pipeline, tmp_path: Path) -> None:
    used = {}
    for every in (0, 4):
        # All entries but one are far from every latent.
        module = vqgan_module(options={"revive_codes_every": every})
        with torch.no_grad():
            weight = module.vqgan.quantize.get_parameter("embedding.weight")
            weight.copy_(F.normalize(torch.ones(32, 4)) + 1e-4 * torch.randn(32, 4))
        train(module, pipeline, tmp_path / str(every), max_steps=8)
        used[every] = module.trainer.callback_metrics["val/codebook_usage"].item()
        logged = "train/revived_codes" in module.trainer.callback_metrics
        assert logged == (every > 0)
    assert used[4] > 2 * used[0]


def test_rejects_a_negative_interval() -> None:
    with pytest.raises(ValueError, match="revive_codes_every is -1"):
        vqgan_module(options={"revive_codes_every": -1})


def test_rejects_a_quantizer_without_learned_codes() -> None:
    with pytest.raises(
        ValueError, match="revive_codes_every is 5, but Rounding does not support code revival; set it to 0"
    ):
        CodeRevival(Rounding(levels=3), every=5)
