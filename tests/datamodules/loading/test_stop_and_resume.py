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
WORKERS = (0, 1, 3)
# Number of batches after which a run is stopped, chosen at random once.
STOPS = {1: dict(zip(WORKERS, (7, 16, 21), strict=True)), 2: dict(zip(WORKERS, (5, 3, 9), strict=True))}


class Keys(pl.Callback):
    """Records the epoch and the keys of each training batch."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, list[str]]] = []

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
    """Environment that makes Lightning treat this process as a rank started by torchrun."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip


def stop_on_two_ranks(rank: int, root: Path, folder: Path) -> dict[int, list[Any]]:
    as_rank(rank)
    return {workers: fit(root, folder, workers, 2, STOPS[2][workers], None).seen for workers in WORKERS}


def resume_on_two_ranks(rank: int, root: Path, folder: Path) -> dict[int, list[Any]]:
    as_rank(rank)
    return {workers: fit(root, folder, workers, 2, -1, folder / f"workers{workers}.ckpt").seen for workers in WORKERS}


def read_broken_examples(rank: int, root: Path, folder: Path) -> list[Any]:
    as_rank(rank)
    return fit(root, folder, 0, 2, COUNT // 2, None, batch_size=1).seen


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("codes")
    write_codes(root, train=COUNT, val=3, per_shard=7)
    return root


def in_order(ranks: list[list[tuple[int, list[str]]]], epoch: int) -> list[str]:
    """The keys of an epoch in the planned order: by batch, then by position in the batch, then by rank."""
    batches = zip_longest(*([keys for of, keys in seen if of == epoch] for seen in ranks), fillvalue=[])
    return [key for shares in batches for key in chain.from_iterable(zip_longest(*shares)) if key is not None]


def assert_planned(before: list[Any], after: list[Any], consumed: int) -> None:
    planned = [[f"train/{number}" for number in epoch_order(COUNT, SEED, epoch)] for epoch in range(2)]
    assert in_order(before, 0) == planned[0][:consumed]
    assert in_order(after, 0) == planned[0][consumed:]
    assert in_order(after, 1) == planned[1]


@pytest.mark.parametrize("num_workers", WORKERS)
def test_one_process_resumes_with_the_next_batch(root: Path, tmp_path: Path, num_workers: int) -> None:
    stop = STOPS[1][num_workers]
    before = fit(root, tmp_path, num_workers, 1, stop, None).seen
    after = fit(root, tmp_path, num_workers, 1, -1, tmp_path / f"workers{num_workers}.ckpt").seen
    assert_planned([before], [after], stop * BATCH)


def test_two_processes_resume_a_run_of_one(root: Path, tmp_path: Path) -> None:
    before = {workers: fit(root, tmp_path, workers, 1, STOPS[1][workers], None).seen for workers in WORKERS}
    after = run_on_ranks(resume_on_two_ranks, tmp_path, root, tmp_path)
    for workers in WORKERS:
        assert_planned([before[workers]], [rank[workers] for rank in after], STOPS[1][workers] * BATCH)
        lengths = [[len(keys) for _, keys in rank[workers]] for rank in after]
        assert len(lengths[0]) == len(lengths[1])
        assert np.abs(np.subtract(*lengths)).max() <= 1


def test_one_process_resumes_a_run_of_two(root: Path, tmp_path: Path) -> None:
    before = run_on_ranks(stop_on_two_ranks, tmp_path, root, tmp_path)
    for workers in WORKERS:
        after = fit(root, tmp_path, workers, 1, -1, tmp_path / f"workers{workers}.ckpt").seen
        assert_planned([rank[workers] for rank in before], [after], STOPS[2][workers] * BATCH * 2)


def validate_almost_nothing(rank: int, root: Path, folder: Path) -> list[float]:
    as_rank(rank)
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


def test_rank_without_a_usable_validation_example_does_not_block_others(tmp_path: Path) -> None:
    images = {f"{number}": {"png": grey_image(number), "cls": b"1"} for number in range(8)}
    write_shards(tmp_path / "set/train", list(images.items()))
    write_shards(tmp_path / "set/val", [("good", images["0"]), ("bad", {"png": b"no image", "cls": b"1"})])
    assert run_on_ranks(validate_almost_nothing, tmp_path, tmp_path / "set", tmp_path) == [[2, 1.0]] * 2


def test_rank_with_a_broken_batch_does_not_block_others(tmp_path: Path) -> None:
    broken = {5, 30}
    write_codes(tmp_path / "codes", train=COUNT, val=3, per_shard=7, broken=broken)
    ranks = run_on_ranks(read_broken_examples, tmp_path, tmp_path / "codes", tmp_path)
    assert [len(seen) for seen in ranks] == [COUNT // 2] * 2
    keys = {key for seen in ranks for _, batch in seen for key in batch}
    assert keys == {f"train/{number}" for number in range(COUNT) if number not in broken}
