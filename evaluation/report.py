"""Writes the ``report`` folder: results, the paper's figures next to them, and image grids."""

import json
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass
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
    "random": "Randomly chosen images",
    "classes": "Images by class, a row for each",
    "neighbours": "Images (left) with their nearest neighbours among the reference's images, by features",
    "reconstructions": "Original images, with their reconstructions below",
}


@dataclass(frozen=True)
class Report:
    """A report.

    Attributes:
        title: heading of the report.
        results: measured values by name.
        facts: how the values were measured. In ``metrics.json``, objects that JSON cannot represent are text, and NaN
            and infinity are null.
        paper: figures of the paper to compare with.
        grids: images by the names of :data:`CAPTIONS`.
    """

    title: str
    results: Mapping[str, float]
    facts: Mapping[str, Any]
    paper: list[Published]
    grids: Mapping[str, Image.Image]

    def write(self, folder: Path) -> None:
        """Write ``metrics.json``, ``report.md`` and grids into a folder, which replaces an older report.

        Args:
            folder: the folder; it appears when it is complete.

        Raises:
            ValueError: if the folder exists and is not a report.
        """
        check_report(folder)
        with atomic_folder(folder) as temporary:
            content = {"metrics": dict(self.results), **self.facts, "versions": package_versions()}
            (temporary / "metrics.json").write_text(json.dumps(_json(content), indent=2, allow_nan=False) + "\n")
            for name, image in self.grids.items():
                save_png(image, temporary / f"{name}.png")
            (temporary / "report.md").write_text(self.markdown())

    def markdown(self) -> str:
        """The text of ``report.md``."""
        parts = [f"# {self.title}", table(self.results, self.paper)]
        if self.paper:
            remark = f" ({self.paper[0].remark})" if len(self.paper) == 1 else ""
            parts.append(
                f"Figures of the paper are from arXiv 2406.06525{remark}. Compare them only with results that use "
                "Inception, the same number of images and the same reference."
            )
        parts += [f"![{name}]({name}.png)\n\n{CAPTIONS[name]}." for name in self.grids]
        parts.append("## How it was measured\n\n" + "\n".join(_listed(self.facts)))
        return "\n\n".join(parts) + "\n"


def check_report(folder: Path) -> None:
    """Check that a report can be written to a folder.

    Raises:
        ValueError: if the folder exists and is not a report, or cannot be written.
    """
    check_output(folder)
    if folder.exists() and not all((folder / name).is_file() for name in FILES):
        raise ValueError(f"{folder} exists and is not a report; move it away, or choose another folder")


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that results may depend on."""
    packages = {name: version(name) for name in ("torch", "lightning", "torchmetrics")}
    return {"python": platform.python_version(), **packages}


def _json(value: Any) -> Any:
    """Convert a value to types that JSON can represent."""
    if isinstance(value, Mapping):
        return {str(key): _json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_json(each) for each in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


def table(results: Mapping[str, float], paper: list[Published]) -> str:
    """Results as a Markdown table, with the paper's figures next to them if the model is one of the paper's.

    For other models, the paper's models follow in a separate table. Results of an extractor other than Inception have
    another name, so no figure is shown next to them.
    """
    own = paper[0] if len(paper) == 1 else None
    rows = []
    for name, value in results.items():
        figure = None if own is None else own.figures.get(name.removeprefix("test/").split("/")[0])
        rows.append([name, f"{value:.4g}", *([] if own is None else ["" if figure is None else f"{figure:g}"])])
    parts = [rows_table(["", "measured", *([] if own is None else [f"paper: {own.title}"])], rows)]
    if len(paper) > 1:
        keys = list(paper[0].figures)
        listed = [
            [each.title, *(f"{each.figures[k]:g}" if k in each.figures else "" for k in keys), each.remark]
            for each in paper
        ]
        parts.append(rows_table(["paper", *keys, ""], listed))
    return "\n\n".join(parts)


def rows_table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def _listed(facts: Mapping[str, Any], indent: str = "") -> list[str]:
    lines = []
    for key, value in facts.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}- {key}:", *_listed(value, f"{indent}  ")]
        else:
            lines.append(f"{indent}- {key}: {value}")
    return lines
