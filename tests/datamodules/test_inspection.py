"""Inspection: the printed description of a dataset and the contact sheet."""

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.inspection import COLUMNS, ROWS, TILE, inspect, main
from datamodules.storage.shards import META_FILE, ShardDataset
from tests.datamodules.feature_datasets import write_dataset
from tests.datamodules.shard_files import assert_one_line, encode, write_shards


def image_bytes(width: int, height: int, colour: str = "red", kind: str = "png", mode: str = "RGB") -> bytes:
    return encode(Image.new("RGB", (width, height), colour).convert(mode), kind)


def write_files(root: Path, contents: dict[str, bytes]) -> None:
    for name, data in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Class folders with images of three sizes and one example of each fault."""
    whole = image_bytes(64, 64)
    contents = {
        "train/ant/0.png": image_bytes(10, 20),
        "train/ant/1.jpg": image_bytes(30, 40, kind="jpeg"),
        "train/ant/2.png": image_bytes(50, 60, mode="L"),
        "train/cat/3.webp": image_bytes(90, 70, kind="webp"),
        "train/cat/4.png": b"no image",
        "train/cat/5.png": b"",
        "train/cat/6.png": whole[: len(whole) - 40],
        "train/dog/7.png": image_bytes(10, 10),
        "train/dog/8.png": image_bytes(10, 10),
        "train/dog/9.png": image_bytes(10, 10),
        "train/dog/10.png": image_bytes(10, 10),
        "val/dog/11.png": image_bytes(8, 9),
    }
    write_files(tmp_path / "set", contents)
    return tmp_path / "set"


def section(lines: list[str], split: str) -> str:
    """The lines about a split."""
    (first,) = (place for place, line in enumerate(lines) if line.startswith(f"{split}: "))
    end = next((place for place in range(first, len(lines)) if not lines[place]), len(lines))
    return "\n".join(lines[first:end])


def test_counts_classes_sizes_and_formats_match_the_images(folder: Path) -> None:
    lines = inspect(str(folder), num_workers=0)
    assert lines[0] == f"{folder}: images"
    assert section(lines, "val").splitlines() == [
        "val: 1 samples, in folders",
        "  classes: 1 of 3; samples per class: 1 (dog) to 1 (dog), median 1",
        "  short side: 8 to 8 px, median 8, 90 % from 8 to 8",
        "  width: 8 to 8 px, height: 9 to 9 px",
        "  formats: PNG 1; colour modes: RGB 1",
        "  bad samples: none",
    ]
    train = section(lines, "train")
    assert train.startswith(
        "train: 11 samples, in folders\n  classes: 3 of 3; samples per class: 3 (ant) to 4 (cat), median 4\n"
    )
    assert "  short side: 10 to 70 px, median 10, 90 % from 10 to 63\n" in train
    assert "  width: 10 to 90 px, height: 10 to 70 px\n" in train
    assert "  formats: PNG 6, JPEG 1, WEBP 1; colour modes: RGB 7, L 1\n" in train


def test_bad_examples_are_listed_by_reason_with_their_location(folder: Path) -> None:
    train = section(inspect(str(folder), num_workers=0), "train")
    assert "  bad samples: 3 (broken image 2, empty file 1)\n" in train
    for key in ("cat/4", "cat/5", "cat/6"):
        assert f"example {key} of {folder}/train/cat" in train


def test_reading_headers_does_not_detect_a_truncated_image(folder: Path) -> None:
    train = section(inspect(str(folder), decode=False, num_workers=0), "train")
    assert "  bad samples: 2 (broken image 1, empty file 1)\n" in train
    assert "width: 10 to 90 px" in train
    assert "formats: PNG 7" in train


def test_shards_with_captions_and_bad_examples_are_described(tmp_path: Path) -> None:
    examples = [(f"{number:09d}", {"png": image_bytes(9, 9), "txt": b"words"}) for number in range(6)]
    examples[2] = (examples[2][0], {"txt": b"words"})
    examples[3] = (examples[3][0], {"png": image_bytes(9, 9)})
    shards = write_shards(tmp_path / "train", examples)
    write_shards(tmp_path / "val", examples[:1])
    shards[1].write_bytes(shards[1].read_bytes()[: -3 * 4096])
    train = section(inspect(str(tmp_path), num_workers=0), "train")
    lines = train.splitlines()
    assert lines[0].endswith("samples, in 2 shards")
    assert lines[1] == "  classes: none"
    assert "no image 1" in train
    assert "truncated shard 1" in train
    assert lines[-1].startswith("  captions: ")


def test_images_are_read_by_worker_processes(folder: Path) -> None:
    assert inspect(str(folder), num_workers=1) == inspect(str(folder), num_workers=0)


def test_contact_sheet_shows_the_images_sorted_by_class(tmp_path: Path) -> None:
    colours = {"ant": "red", "cat": "lime", "dog": "blue"}
    contents = {
        f"{split}/{name}/{number}.png": image_bytes(20, 30, colour)
        for split in ("train", "val")
        for name, colour in colours.items()
        for number in range(8)
    }
    write_files(tmp_path / "set", contents)
    (tmp_path / "set/train/ant/broken.png").write_bytes(b"no image")
    sheet = tmp_path / "below/sheet.png"
    lines = inspect(str(tmp_path / "set"), sheet, num_workers=0)
    assert lines[-1] == f"contact sheet: {sheet}"
    with Image.open(sheet) as image:
        assert image.format == "PNG"
        pixels = np.array(image)
    rows = 3  # 24 images
    assert pixels.shape == (rows * (TILE + 18) + 4, COLUMNS * (TILE + 4) + 4, 3)
    tiles = [
        pixels[4 + row * (TILE + 18) : 4 + row * (TILE + 18) + TILE, 4 + column * (TILE + 4) :][:, :TILE]
        for row in range(rows)
        for column in range(COLUMNS)
    ]
    expected = 8 * [(255, 0, 0)] + 8 * [(0, 255, 0)] + 8 * [(0, 0, 255)] + 6 * [(255, 255, 255)]
    assert [tuple(tile[TILE // 2, TILE // 2].tolist()) for tile in tiles] == expected
    assert all(np.ptp(tile, axis=(0, 1)).max() == 0 for tile in tiles[:24])
    below = pixels[4 + TILE : 4 + TILE + 18, 4 : 4 + TILE]
    assert below.min() < 100  # the name of the class
    assert list(sheet.parent.iterdir()) == [sheet]


def test_contact_sheet_of_many_images_depends_on_the_seed(tmp_path: Path) -> None:
    levels = [(level, level, level) for level in range(100)]
    contents = {
        f"{split}/a/{level}.png": encode(Image.new("RGB", (4, 4), colour))
        for split in ("train", "val")
        for level, colour in enumerate(levels)
    }
    write_files(tmp_path / "set", contents)
    sheets = []
    for name, seed in (("first", 0), ("second", 0), ("third", 1)):
        inspect(str(tmp_path / "set"), tmp_path / name, decode=False, num_workers=0, seed=seed)
        sheets.append(np.array(Image.open(tmp_path / name)))
    assert sheets[0].shape[0] == ROWS * (TILE + 18) + 4
    assert np.array_equal(sheets[0], sheets[1])
    assert not np.array_equal(sheets[0], sheets[2])


def write_codes(root: Path, broken: bool = False) -> Path:
    """Codes of 6 and 2 images, 2 views each; the first views use 4 of 8 entries."""
    shards = ShardDataset(root, {}, "")
    shards.begin(["train", "val"])
    for split, count in (("train", 6), ("val", 2)):
        with shards.shard(split, 0) as writer:
            for number in range(count):
                buffer = BytesIO()
                codes = np.full((2, 1, 2), 7 if split == "train" else 1, np.uint16)
                codes[0, 0] = 9 if broken and number == 3 else number % 3, 6
                np.save(buffer, codes)
                writer.write(f"{split}{number}", {"npy": buffer.getvalue()}, min(number, 2))
    meta = {
        "format": "llamagen-codes",
        "vocabulary": 8,
        "grid": [1, 2],
        "views": 2,
        "classes": ["ant", "cat", "dog"],
        "tokenizer": "abcdef" * 10,
    }
    shards.finish({"train": 1, "val": 1}, meta, {}, 0.0)
    return root


def test_codes_are_described(tmp_path: Path) -> None:
    assert inspect(str(write_codes(tmp_path))) == [
        f"{tmp_path}: codes, 1 × 2 per image, vocabulary 8 (uint16), 2 views, tokenizer abcdefabcdef",
        "",
        "train: 6 samples, in 1 shards",
        "  classes: 3 of 3; samples per class: 1 (ant) to 4 (dog), median 1",
        "  codes in use (first view): 50.0%",
        "  bad samples: none",
        "",
        "val: 2 samples, in 1 shards",
        "  classes: 2 of 3; samples per class: 1 (ant) to 1 (ant), median 1",
        "  codes in use (first view): 37.5%",
        "  bad samples: none",
    ]


SPLITS = {"train": [(f"{number}", number) for number in range(6)], "val": [("6", 6), ("7", 7)]}
KIND = "up to 5 tokens of width 4, encoder t5, also of first sentences"


def test_caption_features_are_described(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "set", SPLITS, "features", encoder="t5")
    assert inspect(str(root)) == [
        f"{root}: caption features, {KIND}",
        "",
        "train: 6 samples, in 2 shards",
        "  classes: none",
        "  features: 6 samples, 3.2 tokens on average, 5 at most",
        "  bad samples: none",
        "",
        "val: 2 samples, in 1 shards",
        "  classes: none",
        "  features: 2 samples, 4.5 tokens on average, 5 at most",
        "  bad samples: none",
    ]


def test_features_stored_with_codes_are_described(tmp_path: Path) -> None:
    lines = inspect(str(write_dataset(tmp_path / "set", SPLITS, encoder="t5")))
    assert lines[0].startswith(f"{tmp_path / 'set'}: codes, 2 × 2 per image, vocabulary 1000 (uint16), 2 views")
    assert lines[1] == f"caption features: {KIND}"
    assert "  features: 6 samples, 3.2 tokens on average, 5 at most\n  bad samples: none" in section(lines, "train")


@pytest.mark.parametrize("parts", ["features", "codes features"])
def test_features_of_an_invalid_size_are_listed(tmp_path: Path, parts: str) -> None:
    root = write_dataset(tmp_path / "set", SPLITS, parts, caption_length=4)  # examples 3 and 7 have 5 tokens
    lines = inspect(str(root))
    for split, key in (("train", 3), ("val", 7)):
        said = section(lines, split)
        assert f"  features: {len(SPLITS[split])} samples, " in said
        assert " tokens on average, 4 at most" in said
        assert "  bad samples: 1 (broken features 1)" in said
        assert f"example {key} " in said


def test_missing_features_and_broken_short_features_are_listed(tmp_path: Path) -> None:
    examples: list[tuple[str, dict[str, bytes]]] = [("0", {"features": bytes(16), "shortfeatures": bytes(9)})]
    examples += [("1", {"txt": b"words"}), ("2", {"features": bytes(24)})]
    write_dataset(tmp_path, {"train": [("0", 0), ("1", 1), ("2", 2)]}, "features")
    write_shards(tmp_path / "train", examples, per_shard=4)
    said = section(inspect(str(tmp_path)), "train")
    assert "  features: 2 samples, 2.5 tokens on average, 3 at most" in said
    assert "  bad samples: 2 (no caption 1, broken features 1)" in said
    assert (
        "    example 1 has no features\n    example 0 has features whose size is not a whole number of tokens" in said
    )


@pytest.mark.parametrize("parts", ["features", "codes features"])
def test_contact_sheet_of_features_is_refused(tmp_path: Path, parts: str) -> None:
    root = write_dataset(tmp_path / "set", SPLITS, parts)
    with pytest.raises(ValueError) as error:
        inspect(str(root), tmp_path / "sheet.png")
    assert_one_line(error, root, f"holds {'codes' if 'codes' in parts else 'caption features'}", "--sheet")


def test_broken_codes_are_listed(tmp_path: Path) -> None:
    train = section(inspect(str(write_codes(tmp_path, broken=True))), "train")
    assert "  bad samples: 1 (broken codes 1)" in train
    assert "example train3" in train
    assert "code 9" in train


def test_contact_sheet_of_codes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        inspect(str(write_codes(tmp_path / "codes")), tmp_path / "sheet.png")
    assert_one_line(error, tmp_path / "codes", "holds codes", "--sheet")
    assert not (tmp_path / "sheet.png").exists()


def test_command_prints_the_lines_of_the_function(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheet = folder.parent / "sheet.png"
    main([str(folder), f"--sheet={sheet}", "--headers_only", "--num_workers=0", "--seed=2"])
    expected = inspect(str(folder), sheet, decode=False, num_workers=0, seed=2)
    assert capsys.readouterr().out.splitlines() == expected
    assert Image.open(sheet).width > TILE


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        (["nowhere"], "folder nowhere does not exist"),
        (["."], "neither .tar files nor folders of images"),
        (["ftp://example.org/set"], "unknown scheme"),
        (["nowhere", "--header"], "unrecognized arguments: --header"),
        ([], "root"),
    ],
    ids=str,
)
def test_usage_error_ends_the_command_in_one_line(
    arguments: list[str],
    phrase: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in said
    assert phrase in said


def test_dataset_with_wrong_meta_json_is_refused(tmp_path: Path) -> None:
    write_codes(tmp_path)
    meta = json.loads((tmp_path / META_FILE).read_text())
    meta["splits"]["val"]["shards"][0]["count"] = 3
    (tmp_path / META_FILE).write_text(json.dumps(meta))
    with pytest.raises(ValueError) as error:
        inspect(str(tmp_path))
    assert_one_line(error, tmp_path, "says 3")
