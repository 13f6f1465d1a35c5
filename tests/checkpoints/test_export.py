"""Exported files hold the weights of the checkpoint, and are complete or absent."""

import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from llamagen.checkpoints.contents import build_model, load_vqgan, weights_checksum
from llamagen.checkpoints.export import export, main
from llamagen.checkpoints.weights import read_weights
from llamagen.models.gpt import GPT, GPTConfig
from llamagen.models.vqgan import VQGAN, VQGANConfig
from tests.golden import assert_matches, fill, golden, normal_input
from tests.pipeline import GPT_NET, TOKENIZER_NET, Pipeline
from tests.small_models import SMALL_VQGAN, assert_same, codes_for, condition_for, small_gpt, small_vqgan

FORMATS = [".pt", ".safetensors"]


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A small tokenizer in the published layout."""
    torch.save({"model": small_vqgan().state_dict()}, tmp_path / "vq.pt")
    return tmp_path / "vq.pt"


@pytest.fixture
def roomy() -> Iterator[Path]:
    """A folder for large files, removed after the tests."""
    with TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.mark.slow
def test_a_published_tokenizer_decodes_the_published_images_also_after_export(roomy: Path) -> None:
    record = golden("VQ-16")
    with torch.device("meta"):
        vqgan = VQGAN()
    wanted = fill(vqgan.to_empty(device="cpu")).state_dict()
    wanted["quantize.codebook_used"].zero_()  # zero in published files
    torch.save({"model": wanted}, roomy / "vq_ds16_c2i.pt")

    loaded = load_vqgan(roomy / "vq_ds16_c2i.pt")
    assert loaded.config == VQGANConfig()
    with torch.no_grad():
        reconstruction = loaded(normal_input(record["image"], (1, 3, 256, 256)).tanh()).reconstruction
    assert_matches(reconstruction, record["reconstruction"])

    for suffix in FORMATS:
        export(roomy / "vq_ds16_c2i.pt", roomy / f"again{suffix}")
        assert_same(read_weights(roomy / f"again{suffix}").state, wanted)
        assert_same(load_vqgan(roomy / f"again{suffix}").state_dict(), wanted)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("averaged", [True, False])
def test_exports_raw_or_averaged_weights_of_a_tokenizer(
    averaged: bool, suffix: str, pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = read_weights(pipeline.tokenizer, averaged)
    out = tmp_path / f"new/vq{suffix}"
    export(pipeline.tokenizer, out, averaged)
    count = sum(parameter.numel() for parameter in VQGAN(VQGANConfig(**TOKENIZER_NET)).parameters())
    kind = "EMA" if averaged else "raw"
    assert (
        capsys.readouterr().out == f"{out}: VQGAN of {count:,} parameters, from {pipeline.tokenizer}, {kind} weights\n"
    )
    found = read_weights(out)
    assert_same(found.state, wanted.state)
    assert_same(load_vqgan(out).state_dict(), wanted.state)
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    is_averaged = averaged and suffix == ".safetensors"
    source = "EMA weights" if is_averaged else "raw weights (it has no separate EMA weights)"
    assert found.source == f"{out}, {source}"
    assert (found.averaged, found.architecture) == (is_averaged, "VQGAN" if suffix == ".safetensors" else None)


@pytest.mark.parametrize("suffix", FORMATS)
def test_exports_a_gpt(suffix: str, pipeline: Pipeline, tmp_path: Path) -> None:
    wanted = read_weights(pipeline.argen)
    export(pipeline.argen, tmp_path / f"gpt{suffix}")
    found = read_weights(tmp_path / f"gpt{suffix}")
    assert_same(found.state, wanted.state)
    built = build_model(wanted)
    assert isinstance(built, GPT)
    direct = GPT(GPTConfig(**GPT_NET)).eval()
    direct.load_state_dict(found.state)
    inputs = codes_for(direct, 2, 15), condition_for(direct, 2)
    with torch.no_grad():
        torch.testing.assert_close(built(*inputs), direct(*inputs), atol=0, rtol=0)


def test_a_pt_file_has_the_published_layout(pipeline: Pipeline, tmp_path: Path) -> None:
    export(pipeline.tokenizer, tmp_path / "vq.pt")
    content = torch.load(tmp_path / "vq.pt", weights_only=True)
    assert content.keys() == {"model"}
    assert list(content["model"]) == list(VQGAN(VQGANConfig(**TOKENIZER_NET)).state_dict())


def test_safetensors_contain_the_configuration(pipeline: Pipeline, tmp_path: Path) -> None:
    for name, checkpoint in (("VQGAN", pipeline.tokenizer), ("GPT", pipeline.argen)):
        wanted = torch.load(checkpoint, weights_only=True)["llamagen"]["config"]
        export(checkpoint, tmp_path / f"{name}.safetensors")
        with safe_open(tmp_path / f"{name}.safetensors", "pt") as file:
            entry = json.loads(file.metadata()["llamagen"])
        digits = [str(digit) for digit in range(10)]
        tokenizer = weights_checksum(load_vqgan(pipeline.tokenizer))
        trained_on = {"GPT": {"classes": digits, "tokenizer": tokenizer}, "VQGAN": {}}[name]
        assert entry == {"architecture": name, "config": wanted, "averaged": True, **trained_on}
        config = {"VQGAN": VQGANConfig, "GPT": GPTConfig}[name](**wanted)
        assert build_model(read_weights(tmp_path / f"{name}.safetensors")).config == config


@pytest.mark.parametrize("suffix", FORMATS)
def test_exported_weights_keep_their_dtype_and_are_dense_and_separate(suffix: str, tmp_path: Path) -> None:
    state = small_vqgan().to(torch.bfloat16).to(memory_format=torch.channels_last).state_dict()
    block = torch.randn(10_000, 4).bfloat16()
    state["quantize.embedding.weight"] = block[:64]  # a view of a larger tensor
    shared = torch.randn(32).bfloat16()
    state["encoder.norm_out.bias"], state["encoder.conv_in.bias"] = shared.repeat(2), shared
    state["decoder.norm_out.bias"] = shared
    torch.save({"model": state}, tmp_path / "vq.pt")
    export(tmp_path / "vq.pt", tmp_path / f"out{suffix}")
    found = read_weights(tmp_path / f"out{suffix}").state
    assert_same(found, state)
    assert all(value.is_contiguous() for value in found.values())
    assert found["quantize.embedding.weight"].untyped_storage().nbytes() == 64 * 4 * 2
    assert found["encoder.conv_in.bias"].data_ptr() != found["decoder.norm_out.bias"].data_ptr()


def test_rejects_an_unknown_suffix(published: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vq\.ckpt would be of an unknown format; name it \*\.pt or \*\.safetensors"):
        export(published, tmp_path / "vq.ckpt")


def test_replaces_an_existing_file_only_with_overwrite(published: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.pt"
    out.write_text("old")
    with pytest.raises(ValueError, match=r"out\.pt exists already; choose another name, or give --overwrite"):
        export(published, out)
    assert out.read_text() == "old"
    export(published, out, overwrite=True)
    assert_same(read_weights(out).state, read_weights(published).state)


def test_a_folder_is_not_replaced(published: Path, tmp_path: Path) -> None:
    (tmp_path / "out.pt").mkdir()
    with pytest.raises(ValueError, match=r"out\.pt exists already"):
        export(published, tmp_path / "out.pt", overwrite=True)


def test_a_checkpoint_can_be_replaced_by_its_export(published: Path) -> None:
    wanted = {name: value.clone() for name, value in read_weights(published).state.items()}
    export(published, published, overwrite=True)
    assert_same(read_weights(published).state, wanted)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_failed_write_leaves_no_file(
    suffix: str, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(content: Any, file: Any, *_: Any) -> None:
        (file if isinstance(file, Path) else Path(file.name)).write_text("half")  # a path's name has no folder
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(ValueError, match=r"cannot be written .disk full.; choose another place"):
        export(published, tmp_path / f"new/out{suffix}")
    assert list((tmp_path / "new").iterdir()) == []


def test_weights_that_do_not_fit_are_not_exported(tmp_path: Path) -> None:
    state = small_vqgan().state_dict()
    del state["quantize.codebook_used"]
    torch.save({"model": state}, tmp_path / "vq.pt")
    with pytest.raises(ValueError, match=r"do not fit this VQGAN; missing: quantize\.codebook_used$"):
        export(tmp_path / "vq.pt", tmp_path / "new/out.pt")
    torch.save({"model": small_gpt().state_dict()}, tmp_path / "gpt.pt")
    with pytest.raises(ValueError, match="not the weights of a VQGAN"):
        export(tmp_path / "gpt.pt", tmp_path / "new/out.pt")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "factor", "kind"), [([], 0.5, "EMA weights"), (["--raw", "--overwrite"], 1.0, "raw weights")]
)
def test_the_command_passes_all_options(
    options: list[str], factor: float, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = small_vqgan().state_dict()
    halves = {name: value * 0.5 for name, value in state.items()}
    torch.save({"model": state, "ema": halves}, tmp_path / "vq.pt")
    out = tmp_path / "out.safetensors"
    if options:
        out.touch()
    main([str(tmp_path / "vq.pt"), str(out), *options])
    assert capsys.readouterr().out.endswith(f"{kind}\n")
    assert_same(read_weights(out).state, {name: value * factor for name, value in state.items()})
    assert load_vqgan(out).config == SMALL_VQGAN


def test_the_command_reports_errors_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["export", "nowhere.pt", str(tmp_path / "out.pt")])
    monkeypatch.delitem(sys.modules, "llamagen.checkpoints.export")  # runpy warns about an imported module
    with pytest.raises(SystemExit) as end:
        runpy.run_module("llamagen.checkpoints.export", run_name="__main__")
    assert end.value.code == 2
    errors = capsys.readouterr().err
    assert errors.splitlines()[-1] == (
        "error: nowhere.pt does not exist; give a file of weights, a published name or "
        "hf://owner/repository/file; see python -m llamagen.checkpoints.export --help"
    )
    assert "Traceback" not in errors


@pytest.mark.parametrize("suffix", FORMATS)
def test_reports_a_path_that_cannot_be_written(suffix: str, published: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot be written: .*; choose another place") as error:
        export(published, tmp_path / f"file/out{suffix}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", FORMATS)
def test_exported_files_have_default_permissions(suffix: str, published: Path, tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    export(published, tmp_path / f"out{suffix}")
    assert (tmp_path / f"out{suffix}").stat().st_mode == (tmp_path / "usual").stat().st_mode
