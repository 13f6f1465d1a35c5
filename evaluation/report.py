"""The ``report`` folder: numbers, beside the paper's, and images."""

import json
import math
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from evaluation.published import Published
from llamagen.files import atomic_folder
from llamagen.grids import save_png
from llamagen.output_paths import check_output

FILES = ("metrics.json", "report.md")
CAPTIONS = {
    "random": "Images drawn at random",
    "classes": "Images of some classes, a row for each",
    "neighbours": "Images (left), and beside each those of the reference whose features are nearest to its own",
    "reconstructions": "Images, and below them what the tokenizer makes of them",
}


def write_report(
    folder: Path,
    title: str,
    numbers: Mapping[str, float],
    facts: Mapping[str, Any],
    paper: list[Published],
    grids: Mapping[str, Image.Image],
) -> None:
    """Write ``metrics.json``, ``report.md`` and grids into a folder, which takes the place of an older report.

    Args:
        folder: appears when it is whole.
        title: of the table.
        numbers: results by name.
        facts: how they came about; in ``metrics.json``, what JSON does not know is text, and numbers that are none
            are null.
        paper: figures to put beside them.
        grids: by the names of :data:`CAPTIONS`.

    Raises:
        ValueError: if there is such a folder which is no report.
    """
    check_report(folder)
    with atomic_folder(folder) as temporary:
        content = {"metrics": dict(numbers), **facts, "versions": versions_here()}
        (temporary / "metrics.json").write_text(json.dumps(_json(content), indent=2, allow_nan=False) + "\n")
        for name, image in grids.items():
            save_png(image, temporary / f"{name}.png")
        (temporary / "report.md").write_text(_markdown(title, numbers, facts, paper, grids))


def check_report(folder: Path) -> None:
    """See that a report can be written there.

    Raises:
        ValueError: if there is something that is no report, or nothing can be written.
    """
    check_output(folder)
    if folder.exists() and not all((folder / name).is_file() for name in FILES):
        raise ValueError(f"{folder} is there and is no report; move it away, or choose another folder")


def versions_here() -> dict[str, str]:
    """Of what numbers may depend on."""
    packages = {name: version(name) for name in ("torch", "lightning", "torchmetrics")}
    return {"python": platform.python_version(), **packages}


def _json(value: Any) -> Any:
    """The same of what JSON knows."""
    if isinstance(value, Mapping):
        return {str(key): _json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_json(each) for each in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


def table(numbers: Mapping[str, float], paper: list[Published]) -> str:
    """Numbers in Markdown, each beside the paper's figure for this model, if it is one of the paper's.

    Else the paper's models follow in a table of their own. Numbers over another extractor than Inception, whose names
    say so, have no figure beside them.
    """
    own = paper[0] if len(paper) == 1 else None
    rows = []
    for name, value in numbers.items():
        figure = None if own is None else own.figures.get(name.removeprefix("test/").split("/")[0])
        rows.append([name, f"{value:.4g}", *([] if own is None else ["" if figure is None else f"{figure:g}"])])
    parts = [rows_table(["", "here", *([] if own is None else [f"paper: {own.title}"])], rows)]
    if len(paper) > 1:
        keys = list(paper[0].figures)
        listed = [
            [each.title, *(f"{each.figures[k]:g}" if k in each.figures else "" for k in keys), each.remark]
            for each in paper
        ]
        parts.append(rows_table(["paper", *keys, ""], listed))
    return "\n\n".join(parts)


def rows_table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def _markdown(
    title: str,
    numbers: Mapping[str, float],
    facts: Mapping[str, Any],
    paper: list[Published],
    grids: Mapping[str, Image.Image],
) -> str:
    parts = [f"# {title}", table(numbers, paper)]
    if paper:
        remark = f" ({paper[0].remark})" if len(paper) == 1 else ""
        parts.append(
            f"Figures of the paper are from arXiv 2406.06525{remark}. Compare them only with numbers over Inception, "
            "of as many images, against the same reference."
        )
    parts += [f"![{name}]({name}.png)\n\n{CAPTIONS[name]}." for name in grids]
    parts.append("## How it was measured\n\n" + "\n".join(_listed(facts)))
    return "\n\n".join(parts) + "\n"


def _listed(facts: Mapping[str, Any], indent: str = "") -> list[str]:
    lines = []
    for key, value in facts.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}- {key}:", *_listed(value, f"{indent}  ")]
        else:
            lines.append(f"{indent}- {key}: {value}")
    return lines
