"""Wrong commands of each stage: one line that names the option or the value, and no run folder.

Those of the other tools are in ``tests/command_line/test_wrong_commands_of_tools.py``.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import callbacks
import main
from datamodules import ClassRequestDataModule, CodeDataModule, ImageDataModule, PromptDataModule
from lightning_modules import ARGenModule, VQGANLossConfig, VQGANModule
from lightning_modules.argen_config import ARGenLossConfig
from llamagen.command import fault_of
from llamagen.models.gpt_config import GPTConfig
from llamagen.models.vqgan import VQGANConfig
from llamagen.sampling import SamplingConfig
from tests.pipeline import GPT_NET, TOKENIZER_NET, Pipeline
from tests.saved_runs import again

DATA, MODEL, CALLBACK = "--data.init_args", "--model.init_args", "--trainer.callbacks"
UNTIL = f"{MODEL}.order.random_until"
FSQ_OF_2 = '{{"class_path":"llamagen.models.quantizers.FSQ","init_args":{{"levels":[2]}}}}'


def with_callback(name: str, *arguments: str) -> str:
    return " ".join([f"{CALLBACK}+={name}", *(f"{CALLBACK}.{argument}" for argument in arguments)])


# By stage: arguments added to a correct command, and part of the message.
FIT_TOKENIZER = {
    f"{DATA}.root={{tmp}}/nowhere": "nowhere does not exist; give a",
    f"{DATA}.root={{tmp}}/flat": "flat",
    f"{DATA}.root={{tmp}}/empty": "empty holds neither .tar files nor folders of images; give a",
    f"{DATA}.root={{tmp}}/file": "file",
    f"{DATA}.train={{tmp}}/nowhere": "nowhere",
    f"{DATA}.val=s4://bucket/x.tar": "s4://bucket/x.tar",
    f"{DATA}.image_size=31": "image_size is 31",
    f"{DATA}.image_size=large": "data.image_size: must be of type int, not large",
    f"{DATA}.batch_size=0": "batch_size is 0",
    f"{DATA}.views=five": "data.views",
    f"{DATA}.remainder=throw": "data.remainder",
    f"{DATA}.folder=x": "has no option folder",
    f"{MODEL}.loss.perceptual_weight=1 {MODEL}.lpips_weights={{tmp}}/file": "LPIPS needs at least 16",
    f"{DATA}.image_size=16 {MODEL}.discriminator=DINODiscriminator {MODEL}.discriminator.weights=no": "not a file",
    f"{MODEL}.init_from={{tmp}}/file": "file",
    f"{MODEL}.init_from=nowhere.pt": "nowhere.pt",
    f"{MODEL}.freeze=[decoder]": "model.freeze",
    f"{MODEL}.freeze=[encoder]": "freeze is [encoder], but init_from is not given; give the weights to freeze",
    f"{MODEL}.net.quantizer={FSQ_OF_2}": "levels of FSQ is [2]; each must be",
    f"{MODEL}.optimizer.lr=0": "lr is 0",
    f"{MODEL}.augmentation=[flip]": "model.augmentation",
    "--trainer.val_check_interval=1000 --trainer.max_steps=-1 --trainer.max_epochs=1": "trainer.val_check_interval",
    "--trainer.accelerator=gpu": "trainer.accelerator is gpu",
    "--trainer.accelerator=quantum": "quantum",
    "--trainer.precision=8-bit": "trainer.precision",
    "--trainer.strategy=magic": "magic",
    "--trainer.strategy=sharded": "trainer.strategy",
    "--trainer.devices=0": "devices",
    "--trainer.max_steps=-2": "max_steps",
    "--trainer.gradient_clip_val=x": "trainer.gradient_clip_val",
    "--trainer.default_root_dir={tmp}/file/run": "not a folder",
    "--ckpt_path={tmp}/file": "file",
    "--ckpt_path={argen}": "holds a GPT, but a VQGAN is expected",
    "--config={tmp}/nowhere.yaml": "nowhere.yaml",
    "--config={tmp}/file": "file",
    "--config={tmp}/extends.yaml": "nowhere.yaml, in extends of",
    with_callback("ModelCheckpoint", "monitor=val/psmr", "mode=max"): "monitor is 'val/psmr'",
    with_callback("ModelCheckpoint", "monitor=val/psnr", "mode=up"): "mode",
    with_callback("BestCheckpoint", "monitor=val/psmr"): "BestCheckpoint.monitor is 'val/psmr'",
    with_callback("EMA", "decay=1.5"): "decay is 1.5",
    with_callback("FIDMonitor", "reference={tmp}/nowhere.npz"): "nowhere.npz",
    with_callback("FIDMonitor", "reference={tmp}/file"): "file",
    with_callback("SampleGrid"): "SampleGrid",
    with_callback("NoSuchCallback"): "no class NoSuchCallback is known",
}
FIT_ARGEN = {
    f"{DATA}.root={{tmp}}/nowhere": "nowhere",
    f"{DATA}.clean_captions=twice": "data.clean_captions: must be one of 'published', 'web'",
    f"{MODEL}.net.block_size=64": "block_size",
    f"{MODEL}.net.block_size=15": "block_size",
    f"{MODEL}.net.num_classes=4": "num_classes",
    f"{CALLBACK}=[] {MODEL}.net.num_classes=4": "the codes have 10 classes",
    f"{MODEL}.net.vocab_size=16": "vocab_size",
    f"{MODEL}.net.code_factors=[500,512]": "code_factors is",
    f"{MODEL}.net.dim=30": "dim 30",
    f"{MODEL}.net.n_layer=many": "model.net.n_layer: must be of type int, not many",
    f"{MODEL}.tokenizer={{tmp}}/file": "file",
    f"{MODEL}.tokenizer={{argen}}": "GPT",
    f"{MODEL}.sampling.top_p=1.5": "top_p is 1.5",
    f"{MODEL}.sampling.window=0": "window is 0; it must be at least 1",
    f"{MODEL}.sampling.window=1.5": "model.sampling.window: must be of type int or one of 'auto', not 1.5",
    f"{MODEL}.sampling.window=wide": "model.sampling.window",
    f"{MODEL}.init_adapt=[num_classes]": "init_adapt",
    f"{UNTIL}=1.5": "order.random_until is 1.5; a share of the run is between 0.0 and 1.0",
    f"{UNTIL}=0.9": "order.raster_from is 0.75, before order.random_until, 0.9",
    f"{MODEL}.order.raster_from=1": "order.raster_from is 1, before order.random_until, 0.5 (steps 1 and 4 of 8)",
    f"{UNTIL}=5 --trainer.max_steps=6": "(steps 4.5 and 5 of 6); give a later one",
    f"{MODEL}.order.until=0.9": "model.order: has no option until",
    f"{UNTIL}=0.5 --trainer.max_steps=-1 --trainer.max_epochs=-1": "the run has no end; set",
    f"{UNTIL}=0.5 {MODEL}.init_from={{argen}}": "target_aware is False, but the model's is True; set",
    f"{MODEL}.net.adaptive_norm=2": "model.net.adaptive_norm",
    f"{MODEL}.lora.rank=4": "lora is given, but init_from is not",
    f"{MODEL}.lora.rank=0": "lora.rank is 0; it must be at least 1",
    "--ckpt_path={tokenizer}": "the checkpoint holds a VQGAN, but a GPT is expected",
    f"{CALLBACK}=[] {with_callback('SampleGrid', 'classes=99')}": "class 10",
    with_callback("ReconstructionGrid"): "ReconstructionGrid",
    with_callback("CodebookHistogram"): "CodebookHistogram",
    with_callback("FIDMonitor"): "reference",
}
PREDICT_ARGEN = {
    f"{DATA}.classes=[99]": "class 99",
    f"{DATA}.classes=[otter]": "there is no class 'otter'",
    f"{DATA}.classes=[-1]": "classes is [-1]",
    f"{DATA}.classes={{tmp}}/nowhere.txt": "nowhere.txt",
    f"{DATA}.per_class=0": "per_class is 0",
    f"{MODEL}.image_size=0": "image_size is 0",
    f"{MODEL}.tokenizer=null": "model.init_args.tokenizer",
    "--data=PromptDataModule --data.prompts=[a]": "prompts were given",
    "--data=PromptDataModule --data.prompts={tmp}/nowhere.tsv": "nowhere.tsv",
    "--data=PromptDataModule --data.prompts=[a] --data.column=x": "column is 'x'",
    "--data=PromptDataModule --data.prompts=[a] --data.clean_captions=twice": "must be one of 'auto', 'published'",
    "--ckpt_path=null": "predict needs a trained model",
    f"{UNTIL}=0.5": "target_aware is False, but the model's is True; set target_aware to",
    "--ckpt_path={tokenizer}": "the checkpoint holds a VQGAN, but a GPT is expected",
    with_callback("FeatureWriter", "dtype=int8"): "dtype",
    "--trainer.default_root_dir={samples}": "already holds samples",
}
VALIDATE_TOKENIZER = {
    "--ckpt_path=null": "validate needs a trained model",
    "--ckpt_path={argen}": "the checkpoint holds a GPT, but a VQGAN is expected",
    f"{DATA}.root={{tmp}}/nowhere": "nowhere",
    f"{MODEL}.net.codebook_size=64": "quantize.embedding.weight is (32, 4), expected (64, 4)",
    "--trainer.limit_val_batches=-1": "limit_val_batches",
    "--data=CaptionDataModule --data.root={tmp}/nowhere": "CaptionDataModule is for predict",
}
TEST_ARGEN = {
    "--ckpt_path={tokenizer}": "holds a VQGAN",
    f"{DATA}.root={{tmp}}/empty": "empty",
}

# Options that a class rejects: the class, its arguments, and part of the message. Each kind is also in a command above.
REJECTED: list[tuple[Callable[..., object], dict[str, Any], str]] = [
    (ImageDataModule, {"root": "images", "image_size": 0}, "image_size is 0"),
    (ImageDataModule, {"root": "images", "num_workers": -1}, "num_workers is -1"),
    (ImageDataModule, {"root": "images", "val_share": 1.5}, "val_share is 1.5"),
    (ImageDataModule, {"root": "images", "max_bad_share": -1}, "max_bad_share is -1"),
    (ImageDataModule, {"root": "images", "seed": -1}, "seed is -1"),
    (ImageDataModule, {"root": "images", "resampled_epoch": 0}, "resampled_epoch is 0"),
    (ImageDataModule, {"root": "images", "cache_gb": 0}, "cache_gb is 0"),
    (ImageDataModule, {"root": "images", "crop_ranges": [0.5]}, "crop_ranges is [0.5]"),
    (CodeDataModule, {"root": "codes", "short_caption_share": 2}, "short_caption_share is 2"),
    (ClassRequestDataModule, {"classes": 0}, "classes is 0"),
    (ClassRequestDataModule, {"classes": [1, 1]}, "classes is [1, 1]"),
    (ClassRequestDataModule, {"classes": 10, "batch_size": 0}, "batch_size 0"),
    (PromptDataModule, {"prompts": ["a"], "per_prompt": 0}, "per_prompt is 0"),
    (VQGANConfig, {"channels": -8}, "channels is -8"),
    (VQGANConfig, {"codebook_size": 262145}, "codebook_size is 262145"),
    (VQGANModule, {"net": VQGANConfig(**TOKENIZER_NET), "revive_codes_every": -1}, "revive_codes_every is -1"),
    (VQGANLossConfig, {"adversarial_start": -1}, "adversarial_start is -1"),
    (ARGenModule, {"net": GPTConfig(**GPT_NET), "max_grad_norm": 0}, "max_grad_norm is 0"),
    (ARGenLossConfig, {"label_smoothing": 2}, "label_smoothing is 2"),
    (SamplingConfig, {"temperature": -1}, "temperature is -1"),
    (callbacks.BestCheckpoint, {"monitor": "val/loss", "save_top_k": 0}, "save_top_k is 0"),
    (callbacks.StepCheckpoint, {"every_n_train_steps": 0}, "every_n_train_steps is 0"),
    (callbacks.ReconstructionGrid, {"count": 0}, "count is 0"),
    (callbacks.Requeue, {"signal": "SIGNONE"}, "SIGNONE"),
    (callbacks.FIDMonitor, {"count": 1}, "count is 1"),
    (callbacks.FIDMonitor, {"image_size": 0}, "image_size is 0"),
    (callbacks.FIDMonitor, {"every_n_validations": 0}, "every_n_validations 0"),
    (callbacks.CompiledSampling, {"batch_size": 0}, "batch_size is 0"),
    (callbacks.SampleGrid, {"per_class": 0}, "per_class 0"),
    (callbacks.Throughput, {"peak_tflops": 0}, "peak_tflops is 0"),
    (callbacks.CodeWriter, {"samples_per_shard": 0}, "samples_per_shard is 0"),
    (callbacks.ImageWriter, {"grid_columns": 0}, "the grid is"),
]


def error_of(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The error line of a command. If there is none, a description of how the command ended."""
    try:
        main.main(command)
    except SystemExit as end:
        errors = capsys.readouterr().err
        lines = [line for line in errors.splitlines() if line.startswith("error: ")]
        return lines[0] if end.code == 2 and len(lines) == 1 and "usage:" not in errors else f"ENDED WITH {errors}"
    except BaseException as error:
        fault = fault_of(error)
        return f"TRACEBACK: {error!r}" if fault is None else f"{'' if fault.status == 2 else 'CODE 1 '}{fault.message}"
    return "ACCEPTED"


