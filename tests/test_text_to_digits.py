"""Text to image from captions to images, with trained models: minutes on a CPU. docs/runs has the record of a run."""

from pathlib import Path

import pytest
from PIL import Image

from benchmarks.text_to_digits import PROMPTS, run


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_at_least_80_percent_of_the_images_show_the_digit_of_their_prompt(tmp_path: Path) -> None:
    _, accuracy = run(tmp_path / "run", per_prompt=20)
    assert accuracy["all"] >= 0.8
    assert min(accuracy[str(digit)] for digit in range(len(PROMPTS))) >= 0.5
    with Image.open(tmp_path / "run/samples/grid.png") as grid:
        assert grid.size[0] > 20 * 192
