"""Throughput of training, measured with a simulated clock."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from callbacks import Throughput, throughput
from llamagen.cost.gpt import flops_per_sequence
from tests.lightning_modules.runs import argen_module

STEP, LOAD, VALIDATE, SAVE = 2.0, 0.5, 100.0, 1000.0
ROWS, LENGTH = 4, 6
WORK = 3e12


class Clock:
    """Simulated time in seconds, and how often it was read."""

    def __init__(self) -> None:
        self.now, self.reads = 0.0, 0

    def perf_counter(self) -> float:
        self.reads += 1
        return self.now


class Codes(Dataset[dict[str, Tensor]]):
    """Batches of codes; the sixteenth is smaller, and loading one takes time."""

    def __init__(self, clock: Clock, count: int) -> None:
        self.clock, self.count = clock, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self.clock.now += LOAD
        rows = 1 if index == 15 else ROWS
        return {"codes": torch.ones(rows, LENGTH)}


class Slow(pl.LightningModule):
    """A module whose steps take simulated time."""

    flops_per_sequence = WORK

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.linear = nn.Linear(LENGTH, 1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.clock.now += STEP
        return cast(Tensor, self.linear(batch["codes"]).mean())

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.clock.now += VALIDATE

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.clock.now += SAVE

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Recorder(Logger):
    """Records what is logged, by step."""

    name, version = "recorder", 0

    def __init__(self) -> None:
        super().__init__()
        self.logged: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        if found := {name: value for name, value in metrics.items() if name.startswith("train/")}:
            self.logged[step + 1] = found

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(throughput, "time", clock)
    return clock


def fit(
    clock: Clock, folder: Path, callback: Throughput, *more: pl.Callback, **options: Any
) -> dict[int, dict[str, float]]:
    recorder = Recorder()
    trainer = pl.Trainer(
        **{
            "accelerator": "cpu",
            "default_root_dir": folder,
            "logger": recorder,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": bool(more),
            "log_every_n_steps": 4,
            "limit_val_batches": 0,
            "max_epochs": 1,
            "callbacks": [callback, *more],
            **options,
        }
    )
    data = (DataLoader(Codes(clock, count), batch_size=None) for count in (16, 2))
    trainer.fit(Slow(clock), *data)
    return recorder.logged


def seconds_of(logged: dict[int, dict[str, float]], rows: int = 4 * ROWS) -> dict[int, float]:
    return {step: rows / metrics["train/sequences_a_second"] for step, metrics in logged.items()}


def test_a_window_includes_waiting_for_data(clock: Clock, tmp_path: Path) -> None:
    logged = fit(clock, tmp_path, Throughput(), limit_train_batches=12)
    # The first window starts after its first batch was loaded.
    assert list(logged) == [4, 8, 12]
    whole = -LOAD
    for step, seconds in ((4, 4 * STEP + 3 * LOAD), (8, 4 * (STEP + LOAD)), (12, 4 * (STEP + LOAD))):
        whole += 4 * (STEP + LOAD)
        assert logged[step] == pytest.approx(
            {
                "train/sequences_a_second": 4 * ROWS / seconds,
                "train/tokens_a_second": 4 * ROWS * LENGTH / seconds,
                "train/tflops_a_second": 4 * ROWS * WORK / 1e12 / seconds,
                "train/hours": whole / 3600,
            }
        )


def test_smaller_batches_are_counted_by_their_size(clock: Clock, tmp_path: Path) -> None:
    logged = fit(clock, tmp_path, Throughput(), log_every_n_steps=8)
    assert logged[16]["train/sequences_a_second"] == pytest.approx((7 * ROWS + 1) / (8 * (STEP + LOAD)))


def test_accumulated_batches_count_and_windows_end_at_optimizer_steps(clock: Clock, tmp_path: Path) -> None:
    logged = fit(clock, tmp_path, Throughput(), accumulate_grad_batches=2, limit_train_batches=9)
    assert list(logged) == [4]
    assert seconds_of(logged, 8 * ROWS) == pytest.approx({4: 8 * STEP + 7 * LOAD})


def test_excludes_validation(clock: Clock, tmp_path: Path) -> None:
    logged = fit(clock, tmp_path, Throughput(), limit_val_batches=2, val_check_interval=2, limit_train_batches=8)
    # After a validation the clock starts when the next batch is there.
    assert seconds_of(logged) == pytest.approx({4: 4 * STEP + 2 * LOAD, 8: 4 * STEP + 2 * LOAD})
    assert clock.now > 8 * VALIDATE


def test_excludes_checkpoints(clock: Clock, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    logged = fit(clock, tmp_path, Throughput(), checkpoint, limit_train_batches=8)
    assert seconds_of(logged) == pytest.approx({4: 4 * STEP + 2 * LOAD, 8: 4 * STEP + 3 * LOAD})
    assert clock.now > 2 * SAVE


def test_a_window_continues_in_the_next_epoch(clock: Clock, tmp_path: Path) -> None:
    logged = fit(clock, tmp_path, Throughput(), max_epochs=3, limit_train_batches=3)
    assert seconds_of(logged) == pytest.approx({4: 4 * STEP + 2 * LOAD, 8: 4 * STEP + 3 * LOAD})


def test_synchronizes_the_device_only_at_the_ends_of_windows(clock: Clock, tmp_path: Path) -> None:
    fit(clock, tmp_path, Throughput(), limit_train_batches=12, log_every_n_steps=6)
    assert clock.reads == 1 + 2 * 2 + 1  # at the start, twice between windows, and at the end of the epoch


def test_hours_include_the_time_before_resuming(clock: Clock, tmp_path: Path) -> None:
    first, second = Throughput(), Throughput()
    before = fit(clock, tmp_path, first, limit_train_batches=8)[8]["train/hours"]
    assert first.state_dict() == {"hours": pytest.approx(before)}
    second.load_state_dict(first.state_dict())
    assert fit(clock, tmp_path, second, limit_train_batches=8)[8]["train/hours"] == pytest.approx(2 * before)
    second.on_train_batch_start(cast(Any, None), cast(Any, SimpleNamespace(device=torch.device("cpu"))), None, 0)
    clock.now += 36.0
    assert second.state_dict() == {"hours": pytest.approx(2 * before + 0.01)}


def test_logs_nothing_if_the_trainer_logs_nothing(clock: Clock, tmp_path: Path) -> None:
    assert fit(clock, tmp_path, Throughput(), log_every_n_steps=0) == {}


def test_logs_mfu_for_a_given_peak(clock: Clock, tmp_path: Path) -> None:
    logged = fit(clock, tmp_path, Throughput(peak_tflops=60.0), limit_train_batches=4)
    assert logged[4]["train/mfu"] == pytest.approx(logged[4]["train/tflops_a_second"] / 60.0)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA GeForce RTX 4090", 165.0),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_finds_the_peak_of_a_gpu_by_its_name(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert throughput.known_peak(torch.device("cuda", 0)) == peak
    assert throughput.known_peak(torch.device("cpu")) is None


def test_synchronizes_a_gpu_before_reading_the_clock(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(device: torch.device) -> None:
        clock.now += 7.0

    monkeypatch.setattr(torch.cuda, "synchronize", work)
    assert throughput._now(torch.device("cuda", 0)) == 7.0
    assert throughput._now(torch.device("cpu")) == 7.0


def test_counts_sequences_of_all_ranks_and_operations_of_one(clock: Clock) -> None:
    logged: dict[str, float] = {}
    module: Any = SimpleNamespace(device=torch.device("cpu"), flops_per_sequence=WORK, log=logged.__setitem__)
    strategy = SimpleNamespace(reduce=lambda counts, reduce_op: {"sum": 2 * counts + 1}[reduce_op])
    trainer: Any = SimpleNamespace(global_step=0, world_size=2, strategy=strategy, log_every_n_steps=1)
    callback, batch = Throughput(), {"codes": torch.ones(ROWS, LENGTH)}
    callback.on_train_start(trainer, module)
    callback.on_train_batch_start(trainer, module, batch, 0)
    clock.now, trainer.global_step = 10.0, 1
    callback.on_train_batch_end(trainer, module, None, batch, 0)
    assert logged == {
        "train/sequences_a_second": pytest.approx((2 * ROWS + 1) / 10),
        "train/tokens_a_second": pytest.approx((2 * ROWS * LENGTH + 1) / 10),
        "train/tflops_a_second": pytest.approx(ROWS * WORK / 1e13),
        "train/hours": pytest.approx(10 / 3600),
    }


def test_rejects_a_module_that_does_not_count_its_operations() -> None:
    module = pl.LightningModule()
    with pytest.raises(ValueError, match="LightningModule has no flops_per_sequence"):
        Throughput().setup(cast(pl.Trainer, None), module, "fit")
    Throughput().setup(cast(pl.Trainer, None), module, "validate")


@pytest.mark.parametrize("peak", [0.0, -1.0, float("nan")])
def test_rejects_an_invalid_peak(peak: float) -> None:
    with pytest.raises(ValueError, match="peak_tflops is"):
        Throughput(peak)


def test_the_autoregressive_module_counts_its_operations() -> None:
    module = argen_module()
    assert module.flops_per_sequence == flops_per_sequence(module.gpt.config) > 0
