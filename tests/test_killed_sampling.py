"""The same 32 images are sampled with any batch size, on any number of processes, and after a kill."""

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import main
from callbacks.writers import images as image_writer
from tests.pipeline import Pipeline
from tests.ranks import succeeds, two_processes
from tests.sampling_probes import KeepCodes, PullThePlug, with_probe

COUNT = 32
CLASSES = [3, 1, 4, 0, 5, 9, 2, 6]
WINDOW = "--model.init_args.sampling.window"
COMPILED = ["--trainer.callbacks+=CompiledSampling", "--trainer.callbacks.init_args.enabled=true"]


def command(pipeline: Pipeline, folder: Path, batch_size: int) -> list[str]:
    return [
        *pipeline.sample_arguments(folder / "samples"),
        *(f"--ckpt_path={pipeline.argen}", f"--data.init_args.classes={CLASSES}", "--data.init_args.per_class=4"),
        *(f"--data.init_args.batch_size={batch_size}", with_probe(KeepCodes, folder=folder / "codes")),
    ]


def killed(task: Callable[[], object]) -> None:
    """Run a task in a process with its own process group, and check that it is killed."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            task()
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


def image_files(folder: Path) -> dict[Path, int]:
    """Images of a run, with the times at which they were written."""
    return {path: path.stat().st_mtime_ns for path in (folder / "samples/images").rglob("*.png")}


def hidden(folder: Path) -> list[str]:
    return [path.name for path in (folder / "samples").rglob(".*")]


def assert_same_images(folder: Path, uninterrupted: Path) -> None:
    """Assert that two runs have the same codes and archives, and that each archive equals the image files."""
    assert len(list((folder / "codes").iterdir())) == len(image_files(folder)) == COUNT
    for path in (uninterrupted / "codes").iterdir():
        assert np.array_equal(np.load(path), np.load(folder / "codes" / path.name)), path.name
    with np.load(folder / "samples/samples.npz") as one, np.load(uninterrupted / "samples/samples.npz") as other:
        assert one["arr_1"].tolist() == other["arr_1"].tolist() == CLASSES * 4
        assert np.array_equal(one["arr_0"], other["arr_0"])
        for index, image in enumerate(one["arr_0"]):
            label = CLASSES[index % 8]
            name = f"samples/images/{label}/{index:06d}_class{label}.png"
            assert np.array_equal(np.array(Image.open(folder / name)), image)
    assert hidden(folder) == [".plan.json"]


@pytest.fixture(scope="module")
def uninterrupted(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    main.main(command(pipeline, folder, COUNT))
    with np.load(folder / "samples/samples.npz") as archive:
        assert len(np.unique(archive["arr_0"], axis=0)) == COUNT
    return folder


@pytest.mark.parametrize("batch_size", [1, 7])
def test_samples_the_same_images_with_any_batch_size(
    pipeline: Pipeline, uninterrupted: Path, tmp_path: Path, batch_size: int
) -> None:
    main.main(command(pipeline, tmp_path, batch_size))
    assert_same_images(tmp_path, uninterrupted)


def test_two_processes_sample_the_images_of_one(pipeline: Pipeline, uninterrupted: Path, tmp_path: Path) -> None:
    succeeds(two_processes(command(pipeline, tmp_path, 7)))
    assert_same_images(tmp_path, uninterrupted)


@pytest.mark.parametrize("batch_size", [7, COUNT])
def test_compiled_sampling_samples_the_same_images(
    pipeline: Pipeline, uninterrupted: Path, tmp_path: Path, batch_size: int
) -> None:
    main.main([*command(pipeline, tmp_path, batch_size), *COMPILED])
    assert_same_images(tmp_path, uninterrupted)


def test_two_processes_resume_a_killed_run_with_compiled_sampling_and_another_window(
    pipeline: Pipeline, uninterrupted: Path, tmp_path: Path
) -> None:
    plug = with_probe(PullThePlug, rank=0, batch=3)
    killed(lambda: main.main([*command(pipeline, tmp_path, 7), *COMPILED, f"{WINDOW}=3", plug]))
    assert 0 < len(image_files(tmp_path)) < COUNT
    succeeds(two_processes([*command(pipeline, tmp_path, 5), *COMPILED, f"{WINDOW}=8"]))
    assert_same_images(tmp_path, uninterrupted)


def test_two_processes_resume_a_run_of_one(pipeline: Pipeline, uninterrupted: Path, tmp_path: Path) -> None:
    killed(lambda: main.main([*command(pipeline, tmp_path, 7), with_probe(PullThePlug, rank=0, batch=3)]))
    before = image_files(tmp_path)
    assert 0 < len(before) < COUNT
    succeeds(two_processes(command(pipeline, tmp_path, 5)))
    assert before.items() <= image_files(tmp_path).items()
    assert_same_images(tmp_path, uninterrupted)


def test_one_process_resumes_a_run_of_two(pipeline: Pipeline, uninterrupted: Path, tmp_path: Path) -> None:
    done = two_processes([*command(pipeline, tmp_path, 3), with_probe(PullThePlug, rank=1, batch=1)])
    assert done.returncode != 0
    before = image_files(tmp_path)
    assert len(before) > 0
    assert not (tmp_path / "samples/samples.npz").exists()
    main.main(command(pipeline, tmp_path, COUNT))
    assert before.items() <= image_files(tmp_path).items()
    assert_same_images(tmp_path, uninterrupted)


def test_a_run_may_be_killed_repeatedly(pipeline: Pipeline, uninterrupted: Path, tmp_path: Path) -> None:
    for batch_size, window in ((1, 4), (9, 1), (4, "auto")):
        plug = with_probe(PullThePlug, rank=0, batch=1)
        arguments = [*command(pipeline, tmp_path, batch_size), f"{WINDOW}={window}", plug]
        killed(lambda: main.main(arguments))  # noqa: B023
    main.main(command(pipeline, tmp_path, 2))
    assert_same_images(tmp_path, uninterrupted)


@pytest.mark.parametrize("left", [0, 1])
def test_two_processes_complete_a_run_with_at_most_one_image_left(
    pipeline: Pipeline, uninterrupted: Path, tmp_path: Path, left: int
) -> None:
    main.main(command(pipeline, tmp_path, COUNT))
    (tmp_path / "samples/samples.npz").unlink()
    (tmp_path / "samples/grid.png").unlink()
    for index in range(left):
        (tmp_path / f"samples/images/{CLASSES[index]}/{index:06d}_class{CLASSES[index]}.png").unlink()
    before = image_files(tmp_path)
    succeeds(two_processes(command(pipeline, tmp_path, COUNT)))
    assert before.items() <= image_files(tmp_path).items()
    assert (tmp_path / "samples/grid.png").exists()
    assert_same_images(tmp_path, uninterrupted)


def test_a_run_killed_while_writing_the_archive_only_writes_it_again(
    pipeline: Pipeline, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = image_writer._pixels

    def die(path: Path) -> np.ndarray:
        if path.name.startswith("000020") and (tmp_path / "samples/grid.png").exists():
            os.killpg(0, signal.SIGKILL)
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(image_writer, "_pixels", die)
        killed(lambda: main.main(command(pipeline, tmp_path, COUNT)))
    plan, archive = sorted(hidden(tmp_path))
    assert plan == ".plan.json"
    assert re.fullmatch(r"\.samples\.npz\..+\.tmp", archive)
    before = image_files(tmp_path)
    assert len(before) == COUNT
    main.main(command(pipeline, tmp_path, COUNT))
    assert image_files(tmp_path) == before
    assert_same_images(tmp_path, uninterrupted)


def test_an_error_of_rank_zero_is_raised_in_every_process(
    pipeline: Pipeline, uninterrupted: Path, tmp_path: Path
) -> None:
    main.main([*command(pipeline, tmp_path, 7), "--trainer.limit_predict_batches=2"])
    other = [*command(pipeline, tmp_path, 7), "--model.init_args.sample_seed=5"]
    done = two_processes(other)
    assert done.returncode != 0
    assert "was started with another sample_seed (0 then, 5 now)" in done.stderr
    assert "Connection closed" not in done.stderr
    assert len(image_files(tmp_path)) == 14
