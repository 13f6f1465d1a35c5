"""Training on a GPU: as on a CPU, in mixed precisions, compiled, averaged, and with sharded parameters."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from callbacks import EMA
from lightning_modules import AdamWConfig, ARGenModule, ShardedStrategy, VQGANModule, models_on_meta_device
from llamagen.checkpoints.weights import read_weights
from llamagen.models.gpt import GPTConfig
from llamagen.models.vqgan import VQGANConfig
from tests.golden import integer_input, normal_input
from tests.lightning_modules.runs import argen_module, vqgan_module
from tests.pipeline import GPT_NET, TOKENIZER_NET

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PRECISE = {"precision": "32-true"}
WITHOUT_DROPOUT = dict.fromkeys(
    ("token_dropout", "resid_dropout", "ffn_dropout", "condition_dropout", "drop_path"), 0.0
)
Weights = dict[str, Tensor]


class FullWeights(pl.Callback):
    """Copies the trained weights, and what is next to them, before the Trainer moves or frees anything.

    Attributes:
        weights: the last weights, whole, on the CPU.
        steps: the weights before the first and after each step, for small models.
        losses: loss of each step.
    """

    def __init__(self) -> None:
        self.weights: Weights = {}
        self.steps: list[Weights] = []
        self.losses: list[float] = []
        self.devices: set[str] = set()
        self.averages: list[Tensor] = []
        self.scales: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.steps.append(whole(pl_module))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))
        self.steps.append(whole(pl_module))
        if pl_module.scaler is not None:
            self.scales.append(pl_module.scaler.get_scale())

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.weights = whole(pl_module)
        self.devices = {parameter.device.type for parameter in pl_module.parameters()}
        state = trainer.optimizers[0].state
        self.averages = [entries["ema"].detach().clone() for entries in state.values() if "ema" in entries]


def whole(module: pl.LightningModule) -> Weights:
    """All trained weights on the CPU, gathered if they are sharded."""
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu().clone()
        for name, value in module.named_parameters()
    }


def code_batches(count: int = 3) -> list[dict[str, Tensor]]:
    return [{"codes": integer_input(f"gpu/codes/{i}", 32, (8, 16)), "condition": torch.arange(8)} for i in range(count)]


def image_batches(count: int = 3) -> list[dict[str, Tensor]]:
    return [{"images": normal_input(f"gpu/images/{i}", (8, 3, 16, 16)).tanh()} for i in range(count)]


def gpt(**net: Any) -> ARGenModule:
    return argen_module(**{**WITHOUT_DROPOUT, **net})


def tokenizer(**loss: Any) -> VQGANModule:
    return vqgan_module(
        options={"net": VQGANConfig(**{**TOKENIZER_NET, "channels": 64})}, **{"adversarial_start": 0, **loss}
    )


def fit(module: pl.LightningModule, batches: list[Any], accelerator: str = "gpu", **options: Any) -> FullWeights:
    """Train for one epoch with clipping and an average."""
    kept = FullWeights()
    trainer = pl.Trainer(
        **{
            "accelerator": accelerator,
            "devices": 1,
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "gradient_clip_val": 1.0,
            "callbacks": [EMA(0.9), kept, *options.pop("more", ())],
            **options,
        }
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))
    assert kept.devices == {"cuda" if accelerator == "gpu" else "cpu"}
    return kept


def agreement(start: Weights, one: Weights, other: Weights) -> float:
    """Cosine of the angle between the changes of two trainings."""
    assert start.keys() == one.keys() == other.keys()
    changes = [torch.cat([(each[name] - start[name]).double().flatten() for name in start]) for each in (one, other)]
    assert min(change.norm() for change in changes) > 0
    return float(torch.cosine_similarity(*changes, dim=0))


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Without TF32, PyTorch's default for convolutions."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


@pytest.mark.parametrize(("build", "batches"), [(gpt, code_batches), (tokenizer, image_batches)])
def test_a_gpu_trains_like_a_cpu(build: Any, batches: Any) -> None:
    with exact_convolutions():
        cpu, gpu = (fit(build(), batches(), accelerator, **PRECISE) for accelerator in ("cpu", "gpu"))
    assert gpu.losses == pytest.approx(cpu.losses, rel=1e-3)
    assert agreement(cpu.steps[0], cpu.weights, gpu.weights) > 0.98


@pytest.mark.parametrize(("build", "batches"), [(gpt, code_batches), (tokenizer, image_batches)])
def test_bfloat16_trains_like_float32(build: Any, batches: Any) -> None:
    exact, narrow = (fit(build(), batches(), precision=precision) for precision in ("32-true", "bf16-mixed"))
    assert narrow.losses == pytest.approx(exact.losses, rel=0.05)
    assert agreement(exact.steps[0], exact.weights, narrow.weights) > 0.7


@pytest.mark.parametrize(
    ("build", "batches"),
    [(gpt, code_batches), (tokenizer, image_batches), (lambda: tokenizer(adaptive_weight=True), image_batches)],
    ids=["gpt", "tokenizer", "adaptive weight"],
)
def test_lightnings_scaler_trains_in_float16(build: Any, batches: Any) -> None:
    kept = fit(build(), batches(12), precision="16-mixed")
    assert torch.tensor(kept.losses).isfinite().all()
    assert all(weights.isfinite().all() for weights in kept.weights.values())
    assert len(kept.scales) == 12
    assert kept.scales[-1] == kept.scales[-4]  # the last steps were not skipped
    assert kept.scales[-1] >= 1.0
    assert agreement(kept.steps[0], kept.weights, kept.steps[-2]) > 0
    assert kept.averages


def test_compiled_blocks_learn_with_dropout() -> None:
    pl.seed_everything(0, verbose=False)
    module = ARGenModule(GPTConfig(**GPT_NET), AdamWConfig(lr=3e-3), compile=True)
    kept = fit(module, code_batches(1) * 40, precision="bf16-mixed")
    assert all(block._compiled_call_impl is not None for block in module.gpt.layers)
    assert kept.losses[0] == pytest.approx(3.466, abs=0.01)  # the logarithm of 32 codes
    assert sum(kept.losses[-5:]) / 5 < 3.2


def test_the_average_on_a_gpu_follows_its_definition() -> None:
    kept = fit(gpt(), code_batches(), precision="bf16-mixed")
    expected = kept.steps[0]
    for weights in kept.steps[1:]:
        expected = {name: 0.9 * expected[name] + 0.1 * weights[name] for name in expected}
    assert {average.device.type for average in kept.averages} == {"cuda"}
    assert len(kept.averages) == len(expected)
    found = torch.cat([average.flatten() for average in kept.averages]).cpu().sort().values
    wanted = torch.cat([average.flatten() for average in expected.values()]).sort().values
    torch.testing.assert_close(found, wanted)  # sorted, because the optimizer has an order of its own


class Save(pl.Callback):
    """Saves a checkpoint at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.save_checkpoint(self.path)


def test_parameters_sharded_over_one_gpu_train_like_others(tmp_path: Path) -> None:
    plain = fit(gpt(), code_batches(), **PRECISE)
    path = tmp_path / "sharded.ckpt"
    with models_on_meta_device():
        module = gpt()
    try:
        sharded = fit(module, code_batches(), strategy=ShardedStrategy(), more=[Save(path)], **PRECISE)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert sharded.losses == pytest.approx(plain.losses, rel=1e-4)
    assert agreement(plain.steps[0], plain.weights, sharded.weights) > 0.999
    saved = read_weights(path, averaged=False).state
    for name, value in saved.items():
        torch.testing.assert_close(value, sharded.weights[f"gpt.{name}"])
