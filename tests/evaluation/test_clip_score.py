"""``python -m evaluation clip``: scores follow from CLIP's features of each image and its prompt."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from evaluation.__main__ import main
from evaluation.clip_score import MAX_GROUPS, SHOWN_PROMPTS, by_column, clip_score, score_of
from evaluation.prompt_images import PromptImage
from llamagen.metrics import extractor_checksum
from tests.tiny_clip import LENGTH, save_tiny_clip

PROMPTS = ["a red cat", "dogs", "", "🙂 猫", "the end of a very long story about a red cat"]
COLUMNS = [
    {"Category": "Animals", "Note": "a"},
    {"Category": "Animals", "Note": "b"},
    {"Category": "Abstract", "Note": "c"},
    {"Category": "Abstract", "Note": "d"},
    {"Category": "", "Note": "e"},
]
EACH = 3


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_clip(tmp_path_factory.mktemp("clips") / "tiny")


def write_samples(
    folder: Path, prompts: list[str], each: int = EACH, columns: list[dict[str, str]] | None = None
) -> Path:
    """A folder as predict writes it, with images of several shapes."""
    generator = np.random.default_rng(0)
    lines = []
    for index in range(each * len(prompts)):
        number = index % len(prompts)
        name = f"images/{number}/{index:06d}_prompt{number}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        coarse = generator.integers(0, 256, (6, 5 + index % 3, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((40 + 7 * (index % 3), 48), Image.Resampling.BICUBIC).save(folder / name)
        lines.append(
            {
                "file_name": name,
                "index": index,
                "prompt_number": number,
                "prompt": prompts[number],
                "columns": columns[number] if columns else {},
            }
        )
    write_metadata(folder, lines)
    return folder


def write_metadata(folder: Path, lines: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_samples(tmp_path_factory.mktemp("samples"), PROMPTS, columns=COLUMNS)


def expected(samples: Path, clip: Path) -> np.ndarray:
    """100 · max(cos, 0) of each original by transformers alone, one original and prompt at a time."""
    model, tokenizer = CLIPModel.from_pretrained(clip), CLIPTokenizer.from_pretrained(clip)
    processor = CLIPImageProcessorPil.from_pretrained(clip)
    scores = []
    for line in (samples / "metadata.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        with Image.open(samples / entry["file_name"]) as image, torch.no_grad():
            original = model.get_image_features(**processor(image, return_tensors="pt")).pooler_output
            text = tokenizer([entry["prompt"]], truncation=True, max_length=LENGTH, return_tensors="pt")
            prompt = model.get_text_features(**text).pooler_output
        scores.append(100 * max(torch.cosine_similarity(original, prompt).item(), 0))
    return np.array(scores)


def fails(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """The error message of the command; checks that it is one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["clip", *map(str, arguments)])
    assert stopped.value.code == 2
    shown = capsys.readouterr()
    assert not shown.out
    lines = [line for line in shown.err.replace("\r", "\n").split("\n") if line and "image/s" not in line]
    lines = [line for line in lines if "Loading weights" not in line and "?image" not in line]
    assert len(lines) == 1, shown.err
    assert lines[0].startswith("error: ")
    return lines[0]


