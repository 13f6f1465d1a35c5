"""CLIP score of generated images and their prompts: ``python -m evaluation clip``. N images."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from datamodules.storage.bad_examples import BadExampleError
from datamodules.transforms.decode import read_image
from evaluation.clip import DEFAULT, Clip, ImageScores, Preparation
from evaluation.command_line import usable_device
from evaluation.image_sets import check_loading, join_checksums
from evaluation.prompt_images import METADATA, PromptImage, read_prompt_images
from evaluation.report import package_versions, rows_table
from llamagen.files import atomic_file
from llamagen.metrics import extractor_checksum
from llamagen.output_paths import check_output_file

MAX_GROUPS = 50
"""A column with more distinct values is taken for free text, not for categories."""
SHOWN_PROMPTS = 20
"""If there are more prompts, only the worst and the best are printed. The file lists all of them."""
MAX_CELL = 60


class Score(NamedTuple):
    """Mean CLIP score of images.

    Attributes:
        mean: mean of the images' scores, in [0, 100].
        error: standard error of the mean; None for a single image.
        images: number of images.
    """

    mean: float
    error: float | None
    images: int

    def facts(self) -> dict[str, float | int | None]:
        """The values for the file."""
        return {"clip_score": self.mean, "standard_error": self.error, "images": self.images}

    def cells(self) -> list[str]:
        """The values for the table."""
        return [f"{self.mean:.4g}", "" if self.error is None else f"{self.error:.2g}", str(self.images)]


def clip_score(
    samples: Path,
    clip: str = DEFAULT,
    out: Path | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    device: str | None = None,
) -> dict[str, float]:
    """Measure how well images match their prompts: the CLIP score, in total, by prompt and by category.

    Args:
        samples: a folder that predict wrote for prompts, or another folder with a metadata.jsonl. Each of its lines
            needs file_name, and prompt or text.
        clip: a CLIP's name on the Hugging Face Hub, or a folder as save_pretrained writes it. Scores of different
            CLIPs cannot be compared.
        out: file for all results, ``.json``.
        batch_size: images per batch.
        num_workers: processes that read image files.
        device: device on which features are extracted; by default a GPU if there is one.
    """
    started, place = time.monotonic(), usable_device(device)
    check_loading(batch_size, num_workers)
    if out is not None:
        check_output_file(out, (".json",))
    images = read_prompt_images(samples)
    model = Clip(clip).to(place)
    scores, checksum = _scores(images, model, batch_size, num_workers, place)
    total = score_of(scores)
    if not math.isfinite(total.mean):
        raise ValueError(f"the CLIP score by {clip} is {total.mean}; its weights are damaged: get them again")
    name = f"clip_score_{model.name}"
    results = {name: total.mean} | ({} if total.error is None else {f"{name}_error": total.error})
    prompts = _by(images, scores, lambda image: (image.number, image.prompt))
    columns = by_column(images, scores)
    cut = sum(model.was_cut(prompt) for _, prompt in prompts)
    if out is not None:
        facts = {
            "metrics": results,
            "images": {"source": str(samples), "count": total.images, "checksum": checksum},
            "extractor": {
                "name": model.name,
                "source": model.source,
                "checksum": extractor_checksum(model.model),
                "image_side": model.preparation.crop,
                "prompt_tokens": model.length,
            },
            "prompts": {"count": len(prompts), "cut": cut},
            "by_column": {
                column: {value: score.facts() for value, score in found.items()} for column, found in columns.items()
            },
            "by_prompt": [
                {"prompt_number": number, "prompt": prompt, "cut": model.was_cut(prompt), **score.facts()}
                for (number, prompt), score in prompts.items()
            ],
            "seconds": round(time.monotonic() - started, 1),
            "versions": package_versions() | {"transformers": version("transformers")},
        }
        with atomic_file(out) as temporary:
            temporary.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(_table(name, total, prompts, columns))
    if cut:
        print(f"{cut} of {len(prompts)} prompts are cut to the {model.length} tokens that {model.name} reads")
    if out is not None:
        print(f"scores: {out}")
    return results


class _Prepared(Dataset[Any]):
    """Images prepared for a CLIP, with the SHA-256 of their pixels; an error message for an image that is unreadable.

    Messages are returned, not raised: the message of an exception from a worker process would include its traceback.
    """

    def __init__(self, files: list[Path], preparation: Preparation) -> None:
        self.files, self.preparation = files, preparation

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[Tensor, str] | str:
        file = self.files[number]
        try:
            pixels = read_image(file.read_bytes(), str(file))
        except (BadExampleError, OSError) as error:
            return f"{error}; generate or get it again, or remove its line from {METADATA}"
        return self.preparation(pixels), hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest()


def _scores(
    images: Sequence[PromptImage], clip: Clip, batch_size: int, num_workers: int, device: str
) -> tuple[np.ndarray, str]:
    """Score of each image, (N,) float64, and the checksum of all images, with a progress bar."""
    metric, digests = ImageScores(clip).to(device), list[str]()
    dataset = _Prepared([image.file for image in images], clip.preparation)
    loader = DataLoader(dataset, batch_size, num_workers=num_workers, collate_fn=list)
    with tqdm(total=len(images), desc=f"features of {clip.name}", unit="image") as bar:
        for batch in loader:
            if bad := [each for each in batch if isinstance(each, str)]:
                raise ValueError(bad[0])
            prompts = [image.prompt for image in images[len(digests) : len(digests) + len(batch)]]
            prepared = torch.stack([pixels for pixels, _ in batch]).to(device)
            metric.update(prepared, prompts)
            digests += [digest for _, digest in batch]
            bar.update(len(batch))
    return metric.scores(), join_checksums(digests)


def score_of(scores: np.ndarray) -> Score:
    """Mean of scores (n,), n at least 1, with its standard error."""
    error = float(scores.std(ddof=1)) / math.sqrt(len(scores)) if len(scores) > 1 else None
    return Score(float(scores.mean()), error, len(scores))


def _by(images: Sequence[PromptImage], scores: np.ndarray, key: Callable[[PromptImage], Hashable]) -> dict[Any, Score]:
    """Scores of images grouped by key, in order of first appearance; images with key None are left out."""
    rows: dict[Hashable, list[int]] = {}
    for row, image in enumerate(images):
        if (value := key(image)) is not None:
            rows.setdefault(value, []).append(row)
    return {value: score_of(scores[group]) for value, group in rows.items()}


def by_column(images: Sequence[PromptImage], scores: np.ndarray) -> dict[str, dict[str, Score]]:
    """Scores by category, for each column of the prompts that holds categories.

    These are columns with at most :data:`MAX_GROUPS` distinct values and fewer values than prompts. Images without a
    value are in no category.
    """
    prompts = {(image.number, image.prompt): image.columns for image in images}
    found = {}
    for name in dict.fromkeys(name for columns in prompts.values() for name in columns):
        values = [columns[name] for columns in prompts.values() if columns.get(name)]
        if 0 < len(set(values)) <= min(MAX_GROUPS, len(values) - 1):
            found[name] = _by(images, scores, lambda image, name=name: image.columns.get(name) or None)  # type: ignore[misc]
    return found


def _table(name: str, total: Score, prompts: dict[Any, Score], columns: dict[str, dict[str, Score]]) -> str:
    rows = [[name, *total.cells()]]
    for column, found in columns.items():
        rows += [[_cell(f"{column}: {value}"), *score.cells()] for value, score in sorted(found.items())]
    rows += [[_cell(label), *score.cells()] for label, score in _shown(prompts)]
    return rows_table(["", "CLIP score", "standard error", "images"], rows)


def _shown(prompts: dict[Any, Score]) -> Iterator[tuple[str, Score]]:
    """All prompts in order. If there are many, only the worst and the best, sorted by score."""
    listed = list(enumerate(prompts.items()))
    if len(listed) > SHOWN_PROMPTS:
        listed.sort(key=lambda each: each[1][1].mean)
        listed = listed[: SHOWN_PROMPTS // 2] + listed[-SHOWN_PROMPTS // 2 :]
    for place, ((number, prompt), score) in listed:
        yield f"prompt {place if number is None else number}: {prompt or '(no words)'}", score


def _cell(text: str) -> str:
    """A text for a cell of a Markdown table, shortened if it is long."""
    line = " ".join(text.split()).replace("|", "\\|")
    return line if len(line) <= MAX_CELL else f"{line[:MAX_CELL]}…"
