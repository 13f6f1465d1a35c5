"""The codebook whose entries are averages of their latents."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.code_revival import CodeRevival
from llamagen.models.quantizer import Quantizer, build_quantizer
from llamagen.models.quantizers import EMAVectorQuantizer
from tests.golden import normal_input
from tests.ranks import run_on_ranks

SIZE, WIDTH, DECAY = 12, 3, 0.8
PATH = "llamagen.models.quantizers.EMAVectorQuantizer"


def quantizer(entropy: bool = False) -> EMAVectorQuantizer:
    torch.manual_seed(0)
    built = EMAVectorQuantizer(SIZE, WIDTH, DECAY)
    built.set_loss_weights({"entropy": float(entropy)})
    return built


def latent(name: str, batch: int = 2) -> Tensor:
    return normal_input(f"ema/{name}", (batch, WIDTH, 2, 2))


def step(module: Quantizer, *latents: Tensor) -> None:
    """A step of the optimizer over several batches."""
    module.before_step()
    for each in latents:
        module(each)
    module.after_step()


class PaperCodebook:
    """The formula of the paper, with counts and their Laplace smoothing as in its published code."""

    def __init__(self, entries: Tensor) -> None:
        self.counts, self.sums, self.entries = torch.ones(len(entries)), entries.clone(), entries.clone()

    def step(self, latents: Tensor) -> None:
        vectors = F.normalize(latents, dim=1).movedim(1, -1).reshape(-1, WIDTH)
        codes = (vectors @ F.normalize(self.entries, dim=-1).T).argmax(-1)
        for code in range(SIZE):
            mine = vectors[codes == code]
            self.counts[code] = DECAY * self.counts[code] + (1 - DECAY) * len(mine)
            self.sums[code] = DECAY * self.sums[code] + (1 - DECAY) * mine.sum(0)
        total = self.counts.sum()
        smoothed = (self.counts + 1e-5) / (total + SIZE * 1e-5) * total
        self.entries = self.sums / smoothed[:, None]


def test_entries_follow_their_latents_by_the_papers_formula() -> None:
    found = quantizer()
    expected = PaperCodebook(found.embedding.weight.detach())
    start = found.codebook()
    for number in range(4):
        batches = latent(f"a{number}"), latent(f"b{number}", 1)
        step(found, *batches)
        expected.step(torch.cat(batches))
    torch.testing.assert_close(found.codebook(), F.normalize(expected.entries, dim=-1))
    moved = (found.codebook() - start).norm(dim=-1) > 1e-3
    assert 3 < moved.sum() < SIZE


def test_an_entry_without_latents_stays_as_it_is() -> None:
    found = quantizer()
    before = found.embedding.weight.detach().clone()
    batch = latent("some")
    used = found(batch).codes.unique().tolist()
    step(found, batch)
    changed = (found.embedding.weight != before).any(-1).nonzero().flatten().tolist()
    assert changed == used


def test_only_taken_steps_of_training_move_entries() -> None:
    found, expected = quantizer(), quantizer()
    found(latent("of a skipped step"))
    step(found, latent("taken"))
    step(expected, latent("taken"))
    found.eval()
    step(found, latent("of validation"))
    assert torch.equal(found.embedding.weight, expected.embedding.weight)
    assert torch.equal(found.latent_sums, expected.latent_sums)


@pytest.mark.parametrize("entropy", [False, True])
def test_the_entries_get_a_gradient_of_zeros(entropy: bool) -> None:
    found, batch = quantizer(entropy), latent("gradient").requires_grad_()
    encoding = found(batch)
    assert tuple(encoding.losses) == found.loss_names == (("commitment", "entropy") if entropy else ("commitment",))
    (sum(encoding.losses.values()) + encoding.quantized.square().sum()).backward()
    assert found.embedding.weight.grad is not None
    assert not found.embedding.weight.grad.any()
    assert batch.grad is not None
    assert batch.grad.any()


def test_revived_codes_begin_a_new_average() -> None:
    found = quantizer()
    optimizer: Any = SimpleNamespace(state={found.embedding.weight: {}})
    revival = CodeRevival(found, every=1)
    batch = latent("revival")
    revival.update(found(batch))
    count = revival.revive(found, optimizer, SimpleNamespace(broadcast=lambda value: value))
    assert count > 2
    torch.testing.assert_close(found.latent_sums, found.embedding.weight)
    step(found, batch)
    # A latent is alone in its new entry, and both parts of the average agree.
    near = (F.normalize(batch, dim=1).movedim(1, -1).reshape(-1, WIDTH) @ found.codebook().T).amax(-1)
    assert (near > 1 - 1e-6).sum() >= count


def test_it_is_built_from_a_checkpoint() -> None:
    found = quantizer()
    step(found, latent("saved"))
    again = build_quantizer(
        {"class_path": PATH, "init_args": {"codebook_size": SIZE, "codebook_dim": WIDTH, "decay": DECAY}}
    )
    again.load_state_dict(found.state_dict())
    for each in (found, again):
        step(each, latent("next"))
    assert torch.equal(again.get_parameter("embedding.weight"), found.embedding.weight)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 5.0, float("nan"), "x", True, False, None, [0.9]])
def test_rejects_a_decay_that_is_not_a_number_of_at_least_0_and_below_1(decay: Any) -> None:
    with pytest.raises(
        ValueError, match=r"decay of EMAVectorQuantizer is .*; it must be a number of at least 0"
    ) as error:
        EMAVectorQuantizer(SIZE, WIDTH, decay)
    assert repr(decay) in str(error.value)
    assert "\n" not in str(error.value)


def _on_rank(rank: int) -> dict[str, Tensor]:
    found = quantizer()
    for number in range(3):
        step(found, latent(f"{number}/{rank}"))
    return dict(found.state_dict())


@pytest.mark.slow
def test_ranks_sum_their_latents(tmp_path: Path) -> None:
    one, two = run_on_ranks(_on_rank, tmp_path)
    expected = quantizer()
    for number in range(3):
        step(expected, torch.cat([latent(f"{number}/{rank}") for rank in range(2)]))
    for name, value in one.items():
        assert torch.equal(value, two[name])
        torch.testing.assert_close(value, expected.state_dict()[name])
