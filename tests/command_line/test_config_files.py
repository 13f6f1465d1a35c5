"""Configuration files of older versions are accepted, with a warning that names the renamed options."""

from pathlib import Path

import pytest
import yaml

import main
from command_line.config_files import RENAMED_CLASSES, with_current_names
from tests.pipeline import Pipeline


def old_configuration(pipeline: Pipeline, path: Path) -> Path:
    """The saved configuration of the pipeline's run with the option names of the version before."""
    settings = yaml.safe_load((pipeline.argen.parents[1] / "fit.yaml").read_text())
    arguments = settings["model"]["init_args"]
    assert arguments.pop("image_size") is None
    arguments["picture_size"] = 8
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def test_a_run_starts_from_a_saved_configuration_with_older_names(pipeline: Pipeline, tmp_path: Path) -> None:
    config = old_configuration(pipeline, tmp_path / "old.yaml")
    run = ["--trainer.max_steps=1", f"--trainer.default_root_dir={tmp_path / 'run'}"]
    with pytest.warns(UserWarning, match=r"old\.yaml uses older names \(picture_size is now image_size\)"):
        cli = main.main(["fit", "--config", str(config), *run])
    assert cli.model.image_size == 8
    saved = yaml.safe_load((tmp_path / "run/fit.yaml").read_text())["model"]["init_args"]
    assert saved["image_size"] == 8
    assert "picture_size" not in saved


def test_an_argument_with_an_older_name_is_rejected_with_the_current_one(
    pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main.main(["fit", *pipeline.argen_arguments(tmp_path / "run"), "--model.init_args.picture_size=8"])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "has no option" in error
    assert "picture_size, which is now" in error
    assert "image_size" in error


def test_options_in_lists_are_renamed_and_other_content_is_kept() -> None:
    old = "trainer:\n  callbacks:\n  - class_path: FIDMonitor\n    init_args: {count: 5, picture_size: 256}\n"
    with pytest.warns(UserWarning, match="the configuration uses older names"):
        renamed = yaml.safe_load(with_current_names(old, ""))
    assert renamed["trainer"]["callbacks"][0]["init_args"] == {"count": 5, "image_size": 256}
    current = "# kept as it is\ndata: {init_args: {image_size: 256}}\n"
    assert with_current_names(current, "") == current


def test_classes_are_renamed_with_and_without_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RENAMED_CLASSES, "OldName", "NewName")
    old = "data:\n  class_path: datamodules.OldName\nmodel:\n- class_path: OldName\n- class_path: Another\n"
    with pytest.warns(UserWarning, match=r"old\.yaml uses older names \(OldName is now NewName\); rename them there"):
        renamed = yaml.safe_load(with_current_names(old, "old.yaml"))
    assert renamed["data"] == {"class_path": "datamodules.NewName"}
    assert renamed["model"] == [{"class_path": "NewName"}, {"class_path": "Another"}]
