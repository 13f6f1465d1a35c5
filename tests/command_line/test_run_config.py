"""A saved configuration used with another folder does not touch the first run; no run overwrites another."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

import main
from command_line.run_config import ROOT_KEY, portable
from tests.pipeline import Pipeline
from tests.saved_runs import again

ANOTHER = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=1"]


def contents(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_saved_configuration_with_another_folder_writes_only_there(pipeline: Pipeline, tmp_path: Path) -> None:
    data = f"--data.init_args.root={pipeline.codes}"
    first, second = tmp_path / "a", tmp_path / "b"
    absolute = [*ANOTHER, f"--trainer.callbacks.dirpath={first}/more"]
    main.main(["fit", *pipeline.argen_arguments(first), data, *absolute, "--trainer.max_steps=2"])
    saved = yaml.safe_load((first / "fit.yaml").read_text())
    folders = [
        each["init_args"]["dirpath"] for each in saved["trainer"]["callbacks"] if "dirpath" in each.get("init_args", {})
    ]
    assert folders == [None, f"{ROOT_KEY}/more"]  # None: checkpoints/ in the folder of the run
    assert saved["trainer"]["logger"]["init_args"]["save_dir"] == ROOT_KEY
    assert saved["data"]["init_args"]["root"] == str(pipeline.codes)
    before = contents(first)
    main.main(["fit", "--config", str(first / "fit.yaml"), f"--trainer.default_root_dir={second}"])
    assert contents(first) == before
    assert (second / "checkpoints/last.ckpt").exists()
    assert (second / "more").exists()

    # Resuming the first run with its own file leaves no trace in it.
    again = ["fit", "--config", str(first / "fit.yaml"), "--trainer.max_steps=4"]
    cli = main.main([*again, "--ckpt_path=last"])
    assert cli.trainer.global_step == 4
    assert yaml.safe_load((first / "fit.yaml").read_text())["ckpt_path"] is None
    with pytest.raises(ValueError, match=r"already holds a run; choose another --trainer.default_root_dir"):
        main.main(again)


def test_rejects_every_output_folder_of_another_run(pipeline: Pipeline, tmp_path: Path) -> None:
    other = pipeline.root / "argen"
    fit = again("fit", other, tmp_path / "run")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/best.ckpt").touch()
    for extra, phrase in (
        (
            [*ANOTHER, f"--trainer.callbacks.dirpath={other}/checkpoints"],
            "checkpoints already holds checkpoints of another",
        ),
        ([*ANOTHER, f"--trainer.callbacks.dirpath={other}/new"], f"new is in {other}, the folder of another run"),
        ([f"--trainer.logger.init_args.save_dir={other}"], f"is in {other}, the folder of another run"),
        ([*ANOTHER, f"--trainer.callbacks.dirpath={tmp_path}/kept"], "kept already holds checkpoints of another run"),
        # resuming a run into the folder of another one
        ([f"--ckpt_path={pipeline.tokenizer}", f"--trainer.default_root_dir={other}"], "already holds a run"),
    ):
        before = contents(other)
        with pytest.raises(ValueError) as error:
            main.main([*fit, *extra])
        assert phrase in str(error.value), extra
        assert contents(other) == before
        assert not (tmp_path / "run").exists()


def test_paths_in_the_run_folder_are_saved_relative_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/a/codes").mkdir(parents=True)

    def saved(root: str, trainer: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        result = portable({"trainer": {"default_root_dir": root, **trainer}, "data": data})
        assert result["trainer"].pop("default_root_dir") == root
        return {**result["trainer"], **result["data"]}

    for root in ("runs/a", "runs/a/", "./runs/a", f"{tmp_path}/runs/a"):
        assert saved(
            root,
            {"dirpath": "runs/a/checkpoints", "save_dir": root, "deep": [{"out": f"{tmp_path}/runs/a/x/y"}]},
            {"cache": "runs/a/cache", "root": "runs/a/codes", "url": "s3://runs/a/x", "other": "runs/ab/x", "n": 3},
        ) == {
            "dirpath": f"{ROOT_KEY}/checkpoints",
            "save_dir": ROOT_KEY,
            "deep": [{"out": f"{ROOT_KEY}/x/y"}],
            "cache": f"{ROOT_KEY}/cache",
            "root": "runs/a/codes",  # it exists, so it is an input
            "url": "s3://runs/a/x",
            "other": "runs/ab/x",
            "n": 3,
        }
    assert saved(".", {"dirpath": "checkpoints/x"}, {"root": "data/new"}) == {
        "dirpath": f"{ROOT_KEY}/checkpoints/x",
        "root": "data/new",
    }
    assert portable({"trainer": {"default_root_dir": None}}) == {"trainer": {"default_root_dir": None}}
    assert os.getcwd() == str(tmp_path)
