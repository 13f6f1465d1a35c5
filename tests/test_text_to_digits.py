"""From captions to images, for real: minutes on a CPU. The record of such a run is in docs/runs."""

from pathlib import Path

import pytest
from PIL import Image

from benchmarks.text_to_digits import PROMPTS, run


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_at_least_four_in_five_images_show_the_digit_of_their_prompt(tmp_path: Path) -> None:
    _, accuracy = run(tmp_path / "run", per_prompt=20)
    assert accuracy["all"] >= 0.8
    assert min(accuracy[str(digit)] for digit in range(len(PROMPTS))) >= 0.5
    with Image.open(tmp_path / "run/samples/grid.png") as grid:
        assert grid.size[0] > 20 * 192
