"""Images that ``predict`` of the autoregressive model writes, and stopped runs that are resumed."""

import json
import os
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import main
from callbacks import EMA, ImageWriter, figures
from callbacks.writers.image_threads import ImageThreads
from callbacks.writers.sample_folder import SampleFolder
from datamodules import ClassRequestDataModule, ImageDataModule
from lightning_modules import ARGenModule
from llamagen.models.gpt import GPTConfig
from llamagen.sampling import SamplingConfig
from tests.datamodules.shard_files import assert_one_line
from tests.lightning_modules.runs import evaluator
from tests.pipeline import GPT_NET, SAMPLING, Pipeline

LIMITED = "--trainer.limit_predict_batches=2"  # 1 may be read as all of them
TWO_BATCHES = {"limit_predict_batches": 2}


def command(pipeline: Pipeline, folder: Path, *more: str) -> list[str]:
    """Sample 30 images in batches of 7."""
    return [*pipeline.sample_arguments(folder), f"--ckpt_path={pipeline.argen}", *more]


"""Those of the command."""


def sample(
    pipeline: Pipeline,
    folder: Path,
    classes: int | list[int] | Path = 10,
    per_class: int = 3,
    batch_size: int = 7,
    averaged: bool = True,
    trainer: Any = None,
    **module: Any,
) -> None:
    """Do the same as :func:`command`, without the command line."""
    gpt = ARGenModule(GPTConfig(**GPT_NET), **{"sampling": SAMPLING, "tokenizer": pipeline.tokenizer, **module})
    callbacks = [EMA(), ImageWriter()] if averaged else [ImageWriter()]
    evaluator(*callbacks, default_root_dir=folder, **(trainer or {})).predict(
        gpt, ClassRequestDataModule(classes, per_class, batch_size), ckpt_path=pipeline.argen, return_predictions=False
    )


def written_files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "images").rglob("*") if path.is_file())


def test_samples_have_the_documented_files_and_archive(pipeline: Pipeline) -> None:
    names = [f"images/{index % 10}/{index:06d}_class{index % 10}.png" for index in range(30)]
    files = [path.relative_to(pipeline.samples).as_posix() for path in pipeline.samples.rglob("*") if path.is_file()]
    assert sorted(files) == sorted([*names, ".plan.json", "grid.png", "predict.yaml", "samples.npz"])
    with np.load(pipeline.samples / "samples.npz") as archive:
        found, labels = archive["arr_0"], archive["arr_1"]
    assert (found.dtype, found.shape) == (np.uint8, (30, 8, 8, 3))
    assert labels.dtype == np.int64
    assert labels.tolist() == [index % 10 for index in range(30)]
    for name, image in zip(names, found, strict=True):
        assert np.array_equal(np.array(Image.open(pipeline.samples / name)), image)


def test_images_are_resized_in_files_archive_and_grid(pipeline: Pipeline, tmp_path: Path) -> None:
    sample(pipeline, tmp_path, image_size=5)
    for path in (tmp_path / "images").rglob("*.png"):
        with Image.open(path) as image:
            assert image.size == (5, 5)
    with np.load(tmp_path / "samples.npz") as archive:
        assert archive["arr_0"].shape == (30, 5, 5, 3)
    assert np.array(Image.open(tmp_path / "grid.png")).shape == (10 * 7 + 2, 3 * 7 + 2, 3)


def test_the_grid_has_a_row_for_each_class(pipeline: Pipeline) -> None:
    grid = np.array(Image.open(pipeline.samples / "grid.png"))
    assert grid.shape == (10 * 10 + 2, 3 * 10 + 2, 3)
    with np.load(pipeline.samples / "samples.npz") as archive:
        assert np.array_equal(grid[2 + 10 * 4 : 10 + 10 * 4, 12:20], archive["arr_0"][14])


def test_images_can_be_read_as_a_folder_of_class_folders(pipeline: Pipeline, tmp_path: Path) -> None:
    sample(pipeline, tmp_path, classes=[3, 7], per_class=2)
    data = ImageDataModule(tmp_path / "images", image_size=8, batch_size=4, num_workers=0)
    data.setup("fit")
    assert data.class_names == [str(number) for number in range(8)], "images keep the requested classes"
    found = [dataset[number, 0]["labels"] for dataset in data.datasets.values() for number in range(len(dataset))]
    assert sorted(found) == [3, 3, 7, 7]


