"""Evaluate pictures without a model: ``python -m evaluation compare|reference|classifier --help``."""

import sys
import time
import zipfile
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import auto_cli
from torch import nn

from datamodules.picture_sets import open_pictures
from evaluation.classifier import train_classifier
from evaluation.gallery import Gallery
from evaluation.measurement import Measurement
from evaluation.published import published
from evaluation.reference import Purpose, Reference, completed, look_at, make_reference, read_reference
from evaluation.report import table, write_report
from llamagen.metrics import Inception, extractor_checksum, extractor_name

Split = Literal["train", "val"]


def compare(
    pictures: str,
    reference: str,
    features: nn.Module | None = None,
    image_size: int | None = None,
    split: Split | None = None,
    reference_split: Split | None = None,
    reference_name: str | None = None,
    reconstructions: bool = False,
    batch_size: int = 64,
    num_workers: int = 0,
    device: str | None = None,
    report: Path | None = None,
) -> dict[str, float]:
    """Measure pictures against others: FID, sFID, Inception Score, precision, recall and KID.

    Args:
        pictures: an ``.npz`` of samples, a folder of pictures or class folders, or shards.
        reference: a file of statistics (of ``python -m evaluation reference``, or ADM's), or pictures like the first.
        features: extractor; Inception by default.
        image_size: side in pixels to which pictures of another size are cropped by ADM's rule; those of an ``.npz``
            never are.
        split: of the pictures, if they have several.
        reference_split: of the reference's pictures.
        reference_name: what the reference is called in the names of the numbers; by default as its file or folder.
        reconstructions: the pictures went through a tokenizer, and the reference are the same pictures before.
        batch_size: pictures that are looked at together.
        num_workers: processes that read picture files.
        device: where features are extracted; by default a GPU, if there is one.
        report: folder for a report with numbers and pictures.
    """
    started, place = time.monotonic(), _device(device)
    kind: Purpose = "reconstruction" if reconstructions else "generation"
    extractor = (Inception() if features is None else features).to(place)
    known = _reference(
        reference, extractor, image_size, reference_split, reference_name, kind, batch_size, num_workers, place
    )
    found = open_pictures(pictures, image_size, split)
    measurement, gallery = Measurement(extractor, found.size, kind, known).to(place), Gallery()
    for images, index, seen, labels in look_at(
        found, extractor, batch_size, num_workers, place, f"looking at {pictures}"
    ):
        measurement.add(seen, index)
        gallery.show(images, index, seen.pool, labels)
    if warning := known.mix_up(kind, measurement.count):
        print(f"warning: {warning}", file=sys.stderr)
    numbers = {name: value.item() for name, value in measurement.compute().items()}
    paper = [] if reconstructions else published(None, None)
    print(table(numbers, []))
    facts = {
        "pictures": {"source": pictures, "count": measurement.count, "resolution": found.size, "crop": found.crop},
        "reference": known.facts(),
        "extractor": {"name": extractor_name(extractor), "checksum": extractor_checksum(extractor)},
        "seconds": round(time.monotonic() - started, 1),
    }
    if report is not None:
        write_report(report, f"{pictures} against {known.name}", numbers, facts, paper, gallery.grids(known))
        print(f"report: {report / 'report.md'}")
    return numbers


def reference(
    pictures: str,
    out: Path,
    name: str | None = None,
    purpose: Purpose = "generation",
    features: nn.Module | None = None,
    image_size: int | None = None,
    split: Split | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    device: str | None = None,
) -> None:
    """Take the statistics of pictures and keep them as a reference: mu, sigma, features, and where they come from.

    Args:
        pictures: a folder of pictures or class folders, shards, or an ``.npz``; one of ADM's references keeps its
            statistics, and gets features.
        out: file to write, ``.npz``.
        name: becomes part of the names of what is measured against it; by default the name of ``out``.
        purpose: whether new pictures are to be compared with it, or reconstructions of these very pictures.
        features: extractor; Inception by default.
        image_size: side in pixels to which pictures of another size are cropped by ADM's rule.
        split: of the pictures, if they have several.
        batch_size: pictures that are looked at together.
        num_workers: processes that read picture files.
        device: where features are extracted; by default a GPU, if there is one.
    """
    if out.suffix != ".npz":
        raise ValueError(f"{out} would be of an unknown format; name it *.npz")
    place = _device(device)
    extractor = (Inception() if features is None else features).to(place)
    made = _reference(pictures, extractor, image_size, split, name or out.stem, purpose, batch_size, num_workers, place)
    made.save(out)
    print(
        f"{out}: {made.count or 'an unknown number of'} pictures of {made.resolution} px, for {made.purpose}, "
        f"named {made.name}"
    )


def _reference(
    source: str,
    extractor: nn.Module,
    image_size: int | None,
    split: Split | None,
    name: str | None,
    purpose: Purpose,
    batch_size: int,
    num_workers: int,
    device: str,
) -> Reference:
    """A file of statistics, or those of pictures."""
    if _holds_statistics(source):
        known = read_reference(source, name)
        known.check(extractor, known.resolution or image_size or 0)
        return completed(known, extractor, device)
    pictures = open_pictures(source, image_size, split)
    called = name or "_".join(Path(source).stem.split()) or "pictures"
    return make_reference(pictures, extractor, called, purpose, batch_size, num_workers, device)


def _holds_statistics(source: str) -> bool:
    path = Path(source)
    if path.suffix != ".npz" or not path.is_file():
        return False
    return zipfile.is_zipfile(path) and "mu.npy" in zipfile.ZipFile(path).namelist()


def _device(device: str | None) -> str:
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def main(args: list[str] | None = None) -> None:
    """The command.

    Args:
        args: instead of the command line's.
    """
    try:
        auto_cli(
            {"compare": compare, "reference": reference, "classifier": train_classifier},
            args=args,
            prog="python -m evaluation",
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
