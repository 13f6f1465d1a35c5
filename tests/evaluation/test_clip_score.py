"""``python -m evaluation clip``: scores follow from CLIP's features of each image and its prompt."""

import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from evaluation.__main__ import main
from evaluation.clip_score import MAX_GROUPS, SHOWN_PROMPTS, by_column, clip_score, score_of
from evaluation.prompt_images import PromptImage
from llamagen.metrics import extractor_checksum
from tests.evaluation.refusals import fails, refusal
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


@pytest.fixture(scope="module")
def each(samples: Path, clip: Path) -> np.ndarray:
    """The expected score of each image of ``samples``."""
    return expected(samples, clip)


class Scored(NamedTuple):
    """What the command writes and prints for ``samples``, and the results of the function."""

    results: dict[str, float]
    content: dict[str, Any]
    printed: str


@pytest.fixture(scope="module")
def scored(samples: Path, clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Scored:
    out = tmp_path_factory.mktemp("scored") / "scores.json"
    with redirect_stdout(io.StringIO()) as printed:
        results = clip_score(samples, str(clip), out, batch_size=7)
    return Scored(results, json.loads(out.read_text(encoding="utf-8")), printed.getvalue())


def test_scores_follow_from_the_features_of_images_and_prompts(
    samples: Path, clip: Path, each: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "scores.json"
    main(["clip", str(samples), f"--clip={clip}", f"--out={out}", "--batch_size=4"])
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


def test_old_configurations_with_a_wrong_end_token_give_the_same(
    samples: Path, each: np.ndarray, scored: Scored, tmp_path: Path
) -> None:
    old = save_tiny_clip(tmp_path / "tiny", old_end=True)
    assert expected(samples, old) == pytest.approx(each, rel=1e-5, abs=1e-5)
    assert clip_score(samples, str(old), batch_size=7) == scored.results


@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (64, 0), (4, 2)])
def test_batch_size_and_workers_do_not_change_scores(
    samples: Path, clip: Path, scored: Scored, tmp_path: Path, batch_size: int, num_workers: int
) -> None:
    out = tmp_path / "scores.json"
    clip_score(samples, str(clip), out, batch_size, num_workers)
    found = json.loads(out.read_text(encoding="utf-8"))
    for key in ("metrics", "by_column", "by_prompt"):
        assert numbers(found[key]) == pytest.approx(numbers(scored.content[key]), rel=1e-5, abs=1e-5)
    assert found["images"] == scored.content["images"]


def numbers(value: Any) -> list[float]:
    """All numbers of a JSON value, in order."""
    if isinstance(value, dict | list):
        return [each for part in (value.values() if isinstance(value, dict) else value) for each in numbers(part)]
    return [value] if isinstance(value, float) else []


def test_cuts_long_prompts_before_their_end_token_and_counts_them(scored: Scored, each: np.ndarray) -> None:
    assert scored.content["prompts"] == {"count": len(PROMPTS), "cut": 1}
    assert [found["cut"] for found in scored.content["by_prompt"]] == [False, False, False, False, True]
    assert f"1 of {len(PROMPTS)} prompts are cut to the {LENGTH} tokens that tiny reads" in scored.printed
    last = each[len(PROMPTS) - 1 :: len(PROMPTS)].mean()
    assert last > 0
    assert scored.content["by_prompt"][-1]["clip_score"] == pytest.approx(last, rel=1e-4)


def test_scores_of_categories_are_means_over_their_images(scored: Scored, each: np.ndarray) -> None:
    found = scored.content["by_column"]
    assert set(found) == {"Category"}  # a note that each prompt has of its own is none
    assert set(found["Category"]) == {"Animals", "Abstract"}
    number = np.arange(EACH * len(PROMPTS)) % len(PROMPTS)
    for category, first in (("Animals", 0), ("Abstract", 2)):
        own = each[(number == first) | (number == first + 1)]
        assert found["Category"][category]["images"] == 2 * EACH
        assert found["Category"][category]["clip_score"] == pytest.approx(own.mean(), rel=1e-4)
        error = own.std(ddof=1) / len(own) ** 0.5
        assert found["Category"][category]["standard_error"] == pytest.approx(error, rel=1e-3)
    assert scored.printed.index("| Category: Abstract |") < scored.printed.index("| Category: Animals |")


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
    def message_of() -> str:
        return refusal(capsys, clip_score, tmp_path / "samples", str(clip), tmp_path / "a.json")

    assert "is not a folder" in message_of()
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
        assert message in message_of()
    metadata.write_bytes(whole.encode("utf-16"))
    assert "cannot be read" in message_of()
    metadata.unlink()
    assert "run the same predict again to resume" in message_of()
    assert not (tmp_path / "a.json").exists()


def test_names_images_that_cannot_be_read(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_samples(tmp_path, ["a red cat"], each=3)
    file = tmp_path / "images" / "0" / "000001_prompt0.png"
    whole = file.read_bytes()
    out = tmp_path / "a.json"
    for data, num_workers in ((b"", 0), (b"no image", 1), (whole[: len(whole) // 2], 0)):
        file.write_bytes(data)
        message = refusal(capsys, clip_score, tmp_path, str(clip), out, num_workers=num_workers)
        assert str(file) in message
        assert "remove its line from metadata.jsonl" in message
    assert not out.exists()


def test_rejects_arguments_out_of_range(
    samples: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, message in (
        ({"batch_size": 0}, "batch_size is 0"),
        ({"num_workers": -1}, "num_workers is -1; it must be at least 0"),
        ({"device": "nowhere"}, "device is 'nowhere'"),
        ({"out": tmp_path}, "give the name of a file, *.json"),
        ({"out": tmp_path / "scores.txt"}, "give the name of a file, *.json"),
        ({"out": clip / "config.json" / "a.json"}, "cannot be written"),
    ):
        assert message in refusal(capsys, clip_score, samples, str(clip), **options)
    message = fails(capsys, "clip", samples, f"--clip={clip}", f"--out={tmp_path / 'scores.txt'}")
    assert "give the name of a file, *.json" in message
