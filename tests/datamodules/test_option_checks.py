"""Every option of every DataModule is checked in the constructor, with an error in one line that names it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import datamodules
from datamodules import (
    CaptionDataModule,
    ClassRequestDataModule,
    CodeDataModule,
    DigitsDataModule,
    ImageDataModule,
    PromptDataModule,
)
from datamodules.packing import pack
from tests.datamodules.shard_files import assert_one_line, grey_image

NAN, INF = float("nan"), float("inf")
WRONG: dict[str, tuple[Any, ...]] = {
    "batch_size": (0, -1, 2.5, True, "4"),
    "num_workers": (-1, 1.5),
    "seed": (-1, 0.5),
    "resampled_epoch": (0, -5, 1.5),
    "val_share": (0.0, 1.0, -0.1, NAN, INF),
    "max_bad_share": (-0.1, 1.1, NAN),
    "cache_gb": (0.0, -1.0, NAN, INF),
    "remainder": ("all", None),
    "class_order": ("text", None),
    "root": ("", "  "),
    "train": ("",),
    "val": ("",),
}
CASES: list[tuple[Any, dict[str, Any], dict[str, tuple[Any, ...]]]] = [
    (
        ImageDataModule,
        {"root": "nowhere"},
        WRONG
        | {
            "image_size": (0, -8, 32.5, 10**6),
            "crop_ranges": ([], [0.9], [NAN], [INF], [1.1, 100.0]),
            "views": ("all",),
        },
    ),
    (DigitsDataModule, {}, {"batch_size": (0,), "image_size": (0,), "num_workers": (-1,), "root": ("", None)}),
    (CaptionDataModule, {"root": "nowhere"}, WRONG),
    (CodeDataModule, {"root": "nowhere"}, WRONG | {"short_caption_share": (-0.1, 1.1, NAN), "features": ("",)}),
    (
        ClassRequestDataModule,
        {},
        {
            "classes": (0, -1, 10**9, [], [1, 1], [-1], [0.5], [10**9], "nowhere.txt"),
            "per_class": (0, -1, 1.5),
            "batch_size": (0, 2.5),
        },
    ),
    (
        PromptDataModule,
        {"prompts": ["a"]},
        {"prompts": ([], [3], "nowhere.txt"), "per_prompt": (0, 10**12), "batch_size": (0,), "column": ("Prompt",)},
    ),
]


@pytest.mark.parametrize(("module", "good", "wrong"), CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_invalid_option_is_refused_at_once_in_one_line_with_its_name(
    module: Any, good: dict[str, Any], wrong: dict[str, tuple[Any, ...]]
) -> None:
    module(**good)
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError) as error:
                module(**good | {name: value})
            assert_one_line(error, name)


def test_cache_dir_must_not_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError) as error:
        ImageDataModule("nowhere", cache_dir=tmp_path / "file")
    assert_one_line(error, "cache_dir", tmp_path / "file", "give the name of a folder")


@pytest.mark.parametrize("options", [{"shard_mb": NAN}, {"shard_mb": INF}, {"seed": -1}, {"workers": 0}], ids=str)
def test_packing_checks_its_options_first(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as error:
        pack("nowhere", tmp_path / "out", **options)
    assert_one_line(error, *options)


def test_worker_processes_do_not_import_lightning(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.png").write_bytes(grey_image(1))
    (tmp_path / "empty").mkdir()  # is warned of, which must not need Lightning
    script = """
import sys
import datamodules.datasets.captions, datamodules.datasets.codes, datamodules.datasets.images
import datamodules.loading.stream
import evaluation.image_sets, datamodules.packing
from datamodules.inspection import inspect
assert "all: 1 samples, in folders" in inspect(sys.argv[1], num_workers=0, decode=False)
heavy = {"lightning", "torchmetrics", "transformers", "sklearn", "kornia", "jsonargparse"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "empty (no images)" in done.stderr


def test_data_modules_are_imported_on_first_use() -> None:
    assert datamodules.CodeDataModule is CodeDataModule
    assert "lightning.pytorch" in sys.modules, "of which the test above would notice the import"
    with pytest.raises(AttributeError, match="Nothing"):
        _ = datamodules.Nothing
