"""Stopped ``predict`` runs of an earlier version, whose folder and plan used other names, are resumed."""

import json
from pathlib import Path

import pytest

import main
from tests.callbacks.writers.test_images import LIMITED, command, written_files
from tests.callbacks.writers.test_writers import SHARDS_OF_500
from tests.pipeline import Pipeline

OLD_KEYS = {"number of images": "number of pictures", "image_size": "picture_size"}


def rename_keys(plan: Path, names: dict[str, str]) -> None:
    content = json.loads(plan.read_text())
    assert names.keys() <= content.keys()
    plan.write_text(json.dumps({names.get(key, key): value for key, value in content.items()}))


def times(folder: Path, pattern: str) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob(pattern)}


def test_a_stopped_sampling_run_is_resumed(pipeline: Pipeline, tmp_path: Path) -> None:
    main.main(command(pipeline, tmp_path, LIMITED))
    (tmp_path / "images").rename(tmp_path / "pictures")
    rename_keys(tmp_path / ".plan.json", OLD_KEYS)
    before = times(tmp_path / "pictures", "*.png")
    assert len(before) == 14
    with pytest.raises(ValueError, match=r"was started with another image_size \(None then, 5 now\)"):
        main.main(command(pipeline, tmp_path, "--model.init_args.image_size=5"))
    assert times(tmp_path / "pictures", "*.png") == before
    main.main(command(pipeline, tmp_path))
    assert not (tmp_path / "pictures").exists()
    assert written_files(tmp_path) == written_files(pipeline.samples)
    assert before.items() <= times(tmp_path / "images", "*.png").items()
    assert json.loads((tmp_path / ".plan.json").read_text()).keys() >= OLD_KEYS.keys()


def test_images_without_a_plan_are_refused(pipeline: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "pictures/3").mkdir(parents=True)
    (tmp_path / "pictures/3/000003_class3.png").touch()
    with pytest.raises(ValueError, match=r"already holds samples"):
        main.main(command(pipeline, tmp_path))


def test_a_stopped_extraction_of_codes_is_resumed(pipeline: Pipeline, tmp_path: Path) -> None:
    arguments = [*pipeline.extract_arguments(tmp_path), f"--ckpt_path={pipeline.tokenizer}", SHARDS_OF_500]
    with pytest.raises(ValueError, match="is incomplete"):
        main.main([*arguments, "--trainer.limit_predict_batches=20"])  # of 32 images each, of 500 in a shard
    before = times(tmp_path, "*.tar")
    assert before.keys() == {"train-000000.tar", "val-000000.tar"}
    rename_keys(tmp_path / ".plan.json", {"images": "pictures"})
    main.main(arguments)
    assert before.items() <= times(tmp_path, "*.tar").items()
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert {split: entry["count"] for split, entry in meta["splits"].items()} == {"train": 1497, "val": 300}
