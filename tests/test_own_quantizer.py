"""A quantiser defined outside llamagen/ and lightning_modules/ goes through the whole pipeline."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import main
from datamodules import CodeDataModule
from lightning_modules import VQGANLossConfig, VQGANModule
from llamagen.checkpoints.contents import load_vqgan, read_checkpoint
from llamagen.checkpoints.export import export
from llamagen.checkpoints.weights import read_weights
from llamagen.models.vqgan import VQGAN, VQGANConfig
from tests.golden import normal_input
from tests.pipeline import TOKENIZER_NET, CreatedOnce, Pipeline
from tests.rounding import Rounding
from tests.saved_runs import again

NET = "--model.init_args.net"
QUANTIZER = {"class_path": "tests.rounding.Rounding", "init_args": {"levels": 5}}
FROM_COMMAND_LINE = [
    *(f"{NET}.quantizer.class_path", "tests.rounding.Rounding", f"{NET}.quantizer.init_args.levels", "5"),
    *("--trainer.max_steps=4", "--trainer.log_every_n_steps=1"),
]


@dataclass(frozen=True)
class Run:
    """A tokenizer with the quantiser, trained for 4 steps and resumed for 2 more, and its codes.

    Attributes:
        pipeline: the images, and arguments of the commands.
        root: folder of the run.
    """

    pipeline: Pipeline
    root: Path

    @property
    def tokenizer(self) -> Path:
        return self.root / "tokenizer/checkpoints/last.ckpt"

    @property
    def codes(self) -> Path:
        return self.root / "codes"

    def fit_arguments(self) -> list[str]:
        return [*self.pipeline.tokenizer_arguments(self.root / "tokenizer"), *FROM_COMMAND_LINE]

    def argen_arguments(self, arguments: list[str]) -> list[str]:
        """Arguments of the pipeline's autoregressive model, with this tokenizer."""
        own = [item for item in arguments if not item.startswith((f"{NET}.vocab_size", "--model.init_args.tokenizer"))]
        return [*own, f"{NET}.vocab_size=25", f"--model.init_args.tokenizer={self.tokenizer}", "--trainer.max_steps=2"]


@pytest.fixture(scope="module")
def run(pipeline: Pipeline, created_once: CreatedOnce) -> Run:
    return Run(pipeline, created_once("own_quantizer", lambda folder: create(Run(pipeline, folder))))


def create(run: Run) -> None:
    main.main(["fit", *run.fit_arguments()])
    assert read_checkpoint(run.tokenizer)["global_step"] == 4
    main.main(
        [*again("fit", run.root / "tokenizer", run.root / "tokenizer"), "--trainer.max_steps=6", "--ckpt_path=last"]
    )
    extract = [*run.pipeline.extract_arguments(run.codes), *FROM_COMMAND_LINE]
    main.main([*extract, f"--ckpt_path={run.tokenizer}"])


def same_weights(a: VQGAN, b: VQGAN) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_checkpoint_rebuilds_the_quantiser(run: Run) -> None:
    vqgan = load_vqgan(run.tokenizer)
    assert isinstance(vqgan.quantize, Rounding)
    assert (vqgan.quantize.levels, vqgan.config.codebook_size, vqgan.config.codebook_dim) == (5, 25, 2)
    assert read_checkpoint(run.tokenizer)["llamagen"]["config"]["quantizer"] == QUANTIZER
    assert not [name for name in vqgan.state_dict() if name.startswith("quantize.")]
    images = normal_input("own quantizer", (2, 3, 8, 8)).tanh()
    encoding = vqgan.encode(images)
    assert torch.equal(vqgan.decode_codes(encoding.codes), vqgan.decode(encoding.quantized))


def test_the_quantisers_loss_is_logged_and_added_with_weight_1(run: Run) -> None:
    lines = (next((run.root / "tokenizer").rglob("metrics.csv"))).read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    row = next(row for row in rows if row["val/loss"])
    assert "val/codebook" not in row
    assert any(row["train/rounding"] for row in rows)
    assert float(row["val/rounding"]) > 0
    assert float(row["val/loss"]) == pytest.approx(float(row["val/reconstruction"]) + float(row["val/rounding"]))


