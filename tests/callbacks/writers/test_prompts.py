"""Images of prompts that ``predict`` writes: their names, records and grid, and runs that are resumed."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import main
from callbacks import ImageWriter
from datamodules import PromptDataModule
from llamagen.sampling import IMAGE_SETTINGS, SamplingConfig
from tests.callbacks.writers.hashed_images import HashedImages
from tests.datamodules.shard_files import assert_one_line
from tests.lightning_modules.runs import evaluator
from tests.ranks import succeeds, two_processes
from tests.sampling_probes import PullThePlug, with_probe
from tests.test_killed_sampling import killed

LONG = "one two three four five six seven eight nine ten"
PROMPTS = ["a cat", "", 'ein "Hündchen" 🐕‍🦺 柴犬', LONG, "b\0b ../../etc/passwd"]
CLEANED = [*PROMPTS[:4], "b b ../../etc/passwd"]
WARNING = r"1 of 5 prompts were longer than the model reads and were truncated: prompt 3 \('one two"


def command(folder: Path, prompts: list[str] | Path = PROMPTS, *more: str) -> list[str]:
    """Sample two images of each prompt in batches of 3."""
    given = str(prompts) if isinstance(prompts, Path) else json.dumps(prompts, ensure_ascii=False)
    return [
        *("predict", f"--model={HashedImages.__module__}.HashedImages", "--model.init_args.init_from=nothing"),
        *("--data=PromptDataModule", f"--data.init_args.prompts={given}", "--data.init_args.per_prompt=2"),
        *("--data.init_args.batch_size=3", "--trainer.callbacks=[{class_path: ImageWriter}]"),
        *("--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false"),
        *("--trainer.accelerator=cpu", "--trainer.enable_model_summary=false", f"--trainer.default_root_dir={folder}"),
        *more,
    ]


def sample(
    folder: Path,
    prompts: list[str] | Path = PROMPTS,
    per_prompt: int = 2,
    batch_size: int = 3,
    limit: float = 1.0,
    **module: Any,
) -> None:
    """Do the same as :func:`command`, without the command line."""
    data = PromptDataModule(prompts, per_prompt, batch_size)
    trainer = evaluator(ImageWriter(), default_root_dir=folder, limit_predict_batches=limit)
    trainer.predict(HashedImages(**module), data, return_predictions=False)


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


NAMES = [f"images/{index % 5}/{index:06d}_prompt{index % 5}.png" for index in range(10)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    with pytest.warns(UserWarning, match=WARNING):
        main.main(command(folder))
    return folder


def assert_same_run(folder: Path, uninterrupted: Path) -> None:
    assert files(folder) == files(uninterrupted)
    assert records(folder) == records(uninterrupted)
    with np.load(folder / "samples.npz") as one, np.load(uninterrupted / "samples.npz") as other:
        assert np.array_equal(one["arr_0"], other["arr_0"])
        assert np.array_equal(one["arr_1"], other["arr_1"])
    for name in NAMES:
        assert np.array_equal(np.array(Image.open(folder / name)), np.array(Image.open(uninterrupted / name)))


def test_images_are_named_by_prompt_and_collected(uninterrupted: Path) -> None:
    others = [".plan.json", "grid.png", "metadata.jsonl", "predict.yaml", "samples.npz"]
    assert files(uninterrupted) == sorted([*NAMES, *others])
    with np.load(uninterrupted / "samples.npz") as archive:
        assert archive["arr_1"].tolist() == [0, 1, 2, 3, 4] * 2
        assert archive["arr_0"].shape == (10, 8, 8, 3)
        for name, image in zip(NAMES, archive["arr_0"], strict=True):
            assert np.array_equal(np.array(Image.open(uninterrupted / name)), image)


def test_each_image_has_a_record_of_its_prompt_and_settings(uninterrupted: Path) -> None:
    found = records(uninterrupted)
    assert [record["file_name"] for record in found] == NAMES
    assert [record["index"] for record in found] == list(range(10))
    assert [record["prompt"] for record in found] == CLEANED * 2
    assert [record["truncated"] for record in found] == [False, False, False, True, False] * 2
    assert {record["seed"] for record in found} == {0}
    assert found[0]["sampling"]["guidance_scale"] == 7.5
    assert found[0]["sampling"]["top_k"] == 1000
    assert found[0]["sampling"].keys() == set(IMAGE_SETTINGS)
    assert "柴犬" in (uninterrupted / "metadata.jsonl").read_text(encoding="utf-8")


def test_the_grid_has_a_row_for_each_prompt_with_captions(uninterrupted: Path) -> None:
    grid = np.array(Image.open(uninterrupted / "grid.png"))
    assert grid.shape[1] == 2 * (192 + 8) + 8
    first = np.array(Image.open(uninterrupted / NAMES[0])).repeat(24, 0).repeat(24, 1)
    assert np.array_equal(grid[8:200, 8:200], first)
    assert grid[200:220, 8:100].min() < 50  # words


def test_single_images_of_prompts_share_the_rows_of_the_grid(tmp_path: Path) -> None:
    sample(tmp_path, [f"prompt {number}" for number in range(10)], per_prompt=1)
    grid = Image.open(tmp_path / "grid.png")
    assert grid.width == 4 * (192 + 8) + 8  # 4 + 4 + 2
    assert 3 * 200 < grid.height < 3 * 240


def test_records_hold_the_other_columns_of_a_table(tmp_path: Path) -> None:
    (tmp_path / "p.tsv").write_text("Prompt\tCategory\tNote\na cat\tAnimals\t\na house\tIndoor\tfile_name\n")
    folder = tmp_path / "samples"
    sample(folder, tmp_path / "p.tsv", per_prompt=1)
    assert [record["columns"] for record in records(folder)] == [
        {"Category": "Animals", "Note": ""},
        {"Category": "Indoor", "Note": "file_name"},
    ]


OTHERS: dict[str, dict[str, Any]] = {
    "list of prompts": {"prompts": ["a cat", "a dog", *PROMPTS[2:]]},
    "number of images (10 then, 12 now)": {"prompts": [*PROMPTS, "more"]},
    "sample_seed (0 then, 3 now)": {"sample_seed": 3},
    "sampling.guidance_scale (7.5 then, 2.0 now)": {"sampling": SamplingConfig(guidance_scale=2.0, top_k=1000)},
    "text.reader (hash then, rhyme now)": {"reader": "rhyme"},
}


def test_rejects_to_resume_with_other_settings_by_name(tmp_path: Path) -> None:
    sample(tmp_path, limit=2)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    assert len(before) == 6
    for what, options in OTHERS.items():
        with pytest.raises(ValueError) as error:
            sample(tmp_path, **options)
        assert_one_line(error, tmp_path, "was started with another ", what)
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")} == before, what


def test_rejects_a_complete_folder(uninterrupted: Path) -> None:
    with pytest.raises(ValueError, match="already holds samples"):
        sample(uninterrupted)


def test_does_not_warn_if_no_prompt_was_truncated(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sample(tmp_path, ["a cat", ""])
    assert not [warning for warning in caught if "were truncated" in str(warning.message)]


def test_a_resumed_run_knows_the_prompts_truncated_before_the_kill(tmp_path: Path, uninterrupted: Path) -> None:
    killed(lambda: main.main(command(tmp_path, PROMPTS, with_probe(PullThePlug, rank=0, batch=2))))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    assert 0 < len(before) < 10
    assert not (tmp_path / "metadata.jsonl").exists()
    with pytest.warns(UserWarning, match=WARNING):
        main.main(command(tmp_path, PROMPTS, "--data.init_args.batch_size=4"))
    assert before.items() <= {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}.items()
    assert_same_run(tmp_path, uninterrupted)


def test_warns_about_prompts_truncated_by_an_earlier_run(tmp_path: Path) -> None:
    prompts = [LONG, "a", "b", "c"]
    with pytest.warns(UserWarning, match="1 of 4 prompts were longer"):
        sample(tmp_path, prompts, per_prompt=1, batch_size=1, limit=2)
    with pytest.warns(UserWarning, match="1 of 4 prompts were longer"):
        sample(tmp_path, prompts, per_prompt=1)
    assert [record["truncated"] for record in records(tmp_path)] == [True, False, False, False]


def test_two_processes_sample_the_same_images_and_warn_once(tmp_path: Path, uninterrupted: Path) -> None:
    done = two_processes(command(tmp_path))
    succeeds(done)
    assert (done.stdout + done.stderr).count("were longer than the model reads") == 1
    assert_same_run(tmp_path, uninterrupted)
