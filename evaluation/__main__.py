"""Evaluate images without a model: ``python -m evaluation compare|reference|classifier|clip --help``."""

from llamagen.cores import share_cores

share_cores()  # before torch is loaded, which is when OpenMP reads its settings

import os
import sys
import time
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Literal

from jsonargparse import auto_cli
from torch import nn

from evaluation.classifier import train_classifier
from evaluation.clip_score import clip_score
from evaluation.command_line import Parser, usable_device
from evaluation.content_check import check_content
from evaluation.gallery import Gallery
from evaluation.image_sets import ImageSet, open_images
from evaluation.measurement import Measurement
from evaluation.published import published
from evaluation.reference import Purpose, Reference, checked_name, completed, look_at, make_reference, read_reference
from evaluation.report import check_report, table, write_report
from llamagen.command import fault_of, one_line, run_command
from llamagen.metrics import Inception, extractor_checksum, extractor_name
from llamagen.output_paths import check_output_file

Split = Literal["train", "val"]


def compare(
    images: str,
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
    """Measure images against others: FID, sFID, Inception Score, precision, recall and KID.

    Args:
        images: an ``.npz`` of samples, a folder of images or class folders, or shards.
        reference: a file of statistics (of ``python -m evaluation reference``, or ADM's), or images like the first.
        features: extractor: Inception, which is the default, Classifier with --features.weights FILE, or a class path.
        image_size: side in pixels to which images of another size are cropped by ADM's rule; those of an ``.npz``
            never are.
        split: of the images, if they have several.
        reference_split: of the reference's images.
        reference_name: what the reference is called in the names of the numbers; by default as its file or folder.
        reconstructions: the images went through a tokenizer, and the reference are the same images before.
        batch_size: images that are looked at together.
        num_workers: processes that read image files.
        device: where features are extracted; by default a GPU, if there is one.
        report: folder for a report with numbers and images.
    """
    started, place = time.monotonic(), usable_device(device)
    _check_numbers(batch_size, num_workers)
    if report is not None:
        check_report(report)
    kind: Purpose = "reconstruction" if reconstructions else "generation"
    found = open_images(images, image_size, split)
    extractor = (Inception() if features is None else features).to(place)
    known = _reference(
        reference, extractor, image_size, reference_split, reference_name, kind, batch_size, num_workers, place, found
    )
    measurement, gallery = Measurement(extractor, found.size, kind, known).to(place), Gallery()
    for batch, index, seen, labels in look_at(found, extractor, batch_size, num_workers, place, f"looking at {images}"):
        measurement.add(seen, index)
        gallery.show(batch, index, seen.pool, labels)
    if warning := known.mix_up(kind, measurement.count):
        print(f"warning: {warning}", file=sys.stderr)
    numbers = {name: value.item() for name, value in measurement.compute().items()}
    paper = [] if reconstructions else published(None, None)
    print(table(numbers, []))
    facts = {
        "images": {
            "source": images,
            "count": measurement.count,
            "resolution": found.size,
            "crop": found.crop,
            "checksum": found.checksum(),
        },
        "reference": known.facts(),
        "extractor": {"name": extractor_name(extractor), "checksum": extractor_checksum(extractor)},
        "seconds": round(time.monotonic() - started, 1),
    }
    if report is not None:
        write_report(report, f"{images} against {known.name}", numbers, facts, paper, gallery.grids(known))
        print(f"report: {report / 'report.md'}")
    return numbers


def reference(
    images: str,
    out: Path,
    name: str | None = None,
    purpose: Purpose | None = None,
    features: nn.Module | None = None,
    image_size: int | None = None,
    split: Split | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    device: str | None = None,
) -> None:
    """Take the statistics of images and keep them as a reference: mu, sigma, features, and where they come from.

    Args:
        images: a folder of images or class folders, shards, or an ``.npz``; one of ADM's references keeps its
            statistics, and gets features.
        out: file to write, ``.npz``.
        name: becomes part of the names of what is measured against it; by default the name of ``out``.
        purpose: whether new images are to be compared with it, or reconstructions of these very images; by default
            what a file of statistics says, and else ``generation``.
        features: extractor: Inception, which is the default, Classifier with --features.weights FILE, or a class path.
        image_size: side in pixels to which images of another size are cropped by ADM's rule.
        split: of the images, if they have several.
        batch_size: images that are looked at together.
        num_workers: processes that read image files.
        device: where features are extracted; by default a GPU, if there is one.
    """
    check_output_file(out, (".npz",))
    _check_numbers(batch_size, num_workers)
    if out.exists() and Path(images).exists() and out.samefile(images):
        raise ValueError(f"out is {out}, which are the images; give another name")
    if out.exists() and not _holds_statistics(str(out)):
        raise ValueError(f"out is {out}, which is there and is no reference; give another name")
    called, place = checked_name(out.stem if name is None else name), usable_device(device)
    if not _holds_statistics(images):
        check_content(open_images(images, image_size, split), num_workers)
    extractor = (Inception() if features is None else features).to(place)
    made = _reference(
        images, extractor, image_size, split, called, purpose or "generation", batch_size, num_workers, place
    )
    made = made if purpose is None else replace(made, purpose=purpose)
    made.save(out)
    print(
        f"{out}: {made.count or 'an unknown number of'} images of {made.resolution} px, for {made.purpose}, "
        f"named {made.name}"
    )


def _check_numbers(batch_size: int, num_workers: int) -> None:
    if batch_size < 1 or num_workers < 0:
        raise ValueError(
            f"batch_size is {batch_size} and num_workers {num_workers}; they must be at least 1 and at least 0"
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
    compared: ImageSet | None = None,
) -> Reference:
    """A file of statistics, or those of images; of the size of what is compared with them."""
    size = image_size if compared is None else compared.size
    if _holds_statistics(source):
        if split is not None:
            raise ValueError(f"{source} is a file of statistics and has no split {split}; leave the split out")
        known = read_reference(source, name)
        known.check(extractor, size or known.resolution or 0)
        if compared is not None:
            check_content(compared, num_workers)
        return completed(known, extractor, device)
    images = open_images(source, image_size, split)
    if compared is not None and images.size != size:
        raise ValueError(
            f"the images of {source} are {images.size} × {images.size}, but those of {compared.name} {size} × "
            f"{size}; compare images of one size, or set image_size, which crops those in folders and shards"
        )
    for each in (compared, images):  # now, and not after the extractor has seen the other side
        if each is not None:
            check_content(each, num_workers)
    path = Path(os.path.abspath(source))
    called = "_".join((path.name if path.is_dir() else path.stem).split()) if name is None else name
    return make_reference(images, extractor, called, purpose, batch_size, num_workers, device)


def _holds_statistics(source: str) -> bool:
    path = Path(source).expanduser()
    if path.suffix != ".npz" or not path.is_file():
        return False
    try:
        with zipfile.ZipFile(path) as file:
            return "mu.npy" in file.namelist()
    except (zipfile.BadZipFile, OSError):
        return False  # whoever looks for images will say what is wrong


def main(args: list[str] | None = None) -> None:
    """The command.

    Args:
        args: instead of the command line's.
    """
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"warning: {one_line(str(message))}", file=sys.stderr)
        try:
            auto_cli(
                {"compare": compare, "reference": reference, "classifier": train_classifier, "clip": clip_score},
                args=args,
                prog="python -m evaluation",
                parser_class=Parser,
            )
        except (ValueError, OSError) as error:
            if (fault := fault_of(error)) is None:
                raise
            print(f"error: {fault.message}", file=sys.stderr)
            raise SystemExit(fault.status) from error
        except KeyboardInterrupt as error:
            print("interrupted; nothing was written", file=sys.stderr)
            raise SystemExit(130) from error


if __name__ == "__main__":
    run_command(main)
