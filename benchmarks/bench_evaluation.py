"""Cost of evaluation: the extractor, FID's matrix root, and all metrics of 50,000 images of 256 × 256 pixels.

Prints tables, then one JSON line. The extractor has random weights, which are as fast as trained ones. The 50,000
images (9.8 GB) are first written to a temporary folder. For them a stub without cost replaces Inception, with features
of the same widths, to measure only reading and metrics.

    python -m benchmarks.bench_evaluation --json benchmarks/results/evaluation_cpu.json
"""

import argparse
import json
import platform
import resource
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import Tensor, nn

from benchmarks.timing import machine, spread
from evaluation.extraction import feature_batches
from evaluation.image_sets import open_images
from evaluation.measurement import Measurement
from evaluation.reference import Reference, make_reference
from llamagen.files import atomic_file
from llamagen.metrics import Features, InceptionNet, extract, frechet_distance

WIDTHS = (2048, 2023, 1008)
SIDE = 256


class Stub(nn.Module):
    """An extractor that costs nothing: pixels as features of Inception's widths."""

    name = "stub"

    def forward(self, images: Tensor) -> Features:
        """(B, 3, H, W) → features that differ from image to image."""
        flat = images.flatten(1) / 255
        step = flat.shape[1] // WIDTHS[0]
        pool, spatial, logits = (flat[:, offset::step][:, :width] for offset, width in enumerate(WIDTHS))
        return Features(pool.contiguous(), spatial.contiguous(), (8 * logits).contiguous())


def peak() -> float:
    """Peak memory of the process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def time_extractor(device: str, batch_size: int, repeats: int) -> dict[str, Any]:
    """Images per second of Inception's network, from 256 × 256 pixels and including the resizing."""
    network = InceptionNet().to(device)
    images = torch.randint(0, 256, (batch_size, 3, SIDE, SIDE), dtype=torch.uint8, device=device)
    seconds = []
    for repeat in range(repeats + 1):
        started = time.perf_counter()
        extract(network, images)
        if device != "cpu":
            torch.cuda.synchronize()
        if repeat:  # the first is a warm-up
            seconds.append(time.perf_counter() - started)
    rates = spread([batch_size / each for each in seconds])
    quartiles = f"quartiles {rates['q1']:.1f} and {rates['q3']:.1f}"
    print(f"extractor, batch {batch_size}: {rates['median']:.1f} images/s ({quartiles})")
    return {"batch_size": batch_size, "images_per_second": rates}


def time_root(device: str, repeats: int, with_scipy: bool) -> dict[str, Any]:
    """Seconds of a Fréchet distance over 2048 features, and time and difference of scipy's matrix square root."""
    generator = np.random.default_rng(0)
    mixing = generator.normal(size=(2048, 2048)) / 45
    sides = [np.abs(generator.normal(size=(5000, 2048)) @ mixing) + shift for shift in (0.0, 0.05)]
    statistics = [(rows.mean(0), np.cov(rows, rowvar=False)) for rows in sides]
    tensors = [torch.from_numpy(part).to(device) for pair in statistics for part in pair]
    seconds, distance = [], 0.0
    for _ in range(repeats):
        started = time.perf_counter()
        distance = frechet_distance(*tensors).item()
        seconds.append(time.perf_counter() - started)
    found: dict[str, Any] = {"seconds": spread(seconds), "distance": distance}
    print(f"Fréchet distance over 2048 features: {found['seconds']['median']:.2f} s")
    if with_scipy:
        started = time.perf_counter()
        (mean, covariance), (other_mean, other) = statistics
        root = scipy.linalg.sqrtm(covariance @ other)
        plain = float(
            (mean - other_mean) @ (mean - other_mean) + np.trace(covariance + other) - 2 * np.trace(root).real
        )
        found |= {"scipy_seconds": time.perf_counter() - started, "scipy_distance": plain}
        print(
            f"scipy.linalg.sqrtm: {found['scipy_seconds']:.2f} s; relative difference {abs(plain / distance - 1):.1e}"
        )
    return found


def write_images(path: Path, count: int) -> None:
    """Write noise as an archive in ADM's format."""
    generator = np.random.default_rng(0)
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as entry,
    ):
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, SIDE, SIDE, 3)}
        np.lib.format.write_array_header_1_0(entry, header)
        for start in range(0, count, 256):
            images = min(256, count - start)
            entry.write(generator.bytes(images * SIDE * SIDE * 3))


def measure_archive(path: Path, reference: Reference | None, device: str) -> tuple[dict[str, Any], Measurement]:
    """Read an archive and add its images to a new measurement."""
    images, stub, before = open_images(path), Stub(), peak()
    measurement = Measurement(stub, SIDE, "generation", reference).to(device)
    started = time.perf_counter()
    for _, index, features, _ in feature_batches(images, stub, 64, 0, device, path.name):
        measurement.add(features, index)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak_mb_before": before, "peak_mb": peak()}, measurement


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--reference_images", type=int, default=10_000)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no_scipy", action="store_true", help="skip scipy's matrix root")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results: dict[str, Any] = {
        "machine": machine(options.device),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "scipy": scipy.__version__},
        "extractor": [time_extractor(options.device, size, options.repeats) for size in options.batch_sizes],
        "matrix_root_2048": time_root(options.device, options.repeats, not options.no_scipy),
    }
    with tempfile.TemporaryDirectory() as folder:
        known, samples = Path(folder) / "reference.npz", Path(folder) / "samples.npz"
        write_images(known, options.reference_images)
        write_images(samples, options.images)
        reference = make_reference(open_images(known), Stub(), "noise", device=options.device)
        run, measurement = measure_archive(samples, reference, options.device)
        size = samples.stat().st_size / 1e9
    print(
        f"{options.images} images ({size:.1f} GB): {options.images / run['seconds']:.0f} images/s, "
        f"peak {run['peak_mb']:.0f} MB ({run['peak_mb_before']:.0f} MB before)"
    )
    for name, metric in measurement.metrics.items():
        started = time.perf_counter()
        metric.compute()
        run[f"{name}_seconds"] = time.perf_counter() - started
        print(f"{name}: {run[f'{name}_seconds']:.1f} s")
    run["peak_mb_with_results"] = peak()
    print(f"peak with all results: {run['peak_mb_with_results']:.0f} MB")
    results["archive"] = {
        "images": options.images,
        "reference_images": options.reference_images,
        "gb": size,
        **run,
    }
    line = json.dumps(results)
    print(line)
    if options.json:
        with atomic_file(options.json) as temporary:
            temporary.write_text(line + "\n")


if __name__ == "__main__":
    main()
