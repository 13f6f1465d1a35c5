"""References: files of statistics that images are compared with. F and S features, M images with stored features."""

import json
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from evaluation.extraction import feature_batches
from evaluation.image_sets import ImageSet, open_images
from llamagen.files import atomic_file
from llamagen.metrics import FID, SFID, extractor_checksum, extractor_name
from llamagen.metrics.image_metric import ReferencePart
from llamagen.metrics.result_names import INCEPTION, PURPOSES, Purpose, check_name

FORMAT = "llamagen-reference-1"
MAX_FEATURES = 10_000
"""Maximum number of images whose features are stored; ADM's references hold this number of images."""
THUMBNAIL = 64
STATISTICS = ("mu", "sigma")
SPATIAL = ("mu_s", "sigma_s")
CONTENT: dict[ReferencePart, str] = {
    "statistics": "statistics (mu and sigma)",
    "spatial_statistics": "spatial statistics (mu_s and sigma_s)",
    "features": "features",
}
"""Optional content of a reference: names of attributes, and their descriptions in messages."""
DAMAGES = (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""Exceptions that numpy and zipfile raise for files that are damaged or of another kind."""
ADM_NAMES = {
    f"VIRTUAL_imagenet{size}{end}": f"imagenet{size}-adm" for size in (64, 128, 256, 512) for end in ("_labeled", "")
}


@dataclass(frozen=True)
class Reference:
    """Statistics of images, and where they come from. Attributes that the file does not have are None.

    Attributes:
        name: name of the reference, a part of result names.
        purpose: which images are compared with it: ``generation`` for generated images (the reference usually holds the
            training images) or ``reconstruction`` for reconstructions (it holds the originals).
        count: number of images.
        resolution: side of the images in pixels.
        crop: how the images were brought to that size: ``none`` or ``adm-centre``.
        extractor: name of the extractor.
        extractor_checksum: SHA-256 of the extractor's weights.
        source: path of the images.
        checksum: checksum of the images, see :meth:`~evaluation.image_sets.ImageSet.checksum`.
        statistics: mean (F,) and covariance (F, F) of the ``pool`` features, float64.
        spatial_statistics: mean (S,) and covariance (S, S) of the ``spatial`` features, float64.
        features: (M, F) float32, ``pool`` features of images spread evenly over the dataset.
        thumbnails: (M, h, w, 3) uint8, the same images, with sides of at most 64 pixels.
        images: file with M images whose features have not been extracted yet, such as one of ADM's references.
    """

    name: str
    purpose: Purpose
    count: int | None
    resolution: int | None
    crop: str | None
    extractor: str
    extractor_checksum: str | None
    source: str
    checksum: str | None
    statistics: tuple[Tensor, Tensor]
    spatial_statistics: tuple[Tensor, Tensor] | None = None
    features: Tensor | None = None
    thumbnails: np.ndarray | None = None
    images: Path | None = None

    def facts(self) -> dict[str, Any]:
        """Everything but the arrays, as primitives."""
        keys = (
            "name",
            "purpose",
            "count",
            "resolution",
            "crop",
            "extractor",
            "extractor_checksum",
            "source",
            "checksum",
        )
        return {key: getattr(self, key) for key in keys}

    def check(self, extractor: nn.Module, image_size: int) -> None:
        """Check that images of this size and their features by this extractor can be compared with the reference.

        Raises:
            ValueError: if the extractor, its weights or the size differ.
        """
        name = extractor_name(extractor)
        if self.extractor != name:
            raise ValueError(
                f"the reference {self.name} was made with the extractor {self.extractor}, not {name}; use that "
                "extractor, or make a reference with this one by python -m evaluation reference"
            )
        if self.extractor_checksum not in (None, checksum := extractor_checksum(extractor)):
            raise ValueError(
                f"the reference {self.name} was made with other weights of {name} (checksum "
                f"{str(self.extractor_checksum)[:12]}, not {checksum[:12]}); use those, or make a new reference"
            )
        if self.resolution not in (None, image_size):
            raise ValueError(
                f"the reference {self.name} is of images of {self.resolution} pixels, not {image_size}; compare "
                "images of one size (samples: model.init_args.image_size)"
            )

    def mismatch(self, purpose: Purpose, count: int | None = None) -> str | None:
        """A warning if the reference is meant for other images; None if it fits.

        Args:
            purpose: whether the compared images are generated or reconstructed.
            count: number of the compared images.
        """
        if purpose == "reconstruction" and self.purpose == "generation":
            return (
                f"reconstructions are compared with {self.name}, a reference for generated images. rFID is the "
                "distance of reconstructions from the very images that were reconstructed, usually the validation "
                "images; against the training images the value differs, often by more than 1. Leave reference out, or "
                "make a reference of the reconstructed images with --purpose reconstruction"
            )
        if purpose == "generation" and self.purpose == "reconstruction":
            return (
                f"generated images are compared with {self.name}, a reference for reconstructions. gFID is the "
                "distance from the training images (for ImageNet use ADM's VIRTUAL_imagenet256_labeled.npz); against "
                "the validation images the value differs"
            )
        if purpose == "reconstruction" and count is not None and self.count not in (None, count):
            return (
                f"{count} reconstructions are compared with {self.name}, a reference of {self.count} images; rFID is "
                "the distance from the very images that were reconstructed"
            )
        return None

    def save(self, path: Path | str) -> None:
        """Write an ``.npz`` atomically. The statistics have the same keys as in ADM's files."""
        arrays: dict[str, Any] = dict(zip(STATISTICS, (part.numpy() for part in self.statistics), strict=True))
        if self.spatial_statistics is not None:
            arrays |= dict(zip(SPATIAL, (part.numpy() for part in self.spatial_statistics), strict=True))
        if self.features is not None:
            arrays["features"] = self.features.numpy()
        if self.thumbnails is not None:
            arrays["thumbnails"] = self.thumbnails
        arrays["meta"] = np.array(json.dumps({"format": FORMAT, **self.facts()}))
        with atomic_file(Path(path)) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)