@pytest.mark.parametrize("stage", ["fit tokenizer", "fit argen", "predict argen", "validate tokenizer", "test argen"])
def test_wrong_commands_are_one_line_errors_and_leave_nothing(
    stage: str, pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("[no configuration, no weights")
    (tmp_path / "extends.yaml").write_text("extends: [nowhere.yaml]")
    (tmp_path / "empty").mkdir()
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat/a.png").write_bytes(b"")
    run = tmp_path / "run"
    places = {"tmp": tmp_path, "argen": pipeline.argen, "tokenizer": pipeline.tokenizer, "samples": pipeline.samples}
    tokenizer, argen = pipeline.root / "tokenizer", pipeline.root / "argen"
    images = ["--data.class_path=ImageDataModule", f"{DATA}.root={pipeline.digits}"]
    commands = {
        "fit tokenizer": ([*again("fit", tokenizer, run), *images], FIT_TOKENIZER),
        "fit argen": (again("fit", argen, run), FIT_ARGEN),
        "predict argen": (again("predict", pipeline.samples, run), PREDICT_ARGEN),
        "validate tokenizer": (
            [*again("validate", tokenizer, run), *images, f"--ckpt_path={pipeline.tokenizer}"],
            VALIDATE_TOKENIZER,
        ),
        "test argen": ([*again("test", argen, run), f"--ckpt_path={pipeline.argen}"], TEST_ARGEN),
    }
    arguments, wrong = commands[stage]
    faults = []
    for more, phrase in wrong.items():
        line = error_of([*arguments, *more.format(**places).split()], capsys)
        if phrase not in line or "\n" in line or line[:4] in ("ACCE", "TRAC", "ENDE", "CODE"):
            faults.append((more, line))
        if run.exists():
            faults.append((more, "left a run folder"))
        shutil.rmtree(run, ignore_errors=True)
    assert not faults, "\n".join(f"{more}: {line}" for more, line in faults)


def test_an_option_that_a_class_rejects_is_named_in_one_line() -> None:
    faults = []
    for build, arguments, phrase in REJECTED:
        try:
            build(**arguments)
            message = "ACCEPTED"
        except ValueError as error:
            message = str(error)
        if phrase not in message or "\n" in message:
            faults.append((build, arguments, message))
    assert faults == []


def test_at_least_sixty_commands_are_tested() -> None:
    assert sum(map(len, (FIT_TOKENIZER, FIT_ARGEN, PREDICT_ARGEN, VALIDATE_TOKENIZER, TEST_ARGEN))) >= 60