def test_labels_may_come_from_a_file_and_repeat(pipeline: Pipeline, tmp_path: Path) -> None:
    labels = [7, 2, 7, 7, 0]
    (tmp_path / "labels.txt").write_text("\n".join(map(str, labels)))
    folder = tmp_path / "samples"
    sample(pipeline, folder, tmp_path / "labels.txt", 2, batch_size=3, trainer=TWO_BATCHES)
    assert len(written_files(folder)) == 6
    sample(pipeline, folder, tmp_path / "labels.txt", 2)
    assert written_files(folder) == [f"{index:06d}_class{label}.png" for index, label in enumerate(labels * 2)]
    with np.load(folder / "samples.npz") as archive:
        assert archive["arr_1"].tolist() == labels * 2
    assert np.array(Image.open(folder / "grid.png")).shape == (3 * 10 + 2, 6 * 10 + 2, 3)


def test_rejects_an_unknown_label_before_writing_anything(pipeline: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("3\n10\n")
    with pytest.raises(ValueError, match="class 10 was requested, but the model has classes 0 to 9"):
        main.main(command(pipeline, tmp_path / "samples", f"--data.init_args.classes={tmp_path / 'labels.txt'}"))
    assert not (tmp_path / "samples").exists()


def test_rejects_a_complete_folder(pipeline: Pipeline) -> None:
    before = {path: path.stat().st_mtime_ns for path in pipeline.samples.rglob("*")}
    with pytest.raises(ValueError, match=r"already holds samples"):
        main.main(command(pipeline, pipeline.samples))
    assert {path: path.stat().st_mtime_ns for path in pipeline.samples.rglob("*")} == before


def test_rejects_a_folder_of_images_without_a_plan(pipeline: Pipeline, tmp_path: Path) -> None:
    for number, name in enumerate(["images/3/000003_class3.png", "000003_class3.png", "images/dog/rex.png"]):
        path = tmp_path / str(number) / name
        path.parent.mkdir(parents=True)
        path.touch()
        with pytest.raises(ValueError, match=r"already holds samples"):
            SampleFolder(tmp_path / str(number), np.arange(10)).check_free()
    with pytest.raises(ValueError, match=r"already holds samples"):
        main.main(command(pipeline, tmp_path / "0"))
    assert [path.name for path in (tmp_path / "0").rglob("*") if path.is_file()] == ["000003_class3.png"]


OTHERS: dict[str, dict[str, Any]] = {
    "sample_seed (0 then, 3 now)": {"sample_seed": 3},
    "image_size (None then, 5 now)": {"image_size": 5},
    f"sampling.temperature ({SAMPLING.temperature} then, 0.5 now)": {"sampling": replace(SAMPLING, temperature=0.5)},
    "number of images (30 then, 40 now)": {"per_class": 4},
    "order of labels": {"classes": [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]},
    "precision (32-true then, bf16-mixed now)": {"trainer": {"precision": "bf16-mixed"}},
    "model": {"averaged": False},
}


def test_rejects_to_resume_with_other_settings_by_name(pipeline: Pipeline, tmp_path: Path) -> None:
    sample(pipeline, tmp_path, trainer=TWO_BATCHES)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for what, options in OTHERS.items():
        with pytest.raises(ValueError) as error:
            sample(pipeline, tmp_path, **options)
        assert_one_line(error, tmp_path, f"was started with another {what}")
        assert_one_line(error, "resume it with the command that started it")
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before, what


def test_a_run_without_images_may_restart_with_other_settings(pipeline: Pipeline, tmp_path: Path) -> None:
    sample(pipeline, tmp_path, trainer={"limit_predict_batches": 0})
    assert written_files(tmp_path) == []
    sample(pipeline, tmp_path, sample_seed=3)
    assert json.loads((tmp_path / ".plan.json").read_text())["sample_seed"] == 3
    assert len(written_files(tmp_path)) == 30


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ('{"format": "llamagen-codes"}', "format (llamagen-codes then, llamagen-samples now)"),
        ("?", "is not the plan"),
    ],
)
def test_rejects_a_folder_with_another_kind_of_plan(pipeline: Pipeline, tmp_path: Path, text: str, phrase: str) -> None:
    (tmp_path / ".plan.json").write_text(text)
    with pytest.raises(ValueError) as error:
        sample(pipeline, tmp_path)
    assert_one_line(error, phrase)
    assert (tmp_path / ".plan.json").read_text() == text


