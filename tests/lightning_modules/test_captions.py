"""The predict-only module that encodes captions, and its command line."""

import sys
from pathlib import Path

import pytest
import torch

import main
from lightning_modules import CaptionModule
from llamagen.text import CaptionEncoder, TextEncoderConfig
from tests.datamodules.caption_datasets import write_captioned_codes
from tests.tiny_t5 import WIDTH, save_tiny_t5

CAPTIONS = ["a cat sits on the red house. a dog", "a dog"]


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_t5(tmp_path_factory.mktemp("t5"))


def test_predict_step_returns_the_features_of_captions(t5: Path) -> None:
    module = CaptionModule(TextEncoderConfig(str(t5), "float32"), caption_length=16)
    expected = CaptionEncoder(t5, 16, "float32")(CAPTIONS)
    outputs = module.predict_step({"captions": CAPTIONS}, 0)
    assert outputs.captions.features.shape == (2, 16, WIDTH)
    assert all(map(torch.equal, outputs.captions, expected))
    assert outputs.short_captions is None


def test_predict_step_returns_the_features_of_short_captions_if_given(t5: Path) -> None:
    module = CaptionModule(TextEncoderConfig(str(t5), "bfloat16"), caption_length=16)
    short = ["a cat sits on the red house.", "a dog"]
    outputs = module.predict_step({"captions": CAPTIONS, "short_captions": short}, 0)
    assert outputs.short_captions is not None
    assert outputs.captions.features.dtype == torch.bfloat16
    assert all(map(torch.equal, outputs.short_captions, CaptionEncoder(t5, 16)(short)))


def test_the_encoder_is_not_saved_or_cast_but_moves_with_the_module(t5: Path) -> None:
    module = CaptionModule(TextEncoderConfig(str(t5), "float32")).half()
    assert module.encoder.dtype == torch.float32
    assert module.encoder.caption_length == 120
    assert (list(module.state_dict()), list(module.parameters())) == ([], [])
    module.to("meta").on_predict_start()
    assert module.encoder.device == torch.device("meta")


def arguments(t5: Path | str, source: Path, out: Path) -> list[str]:
    return [
        *(
            "--config",
            "configs/text/extract.yaml",
            "--data.init_args.clean_captions=web",
        ),  # imports less than published
        f"--data.init_args.root={source}",
        *(f"--trainer.default_root_dir={out}", f"--model.init_args.encoder.name={t5}", "--trainer.accelerator=cpu"),
    ]


def error_of(stage: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The last line on stderr of a command that fails."""
    with pytest.raises(SystemExit):
        main.main([stage, *arguments])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_rejects_other_stages_before_loading_the_encoder(
    stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = error_of(stage, arguments("./nowhere", tmp_path, tmp_path / "out"), capsys)
    assert f"CaptionModule has nothing to train or to evaluate; {stage} another model" in said


def test_rejects_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*arguments("./nowhere", tmp_path, tmp_path / "out"), "--ckpt_path=README.md"]
    assert "CaptionModule is in no checkpoint; leave --ckpt_path out" in error_of("predict", command, capsys)


def test_a_missing_encoder_is_a_one_line_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_captioned_codes(tmp_path / "codes", {"train": 3, "val": 2})
    said = error_of("predict", arguments("./nowhere", source, tmp_path / "out"), capsys)
    assert "the caption encoder ./nowhere does not exist" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("package", "option"), [("transformers", "false"), ("ftfy", "true")])
def test_without_the_extra_the_message_says_how_to_install_it(
    t5: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    package: str,
    option: str,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    source = write_captioned_codes(tmp_path / "codes", {"train": 3, "val": 2})
    command = [*arguments(t5, source, tmp_path / "out"), f"--data.init_args.clean_captions={option}"]
    said = error_of("predict", command, capsys)
    assert f"needs {package}" in said
    assert 'pip install -c constraints.txt -e ".[text]"' in said
    assert not (tmp_path / "out").exists()