def test_scores_follow_from_the_features_of_images_and_prompts(
    samples: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "scores.json"
    main(["clip", str(samples), f"--clip={clip}", f"--out={out}", "--batch_size=4"])
    each = expected(samples, clip)
    assert 0 in each  # one below zero counts as zero
    assert len({round(score, 3) for score in each}) > len(each) / 3
    content = json.loads(out.read_text(encoding="utf-8"))
    error = each.std(ddof=1) / len(each) ** 0.5
    assert content["metrics"] == pytest.approx(
        {"clip_score_tiny": each.mean(), "clip_score_tiny_error": error}, rel=1e-4
    )
    for number, found in enumerate(content["by_prompt"]):
        own = each[number :: len(PROMPTS)]
        assert (found["prompt_number"], found["prompt"], found["images"]) == (number, PROMPTS[number], EACH)
        assert found["clip_score"] == pytest.approx(own.mean(), rel=1e-4, abs=1e-4)
        assert found["standard_error"] == pytest.approx(own.std(ddof=1) / EACH**0.5, rel=1e-3, abs=1e-4)
    assert content["images"]["source"] == str(samples)
    assert content["images"]["count"] == len(each)
    assert content["extractor"] == {
        "name": "tiny",
        "source": str(clip),
        "checksum": extractor_checksum(CLIPModel.from_pretrained(clip)),
        "image_side": 32,
        "prompt_tokens": LENGTH,
    }
    assert {"torch", "torchmetrics", "transformers"} < set(content["versions"])
    shown = capsys.readouterr()
    assert f"| clip_score_tiny | {each.mean():.4g} | {error:.2g} | {len(each)} |" in shown.out
    assert "| prompt 2: (no words) |" in shown.out
    assert f"{len(each)}/{len(each)}" in shown.err
    assert [path.name for path in out.parent.iterdir()] == ["scores.json"]


def test_old_configurations_with_a_wrong_end_token_give_the_same(samples: Path, tmp_path: Path, clip: Path) -> None:
    old = save_tiny_clip(tmp_path / "tiny", old_end=True)
    assert expected(samples, old) == pytest.approx(expected(samples, clip), rel=1e-5, abs=1e-5)
    assert clip_score(samples, str(old)) == clip_score(samples, str(clip))


@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (64, 0), (4, 2)])
def test_batch_size_and_workers_do_not_change_scores(
    samples: Path, clip: Path, tmp_path: Path, batch_size: int, num_workers: int
) -> None:
    out = tmp_path / "scores.json"
    clip_score(samples, str(clip), out, batch_size, num_workers)
    found = json.loads(out.read_text(encoding="utf-8"))
    clip_score(samples, str(clip), out, batch_size=7)
    other = json.loads(out.read_text(encoding="utf-8"))
    for key in ("metrics", "by_column", "by_prompt"):
        assert numbers(found[key]) == pytest.approx(numbers(other[key]), rel=1e-5, abs=1e-5)
    assert found["images"] == other["images"]


def numbers(value: Any) -> list[float]:
    """All numbers of a JSON value, in order."""
    if isinstance(value, dict | list):
        return [each for part in (value.values() if isinstance(value, dict) else value) for each in numbers(part)]
    return [value] if isinstance(value, float) else []