def test_a_limited_run_leaves_no_archive_and_is_resumed(pipeline: Pipeline, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"16 of 30 images are missing in .* so samples.npz was not written"):
        main.main(command(pipeline, tmp_path, "--trainer.limit_predict_batches=2"))
    assert not (tmp_path / "samples.npz").exists()
    assert not (tmp_path / "grid.png").exists()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "images").rglob("*.png")}
    assert len(before) == 14
    main.main(command(pipeline, tmp_path))
    assert before.items() <= {p: p.stat().st_mtime_ns for p in (tmp_path / "images").rglob("*.png")}.items()
    assert written_files(tmp_path) == written_files(pipeline.samples)
    with np.load(tmp_path / "samples.npz") as one, np.load(pipeline.samples / "samples.npz") as other:
        assert np.array_equal(one["arr_1"], other["arr_1"])
        assert np.array_equal(one["arr_0"], other["arr_0"])


def test_removes_temporary_files_of_a_killed_run(pipeline: Pipeline, tmp_path: Path) -> None:
    sample(pipeline, tmp_path, trainer=TWO_BATCHES)
    for name in (".samples.npz.tmp", "images/9/.000009_class9.png.tmp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    sample(pipeline, tmp_path, trainer=TWO_BATCHES)
    assert [path.name for path in tmp_path.rglob(".*")] == [".plan.json"]


def test_only_images_of_the_plan_count_as_finished(tmp_path: Path) -> None:
    folder = SampleFolder(tmp_path, np.array([4, 2, 4]))
    assert folder.finished() == []
    right = ("4/000000_class4.png", "4/000002_class4.png")
    wrong = ("2/000001_class4.png", "4/000001_class2.png", "4/000003_class4.png", "4/.000001_class2.png.tmp", "2/x")
    for name in (*right, *wrong):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(b"image")
    (tmp_path / "images/000001_class2.png").write_bytes(b"image")
    (tmp_path / "images/2/000001_class2.png").touch()  # left empty by a crash of the machine
    assert folder.finished() == [0, 2]
    assert [folder.path(index) for index in (0, 2)] == [tmp_path / "images" / name for name in right]


def test_class_folders_sort_by_class(tmp_path: Path) -> None:
    folder = SampleFolder(tmp_path, np.array([4, 12]))
    assert folder.path(0) == tmp_path / "images/04/000000_class4.png"
    assert folder.path(1) == tmp_path / "images/12/000001_class12.png"
    for index in (0, 1):
        folder.path(index).parent.mkdir(parents=True)
        folder.path(index).write_bytes(b"image")
    assert folder.finished() == [0, 1]


def stub_module() -> Any:
    """A stub with the members of a module that ImageWriter needs."""
    return SimpleNamespace(
        generator=torch.nn.Linear(1, 1),
        sampling=SamplingConfig(),
        sample_seed=0,
        image_size=None,
        tokenizer_checksum=None,
        caption_metadata={},
    )


def test_all_ranks_use_the_listing_of_rank_zero(tmp_path: Path) -> None:
    data = ClassRequestDataModule(4, per_class=1)
    (tmp_path / "images/1").mkdir(parents=True)
    (tmp_path / "images/1/000001_class1.png").touch()
    sent: list[Any] = []
    strategy = SimpleNamespace(broadcast=lambda value: sent.append(value) or ([0, 2], ""))
    trainer: Any = SimpleNamespace(
        datamodule=data, default_root_dir=str(tmp_path), is_global_zero=False, strategy=strategy
    )
    ImageWriter().setup(trainer, stub_module(), "predict")
    assert sent == [(None, "")]
    batches = list(data.predict_dataloader())
    assert [batch["index"].tolist() for batch in batches] == [[1, 3]]


def test_a_rank_reaches_the_barrier_after_its_images_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    reached = threading.Event()

    def barrier(name: str) -> None:
        counts.append(len(written_files(tmp_path)))
        reached.set()

    # No image is written before the rank waits for its threads, or was at the barrier.
    waiting = ImageThreads.finish
    monkeypatch.setattr(ImageThreads, "finish", lambda threads: reached.set() or waiting(threads))
    slow_save(monkeypatch, lambda: reached.wait(60) and None)
    strategy = SimpleNamespace(broadcast=lambda value: value, barrier=barrier)
    trainer: Any = SimpleNamespace(
        callbacks=[],
        datamodule=ClassRequestDataModule(10, per_class=1),
        default_root_dir=str(tmp_path),
        is_global_zero=True,
        strategy=strategy,
        precision="32-true",
    )
    module, writer = stub_module(), ImageWriter()
    writer.setup(trainer, module, "predict")
    writer.on_predict_start(trainer, module)
    outputs = {"images": torch.zeros(10, 4, 4, 3, dtype=torch.uint8), "index": torch.arange(10)}
    writer.on_predict_batch_end(trainer, module, outputs, {}, 0)
    writer.on_predict_epoch_end(trainer, module)
    assert counts == [10]


def failing_save(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Fill the disk while an image is written."""
    write = Path.write_bytes

    def half_write(self: Path, data: Any) -> int:
        if name in self.name:
            write(self, b"half")
            raise OSError(28, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", half_write)


def test_an_error_in_a_thread_ends_the_run_and_leaves_no_partial_file(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        failing_save(patch, "000012")
        with pytest.raises(OSError, match="No space left on device"):
            sample(pipeline, tmp_path)
    assert "000012_class2.png" not in written_files(tmp_path)
    assert not any(name.startswith(".") for name in written_files(tmp_path))
    assert not (tmp_path / "samples.npz").exists()
    sample(pipeline, tmp_path)
    assert written_files(tmp_path) == written_files(pipeline.samples)


IMAGE = np.zeros((4, 4, 3), np.uint8)


def slow_save(monkeypatch: pytest.MonkeyPatch, gate: Any) -> None:
    """Call ``gate`` in each thread before it saves."""
    save = figures.save_png
    monkeypatch.setattr("callbacks.writers.image_threads.save_png", lambda *args: gate() or save(*args))


def test_threads_write_in_parallel_and_bound_the_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = threading.Barrier(3, timeout=60)  # two threads and this one
    slow_save(monkeypatch, lambda: meeting.wait() and None)
    threads = ImageThreads(threads=2, waiting=1)
    for number in range(3):
        threads.write(lambda: IMAGE, tmp_path / f"{number}.png")
    more = threading.Thread(target=lambda: threads.write(lambda: IMAGE, tmp_path / "3.png"))
    more.start()
    assert not threads._slots.acquire(blocking=False)  # three images are being written or wait, which is the limit
    meeting.wait()
    meeting.wait()
    more.join(60)
    assert not more.is_alive()
    threads.finish()
    assert sorted(os.listdir(tmp_path)) == ["0.png", "1.png", "2.png", "3.png"]


def test_cancelling_discards_waiting_images_and_finishes_started_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, cancelled = threading.Event(), threading.Event()
    slow_save(monkeypatch, lambda: begun.set() or (cancelled.wait(60) and None))
    threads = ImageThreads(threads=1, waiting=100)
    shutdown = threads._pool.shutdown

    def cancel(wait: bool = True, *, cancel_futures: bool = False) -> None:
        shutdown(wait=False, cancel_futures=cancel_futures)
        cancelled.set()
        shutdown(wait)

    monkeypatch.setattr(threads._pool, "shutdown", cancel)
    for number in range(100):
        threads.write(lambda: IMAGE, tmp_path / f"{number}.png")
    assert begun.wait(60)
    threads.cancel()
    assert os.listdir(tmp_path) == ["0.png"]


def test_a_failing_run_ends_its_threads(pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predict_step = ARGenModule.predict_step

    def fail(self: ARGenModule, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 2:
            raise RuntimeError("pulled the plug")
        return predict_step(self, batch, batch_idx)

    monkeypatch.setattr(ARGenModule, "predict_step", fail)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        sample(pipeline, tmp_path)
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("images")] == []
    assert not any(name.startswith(".") for name in written_files(tmp_path))


def test_the_first_error_is_raised_by_the_next_call_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_save(monkeypatch, "bad")
    threads = ImageThreads(threads=1, waiting=0)
    threads.write(lambda: IMAGE, tmp_path / "bad.png")
    threads._slots.acquire()  # waits for the thread
    threads._slots.release()
    with pytest.raises(OSError, match="No space left"):
        threads.write(lambda: IMAGE, tmp_path / "good.png")
    with pytest.raises(OSError, match="No space left"):
        threads.finish()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("options", [{"grid_columns": 0}, {"grid_rows": 0}])
def test_rejects_an_empty_grid(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="both must be at least 1"):
        ImageWriter(**options)
