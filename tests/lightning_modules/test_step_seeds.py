"""The random numbers of a training step depend on seed, step, accumulated batch and rank, and on nothing else."""

from types import SimpleNamespace
from typing import Any

import torch

from lightning_modules import AdamWConfig
from lightning_modules.base import GenerativeModule


class Probe(GenerativeModule):
    """A module without networks, at a given step of a given rank."""

    global_step: Any = 0
    global_rank: Any = 0
    trainer: Any = None

    def log(self, *_: Any, **__: Any) -> None:
        """Drop the value."""

    def lr_schedulers(self) -> Any:
        return SimpleNamespace(get_last_lr=lambda: [0.0])


def drawn(seed: int = 0, step: int = 0, batch_idx: int = 0, rank: int = 0, accumulate: int = 1) -> list[float]:
    """Random numbers of a step, after unrelated ones."""
    module = Probe(AdamWConfig())
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=batch_idx))
    module.trainer = SimpleNamespace(accumulate_grad_batches=accumulate, fit_loop=loop)
    module.global_step, module.global_rank, module._step_seed = step, rank, seed
    torch.rand(3)
    module.on_train_batch_start(None, batch_idx)
    return torch.rand(4).tolist()


def test_seed_step_accumulated_batch_and_rank_have_random_numbers_of_their_own() -> None:
    cases = [
        *({"seed": seed, "step": step, "rank": rank} for seed in (0, 1) for step in (0, 1, 8) for rank in (0, 1)),
        {"batch_idx": 1, "accumulate": 2},
        {"batch_idx": 1, "accumulate": 2, "rank": 1},
    ]
    assert len({tuple(drawn(**case)) for case in cases}) == len(cases)


def test_the_random_numbers_of_a_step_do_not_depend_on_its_epoch() -> None:
    # A run that resumes with other batches per epoch has other batch numbers.
    assert drawn(step=8, batch_idx=8) == drawn(step=8, batch_idx=0)
    assert drawn(step=4, batch_idx=9, accumulate=2) == drawn(step=4, batch_idx=1, accumulate=2)
