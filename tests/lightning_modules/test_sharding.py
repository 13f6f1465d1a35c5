"""Sharded parameters (FSDP2) train like others, and any strategy can resume their checkpoints."""

import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import main
from lightning_modules import ARGenModule, ShardedStrategy, models_on_meta_device
from llamagen.checkpoints.contents import read_checkpoint, weights_checksum
from llamagen.checkpoints.export import export
from llamagen.checkpoints.weights import averaged_weights, read_weights
from llamagen.models.gpt import GPT, GPTConfig
from tests.lightning_modules.runs import argen_module, vqgan_module
from tests.lightning_modules.test_argen_ranks import NET, RANDOM_ORDERS, STEPS, arguments
from tests.pipeline import GPT_NET, CreatedOnce, Pipeline
from tests.ranks import ended, run_on_ranks, succeeds, two_processes

HALF = STEPS // 2
LAST = "checkpoints/last.ckpt"
SHARDED = ("--trainer.strategy=sharded",)
LIGHTNINGS = (
    "--trainer.strategy=lightning.pytorch.strategies.ModelParallelStrategy",
    "--trainer.strategy.data_parallel_size=2",
    "--trainer.strategy.tensor_parallel_size=1",
    "--trainer.strategy.process_group_backend=gloo",
)


def command(pipeline: Pipeline, folder: Path, processes: int, *more: str) -> list[str]:
    """Arguments of a training with the same global batch for any number of processes."""
    return [*arguments(pipeline, folder, 200 // processes), f"--trainer.devices={processes}", *more]


def _run_stage(arguments: list[str], ranks: int) -> None:
    """Run ``main.py``: in this process, or on two ranks."""
    if ranks == 1:
        main.main(arguments)
    else:
        succeeds(two_processes(arguments))


def run(pipeline: Pipeline, folder: Path, ranks: int, *more: str) -> Path:
    """Train, and return the last checkpoint."""
    _run_stage(command(pipeline, folder, ranks, *more), ranks)
    return folder / LAST


@pytest.fixture
def one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process is the only rank of a process group, so that it can use a sharded strategy."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def one(pipeline: Pipeline, created_once: CreatedOnce) -> Path:
    """The checkpoint of one process, after all steps."""
    return created_once("sharding_one", lambda folder: run(pipeline, folder, 1)) / LAST


@pytest.fixture(scope="module")
def half(pipeline: Pipeline, created_once: CreatedOnce) -> Path:
    """The checkpoint of one process, after half of the steps."""
    return created_once("sharding_half", lambda folder: run(pipeline, folder, 1, f"--trainer.max_steps={HALF}")) / LAST


@pytest.fixture(scope="module")
def sharded_half(pipeline: Pipeline, created_once: CreatedOnce) -> Path:
    """The checkpoint of two processes that the command starts, after half of the steps."""

    def create(folder: Path) -> None:
        options = command(pipeline, folder, 2, *LIGHTNINGS, f"--trainer.max_steps={HALF}")
        succeeds(ended([sys.executable, "main.py", *options]))

    return created_once("sharding_sharded_half", create) / LAST


def everything(path: Path) -> dict[str, Any]:
    return read_checkpoint(path, wanted=lambda _: True)


def tensors(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Weights, moments and averages."""
    found: dict[str, Tensor] = dict(checkpoint["state_dict"])
    for number, entries in checkpoint["optimizer_states"][0]["state"].items():
        found |= {f"{number} {name}": value for name, value in entries.items()}
    return found


def assert_alike(one: Path, other: Path) -> None:
    """Assert that two checkpoints are equal up to rounding."""
    first, second = everything(one), everything(other)
    assert first["global_step"] == second["global_step"] == STEPS
    assert first["llamagen"] == second["llamagen"]
    assert first["optimizer_states"][0]["param_groups"] == second["optimizer_states"][0]["param_groups"]
    assert first["CodeDataModule"] == second["CodeDataModule"]
    wanted, found = tensors(first), tensors(second)
    assert wanted.keys() == found.keys()
    assert any(name.endswith(" ema") for name in wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(SHARDED, marks=pytest.mark.slow),
        (*SHARDED, "--model.init_args.activation_checkpointing=true"),
    ],
)
def test_two_sharded_ranks_reach_the_weights_moments_and_averages_of_one(
    more: tuple[str, ...], pipeline: Pipeline, one: Path, tmp_path: Path
) -> None:
    two = run(pipeline, tmp_path, 2, *more)
    assert len(list(two.glob("*.distcp"))) == 2
    assert_alike(one, two)
    assert not list(two.parent.glob(".*"))


@pytest.mark.slow
def test_a_sharded_checkpoint_resumes_in_one_process(
    pipeline: Pipeline, one: Path, sharded_half: Path, tmp_path: Path
) -> None:
    assert_alike(one, run(pipeline, tmp_path, 1, f"--ckpt_path={sharded_half}"))


@pytest.mark.slow
@pytest.mark.usefixtures("one_rank")
def test_a_sharded_checkpoint_resumes_in_one_sharded_process(
    pipeline: Pipeline, one: Path, sharded_half: Path, tmp_path: Path
) -> None:
    assert_alike(one, run(pipeline, tmp_path / "run", 1, *SHARDED, f"--ckpt_path={sharded_half}"))


def test_the_checkpoint_of_one_process_resumes_in_two_sharded_ones(
    pipeline: Pipeline, one: Path, half: Path, tmp_path: Path
) -> None:
    assert_alike(one, run(pipeline, tmp_path, 2, *LIGHTNINGS, f"--ckpt_path={half}"))


@pytest.mark.slow
def test_a_gathered_checkpoint_is_numbered_like_any_other(
    pipeline: Pipeline, one: Path, sharded_half: Path, tmp_path: Path
) -> None:
    one_file = "--trainer.strategy.save_distributed_checkpoint=false"
    two = run(pipeline, tmp_path, 2, *LIGHTNINGS, one_file, f"--ckpt_path={sharded_half}")
    assert two.is_file()
    assert_alike(one, two)


@pytest.mark.parametrize(("suffix", "averaged"), [(".pt", True), (".safetensors", False)])
def test_a_sharded_checkpoint_becomes_one_file_of_weights(
    suffix: str, averaged: bool, half: Path, sharded_half: Path, tmp_path: Path
) -> None:
    for path, name in ((half, "whole"), (sharded_half, "sharded")):
        export(path, tmp_path / (name + suffix), averaged)
    wanted, found = (read_weights(tmp_path / (name + suffix)).state for name in ("whole", "sharded"))
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)


def test_sharded_ranks_validate_and_sample_with_averages_like_one(
    pipeline: Pipeline, half: Path, sharded_half: Path, tmp_path: Path
) -> None:
    ema = "--trainer.callbacks=[{class_path: EMA}]"
    for name, path, more, ranks in (("one", half, (), 1), ("two", sharded_half, SHARDED, 2)):
        shared = [f"--ckpt_path={path}", f"--trainer.default_root_dir={tmp_path / name}", *RANDOM_ORDERS, *more]
        validate = ["validate", *pipeline.argen_arguments(tmp_path / name), f"--data.init_args.root={pipeline.codes}"]
        options = [item for item in validate if not item.startswith(("--trainer.max_steps", "--trainer.val_check"))]
        _run_stage([*options, ema, "--trainer.limit_val_batches=1.0", *shared], ranks)
        # Nine images in batches of four are two batches for the first rank, and one, cut in two, for the second.
        few = ["--data.init_args.classes=[0,3,7]", "--data.init_args.batch_size=4"]
        _run_stage([*pipeline.sample_arguments(tmp_path / name), *few, *shared], ranks)
    rows = [(tmp_path / name / "logs/version_0/metrics.csv").read_text().splitlines() for name in ("one", "two")]
    one, two = (dict(zip(lines[0].split(","), lines[1].split(","), strict=True)) for lines in rows)
    assert one.keys() == two.keys() >= {"val/loss", "val/top5"}
    for name in ("val/loss", "val/perplexity", "val/top1", "val/top5", "val/loss_random_order"):
        assert float(two[name]) == pytest.approx(float(one[name]), rel=1e-5)
    images = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one/images").rglob("*.png"))
    assert len(images) == 9
    same = [(tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in images]
    assert sum(same) >= 8  # rounding may change a sampled code


@pytest.mark.usefixtures("one_rank")
def test_rejects_the_checkpoint_of_another_model_before_reading_it(
    pipeline: Pipeline, half: Path, tmp_path: Path
) -> None:
    wide = "--model.init_args.net.dim=64"
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match="the checkpoint's GPT has another shape"):
        run(pipeline, folder, 1, *SHARDED, wide, f"--ckpt_path={half}")
    assert not folder.exists()


def test_files_with_only_weights_cannot_be_resumed(half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = everything(half)
    del checkpoint["optimizer_states"]
    torch.save(checkpoint, tmp_path / "weights.ckpt")
    module = argen_module(5, target_aware=True)
    strategy = object.__new__(ShardedStrategy)
    monkeypatch.setattr(ShardedStrategy, "broadcast", lambda self, value: value)
    monkeypatch.setattr(ShardedStrategy, "lightning_module", module)
    monkeypatch.setattr(ShardedStrategy, "optimizers", [torch.optim.AdamW(module.parameters())])
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match="holds only weights; start a new run"):
        strategy.load_checkpoint(tmp_path / "weights.ckpt")
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    monkeypatch.setattr(ShardedStrategy, "optimizers", [])
    strategy.load_checkpoint(tmp_path / "weights.ckpt")  # for validation
    assert all(torch.equal(value, checkpoint["state_dict"][name]) for name, value in module.state_dict().items())


def test_rejects_sharding_of_a_tokenizer(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main.main(
            ["fit", "--config", "configs/vqgan/base.yaml", "--trainer.accelerator=cpu", "--trainer.strategy=sharded"]
        )
    assert end.value.code == 2
    assert "VQGANModule is small enough for each GPU; set trainer.strategy to ddp" in capsys.readouterr().err


def _initial(rank: int, weights: str, num_classes: int) -> dict[str, Tensor]:
    """Initial weights of a sharded model that was built on the meta device."""
    torch.manual_seed(0)
    mesh = torch.distributed.init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    with models_on_meta_device():
        module = _start(weights, num_classes)
    module._device_mesh = mesh
    strategy = SimpleNamespace(root_device=torch.device("cpu"), broadcast=lambda value: value)
    module._trainer = SimpleNamespace(precision="32-true", strategy=strategy, state=SimpleNamespace(fn="validate"))
    torch.manual_seed(rank + 1)
    module.configure_model()
    module.configure_model()
    assert all(isinstance(parameter, DTensor) for parameter in module.parameters())
    assert sum(p.to_local().numel() for p in module.parameters()) < 0.7 * sum(p.numel() for p in module.parameters())
    with torch.inference_mode():
        checksum = _checksum(module.gpt)
    return {name: value.full_tensor() for name, value in module.gpt.state_dict().items()} | checksum


def _checksum(gpt: GPT) -> dict[str, Tensor]:
    return {"checksum": torch.tensor(list(bytes.fromhex(weights_checksum(gpt))))}


def _start(weights: str, num_classes: int) -> ARGenModule:
    config = GPTConfig(**{**NET, "num_classes": num_classes})
    return ARGenModule(config, init_from=weights or None, init_adapt=["num_classes"] if num_classes == 12 else ())


@pytest.mark.parametrize(("from_file", "num_classes"), [(False, 10), (True, 10), (True, 12)])
def test_a_model_on_the_meta_device_gets_the_usual_initial_weights(
    from_file: bool, num_classes: int, half: Path, tmp_path: Path
) -> None:
    weights = str(half) if from_file else ""
    torch.manual_seed(0)
    gpt = _start(weights, num_classes).gpt
    wanted = gpt.state_dict() | _checksum(gpt)
    for found in run_on_ranks(_initial, tmp_path, weights, num_classes):
        assert found.keys() == wanted.keys()
        for name, value in found.items():
            assert torch.equal(value, wanted[name]), name


def test_a_model_on_the_meta_device_is_initialised_without_a_strategy_too(half: Path) -> None:
    torch.manual_seed(0)
    with models_on_meta_device():
        module = ARGenModule(GPTConfig(**GPT_NET))
    module.configure_model()
    torch.manual_seed(0)
    for name, value in GPT(GPTConfig(**GPT_NET)).state_dict().items():
        assert torch.equal(module.gpt.state_dict()[name], value)
    with models_on_meta_device(), pytest.raises(ValueError, match="they do not fit"):
        ARGenModule(GPTConfig(**{**NET, "dim": 64}), init_from=half)


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch {self.mark}",)


def test_rejects_code_in_the_index_of_shards_without_running_it(sharded_half: Path, tmp_path: Path) -> None:
    copy = tmp_path / "last.ckpt"
    shutil.copytree(sharded_half, copy)
    (copy / ".metadata").write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    with pytest.raises(ValueError, match=r"is refused: it needs (posix|nt).system") as error:
        read_weights(copy)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "meta.pt"])
def test_damaged_shards_are_a_one_line_error(file: str, sharded_half: Path, tmp_path: Path) -> None:
    copy = tmp_path / "last.ckpt"
    shutil.copytree(sharded_half, copy)
    (copy / file).write_bytes((copy / file).read_bytes()[:100])
    with pytest.raises(ValueError, match="it is damaged") as error:
        read_weights(copy)
    assert "\n" not in str(error.value)
    (copy / file).unlink()
    with pytest.raises(ValueError, match=r"is damaged|not a complete sharded checkpoint"):
        read_weights(copy)


def test_reads_the_averages_of_a_sharded_checkpoint(half: Path, sharded_half: Path) -> None:
    wanted, found = averaged_weights(everything(half)), averaged_weights(everything(sharded_half))
    assert list(wanted) == list(found)
    raw = everything(half)["state_dict"]
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)
        assert not torch.equal(value, raw[name])


def _with_mesh(module: Any, data: int, tensor: int, precision: str = "32-true") -> Any:
    module._device_mesh = {name: SimpleNamespace(size=lambda n=n: n) for name, n in
                           (("data_parallel", data), ("tensor_parallel", tensor))}  # fmt: skip
    module._trainer = SimpleNamespace(precision=precision, state=SimpleNamespace(fn="fit"))
    return module


def test_rejects_unsupported_sharding() -> None:
    with pytest.raises(ValueError, match=r"tensor_parallel_size is 2.*set it to 1"):
        _with_mesh(argen_module(), 1, 2).configure_model()
    with pytest.raises(ValueError, match="precision 16-mixed does not work with sharded parameters"):
        _with_mesh(argen_module(), 2, 1, "16-mixed").configure_model()
    with pytest.raises(ValueError, match="VQGANModule is small enough for each GPU"):
        _with_mesh(vqgan_module(), 2, 1).configure_model()


def test_an_unfinished_sharded_checkpoint_keeps_the_previous_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.ckpt"
    path.mkdir()
    (path / "meta.pt").touch()
    strategy: Any = SimpleNamespace(broadcast=lambda value: value, global_rank=0, barrier=lambda: None)
    monkeypatch.setattr(strategy, "_save_distributed_checkpoint", True, raising=False)
    written: list[Path] = []

    def save(self: Any, checkpoint: dict[str, Any], filepath: Path, options: Any = None) -> None:
        filepath.mkdir()
        written.append(filepath)
        if "fails" in checkpoint:
            raise OSError("no space left")
        (filepath / "new").touch()

    parent = ShardedStrategy.__mro__[1]
    monkeypatch.setattr(parent, "save_checkpoint", save)
    whole = object.__new__(ShardedStrategy)
    for name in ("broadcast", "barrier"):
        monkeypatch.setattr(ShardedStrategy, name, lambda self, *value: value[0] if value else None)
    monkeypatch.setattr(ShardedStrategy, "global_rank", 0)
    whole._save_distributed_checkpoint = True
    with pytest.raises(OSError, match="no space left"):
        whole.save_checkpoint({"fails": True}, path)
    assert [file.name for file in path.iterdir()] == ["meta.pt"]
    whole.save_checkpoint({}, path)
    assert [file.name for file in path.iterdir()] == ["new"]
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    assert path not in written
