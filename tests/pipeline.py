"""A small version of the whole pipeline: the four commands of the quickstart on digits of 8 px."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import main
from llamagen.sampling import SamplingConfig

CreatedOnce = Callable[[str, Callable[[Path], object]], Path]
"""The fixture ``created_once``: a folder by name, created by the first worker process that needs it."""
TOKENIZER_NET = {
    "channels": 32,
    "channel_multipliers": [1, 1],
    "num_res_blocks": 1,
    "z_channels": 16,
    "codebook_size": 32,
    "codebook_dim": 4,
}
PATCHGAN = {"channels": 8, "num_layers": 1}
GPT_NET = {
    "dim": 32,
    "n_layer": 2,
    "n_head": 2,
    "multiple_of": 16,
    "vocab_size": 32,
    "block_size": 16,
    "num_classes": 10,
}


def _sampling() -> SamplingConfig:
    settings: dict[str, Any] = {}
    for name in ("base", "digits"):
        config = yaml.safe_load(Path(f"configs/argen/{name}.yaml").read_text())
        settings |= config["model"]["init_args"]["sampling"]
    return SamplingConfig(**settings)


SAMPLING = _sampling()
"""Settings of sampling in the configurations of the run."""


@dataclass(frozen=True)
class Pipeline:
    """Folders of a small run.

    Attributes:
        root: parent of all others.
    """

    root: Path

    @property
    def digits(self) -> Path:
        """Shards of the digits."""
        return self.root / "digits"

    @property
    def codes(self) -> Path:
        """Shards of the digits' codes."""
        return self.root / "codes"

    @property
    def samples(self) -> Path:
        """Generated images."""
        return self.root / "samples"

    @property
    def tokenizer(self) -> Path:
        """Checkpoint of the tokenizer."""
        return self.root / "tokenizer/checkpoints/last.ckpt"

    @property
    def argen(self) -> Path:
        """Checkpoint of the autoregressive model."""
        return self.root / "argen/checkpoints/last.ckpt"

    def tokenizer_arguments(self, folder: Path) -> list[str]:
        """Arguments of a stage of the tokenizer in ``folder``."""
        return [
            *("--config", "configs/vqgan/base.yaml", "--config", "configs/vqgan/digits.yaml"),
            *(f"--model.init_args.net.{key}={value}" for key, value in TOKENIZER_NET.items()),
            *(f"--model.init_args.discriminator.init_args.{key}={value}" for key, value in PATCHGAN.items()),
            *("--data.init_args.image_size=8", f"--data.init_args.root={self.digits}"),
            *("--model.init_args.loss.adversarial_start=4", "--trainer.max_steps=8", "--trainer.limit_val_batches=2"),
            *("--trainer.val_check_interval=4", "--trainer.check_val_every_n_epoch=1"),
            *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
            f"--trainer.default_root_dir={folder}",
        ]

    def argen_arguments(self, folder: Path) -> list[str]:
        """Arguments of a stage of the autoregressive model in ``folder``."""
        return [
            *("--config", "configs/argen/base.yaml", "--config", "configs/argen/digits.yaml"),
            *(f"--model.init_args.net.{key}={value}" for key, value in GPT_NET.items()),
            f"--model.init_args.tokenizer={self.tokenizer}",
            *("--trainer.max_steps=8", "--trainer.val_check_interval=4", "--trainer.check_val_every_n_epoch=1"),
            *("--trainer.limit_val_batches=2", "--trainer.enable_progress_bar=false"),
            "--trainer.enable_model_summary=false",
            f"--trainer.default_root_dir={folder}",
        ]

    def extract_arguments(self, folder: Path) -> list[str]:
        """The command that extracts codes into ``folder``."""
        arguments = self.tokenizer_arguments(folder)
        return ["predict", *arguments, "--config", "configs/vqgan/extract.yaml", f"--trainer.default_root_dir={folder}"]

    def sample_arguments(self, folder: Path) -> list[str]:
        """The command that generates images into ``folder``."""
        arguments = [item for item in self.argen_arguments(folder) if not item.startswith("--data")]
        return [
            *("predict", *arguments, "--config", "configs/argen/sample.yaml", f"--trainer.default_root_dir={folder}"),
            *("--data.init_args.per_class=3", "--data.init_args.batch_size=7"),
        ]

    def run(self) -> None:
        """Run the four commands."""
        main.main(["fit", *self.tokenizer_arguments(self.root / "tokenizer")])
        main.main([*self.extract_arguments(self.codes), f"--ckpt_path={self.tokenizer}"])
        main.main(["fit", *self.argen_arguments(self.root / "argen"), f"--data.init_args.root={self.codes}"])
        main.main([*self.sample_arguments(self.samples), f"--ckpt_path={self.argen}"])
