"""A small text-to-image pipeline: digits with captions, their codes, features of a tiny T5, a trained model."""

from dataclasses import dataclass
from pathlib import Path

import main
from datamodules.digits import NAMES
from tests.pipeline import GPT_NET, Pipeline
from tests.tiny_t5 import WIDTH, save_tiny_model, tiny_tokenizer

LENGTH = 8
TEXT_NET = {**GPT_NET, "condition": "text", "caption_length": LENGTH, "caption_dim": WIDTH}
QUIET = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")


@dataclass(frozen=True)
class TextPipeline:
    """Folders of a small run.

    Attributes:
        root: parent of all others.
        images: the run with the tokenizer.
    """

    root: Path
    images: Pipeline

    @property
    def t5(self) -> Path:
        """The T5 encoder and its tokenizer."""
        return self.root / "t5"

    @property
    def codes(self) -> Path:
        """Codes with captions."""
        return self.root / "codes"

    @property
    def features(self) -> Path:
        """Codes with features of their captions."""
        return self.root / "features"

    @property
    def argen(self) -> Path:
        """Checkpoint of the model trained on the features."""
        return self.root / "argen/checkpoints/last.ckpt"

    def feature_arguments(self, folder: Path) -> list[str]:
        """The command that extracts features into ``folder``."""
        return [
            *("predict", "--config", "configs/text/extract.yaml", *QUIET, "--model.init_args.encoder.dtype=float32"),
            *(f"--model.init_args.encoder.name={self.t5}", f"--model.init_args.caption_length={LENGTH}"),
            *(f"--data.init_args.root={self.codes}", "--data.init_args.num_workers=0"),
            "--data.init_args.clean_captions=web",  # the published cleaning would import diffusers, in 2 seconds
            *("--data.init_args.short_captions=true", f"--trainer.default_root_dir={folder}"),
        ]

    def argen_arguments(self, folder: Path) -> list[str]:
        """Arguments of a stage of the text model in ``folder``, without those of the data."""
        return [
            *("--config", "configs/argen/base.yaml", "--config", "configs/argen/digits.yaml"),
            *("--config", "configs/argen/text_digits.yaml", *QUIET),
            *(f"--model.init_args.net.{key}={value}" for key, value in TEXT_NET.items()),
            *(f"--model.init_args.tokenizer={self.images.tokenizer}", "--trainer.max_steps=8"),
            *(f"--model.init_args.text_encoder.name={self.t5}", f"--trainer.default_root_dir={folder}"),
            *("--trainer.val_check_interval=4", "--trainer.check_val_every_n_epoch=1", "--trainer.limit_val_batches=2"),
        ]

    def prompt_arguments(self, folder: Path, prompts: str) -> list[str]:
        """The command that generates images of prompts into ``folder``."""
        return [
            *("predict", *self.argen_arguments(folder), "--config", "configs/argen/prompts.yaml"),
            *(f"--trainer.default_root_dir={folder}", f"--data.init_args.prompts={prompts}"),
            f"--ckpt_path={self.argen}",
        ]

    def run(self) -> None:
        """Extract codes, extract features, train."""
        save_tiny_model(self.t5)
        tiny_tokenizer(("handwritten", *NAMES)).save_pretrained(self.t5)
        tokenizer = [item for item in self.images.tokenizer_arguments(self.codes) if "data.init_args.root" not in item]
        main.main(
            [
                *("predict", *tokenizer, "--config", "configs/vqgan/extract.yaml", "--data.init_args.captions=true"),
                *(f"--data.init_args.root={self.root / 'digits'}", f"--trainer.default_root_dir={self.codes}"),
                f"--ckpt_path={self.images.tokenizer}",
            ]
        )
        main.main(self.feature_arguments(self.features))
        main.main(["fit", *self.argen_arguments(self.root / "argen"), f"--data.init_args.root={self.features}"])