def test_the_run_resumes(run: Run) -> None:
    assert read_checkpoint(run.tokenizer)["global_step"] == 6


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_exported_weights_rebuild_the_quantiser(run: Run, tmp_path: Path, suffix: str) -> None:
    export(run.tokenizer, tmp_path / f"weights.{suffix}")
    loaded, expected = load_vqgan(tmp_path / f"weights.{suffix}"), load_vqgan(run.tokenizer)
    assert loaded.config == expected.config
    assert same_weights(loaded, expected)
    assert torch.equal(loaded.quantize.get_buffer("powers"), torch.tensor([1, 5]))
    module = VQGANModule(loaded.config, init_from=tmp_path / f"weights.{suffix}", lpips_weights=None)
    assert same_weights(module.vqgan, expected)
    export(tmp_path / f"weights.{suffix}", tmp_path / "again.safetensors")
    assert read_weights(tmp_path / "again.safetensors").config == read_weights(run.tokenizer).config


def test_codes_are_extracted(run: Run) -> None:
    data = CodeDataModule(root=run.codes, batch_size=4)
    data.prepare_data()
    data.setup("fit")
    codes = next(iter(data.train_dataloader()))["codes"]
    assert codes.shape == (4, 16)
    assert 0 <= int(codes.min()) <= int(codes.max()) < 25


def test_an_autoregressive_model_trains_on_its_codes_and_samples(run: Run) -> None:
    folder, pipeline = run.root / "argen", run.pipeline
    fit = run.argen_arguments(pipeline.argen_arguments(folder))
    main.main(["fit", *fit, f"--data.init_args.root={run.codes}"])
    sample = run.argen_arguments(pipeline.sample_arguments(run.root / "samples"))
    main.main([*sample, f"--ckpt_path={folder / 'checkpoints/last.ckpt'}"])
    images = np.load(run.root / "samples/samples.npz")["arr_0"]
    assert images.shape == (30, 8, 8, 3)
    assert images.dtype == np.uint8


def test_mistakes_are_reported_in_one_line() -> None:
    for quantizer, options, parts in (
        (
            {"class_path": "tests.pipeline.Pipeline"},
            {},
            ["tests.pipeline.Pipeline, which is not a quantiser; give a subclass of"],
        ),
        (
            {"class_path": "absent.Rounding"},
            {},
            ["quantizer.class_path is absent.Rounding, which cannot be imported (No module named 'absent')"],
        ),
        (
            {"class_path": "tests.rounding.Rounding", "init_args": {"steps": 5}},
            {},
            ["quantizer.init_args is {'steps': 5}", "its arguments are (levels: int"],
        ),
        (
            QUANTIZER,
            {"revive_codes_every": 5},
            ["revive_codes_every is 5, but Rounding does not support code revival; set it to 0"],
        ),
        (
            QUANTIZER,
            {"loss": VQGANLossConfig(entropy_weight=0.1)},
            ["loss.entropy_weight is 0.1, but Rounding has no entropy loss; set it to 0"],
        ),
        (
            {"class_path": "tests.rounding.Rounding", "init_args": {"levels": 5, "dim": 9}},
            {},
            ["size of Rounding is 1953125; at most 262,144 codes are supported"],
        ),
    ):
        with pytest.raises(ValueError) as error:
            VQGANModule(VQGANConfig(**TOKENIZER_NET, quantizer=quantizer), lpips_weights=None, **options)
        assert all(part in str(error.value) for part in parts), error.value
        assert "\n" not in str(error.value)


def test_a_mistake_on_the_command_line_is_one_line_and_leaves_no_folder(
    pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main.main(
            [*again("fit", pipeline.root / "tokenizer", tmp_path), f"{NET}.quantizer.class_path=tests.rounding.Absent"]
        )
    (message,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert "quantizer.class_path is tests.rounding.Absent, which cannot be imported" in message
    assert "give a class of a module" in message
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_quantiser_is_rejected(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = [f"{NET}.quantizer.init_args.levels=4", f"--model.init_args.init_from={run.tokenizer}"]
    with pytest.raises(SystemExit):
        main.main([*again("fit", run.root / "tokenizer", tmp_path), *other])
    assert f"set net.quantizer to {QUANTIZER}" in capsys.readouterr().err
