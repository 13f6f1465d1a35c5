"""Text to image from captions to images, with trained models. docs/runs has the record of a run of full size."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import main
from benchmarks.digits_accuracy import measure
from benchmarks.small_t5 import save_small_t5
from benchmarks.text_to_digits import PROMPTS, WIDTH, commands
from datamodules.digits import NAMES

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
# Digits of 8 px and narrow models take a minute instead of many.
TOKENIZER = [
    *("--data.init_args.image_size=8", "--model.init_args.net.channel_multipliers=[1,1]"),
    *("--model.init_args.discriminator.init_args.channels=8", "--model.init_args.discriminator.init_args.num_layers=1"),
]
SMALLER = {
    "tokenizer": [*TOKENIZER, "--trainer.max_epochs=10", "--trainer.check_val_every_n_epoch=10"],
    "codes": TOKENIZER,
    "training": ["--trainer.max_epochs=25", "--trainer.check_val_every_n_epoch=25"],
}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_at_least_80_percent_of_the_images_show_the_digit_of_their_prompt(tmp_path: Path) -> None:
    save_small_t5(tmp_path / "t5", ["a", "handwritten", *NAMES], WIDTH)
    for stage, arguments in commands(tmp_path, per_prompt=20).items():
        main.main([*arguments, *QUIET, *SMALLER.get(stage, [])])
    with np.load(tmp_path / "samples/samples.npz") as archive:
        accuracy = measure(archive["arr_0"], archive["arr_1"])
    assert accuracy["all"] >= 0.8
    assert min(accuracy[str(digit)] for digit in range(len(PROMPTS))) >= 0.5
    with Image.open(tmp_path / "samples/grid.png") as grid:
        assert grid.size[0] > 20 * 8
