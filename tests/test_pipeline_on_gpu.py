"""The four commands of the quickstart on a GPU: training, codes, and images by compiled sampling."""

import json
from pathlib import Path

import pytest
import torch

import main
from tests.pipeline import Pipeline

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ON_GPU = ("--trainer.accelerator=gpu", "--trainer.devices=1", "--trainer.precision=bf16-mixed")


class PipelineOnGPU(Pipeline):
    """The same commands on one GPU, in bfloat16."""

    def tokenizer_arguments(self, folder: Path) -> list[str]:
        return [*super().tokenizer_arguments(folder), *ON_GPU]

    def argen_arguments(self, folder: Path) -> list[str]:
        return [*super().argen_arguments(folder), *ON_GPU]


def test_the_four_commands_run_on_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llamagen.sampling.automatic.MIN_PARAMETERS", 0)
    pipeline = PipelineOnGPU(tmp_path)
    pipeline.run()
    assert "compiled sampling is ready after" in capsys.readouterr().out
    images = sorted(pipeline.samples.glob("images/*/*.png"))
    assert len(images) == 30
    assert json.loads((pipeline.codes / "meta.json").read_text())
    once = [path.read_bytes() for path in images]
    main.main([*pipeline.sample_arguments(tmp_path / "again"), f"--ckpt_path={pipeline.argen}"])
    again = [path.read_bytes() for path in sorted((tmp_path / "again").glob("images/*/*.png"))]
    assert once == again
