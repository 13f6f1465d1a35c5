"""Configuration files may extend others, have sections of stages, and use older names, with a warning."""

from pathlib import Path
from typing import Any

import pytest
import yaml

import main
from command_line.config_files import RENAMED_CLASSES, configs_of_stage, with_current_names
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


def written(folder: Path, **files: str) -> Path:
    """Write files, by name without the suffix; return the path of the first."""
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.yaml").write_text(content)
    return folder / f"{next(iter(files))}.yaml"


def parts(path: Path, stage: str) -> list[dict[str, Any]]:
    return [yaml.safe_load(part) for part in configs_of_stage(str(path), stage)]


def test_a_file_stands_for_the_files_that_it_extends_itself_and_the_section_of_the_stage(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        a="extends: [sub/b.yaml, c.yaml]\nx: 1\nfit:\n  extends: [d.yaml]\n  x: 2\npredict: {x: 3}\ntest:\n",
        **{"sub/b": "extends: [../c.yaml]\nfit: {y: 4}\npredict: {y: 5}"},
        c="z: 6",
        d="z: 7",
    )
    assert parts(path, "fit") == [{"z": 6}, {"y": 4}, {"z": 6}, {"x": 1}, {"z": 7}, {"x": 2}]
    assert parts(path, "predict") == [{"z": 6}, {"y": 5}, {"z": 6}, {"x": 1}, {"x": 3}]
    assert parts(path, "test") == [{"z": 6}, {"z": 6}, {"x": 1}]
    assert configs_of_stage(str(tmp_path / "c.yaml"), "fit") == [str(tmp_path / "c.yaml")]
    assert configs_of_stage("{x: 1}", "fit") == ["{x: 1}"]
    assert configs_of_stage("x: 1 " + "# long" * 100, "fit") == ["x: 1 " + "# long" * 100]


@pytest.mark.parametrize(
    ("files", "phrase"),
    [
        ({"a": "extends: [b.yaml]", "b": "extends: [a.yaml]"}, "extends has a.yaml, which extends this file"),
        ({"a": "fit: {extends: [a.yaml]}"}, "extends has a.yaml, which extends this file"),
        ({"a": "extends: [no.yaml]"}, "a.yaml, cannot be read as YAML (No such file or directory)"),
        ({"a": "extends: [b.yaml]", "b": "[1"}, "b.yaml, in extends of"),
        ({"a": "extends: [b.yaml]", "b": "3"}, "cannot be read as YAML (it holds no settings)"),
        ({"a": "extends: b.yaml"}, "extends is 'b.yaml'; give a list of files"),
        ({"a": "extends: [3]"}, "extends is [3]; give a list of files"),
        ({"a": "predict: 3"}, "predict is 3; write the settings of that stage below it"),
    ],
    ids=str,
)
def test_a_file_that_cannot_be_split_is_an_error_of_one_line(
    files: dict[str, str], phrase: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, **files)
    with pytest.raises(ValueError) as error:
        configs_of_stage(str(path), "fit")
    assert phrase in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(SystemExit) as end:
        main.main(["fit", "--config", str(path)])
    assert end.value.code == 2
    assert phrase in capsys.readouterr().err


def printed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    """The configuration that a command prints, and its errors."""
    with pytest.raises(SystemExit):
        main.main([*arguments, "--print_config"])
    output = capsys.readouterr()
    return yaml.safe_load(output.out) or {}, output.err


def test_sections_and_further_files_are_merged_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A section replaces lists, appends with +, changes classes, and wins over its file, but not over the next one."""
    base = Path("configs/argen/base.yaml").resolve()
    one = written(
        tmp_path,
        one=f"extends: [{base}]\nmodel: {{init_args: {{net: {{dim: 384}}, picture_size: 5}}}}\n"
        "validate:\n  trainer: {callbacks+: [{class_path: SampleGrid}]}\n  model: {init_args: {net: {n_layer: 3}}}\n"
        "predict:\n  trainer: {callbacks: [{class_path: ImageWriter}], default_root_dir: '${data.class_path}'}\n"
        "  model: {init_args: {net: {n_layer: 3, dim: 192}}}\n"
        "  data: {class_path: ClassRequestDataModule, init_args: {classes: ['${model.init_args.net.dim}', otter]}}\n",
    )
    two = written(
        tmp_path, two="model: {init_args: {net: {n_layer: 4}}}\nvalidate: {model: {init_args: {net: {dim: 96}}}}\n"
    )
    files = ["--config", str(one), "--config", str(two)]
    with pytest.warns(UserWarning, match=r"one\.yaml uses older names"):
        validate, predict = (printed([stage, *files], capsys)[0] for stage in ("validate", "predict"))
    net, names = (
        validate["model"]["init_args"]["net"],
        [each["class_path"] for each in validate["trainer"]["callbacks"]],
    )
    assert (net["dim"], net["n_layer"]) == (96, 4)
    assert (names[0], names[-1]) == ("callbacks.EMA", "callbacks.SampleGrid")
    assert validate["data"]["class_path"] == "datamodules.CodeDataModule"
    net = predict["model"]["init_args"]["net"]
    assert (net["dim"], net["n_layer"], predict["model"]["init_args"]["image_size"]) == (192, 4, 5)
    assert [each["class_path"] for each in predict["trainer"]["callbacks"]] == ["callbacks.ImageWriter"]
    assert predict["trainer"]["default_root_dir"] == "datamodules.ClassRequestDataModule"
    assert predict["data"]["init_args"] == {"classes": [192, "otter"], "per_class": 50, "batch_size": 256}


@pytest.mark.parametrize(
    ("content", "phrase"),
    [
        ("fit: {trainer: {max_epoch: 3}}", "max_epoch"),
        ("fit: {predict: {trainer: {max_epochs: 3}}}", "predict"),
        ("tset: {trainer: {max_epochs: 3}}", "tset"),
    ],
)
def test_unknown_keys_of_a_section_are_errors(
    content: str, phrase: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, error = printed(["fit", "--config", str(written(tmp_path, a=content))], capsys)
    assert config == {}
    assert f"has no option {phrase}" in error