def test_cuts_long_prompts_before_their_end_token_and_counts_them(
    samples: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores.json"
    clip_score(samples, str(clip), out)
    content = json.loads(out.read_text(encoding="utf-8"))
    assert content["prompts"] == {"count": len(PROMPTS), "cut": 1}
    assert [each["cut"] for each in content["by_prompt"]] == [False, False, False, False, True]
    assert f"1 of {len(PROMPTS)} prompts are cut to the {LENGTH} tokens that tiny reads" in capsys.readouterr().out
    last = expected(samples, clip)[len(PROMPTS) - 1 :: len(PROMPTS)].mean()
    assert last > 0
    assert content["by_prompt"][-1]["clip_score"] == pytest.approx(last, rel=1e-4)


def test_scores_of_categories_are_means_over_their_images(
    samples: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores.json"
    clip_score(samples, str(clip), out)
    found = json.loads(out.read_text(encoding="utf-8"))["by_column"]
    assert set(found) == {"Category"}  # a note that each prompt has of its own is none
    assert set(found["Category"]) == {"Animals", "Abstract"}
    each, number = expected(samples, clip), np.arange(EACH * len(PROMPTS)) % len(PROMPTS)
    for category, first in (("Animals", 0), ("Abstract", 2)):
        own = each[(number == first) | (number == first + 1)]
        assert found["Category"][category]["images"] == 2 * EACH
        assert found["Category"][category]["clip_score"] == pytest.approx(own.mean(), rel=1e-4)
    shown = capsys.readouterr().out
    assert shown.index("| Category: Abstract |") < shown.index("| Category: Animals |")


def test_a_column_with_many_values_is_not_a_category() -> None:
    def found(values: int) -> dict[str, Any]:
        count = 2 * values
        some = [PromptImage(Path("a"), str(row), row, {"Note": str(row % values)}) for row in range(count)]
        return by_column(some, np.zeros(count))

    assert set(found(MAX_GROUPS)) == {"Note"}
    assert found(MAX_GROUPS + 1) == {}


def test_prints_the_worst_and_the_best_of_many_prompts(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [f"cat {number} | of a lot" for number in range(SHOWN_PROMPTS + 5)]
    write_samples(tmp_path, prompts, each=1)
    clip_score(tmp_path, str(clip))
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| prompt")]
    each = expected(tmp_path, clip)
    order = np.argsort(each, kind="stable").tolist()
    half = SHOWN_PROMPTS // 2
    assert [int(line.split()[2].strip(":")) for line in shown[-half:]] == order[-half:]
    assert len(shown) == SHOWN_PROMPTS
    assert all(line.replace("\\|", "").count("|") == 5 for line in shown)


def test_reads_records_with_text_and_without_prompt_numbers(clip: Path, tmp_path: Path) -> None:
    write_samples(tmp_path, PROMPTS, each=1)
    lines = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    whole = clip_score(tmp_path, str(clip))
    write_metadata(tmp_path, [{"text": line["prompt"], "file_name": line["file_name"], "width": 4} for line in lines])
    assert clip_score(tmp_path, str(clip), tmp_path / "a.json") == whole
    found = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["by_prompt"]
    assert [each["prompt"] for each in found] == PROMPTS
    assert {each["prompt_number"] for each in found} == {None}


def test_a_lone_surrogate_becomes_a_question_mark(clip: Path, tmp_path: Path) -> None:
    write_samples(tmp_path, ["a ? b"], each=1)
    whole = clip_score(tmp_path, str(clip))
    text = (tmp_path / "metadata.jsonl").read_text().replace("a ? b", "a \\ud83d b")
    (tmp_path / "metadata.jsonl").write_text(text)
    assert clip_score(tmp_path, str(clip), tmp_path / "a.json") == whole


def test_a_single_image_has_no_standard_error(clip: Path, tmp_path: Path) -> None:
    write_samples(tmp_path, ["a red cat"], each=1)
    assert set(clip_score(tmp_path, str(clip), tmp_path / "a.json")) == {"clip_score_tiny"}
    assert json.loads((tmp_path / "a.json").read_text())["by_prompt"][0]["standard_error"] is None
    assert score_of(np.array([1.0, 2.0])) == (1.5, pytest.approx(0.5), 2)


def test_rejects_incomplete_folders(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refusal(*more: Any) -> str:
        return fails(capsys, tmp_path / "samples", f"--clip={clip}", f"--out={tmp_path / 'a.json'}", *more)

    assert "is not a folder" in refusal()
    write_samples(tmp_path / "samples", ["a red cat", "dogs"], each=2)
    metadata = tmp_path / "samples" / "metadata.jsonl"
    whole = metadata.read_text()
    for text, message in (
        (whole[:-20], "line 4 of"),
        (whole + "3\n", "must be a JSON object with file_name and prompt"),
        (whole.replace('"prompt":', '"caption":'), "has no prompt for images/0/000000_prompt0.png"),
        (whole.replace("000002_", "000009_"), "000009_prompt0.png does not exist, but line 3 of"),
        ("\n", "lists no images"),
    ):
        metadata.write_text(text)
        assert message in refusal()
    metadata.write_bytes(whole.encode("utf-16"))
    assert "cannot be read" in refusal()
    metadata.unlink()
    assert "run the same predict again to resume" in refusal()
    assert not (tmp_path / "a.json").exists()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_names_images_that_cannot_be_read(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], num_workers: int
) -> None:
    write_samples(tmp_path, ["a red cat"], each=3)
    file = tmp_path / "images" / "0" / "000001_prompt0.png"
    whole = file.read_bytes()
    for data in (b"", b"no image", whole[: len(whole) // 2]):
        file.write_bytes(data)
        message = fails(capsys, tmp_path, f"--clip={clip}", f"--num_workers={num_workers}", f"--out={tmp_path}/a.json")
        assert str(file) in message
        assert "remove its line from metadata.jsonl" in message
    assert not (tmp_path / "a.json").exists()


def test_rejects_arguments_out_of_range(
    samples: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for argument, message in (
        ("--batch_size=0", "batch_size is 0"),
        ("--num_workers=-1", "num_workers is -1; it must be at least 0"),
        ("--device=nowhere", "device is 'nowhere'"),
        (f"--out={tmp_path}", "give the name of a file, *.json"),
        (f"--out={tmp_path / 'scores.txt'}", "give the name of a file, *.json"),
        (f"--out={clip / 'config.json' / 'a.json'}", "cannot be written"),
    ):
        assert message in fails(capsys, samples, f"--clip={clip}", argument)
