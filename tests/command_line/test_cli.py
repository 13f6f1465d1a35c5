"""The command line: mistakes of users, stages, resuming, and several processes."""

import shutil
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import main
from command_line import LlamaGenCLI
from command_line import cli as cli_module
from datamodules.storage.shards import META_FILE, ShardDataset, read_meta
from lightning_modules import CheckpointFiles
from tests.pipeline import Pipeline
from tests.ranks import ended, succeeds, two_processes
from tests.saved_runs import again
from tests.text_pipeline import TextPipeline


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_wrong_arguments_are_named(pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {}
    for argument, phrase in (
        ("--model.init_args.net.n_layers=3", "n_layers"),
        ("--trainer.max_epoch=3", "max_epoch"),
        ("--model.init_args.net.condition=sound", "condition"),
        ("--model.class_path=Transformer", "Transformer"),
        ("--ckpt_path=nowhere.ckpt", "nowhere.ckpt does not exist"),
        ("--ckpt_path=README.md", "README.md cannot be read as a checkpoint"),
        ("--ckpt_path=configs", "configs is a folder, but not a complete sharded checkpoint"),
        ("--model.init_args.tokenizer=README.md", "error: tokenizer: README.md cannot be read as a checkpoint"),
    ):
        with pytest.raises((SystemExit, ValueError)) as error:
            main.main([*again("fit", pipeline.root / "argen", tmp_path / "run"), argument])
        message = str(error.value) + capsys.readouterr().err
        if phrase not in message:
            wrong[argument] = message
        assert not (tmp_path / "run").exists(), argument
    assert wrong == {}


def test_messages_come_from_this_project_and_not_from_the_parser(
    text_pipeline: TextPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder, latin, run = tmp_path / "t5", tmp_path / "latin.txt", tmp_path / "run"
    encoder.mkdir()
    (encoder / "config.json").write_text("{}")
    latin.write_bytes(b"caf\xe9\n")
    for arguments, phrase in (
        ([*text_pipeline.feature_arguments(run), f"--model.init_args.encoder.name={encoder}"], "the caption encoder"),
        (text_pipeline.prompt_arguments(run, str(latin)), f"prompts is '{latin}', which cannot be read (not a text"),
        (text_pipeline.prompt_arguments(run, "["), "prompts is '[', which is not a list"),
    ):
        with pytest.raises(SystemExit):
            main.main(arguments)
        assert f"error: {phrase}" in capsys.readouterr().err
    assert not run.exists()


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_rejects_a_stage_without_a_trained_model(
    stage: str, pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main.main([stage, *pipeline.sample_arguments(tmp_path / "run")[1:]])
    assert f"{stage} needs a trained model; give --ckpt_path" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_rejects_the_last_checkpoint_of_a_run_that_has_none(pipeline: Pipeline, tmp_path: Path) -> None:
    arguments = [*pipeline.argen_arguments(tmp_path / "run"), f"--data.init_args.root={pipeline.codes}"]
    with pytest.raises(ValueError, match="--ckpt_path last: there is no checkpoint in"):
        main.main(["validate", *arguments, "--ckpt_path=last"])


def test_fit_rejects_a_file_of_weights_as_ckpt_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": {"weight": torch.zeros(2)}}, tmp_path / "published.pt")
    with pytest.raises(SystemExit):
        main.main(["fit", "--config", "configs/argen/base.yaml", f"--ckpt_path={tmp_path / 'published.pt'}"])
    message = capsys.readouterr().err
    assert "published.pt holds only weights" in message
    assert f"--model.init_args.init_from {tmp_path / 'published.pt'}" in message


def test_predict_collects_no_results_in_memory_and_other_stages_take_no_such_option() -> None:
    for stage, collected in (("predict", False), ("test", None)):
        trainer = SimpleNamespace(strategy="auto", devices="auto")
        cli: Any = SimpleNamespace(subcommand=stage, config={stage: SimpleNamespace(trainer=trainer)})
        LlamaGenCLI.before_instantiate_classes(cli)
        assert getattr(cli.config[stage], "return_predictions", None) is collected


@pytest.mark.parametrize(
    ("limit", "devices", "threads"), [(4, 2, 2), (4, 8, 1), (4, 1, None), (4, "auto", None), (16, 2, None)]
)
def test_the_cores_of_a_container_are_divided_among_processes(
    limit: int, devices: int | str, threads: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(cli_module, "usable_cores", lambda: limit)
    monkeypatch.setattr(cli_module, "available_cores", lambda: 16)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    cli_module._share_limited_cores(devices)
    assert chosen == ([] if threads is None else [threads])


def test_print_config_shows_the_merged_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main.main(
            [
                *("fit", "--config", "configs/argen/base.yaml", "--config", "configs/argen/size/XL.yaml"),
                *("--trainer.default_root_dir=elsewhere", "--model.init_args.net.dim=640", "--print_config"),
            ]
        )
    assert stop.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    net = config["model"]["init_args"]["net"]
    assert (net["n_layer"], net["n_head"], net["dim"], net["vocab_size"]) == (36, 20, 640, 16384)
    assert config["trainer"]["logger"]["init_args"]["save_dir"] == "elsewhere"


def copy_of(pipeline: Pipeline, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pipeline.codes, tmp_path / "codes"))


def missing(pipeline: Pipeline, tmp_path: Path) -> Path:
    return tmp_path / "codes"


def empty(pipeline: Pipeline, tmp_path: Path) -> Path:
    (tmp_path / "codes").mkdir()
    return tmp_path / "codes"


def without_a_shard(pipeline: Pipeline, tmp_path: Path) -> Path:
    root = copy_of(pipeline, tmp_path)
    next((root / "train").iterdir()).unlink()
    return root


def truncated(pipeline: Pipeline, tmp_path: Path) -> Path:
    root = copy_of(pipeline, tmp_path)
    shard = next((root / "train").iterdir())
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2 - 700])
    return root


def rewritten(pipeline: Pipeline, root: Path, codes: list[np.ndarray], **meta: object) -> Path:
    """A dataset with these codes in each split, and the pipeline's meta.json with changes ``meta``."""
    shards = ShardDataset(root, {}, "")
    shards.begin(["train", "val"])
    for split in ("train", "val"):
        with shards.shard(split, 0) as writer:
            for number, array in enumerate(codes):
                buffer = BytesIO()
                np.save(buffer, array)
                writer.write(f"{number:06d}", {"npy": buffer.getvalue()}, 3)
    shards.finish({"train": 1, "val": 1}, read_meta(pipeline.codes, "") | meta, {}, 0.0)
    return root


def outside_of_the_vocabulary(pipeline: Pipeline, tmp_path: Path) -> Path:
    codes = [np.full((1, 4, 4), 31 if number < 17 else 32, np.uint16) for number in range(20)]
    return rewritten(pipeline, tmp_path / "codes", codes)


def other_grid(pipeline: Pipeline, tmp_path: Path) -> Path:
    return rewritten(pipeline, tmp_path / "codes", [np.zeros((1, 8, 8), np.uint16)], grid=[8, 8])


def not_finished(pipeline: Pipeline, tmp_path: Path) -> Path:
    root = copy_of(pipeline, tmp_path)
    (root / META_FILE).unlink()
    return root


@pytest.mark.parametrize(
    ("prepare", "phrase"),
    [
        (missing, "does not exist; write the codes first"),
        (empty, "holds neither .tar files nor folders of images; write the codes first"),
        (not_finished, "has no meta.json, so it is incomplete; write the codes first"),
        (without_a_shard, "train-000000.tar does not exist"),
        (truncated, "examples of train are bad, more than max_bad_share 0.05 (truncated shard: "),
        (outside_of_the_vocabulary, "holds code 32, outside of the vocabulary of 32; extract the codes again"),
        (other_grid, "the tokenizer's grid is 8 × 8 = 64 codes per image, but the model's block_size is 16"),
    ],
)
def test_bad_codes_are_a_one_line_error_and_write_nothing(
    prepare: Callable[[Pipeline, Path], Path], phrase: str, pipeline: Pipeline, tmp_path: Path
) -> None:
    root = prepare(pipeline, tmp_path)
    with pytest.raises(ValueError) as error:
        main.main([*again("fit", pipeline.root / "argen", tmp_path / "run"), f"--data.init_args.root={root}"])
    assert phrase in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_validate_and_test_report_the_loss(pipeline: Pipeline, tmp_path: Path) -> None:
    for stage, name in (("validate", "val/loss"), ("test", "test/loss")):
        arguments = pipeline.argen_arguments(tmp_path / stage)
        cli = main.main([stage, *arguments, f"--data.init_args.root={pipeline.codes}", f"--ckpt_path={pipeline.argen}"])
        assert 0 < cli.trainer.callback_metrics[name] < 4
        assert (tmp_path / stage / f"{stage}.yaml").is_file()


def test_a_run_saves_its_configuration_and_is_not_overwritten(pipeline: Pipeline) -> None:
    folder = pipeline.root / "argen"
    config = yaml.safe_load((folder / "fit.yaml").read_text())
    assert config["model"]["init_args"]["net"]["dim"] == 32
    before = {path: path.stat().st_mtime_ns for path in files(folder)}
    with pytest.raises(ValueError, match=r"already holds a run; choose another"):
        main.main(["fit", *pipeline.argen_arguments(folder), f"--data.init_args.root={pipeline.codes}"])
    assert {path: path.stat().st_mtime_ns for path in files(folder)} == before


def test_the_command_line_resumes_exactly(pipeline: Pipeline, tmp_path: Path) -> None:
    data = f"--data.init_args.root={pipeline.codes}"
    cli = main.main(["fit", *pipeline.argen_arguments(tmp_path), data, "--trainer.max_steps=5"])
    assert type(cli.trainer.strategy.checkpoint_io) is CheckpointFiles  # atomic, and safe if the disk is full
    last = tmp_path / "checkpoints/last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 5  # of the last step, not of a validation
    main.main(["fit", *pipeline.argen_arguments(tmp_path), data, f"--ckpt_path={last}"])
    resumed, whole = (torch.load(path, weights_only=True) for path in (last, pipeline.argen))
    assert resumed["global_step"] == whole["global_step"] == 8
    for name, weight in whole["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], weight), name


def launched(arguments: list[str]) -> CompletedProcess[str]:
    """Run ``main.py`` as a user does: Lightning starts the second process."""
    return ended([sys.executable, "main.py", *arguments, "--trainer.devices=2", "--trainer.strategy=ddp"])


@pytest.mark.parametrize("run", [two_processes, pytest.param(launched, marks=pytest.mark.slow)])
def test_two_processes_report_a_mistake_once_and_write_nothing(
    run: Callable[[list[str]], CompletedProcess[str]], pipeline: Pipeline, tmp_path: Path
) -> None:
    root = other_grid(pipeline, tmp_path)
    done = run([*again("fit", pipeline.root / "argen", tmp_path / "run"), f"--data.init_args.root={root}"])
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "error: the tokenizer's grid is 8 × 8 = 64 codes per image" in done.stderr
    assert "Connection closed" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_two_processes_extract_the_codes_of_one(pipeline: Pipeline, tmp_path: Path) -> None:
    succeeds(two_processes([*pipeline.extract_arguments(tmp_path / "codes"), f"--ckpt_path={pipeline.tokenizer}"]))
    written = {path.relative_to(pipeline.codes) for path in pipeline.codes.rglob("*") if path.is_file()}
    assert {path.relative_to(tmp_path / "codes") for path in files(tmp_path / "codes")} == written
    for path in written - {Path("predict.yaml")}:
        assert (tmp_path / "codes" / path).read_bytes() == (pipeline.codes / path).read_bytes(), path


@pytest.mark.slow
def test_lightning_launches_two_processes_that_train_both_networks(pipeline: Pipeline, tmp_path: Path) -> None:
    arguments = ["fit", *pipeline.tokenizer_arguments(tmp_path / "tokenizer"), "--data.init_args.batch_size=50"]
    succeeds(launched(arguments))
    checkpoint = torch.load(tmp_path / "tokenizer/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 8
    assert checkpoint["DigitsDataModule"] == {"train": {"epoch": 0, "consumed": 800}}
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())
