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
from evaluation.extraction import feature_batches
from evaluation.gallery import Gallery
from evaluation.image_sets import ImageSet, check_loading, open_images
from evaluation.measurement import Measurement
from evaluation.published import published
from evaluation.reference import Reference, make_reference, read_reference, with_features
from evaluation.report import Report, check_report, table
from llamagen.command import fault_of, one_line, run_command
from llamagen.metrics import Inception, extractor_checksum, extractor_name
from llamagen.metrics.result_names import Purpose, check_name
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
        reference: a file of ``python -m evaluation reference``, one of ADM's, or images in one of the forms above.
        features: the extractor: Inception (the default), Classifier with --features.weights FILE, or a class path.
        image_size: side in pixels to which images of another size are resized and cropped by ADM's rule. Images of an
            ``.npz`` are never resized.
        split: train or val, for images that have both.
        reference_split: the same for the reference's images.
        reference_name: name of the reference in the names of results; by default that of its file or folder.
        reconstructions: the images are reconstructions, and the reference holds the originals.
        batch_size: images per batch.
        num_workers: processes that read image files.
        device: device on which features are extracted; by default a GPU if there is one.
        report: folder for a report with results and image grids.
    """
    started, place = time.monotonic(), usable_device(device)
    check_loading(batch_size, num_workers)
    if report is not None:
        check_report(report)
    purpose: Purpose = "reconstruction" if reconstructions else "generation"
    image_set = open_images(images, image_size, split)
    extractor = (Inception() if features is None else features).to(place)
    statistics = _reference(
        reference,
        extractor,
        image_size,
        reference_split,
        reference_name,
        purpose,
        batch_size,
        num_workers,
        place,
        compared=image_set,
    )
    measurement, gallery = Measurement(extractor, image_set.size, purpose, statistics).to(place), Gallery()
    for batch in feature_batches(image_set, extractor, batch_size, num_workers, place, f"features of {images}"):
        measurement.add(batch.features, batch.index)
        gallery.add(batch.images, batch.index, batch.features.pool, batch.labels)
    if warning := statistics.mismatch(purpose, measurement.count):
        print(f"warning: {warning}", file=sys.stderr)
    results = {name: value.item() for name, value in measurement.compute().items()}
    paper = [] if reconstructions else published(None, None)
    print(table(results, []))
    facts = {
        "images": {
            "source": images,
            "count": measurement.count,
            "resolution": image_set.size,
            "crop": image_set.crop,
            "checksum": image_set.checksum(),
        },
        "reference": statistics.facts(),
        "extractor": {"name": extractor_name(extractor), "checksum": extractor_checksum(extractor)},
        "seconds": round(time.monotonic() - started, 1),
    }
    if report is not None:
        title = f"{images} against {statistics.name}"
        Report(title, results, facts, paper, gallery.grids(statistics)).write(report)
        print(f"report: {report / 'report.md'}")
    return results


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
    """Write a reference: statistics and features of images, and where they come from.

    Args:
        images: a folder of images or class folders, shards, or an ``.npz``. The statistics of ADM's references are
            kept; only features are added.
        out: file to write, ``.npz``.
        name: name of the reference in the names of results; by default that of ``out``.
        purpose: which images are compared with it: generated ones, or reconstructions of these images. By default the
            purpose recorded in a file of statistics, else ``generation``.
        features: the extractor: Inception (the default), Classifier with --features.weights FILE, or a class path.
        image_size: side in pixels to which images of another size are resized and cropped by ADM's rule.
        split: train or val, for images that have both.
        batch_size: images per batch.
        num_workers: processes that read image files.
        device: device on which features are extracted; by default a GPU if there is one.
    """
    check_output_file(out, (".npz",))
    check_loading(batch_size, num_workers)
    if out.exists() and Path(images).exists() and out.samefile(images):
        raise ValueError(f"out is {out}, which is the file of images; give another name")
    if out.exists() and not _holds_statistics(str(out)):
        raise ValueError(f"out is {out}, which exists and is not a reference; give another name")
    name, place = check_name(out.stem if name is None else name, "reference"), usable_device(device)
    if not _holds_statistics(images):
        check_content(open_images(images, image_size, split), num_workers)
    extractor = (Inception() if features is None else features).to(place)
    made = _reference(
        images, extractor, image_size, split, name, purpose or "generation", batch_size, num_workers, place
    )
    made = made if purpose is None else replace(made, purpose=purpose)
    made.save(out)
    print(
        f"{out}: {made.count or 'an unknown number of'} images of {made.resolution} px, for {made.purpose}, "
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
    compared: ImageSet | None = None,
) -> Reference:
    """Read a reference, or make one from images. It must match the size of the compared images."""
    size = image_size if compared is None else compared.size
    if _holds_statistics(source):
        if split is not None:
            raise ValueError(f"{source} is a file of statistics and has no split {split}; leave the split out")
        statistics = read_reference(source, name)
        statistics.check(extractor, size or statistics.resolution or 0)
        if compared is not None:
            check_content(compared, num_workers)
        return with_features(statistics, extractor, device)
    images = open_images(source, image_size, split)
    if compared is not None and images.size != size:
        raise ValueError(
            f"the images of {source} are {images.size} × {images.size}, but those of {compared.name} {size} × "
            f"{size}; compare images of one size, or set image_size, which crops those in folders and shards"
        )
    for image_set in (compared, images):  # both before any features are extracted, which takes minutes
        if image_set is not None:
            check_content(image_set, num_workers)
    path = Path(os.path.abspath(source))
    name = "_".join((path.name if path.is_dir() else path.stem).split()) if name is None else name
    return make_reference(images, extractor, name, purpose, batch_size, num_workers, device)


def _holds_statistics(source: str) -> bool:
    path = Path(source).expanduser()
    if path.suffix != ".npz" or not path.is_file():
        return False
    try:
        with zipfile.ZipFile(path) as file:
            return "mu.npy" in file.namelist()
    except (zipfile.BadZipFile, OSError):
        return False  # open_images reports the fault


def main(args: list[str] | None = None) -> None:
    """Run the command.

    Args:
        args: arguments; None for those of the command line.
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
