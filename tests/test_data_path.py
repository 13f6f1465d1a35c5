"""From a folder of images to batches of codes: every key arrives except those of broken images."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import main
from datamodules import CodeDataModule, ImageDataModule
from datamodules.packing import pack
from tests.datamodules.shard_files import encode
from tests.pipeline import Pipeline
from tests.ranks import succeeds, two_processes

CLASSES, PER_CLASS = 8, 25
KINDS = [("jpg", "jpeg"), ("JPEG", "jpeg"), ("png", "png"), ("webp", "webp")]


def write_folder(root: Path) -> set[str]:
    """Write 200 images of several formats and sizes to class folders. Returns their keys."""
    keys = set()
    for number in range(CLASSES * PER_CLASS):
        generator = np.random.default_rng(number)
        height, width = generator.integers(8, 20, 2)
        image = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        suffix, kind = KINDS[number % len(KINDS)]
        path = root / f"class{number % CLASSES}" / f"{number:03d}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(image, kind))
        keys.add(f"class{number % CLASSES}/{number:03d}")
    return keys


def break_some(root: Path, keys: set[str]) -> set[str]:
    """Break one image in a hundred, each in a different way. Returns their keys."""
    broken = sorted(keys)[50::100]
    for place, key in enumerate(broken):
        (path,) = root.glob(f"{key}.*")
        path.write_bytes([path.read_bytes()[: path.stat().st_size // 2], b"no image at all"][place])
    return set(broken)


def arguments(pipeline: Pipeline, root: Path, folder: Path, num_workers: int) -> list[str]:
    """Arguments of the command that encodes the images of ``root``."""
    kept = [item for item in pipeline.extract_arguments(folder) if not item.startswith("--data.init_args.root")]
    return [
        *(*kept, f"--ckpt_path={pipeline.tokenizer}", "--data=ImageDataModule", f"--data.init_args.root={root}"),
        *("--data.init_args.image_size=8", "--data.init_args.views=ten_crop", "--data.init_args.batch_size=7"),
        f"--data.init_args.num_workers={num_workers}",
    ]


def code_keys(folder: Path) -> dict[str, int]:
    """Class of each key in the batches of an epoch and a validation. Each key occurs once."""
    data = CodeDataModule(folder, batch_size=8, num_workers=0)
    data.setup("fit")
    classes = {}
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for batch in loader:
            assert batch["codes"].shape[1:] == (16,)
            for key, label in zip(batch["keys"], batch["condition"].tolist(), strict=True):
                assert key not in classes
                classes[key] = label
    return classes


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str], set[str]]:
    """A folder of images, all keys, and those of the broken ones."""
    root = tmp_path_factory.mktemp("images")
    keys = write_folder(root)
    return root, keys, break_some(root, keys)


def test_every_key_except_broken_images_reaches_the_code_batches(
    pipeline: Pipeline, images: tuple[Path, set[str], set[str]], tmp_path: Path
) -> None:
    root, keys, broken = images
    assert len(broken) == 0.01 * len(keys)
    pack(str(root), tmp_path / "shards", shard_mb=0.05, workers=1)
    data = ImageDataModule(str(tmp_path / "shards"), image_size=8, num_workers=1)
    data.setup("fit")
    seen = [
        key for loader in (data.train_dataloader(), data.val_dataloader()) for batch in loader for key in batch["keys"]
    ]
    assert sorted(seen) == sorted(keys - broken)
    main.main(arguments(pipeline, tmp_path / "shards", tmp_path / "codes", num_workers=1))
    assert code_keys(tmp_path / "codes") == {key: int(key[5]) for key in keys - broken}
    listed = [line.split("\t") for line in (tmp_path / "codes/skipped.tsv").read_text().splitlines()[1:]]
    assert {key: reason for _, key, reason, _ in listed} == dict.fromkeys(broken, "broken image")
    meta = json.loads((tmp_path / "codes/meta.json").read_text())
    assert (meta["views"], len(meta["view_names"]), meta["classes"]) == (20, 20, [f"class{n}" for n in range(CLASSES)])
    assert sum(split["count"] for split in meta["splits"].values()) == len(keys) - len(broken)


@pytest.mark.slow
def test_two_ranks_write_the_same_code_shards_as_one(
    pipeline: Pipeline, images: tuple[Path, set[str], set[str]], tmp_path: Path
) -> None:
    # Directly from the folder, in shards of 30 images.
    small = "--trainer.callbacks=[{class_path: EMA}, {class_path: CodeWriter, init_args: {samples_per_shard: 30}}]"
    main.main([*arguments(pipeline, images[0], tmp_path / "one", num_workers=0), small])
    succeeds(two_processes([*arguments(pipeline, images[0], tmp_path / "two", num_workers=1), small]))
    one, two = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.name != "predict.yaml"
         and path.is_file()} for folder in (tmp_path / "one", tmp_path / "two")
    )  # fmt: skip
    assert len(one) == 7 + 1 + 2  # shards of the training and the validation split, meta.json and skipped.tsv
    assert one.keys() == two.keys()
    assert [str(name) for name in one if one[name] != two[name]] == []


def test_skipped_images_are_logged_by_reason_and_are_fatal_above_max_bad_share(
    pipeline: Pipeline, images: tuple[Path, set[str], set[str]], tmp_path: Path
) -> None:
    def fit(folder: Path, *more: str) -> None:
        kept = [item for item in pipeline.tokenizer_arguments(folder) if "--trainer.max_steps" not in item]
        main.main(["fit", *kept, "--data=ImageDataModule", f"--data.init_args.root={images[0]}",
                   "--data.init_args.image_size=8", "--data.init_args.num_workers=0", "--trainer.max_epochs=1",
                   "--trainer.val_check_interval=null", *more])  # fmt: skip

    fit(tmp_path / "run")
    (table,) = (tmp_path / "run").rglob("metrics.csv")
    lines = [line.split(",") for line in table.read_text().splitlines()]
    column = lines[0].index("skipped/train/broken_image")
    assert [line[column] for line in lines[1:] if line[column]] == ["2.0"]
    with pytest.raises(ValueError, match=r"examples of train are bad, more than max_bad_share 0.005 .*broken image"):
        fit(tmp_path / "strict", "--data.init_args.max_bad_share=0.005")