def read_reference(path: Path | str, name: str | None = None) -> Reference:
    """Read a file of ``python -m evaluation reference``, one of ADM's, or any ``.npz`` with ``mu`` and ``sigma``.

    If a file does not name extractor and purpose, Inception and generated images are assumed.

    Args:
        path: the file.
        name: overrides the name in the file.

    Raises:
        ValueError: in one line, if the file is missing, damaged or holds no statistics.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"there is no reference {path}; make one with python -m evaluation reference")
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("it is not an .npz, or cut off; get or make it again")
        with np.load(path, allow_pickle=False) as file:
            keys = set(file.files)
            if not keys.issuperset(STATISTICS):
                hint = "it holds images; " if "arr_0" in keys else ""
                raise ValueError(
                    f"no mu and sigma, but {', '.join(sorted(keys)) or 'nothing'}; {hint}make a reference from it"
                )
            wanted = (*STATISTICS, *SPATIAL) if keys.issuperset(SPATIAL) else STATISTICS
            parts = {key: torch.from_numpy(file[key].astype(np.float64)) for key in wanted}
            meta = json.loads(str(file["meta"])) if "meta" in keys else {}
            if not isinstance(meta, dict):
                raise ValueError(f"its meta is {meta!r}; make it again")
            features = torch.from_numpy(file["features"]) if "features" in keys else None
            thumbnails = file["thumbnails"] if "thumbnails" in keys else None
    except DAMAGES as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path} is not a reference: {reason}") from error
    stem = path.stem
    if not meta:
        images = path if "arr_0" in keys else None
        resolution = open_images(path).size if images else None
        meta = {
            "name": ADM_NAMES.get(stem, stem),
            "purpose": "generation",
            "resolution": resolution,
            "extractor": INCEPTION,
        }
    elif meta.get("format") != FORMAT:
        raise ValueError(f"{path} is a reference of the format {meta.get('format')}; this version reads {FORMAT}")
    else:
        images = None
    if lacking := [key for key in ("name", "purpose", "extractor") if not meta.get(key)]:
        raise ValueError(f"{path} is not a reference: it does not give its {', '.join(lacking)}; make it again")
    _check_shapes(path, parts)
    known = {key: meta.get(key) for key in ("count", "resolution", "crop", "extractor_checksum", "checksum")}
    return Reference(
        name=check_name(name or meta["name"], "reference"),
        purpose=meta["purpose"],
        extractor=meta["extractor"],
        source=meta.get("source", str(path)),
        statistics=(parts["mu"].flatten(), parts["sigma"]),
        spatial_statistics=(parts["mu_s"].flatten(), parts["sigma_s"]) if "mu_s" in parts else None,
        features=features,
        thumbnails=thumbnails,
        images=images,
        **known,
    )


def _check_shapes(path: Path, parts: dict[str, Tensor]) -> None:
    """Check that means, (F,) or (1, F), and covariances (F, F) fit together and are finite."""
    for mean, covariance in (STATISTICS, SPATIAL):
        if mean not in parts:
            continue
        shape, other, count = parts[mean].shape, parts[covariance].shape, parts[mean].numel()
        if shape not in ((count,), (1, count)) or other != (count, count):
            raise ValueError(
                f"{path} is not a reference: {mean} is {tuple(shape)}, but {covariance} {tuple(other)}; they must be "
                "(F,) and (F, F)"
            )
        if not (parts[mean].isfinite().all() and parts[covariance].isfinite().all()):
            raise ValueError(f"{path} is not a reference: {mean} or {covariance} is not finite; get or make it again")
        if not parts[covariance].any():
            raise ValueError(
                f"{path} is not a reference: {covariance} is zero everywhere, so all its images were the same; make it "
                "again from other images"
            )


def make_reference(
    images: ImageSet,
    extractor: nn.Module,
    name: str,
    purpose: Purpose = "generation",
    batch_size: int = 64,
    num_workers: int = 0,
    device: str | torch.device = "cpu",
    max_features: int = MAX_FEATURES,
) -> Reference:
    """Compute the statistics of images, with a progress bar.

    Args:
        images: the images.
        extractor: extractor of the features.
        name: name of the reference.
        purpose: see :class:`Reference`.
        batch_size: images per batch.
        num_workers: processes that read images.
        device: device on which the extractor runs.
        max_features: number of images whose features are stored, for precision, recall, KID and nearest neighbours.

    Raises:
        ValueError: if the name is not allowed, there are too few images, or images cannot be read.
    """
    if purpose not in PURPOSES:
        raise ValueError(f"purpose is {purpose!r}; give {' or '.join(PURPOSES)}")
    name, count = check_name(name, "reference"), len(images)
    fid, sfid = FID(extractor, images.size).to(device), None
    kept = np.unique(np.linspace(0, count - 1, min(count, max_features)).round().astype(int))
    excerpt, seen = _Excerpt(len(kept)), 0
    for batch in feature_batches(images, extractor, batch_size, num_workers, device, f"features of {name}"):
        if batch.features.spatial is not None and sfid is None:
            sfid = SFID(extractor, images.size).to(device)
        for metric in (fid, sfid):
            if metric is not None:
                metric.update(batch.features, real=True)
        chosen = torch.from_numpy(np.isin(batch.index.numpy(), kept))
        pool = batch.features.pool
        excerpt.add(pool[chosen.to(pool.device)], batch.images[chosen])
        seen += len(batch.images)
    features, thumbnails = excerpt.arrays()
    return Reference(
        name=name,
        purpose=purpose,
        count=seen,
        resolution=images.size,
        crop=images.crop,
        extractor=extractor_name(extractor),
        extractor_checksum=extractor_checksum(extractor),
        source=images.name,
        checksum=images.checksum(),
        statistics=_on_cpu(fid.statistics(real=True)),
        spatial_statistics=None if sfid is None else _on_cpu(sfid.statistics(real=True)),
        features=features,
        thumbnails=thumbnails,
    )


def with_features(
    reference: Reference, extractor: nn.Module, device: str | torch.device, show_progress: bool = True
) -> Reference:
    """Add features to a reference that holds images instead, like those of ADM. Others are returned unchanged."""
    if reference.images is None:
        return reference
    images = open_images(reference.images)
    excerpt = _Excerpt(len(images))
    task = f"features of {reference.name}"
    for batch in feature_batches(images, extractor, 64, 0, device, task, show_progress):
        excerpt.add(batch.features.pool, batch.images)
    features, thumbnails = excerpt.arrays()
    return replace(reference, features=features, thumbnails=thumbnails, images=None)


class _Excerpt:
    """Features and thumbnails of up to ``maximum`` images.

    Their memory is allocated at once: small tensors that are kept between large temporary ones fragment the heap.
    """

    def __init__(self, maximum: int) -> None:
        self.maximum, self.count = maximum, 0
        self.features, self.thumbnails = torch.empty(0), np.empty(0, dtype=np.uint8)

    def add(self, pool: Tensor, images: Tensor) -> None:
        """Store features (B, F) and images (B, 3, H, W) uint8."""
        for row, image in zip(pool.float().cpu(), images.permute(0, 2, 3, 1).numpy(), strict=True):
            small = thumbnail(image)
            if not self.count:
                self.features = torch.empty(self.maximum, len(row))
                self.thumbnails = np.empty((self.maximum, *small.shape), dtype=np.uint8)
            self.features[self.count], self.thumbnails[self.count] = row, small
            self.count += 1

    def arrays(self) -> tuple[Tensor, np.ndarray]:
        """Features (M, F) float32 and thumbnails (M, h, w, 3) uint8."""
        return self.features[: self.count].clone(), self.thumbnails[: self.count].copy()


def thumbnail(image: np.ndarray) -> np.ndarray:
    """Shrink an image (H, W, 3) uint8 to sides of at most 64 pixels."""
    small = Image.fromarray(image)
    if max(small.size) > THUMBNAIL:
        small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return np.array(small)


def _on_cpu(statistics: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return statistics[0].cpu(), statistics[1].cpu()
