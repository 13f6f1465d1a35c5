"""A training run stopped within an epoch resumes with the rest of the plan, on any number of ranks and workers."""

import os
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules import CodeDataModule, ImageDataModule
from datamodules.loading.order import epoch_order
from lightning_modules import ARGenModule, VQGANLossConfig, VQGANModule
from llamagen.models.discriminator import PatchGAN
from llamagen.models.gpt import GPTConfig
from llamagen.models.vqgan import VQGANConfig
from tests.datamodules.code_datasets import write_codes
from tests.datamodules.shard_files import grey_image, write_shards
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.filterwarnings("ignore:.*worker processes in total.*", "ignore:.*save_last.*")

COUNT, BATCH, SEED = 45, 2, 3
WORKERS = (0, 3)
# Number of batches after which a run is stopped, chosen at random once: by number of processes and of workers.
STOPS = {1: dict(zip(WORKERS, (7, 21), strict=True)), 2: dict(zip(WORKERS, (5, 9), strict=True))}
BROKEN = {5, 30}


Batches = list[tuple[int, list[str]]]
"""Epoch and keys of each batch."""


class Keys(pl.Callback):
    """Records the epoch and the keys of each training batch."""

    def __init__(self) -> None:
        self.seen: Batches = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.seen.append((trainer.current_epoch, list(batch["keys"])))


def fit(
    root: Path, folder: Path, num_workers: int, devices: int, max_steps: int, ckpt: Path | None, batch_size: int = BATCH
) -> Keys:
    """Train for some steps and save at the last one. Returns the module with the recorded batches."""
    keys = Keys()
    saving = ModelCheckpoint(folder, f"workers{num_workers}", every_n_train_steps=max_steps if ckpt is None else 10**6)
    trainer = pl.Trainer(
        accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", max_steps=max_steps,
        max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, callbacks=[keys, saving], limit_val_batches=0,
    )  # fmt: skip
    net = GPTConfig(
        dim=8, n_layer=1, n_head=1, multiple_of=4, vocab_size=8, block_size=4, num_classes=5, resid_dropout=0.0
    )
    data = CodeDataModule(root, batch_size, num_workers=num_workers, seed=SEED)
    trainer.fit(ARGenModule(net), data, ckpt_path=None if ckpt is None else str(ckpt))
    return keys


def as_rank(rank: int) -> None:
    """Make Lightning treat this process as a rank started by torchrun."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip


def validate_almost_nothing(root: Path, folder: Path) -> list[float]:
    """Train for two steps and validate on one usable example. Returns the steps and the number of broken images."""
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_steps=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, val_check_interval=1,
    )  # fmt: skip
    data = ImageDataModule(str(root), image_size=8, batch_size=2, num_workers=0, max_bad_share=0.9)
    net = VQGANConfig(
        channels=32, channel_multipliers=(1, 1), num_res_blocks=1, z_channels=16, codebook_size=32, codebook_dim=4
    )
    loss = VQGANLossConfig(perceptual_weight=0.0, adversarial_weight=0.5, adversarial_start=0)
    module = VQGANModule(net, loss, discriminator=PatchGAN(8, 1))
    trainer.fit(module, data)
    return [trainer.global_step, float(trainer.callback_metrics["skipped/val/broken_image"])]


def train_on_two_ranks(rank: int, folder: Path) -> dict[str, Any]:
    """All runs of two processes, one after another in the same processes, which take seconds to start."""
    as_rank(rank)
    codes, out = folder / "codes", folder / "two"
    return {
        "stopped": {workers: fit(codes, out, workers, 2, STOPS[2][workers], None).seen for workers in WORKERS},
        "resumed": {
            workers: fit(codes, out, workers, 2, -1, folder / f"one/workers{workers}.ckpt").seen for workers in WORKERS
        },
        "broken": fit(folder / "broken", folder / "out", 0, 2, COUNT // 2, None, batch_size=1).seen,
        "validated": validate_almost_nothing(folder / "images", folder / "out"),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The datasets of all runs: codes, codes with broken examples, and images of which some are broken."""
    folder = tmp_path_factory.mktemp("stop_and_resume")
    write_codes(folder / "codes", train=COUNT, val=3, per_shard=7)
    write_codes(folder / "broken", train=COUNT, val=3, per_shard=7, broken=BROKEN)
    images = {f"{number}": {"png": grey_image(number), "cls": b"1"} for number in range(8)}
    write_shards(folder / "images/train", list(images.items()))
    write_shards(folder / "images/val", [("good", images["0"]), ("bad", {"png": b"no image", "cls": b"1"})])
    return folder


