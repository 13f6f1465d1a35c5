"""Weights of the hub wherever a path of weights is taken: Python, options, --ckpt_path, export."""

import ast
from pathlib import Path

import pytest
import torch
import yaml

import main
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


@pytest.fixture
def served(hub: HubServer, tmp_path: Path) -> HubServer:
    """A tokenizer and a class model, small, under published names."""
    for name, model in (("vq_ds16_c2i", small_vqgan()), ("c2i_B_256", small_gpt())):
        torch.save({"model": model.state_dict()}, tmp_path / f"{name}.pt")
        hub.add_published(name, tmp_path / f"{name}.pt")
    return hub


def saved(folder: Path, stage: str) -> dict[str, object]:
    """The configuration that a stage recorded."""
    content: dict[str, object] = yaml.safe_load((folder / f"{stage}.yaml").read_text())
    return content


def test_weights_are_read_by_name_and_by_address(served: HubServer) -> None:
    assert_same(read_weights("c2i_B_256").state, small_gpt().state_dict())
    assert_same(load_vqgan("vq_ds16_c2i").state_dict(), small_vqgan().state_dict())
    weights = read_weights("hf://FoundationVision/LlamaGen/vq_ds16_c2i.pt@main")
    assert_same(weights.state, small_vqgan().state_dict())


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_that_was_damaged_in_the_cache_is_named_with_the_remedy(
    suffix: str, served: HubServer, tmp_path: Path
) -> None:
    export("vq_ds16_c2i", tmp_path / f"vq{suffix}")
    served.add("me/vq", {f"vq{suffix}": tmp_path / f"vq{suffix}"})
    served.offline()  # nothing else would notice
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE"):
        read_weights(f"hf://me/vq/vq{suffix}")
    served.online()
    path = Path(read_weights(f"hf://me/vq/vq{suffix}").source.split(",")[0])
    content = path.resolve()
    content.write_bytes(content.read_bytes()[:-100])
    served.offline()
    with pytest.raises(
        ValueError, match=rf"damaged or another kind of file; remove {content} and run the same command"
    ):
        read_weights(f"hf://me/vq/vq{suffix}")


def test_the_export_reads_from_the_hub(served: HubServer, tmp_path: Path) -> None:
    export_command(["vq_ds16_c2i", str(tmp_path / "a.safetensors")])
    export_command(["hf://FoundationVision/LlamaGen/vq_ds16_c2i.pt", str(tmp_path / "b.safetensors")])
    for name in "ab":
        assert_same(read_weights(tmp_path / f"{name}.safetensors").state, small_vqgan().state_dict())


@pytest.fixture
def run(hub: HubServer, pipeline: Pipeline, tmp_path: Path) -> HubServer:
    """The checkpoint of a tokenizer run, and its weights under a published name."""
    hub.add("me/run", {"last.ckpt": pipeline.tokenizer})
    export(pipeline.tokenizer, tmp_path / "vq.pt")
    hub.add_published("vq_ds16_c2i", tmp_path / "vq.pt")
    return hub


@pytest.mark.parametrize("given", ["vq_ds16_c2i", "hf://FoundationVision/LlamaGen/vq_ds16_c2i.pt@main"])
def test_ckpt_path_takes_published_weights_and_the_run_records_their_name(
    given: str, run: HubServer, pipeline: Pipeline, tmp_path: Path
) -> None:
    expected = main.main(
        ["validate", *pipeline.tokenizer_arguments(tmp_path / "a"), f"--ckpt_path={pipeline.tokenizer}"]
    )
    found = main.main(["validate", *pipeline.tokenizer_arguments(tmp_path / "b"), f"--ckpt_path={given}"])
    assert found.trainer.callback_metrics["val/psnr"] == expected.trainer.callback_metrics["val/psnr"]
    settings = saved(tmp_path / "b", "validate")
    assert settings["model"]["init_args"]["init_from"] == given  # type: ignore[index]
    assert settings["ckpt_path"] is None


def test_ckpt_path_takes_the_checkpoint_of_a_run(run: HubServer, pipeline: Pipeline, tmp_path: Path) -> None:
    cli = main.main(
        ["fit", *pipeline.tokenizer_arguments(tmp_path / "run"), f"--ckpt_path={RUN}", "--trainer.max_steps=9"]
    )
    assert cli.trainer.global_step >= 9
    assert cli.model.global_step >= 9
    first = main.main(["validate", *pipeline.tokenizer_arguments(tmp_path / "v"), f"--ckpt_path={RUN}"])
    assert first.trainer.callback_metrics
    assert saved(tmp_path / "v", "validate")["ckpt_path"] == RUN


def test_fit_cannot_resume_from_weights_and_names_the_option(
    run: HubServer, pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main.main(["fit", *pipeline.tokenizer_arguments(tmp_path / "run"), "--ckpt_path=vq_ds16_c2i"])
    message = capsys.readouterr().err
    assert "--ckpt_path: vq_ds16_c2i holds only weights" in message
    assert "start a new run from them with --model.init_args.init_from vq_ds16_c2i" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["--ckpt_path", "--model.init_args.init_from"])
@pytest.mark.parametrize(
    ("given", "part"),
    [
        ("vq_ds17_c2i", "vq_ds17_c2i is neither a file nor a published name; give a path, hf://owner/repository/file"),
        ("hf://me/run", "hf://me/run does not name a file on the hub; give hf://owner/repository/file[@revision]"),
        ("hf://me/run/first.ckpt", "me/run has no file first.ckpt at main; it has last.ckpt"),
    ],
)
def test_a_wrong_name_is_one_line(
    option: str, given: str, part: str, run: HubServer, pipeline: Pipeline, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    capsys.readouterr()
    with pytest.raises((SystemExit, ValueError)) as error:
        main.main(["validate", *pipeline.tokenizer_arguments(tmp_path / "run"), f"{option}={given}"])
    message = capsys.readouterr().err or str(error.value)
    assert part in message
    assert not (tmp_path / "run").exists()


def test_lightning_reads_an_address(run: HubServer, pipeline: Pipeline) -> None:
    loaded = CheckpointFiles().load_checkpoint(RUN, weights_only=True)
    assert loaded.keys() == read_checkpoint(pipeline.tokenizer).keys()
    path = resolve_checkpoint(RUN, None, "fit")  # type: ignore[arg-type]
    assert Path(path).read_bytes() == pipeline.tokenizer.read_bytes()


def test_libraries_of_the_hub_are_imported_when_they_are_needed() -> None:
    for path in Path("llamagen").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"huggingface_hub", "httpx2"}, path
