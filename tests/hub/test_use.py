"""Weights of the hub wherever a path of weights is taken: Python, options, --ckpt_path, export."""

import ast
from pathlib import Path
from typing import Any

import pytest
import yaml

import main
from command_line.cli import LlamaGenCLI
from lightning_modules import CheckpointFiles
from lightning_modules.latest_checkpoint import resolve_checkpoint
from llamagen.checkpoints.contents import load_vqgan, read_checkpoint
from llamagen.checkpoints.export import export
from llamagen.checkpoints.export import main as export_command
from llamagen.checkpoints.weights import read_weights
from tests.hub_server import HubServer
from tests.pipeline import Pipeline
from tests.small_models import assert_same, small_gpt, small_vqgan

RUN = "hf://me/run/last.ckpt"
PUBLISHED = "hf://FoundationVision/LlamaGen/c2i_B_256.pt@main"


def saved(folder: Path, stage: str) -> dict[str, Any]:
    """The configuration that a stage recorded."""
    content: dict[str, Any] = yaml.safe_load((folder / f"{stage}.yaml").read_text())
    return content


def test_weights_are_read_by_name_and_by_address(published_hub: HubServer) -> None:
    assert_same(read_weights("c2i_B_256").state, small_gpt().state_dict())
    assert_same(load_vqgan("vq_ds16_c2i").state_dict(), small_vqgan().state_dict())
    weights = read_weights("hf://FoundationVision/LlamaGen/vq_ds16_c2i.pt@main")
    assert_same(weights.state, small_vqgan().state_dict())


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_that_was_damaged_in_the_cache_is_named_with_the_remedy(
    suffix: str, published_hub: HubServer, tmp_path: Path
) -> None:
    export("vq_ds16_c2i", tmp_path / f"vq{suffix}")
    published_hub.add("me/vq", {f"vq{suffix}": tmp_path / f"vq{suffix}"})
    published_hub.offline()  # nothing else would notice
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE"):
        read_weights(f"hf://me/vq/vq{suffix}")
    published_hub.online()
    path = Path(read_weights(f"hf://me/vq/vq{suffix}").source.split(",")[0])
    content = path.resolve()
    content.write_bytes(content.read_bytes()[:-100])
    published_hub.offline()
    with pytest.raises(
        ValueError, match=rf"damaged or another kind of file; remove {content} and run the same command"
    ):
        read_weights(f"hf://me/vq/vq{suffix}")


def test_the_export_reads_from_the_hub(published_hub: HubServer, tmp_path: Path) -> None:
    export_command(["vq_ds16_c2i", str(tmp_path / "a.safetensors")])
    export_command(["hf://FoundationVision/LlamaGen/vq_ds16_c2i.pt", str(tmp_path / "b.safetensors")])
    for name in "ab":
        assert_same(read_weights(tmp_path / f"{name}.safetensors").state, small_vqgan().state_dict())


@pytest.fixture
def run(hub: HubServer, pipeline: Pipeline, tmp_path: Path) -> HubServer:
    """The checkpoint of a run, and its weights under a published name."""
    hub.add("me/run", {"last.ckpt": pipeline.argen})
    export(pipeline.argen, tmp_path / "argen.pt")
    hub.add_published("c2i_B_256", tmp_path / "argen.pt")
    return hub


def test_ckpt_path_takes_published_weights_and_the_run_records_their_address(
    run: HubServer, pipeline: Pipeline, tmp_path: Path
) -> None:
    codes = f"--data.init_args.root={pipeline.codes}"
    found = [
        main.main(["validate", *pipeline.argen_arguments(tmp_path / name), codes, f"--ckpt_path={given}"])
        for name, given in (("a", RUN), ("b", PUBLISHED))
    ]
    assert len({cli.trainer.callback_metrics["val/loss"].item() for cli in found}) == 1
    of_run, of_published = saved(tmp_path / "a", "validate"), saved(tmp_path / "b", "validate")
    assert (of_run["ckpt_path"], of_run["model"]["init_args"]["init_from"]) == (RUN, None)
    assert (of_published["ckpt_path"], of_published["model"]["init_args"]["init_from"]) == (None, PUBLISHED)


def test_an_address_stays_an_address_if_the_parser_makes_it_a_path(
    run: HubServer,
    pipeline: Pipeline,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check = LlamaGenCLI._parse_ckpt_path

    def with_path(self: LlamaGenCLI) -> None:
        config = self.config[self.config.subcommand]
        config["ckpt_path"] = Path(config["ckpt_path"])
        check(self)

    monkeypatch.setattr(LlamaGenCLI, "_parse_ckpt_path", with_path)
    with pytest.raises(SystemExit):
        main.main(["validate", *pipeline.argen_arguments(tmp_path / "run"), "--ckpt_path=hf://me/run"])
    assert "hf://me/run does not name a file" in capsys.readouterr().err


def test_fit_cannot_resume_from_weights_and_names_the_option(
    run: HubServer, pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main.main(["fit", *pipeline.argen_arguments(tmp_path / "run"), "--ckpt_path=c2i_B_256"])
    message = capsys.readouterr().err
    assert "--ckpt_path: c2i_B_256 holds only weights" in message
    assert "start a new run from them with --model.init_args.init_from c2i_B_256" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "given", "part"),
    [
        (
            "--ckpt_path",
            "vq_ds17_c2i",
            "vq_ds17_c2i is neither a file nor a published name; give a path, hf://owner/repo",
        ),
        (
            "--ckpt_path",
            "hf://me/run",
            "hf://me/run does not name a file on the hub; give hf://owner/repository/file[@rev",
        ),
        (
            "--model.init_args.init_from",
            "hf://me/run/first.ckpt",
            "me/run has no file first.ckpt at main; it has last.ckpt",
        ),
    ],
)
def test_a_wrong_name_is_one_line(
    option: str, given: str, part: str, run: HubServer, pipeline: Pipeline, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    capsys.readouterr()
    with pytest.raises((SystemExit, ValueError)) as error:
        main.main(["validate", *pipeline.argen_arguments(tmp_path / "run"), f"{option}={given}"])
    message = capsys.readouterr().err or str(error.value)
    assert part in message
    assert not (tmp_path / "run").exists()


def test_lightning_reads_an_address(run: HubServer, pipeline: Pipeline) -> None:
    loaded = CheckpointFiles().load_checkpoint(RUN, weights_only=True)
    assert loaded.keys() == read_checkpoint(pipeline.argen).keys()
    trainer: Any = None
    path = Path(resolve_checkpoint(RUN, trainer, "fit"))
    assert path.read_bytes() == pipeline.argen.read_bytes()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.resolve().write_bytes(content)
    with pytest.raises(ValueError, match=rf"is damaged \(.*; remove {path.resolve()} and run the same command again"):
        resolve_checkpoint(RUN, trainer, "fit")


def test_libraries_of_the_hub_are_imported_when_they_are_needed() -> None:
    for path in Path("llamagen").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"huggingface_hub", "httpx2"}, path