@pytest.fixture(scope="module")
def stopped(folder: Path) -> dict[int, Batches]:
    """The batches of runs of one process until they were stopped, by number of workers."""
    codes = folder / "codes"
    return {workers: fit(codes, folder / "one", workers, 1, STOPS[1][workers], None).seen for workers in WORKERS}


@pytest.fixture(scope="module")
def ranks(folder: Path, stopped: dict[int, Batches]) -> list[dict[str, Any]]:
    """The runs of two processes, for each rank."""
    return run_on_ranks(train_on_two_ranks, folder, folder)


def in_order(ranks: list[Batches], epoch: int) -> list[str]:
    """The keys of an epoch in the planned order: by batch, then by position in the batch, then by rank."""
    batches = zip_longest(*([keys for of, keys in seen if of == epoch] for seen in ranks), fillvalue=[])
    return [key for shares in batches for key in chain.from_iterable(zip_longest(*shares)) if key is not None]


def assert_planned(before: list[Any], after: list[Any], consumed: int) -> None:
    planned = [[f"train/{number}" for number in epoch_order(COUNT, SEED, epoch)] for epoch in range(2)]
    assert in_order(before, 0) == planned[0][:consumed]
    assert in_order(after, 0) == planned[0][consumed:]
    assert in_order(after, 1) == planned[1]


@pytest.mark.parametrize("num_workers", WORKERS)
def test_one_process_resumes_with_the_next_batch(
    folder: Path, stopped: dict[int, Batches], tmp_path: Path, num_workers: int
) -> None:
    checkpoint = folder / f"one/workers{num_workers}.ckpt"
    after = fit(folder / "codes", tmp_path, num_workers, 1, -1, checkpoint).seen
    assert_planned([stopped[num_workers]], [after], STOPS[1][num_workers] * BATCH)


def test_two_processes_resume_a_run_of_one(stopped: dict[int, Batches], ranks: list[dict[str, Any]]) -> None:
    for workers in WORKERS:
        after = [rank["resumed"][workers] for rank in ranks]
        assert_planned([stopped[workers]], after, STOPS[1][workers] * BATCH)
        lengths = [[len(keys) for _, keys in seen] for seen in after]
        assert len(lengths[0]) == len(lengths[1])
        assert np.abs(np.subtract(*lengths)).max() <= 1


def test_one_process_resumes_a_run_of_two(folder: Path, tmp_path: Path, ranks: list[dict[str, Any]]) -> None:
    for workers in WORKERS:
        after = fit(folder / "codes", tmp_path, workers, 1, -1, folder / f"two/workers{workers}.ckpt").seen
        assert_planned([rank["stopped"][workers] for rank in ranks], [after], STOPS[2][workers] * BATCH * 2)


def test_rank_without_a_usable_validation_example_does_not_block_others(ranks: list[dict[str, Any]]) -> None:
    assert [rank["validated"] for rank in ranks] == [[2, 1.0]] * 2


def test_rank_with_a_broken_batch_does_not_block_others(ranks: list[dict[str, Any]]) -> None:
    assert [len(rank["broken"]) for rank in ranks] == [COUNT // 2] * 2
    keys = {key for rank in ranks for _, batch in rank["broken"] for key in batch}
    assert keys == {f"train/{number}" for number in range(COUNT) if number not in BROKEN}
