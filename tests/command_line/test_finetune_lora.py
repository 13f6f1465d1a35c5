"""Fine-tuning with LoRA by the commands of its documentation: training, images, export."""

import hashlib
from pathlib import Path

import pytest
import torch

import main
from llamagen import LlamaGen
from llamagen.checkpoints.export import main as export
from llamagen.checkpoints.weights import read_weights
from tests.pipeline import Pipeline


def checksum(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_adapters_are_trained_sampled_loaded_and_exported(
    pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, before = tmp_path / "tuned", checksum(pipeline.argen)
    configs = ("--config", "configs/finetune.yaml", "--config", "configs/argen/finetune_lora.yaml")
    base = pipeline.argen_arguments(run)
    options = [
        *(f"--data.init_args.root={pipeline.codes}", f"--model.init_args.init_from={pipeline.argen}"),
        *("--data.init_args.batch_size=64", "--trainer.max_steps=3", "--model.init_args.lora.rank=4"),
    ]
    fitted = main.main(["fit", *base[:4], *configs, *base[4:], *options]).model
    assert fitted.lora.rank == 4
    assert fitted.lora.alpha == 32
    assert checksum(pipeline.argen) == before
    last = run / "checkpoints/last.ckpt"
    assert last.stat().st_size < pipeline.argen.stat().st_size
    sample = [
        *("predict", "--config", str(run / "fit.yaml"), "--config", "configs/argen/sample.yaml"),
        *("--data.init_args.per_class=1", "--data.init_args.batch_size=10", f"--ckpt_path={last}"),
    ]
    main.main([*sample, f"--trainer.default_root_dir={tmp_path / 'samples'}"])
    assert len(list((tmp_path / "samples/images").rglob("*.png"))) == 10
    model = LlamaGen.from_pretrained(run)
    assert model.gpt is not None
    wanted = read_weights(last).state
    assert all(torch.equal(value, wanted[name]) for name, value in model.gpt.state_dict().items())
    export([str(run), "--to", str(tmp_path / "exported"), "--samples", "0"])
    exported = LlamaGen.from_pretrained(tmp_path / "exported")
    call = {"conditions": [0, 4], "seed": 3, "progress": False}
    assert torch.equal(exported.generate_codes(**call), model.generate_codes(**call))
    without = ["--model.init_args.lora=null", f"--trainer.default_root_dir={tmp_path / 'other'}"]
    with pytest.raises(ValueError, match="the checkpoint holds LoRA adapters; set "):
        main.main([*sample, *without])
