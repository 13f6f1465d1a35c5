"""Reports are complete or absent, valid JSON, and show the paper's figures next to matching models."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from evaluation.published import published
from evaluation.report import CAPTIONS, Report, check_report, table
from llamagen.models.gpt_config import GPTConfig
from llamagen.models.vqgan import VQGANConfig
from tests.datamodules.shard_files import assert_one_line

# Values in the paper, arXiv 2406.06525: FID, Inception Score, precision, recall.
GENERATION = {
    "B, 256 px": (5.46, 193.6, 0.84, 0.46),
    "L, 256 px": (3.80, 248.3, 0.83, 0.51),
    "XL, 256 px": (3.39, 227.1, 0.81, 0.54),
    "XXL, 256 px": (3.09, 253.6, 0.83, 0.53),
    "3B, 256 px": (3.05, 222.3, 0.80, 0.58),
    "B, 384 px": (6.09, 182.5, 0.85, 0.42),
    "L, 384 px": (3.07, 256.1, 0.83, 0.52),
    "XL, 384 px": (2.62, 244.1, 0.80, 0.57),
    "XXL, 384 px": (2.34, 253.9, 0.80, 0.59),
    "3B, 384 px": (2.18, 263.3, 0.81, 0.58),
}
SHAPES = {"B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1280, 36, 20), "XXL": (1536, 48, 24), "3B": (3200, 24, 32)}
RECONSTRUCTION = {
    ((1, 1, 2, 2, 4), 256): 2.19,
    ((1, 1, 2, 2, 4), 384): 0.94,
    ((1, 1, 2, 2, 4), 512): 0.70,
    ((1, 2, 2, 4), 256): 0.59,
}


def gpt(size: str = "B", side: int = 256, **options: Any) -> GPTConfig:
    dim, layers, heads = SHAPES[size]
    return GPTConfig(dim=dim, n_layer=layers, n_head=heads, block_size=(side // 16) ** 2, **options)


@pytest.mark.parametrize("title", GENERATION)
def test_a_model_of_the_paper_gets_its_figures(title: str) -> None:
    size, side = title.removesuffix(" px").split(", ")
    (found,) = published(gpt(size, int(side)), int(side))
    assert found.title == title
    assert found.figures == dict(
        zip(("gfid", "inception_score", "precision", "recall"), GENERATION[title], strict=True)
    )


@pytest.mark.parametrize("key", RECONSTRUCTION)
def test_a_tokenizer_of_the_paper_gets_its_figures(key: tuple[tuple[int, ...], int]) -> None:
    (found,) = published(VQGANConfig(channel_multipliers=key[0]), key[1])
    assert found.title == f"VQ-{2 ** (len(key[0]) - 1)}, {key[1]} px"
    assert found.figures["rfid"] == RECONSTRUCTION[key]


@pytest.mark.parametrize(
    "config",
    [
        None,
        gpt(side=512),
        gpt(vocab_size=64),
        gpt(num_classes=10),
        GPTConfig(dim=64, n_layer=2, n_head=2),
    ],
)
def test_another_model_gets_the_figures_of_all_models(config: GPTConfig | None) -> None:
    assert [each.title for each in published(config, 256)] == list(GENERATION)


def test_a_text_model_gets_no_figures() -> None:
    assert published(gpt("XL", condition="text"), 256) == []


@pytest.mark.parametrize(
    ("config", "side"),
    [
        (VQGANConfig(), 128),
        (VQGANConfig(), None),
        (VQGANConfig(channels=32), 256),
        (VQGANConfig(codebook_size=64), 256),
    ],
)
def test_another_tokenizer_gets_the_figures_of_all_tokenizers(config: VQGANConfig, side: int | None) -> None:
    assert len(published(config, side)) == len(RECONSTRUCTION)


NUMBERS = {"gfid/imagenet256-adm": 12.3456, "gfid_digits/a": 1.0, "inception_score": 200.0, "test/psnr": 20.0}


def test_one_model_of_the_paper_is_a_column() -> None:
    assert table(NUMBERS, published(gpt(), 256)).splitlines() == [
        "|  | measured | paper: B, 256 px |",
        "| --- | --- | --- |",
        "| gfid/imagenet256-adm | 12.35 | 5.46 |",
        "| gfid_digits/a | 1 |  |",
        "| inception_score | 200 | 193.6 |",
        "| test/psnr | 20 |  |",
    ]
    assert "| test/psnr | 20 | 20.79 |" in table(NUMBERS, published(VQGANConfig(), 256))


def test_many_models_of_the_paper_are_a_table() -> None:
    ours, theirs = table(NUMBERS, published(None, None)).split("\n\n")
    assert ours.splitlines()[0] == "|  | measured |"
    assert theirs.splitlines()[0] == "| paper | gfid | inception_score | precision | recall |  |"
    assert len(theirs.splitlines()) == 2 + len(GENERATION)
    assert "| 3B, 384 px | 2.18 | 263.3 | 0.81 | 0.58 | 50,000 samples" in theirs
    assert "| VQ-16, 512 px | 0.7 |  |  |" in table({}, published(VQGANConfig(), 64))


def test_without_figures_the_table_holds_results_only() -> None:
    assert table({"gfid/a": 1.0}, []).splitlines() == ["|  | measured |", "| --- | --- |", "| gfid/a | 1 |"]


FACTS = {"images": {"source": Path("a"), "sides": (8, 8)}, "seconds": 1.5, "crop": None}


def write(folder: Path, numbers: dict[str, float] | None = None) -> None:
    grids = {name: Image.new("RGB", (3, 2)) for name in CAPTIONS}
    results = {"gfid/b": 1.0} if numbers is None else numbers
    Report("a against b", results, FACTS, [], grids).write(folder)


def test_a_report_holds_results_facts_and_grids(tmp_path: Path) -> None:
    write(tmp_path / "new" / "report")
    files = {path.name for path in (tmp_path / "new" / "report").iterdir()}
    assert files == {"metrics.json", "report.md", *(f"{name}.png" for name in CAPTIONS)}
    content = json.loads((tmp_path / "new" / "report" / "metrics.json").read_text())
    assert content.pop("versions").keys() == {"python", "torch", "lightning", "torchmetrics"}
    assert content == {
        "metrics": {"gfid/b": 1.0}, "images": {"source": "a", "sides": [8, 8]}, "seconds": 1.5, "crop": None,
    }  # fmt: skip
    text = (tmp_path / "new" / "report" / "report.md").read_text()
    assert text.startswith("# a against b\n\n|  | measured |\n")
    assert "- images:\n  - source: a\n" in text
    for name, caption in CAPTIONS.items():
        assert f"![{name}]({name}.png)\n\n{caption}." in text
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report"]


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def test_writes_nan_and_infinity_as_null(tmp_path: Path) -> None:
    write(tmp_path / "r", {"a": float("nan"), "b": float("inf"), "c": -float("inf"), "d": 2.0})
    content = json.loads((tmp_path / "r" / "metrics.json").read_text(), parse_constant=refuse)
    assert content["metrics"] == {"a": None, "b": None, "c": None, "d": 2.0}
    assert "| a | nan |\n| b | inf |" in (tmp_path / "r" / "report.md").read_text()


def test_replaces_an_older_report(tmp_path: Path) -> None:
    write(tmp_path / "r")
    (tmp_path / "r" / "old.png").touch()
    write(tmp_path / "r", {"gfid/b": 2.0})
    assert json.loads((tmp_path / "r" / "metrics.json").read_text())["metrics"] == {"gfid/b": 2.0}
    assert not (tmp_path / "r" / "old.png").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


@pytest.mark.parametrize("names", [[], ["thesis.tex"], ["metrics.json", "thesis.tex"]])
def test_rejects_a_folder_that_is_not_a_report(names: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "r"
    folder.mkdir()
    for name in names:
        (folder / name).touch()
    for call in (write, check_report):
        with pytest.raises(ValueError, match="exists and is not a report; move it away") as error:
            call(folder)
        assert_one_line(error, folder)
    assert sorted(path.name for path in folder.iterdir()) == names
    assert list(tmp_path.iterdir()) == [folder]


def test_rejects_a_file(tmp_path: Path) -> None:
    (tmp_path / "r").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not a report"):
        write(tmp_path / "r")
    assert (tmp_path / "r").read_text() == "mine"


def test_an_interrupted_write_keeps_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    write(tmp_path / "r")
    before = (tmp_path / "r" / "metrics.json").read_text()
    monkeypatch.setattr("evaluation.report.save_png", stop)
    for folder in (tmp_path / "r", tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt):
            write(folder, {"gfid/b": 2.0})
    assert [path.name for path in tmp_path.iterdir()] == ["r"]
    assert (tmp_path / "r" / "metrics.json").read_text() == before
