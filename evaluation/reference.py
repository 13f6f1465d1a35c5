"""What images are measured against, as a file. F and S features, M images of which features are kept."""

import json
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from evaluation.content_check import check_content, warn_of_content
from evaluation.image_sets import ImageSet, open_images
from llamagen.files import atomic_file
from llamagen.metrics import FID, SFID, Features, extract, extractor_checksum, extractor_name
from llamagen.metrics.inception import Inception

Purpose = Literal["generation", "reconstruction"]

FORMAT = "llamagen-reference-1"
MAX_FEATURES = 10_000
"""Images whose features are kept: as many as ADM's references have images."""
THUMBNAIL = 64
STATISTICS = ("mu", "sigma")
SPATIAL = ("mu_s", "sigma_s")
DAMAGES = (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What numpy and zipfile raise for files that are damaged, or something else."""
ADM_NAMES = {
    f"VIRTUAL_imagenet{size}{end}": f"imagenet{size}-adm" for size in (64, 128, 256, 512) for end in ("_labeled", "")
}


@dataclass(frozen=True)
class Reference:
    """Statistics of images, and where they come from.

    Attributes:
        name: becomes part of the names of what is measured against it.
        purpose: what is to be compared with it: ``generation`` (new images, usually against the training images) or
            ``reconstruction`` (images that went through a tokenizer, against themselves).
        count: number of images; None if the file does not say.
        resolution: their side in pixels; None likewise.
        crop: how they got that size: ``none``, ``adm-centre``; None likewise.
        extractor: name of the extractor of features.
        extractor_checksum: of its weights; None likewise.
        source: where the images were.
        checksum: of the images, see :meth:`~evaluation.image_sets.ImageSet.checksum`; None likewise.
        statistics: mean (F,) and covariance (F, F) of ``pool``, float64.
        spatial_statistics: (S,) and (S, S) likewise; None if there are none.
        features: (M, F) float32, of images that are spread evenly over all; None if there are none.
        thumbnails: (M, h, w, 3) uint8, these images, at most 64 pixels wide; None likewise.
        images: file that holds M images whose features are not known yet, as in ADM's references.
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
        """What is known of it beside the numbers; primitives only."""
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
        """See that images of this size, through this extractor, can be compared with it.

        Raises:
            ValueError: if not, with what differs.
        """
        here = extractor_name(extractor)
        if self.extractor != here:
            raise ValueError(
                f"the reference {self.name} was made with the extractor {self.extractor}, not {here}; give features of "
                "that one, or make a reference with this one by python -m evaluation reference"
            )
        if self.extractor_checksum not in (None, checksum := extractor_checksum(extractor)):
            raise ValueError(
                f"the reference {self.name} was made with other weights of {here} (checksum "
                f"{str(self.extractor_checksum)[:12]}, here {checksum[:12]}); give those, or make a new reference"
            )
        if self.resolution not in (None, image_size):
            raise ValueError(
                f"the reference {self.name} is of images of {self.resolution} pixels, not {image_size}; compare "
                "images of one size (samples: model.init_args.image_size)"
            )

    def mix_up(self, kind: Purpose, count: int | None = None) -> str | None:
        """What to warn of, if this is a reference for something else; None if it is not.

        Args:
            kind: of the images that are compared with it.
            count: of them.
        """
        if kind == "reconstruction" and self.purpose == "generation":
            return (
                f"reconstructions are compared with {self.name}, a reference for generated images. rFID is the "
                "distance of reconstructions from the very images that were reconstructed, usually the validation "
                "set; against the statistics of the training set it is another number, often by more than 1. Leave "
                "reference out, or make one of these images with --purpose reconstruction"
            )
        if kind == "generation" and self.purpose == "reconstruction":
            return (
                f"generated images are compared with {self.name}, a reference for reconstructions. gFID is the "
                "distance from the statistics of the training set (for ImageNet those of ADM's "
                "VIRTUAL_imagenet256_labeled.npz); against the validation set it is another number"
            )
        if kind == "reconstruction" and count is not None and self.count not in (None, count):
            return (
                f"{count} reconstructions are compared with {self.name}, a reference of {self.count} images; rFID is "
                "the distance from the very images that were reconstructed"
            )
        return None

    def save(self, path: Path | str) -> None:
        """Write it as an ``.npz``, whole or not at all, whose statistics have the names that ADM's have."""
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
    """A reference: a file of ``python -m evaluation reference``, one of ADM's, or any ``.npz`` of ``mu`` and ``sigma``.

    Of files that do not say so it is taken that they are of Inception and for generated images.

    Args:
        path: the file.
        name: instead of the one that the file has.

    Raises:
        ValueError: in one line, if there is no such file, or it holds no statistics.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"there is no reference {path}; make one with python -m evaluation reference")
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no .npz, or cut off; get or make it again")
        with np.load(path, allow_pickle=False) as file:
            keys = set(file.files)
            if not keys.issuperset(STATISTICS):
                hint = "it holds images; " if "arr_0" in keys else ""
                raise ValueError(
                    f"no mu and sigma, but {', '.join(sorted(keys)) or 'nothing'}; {hint}make a reference of it"
                )
            found = (*STATISTICS, *SPATIAL) if keys.issuperset(SPATIAL) else STATISTICS
            parts = {key: torch.from_numpy(file[key].astype(np.float64)) for key in found}
            meta = json.loads(str(file["meta"])) if "meta" in keys else {}
            if not isinstance(meta, dict):
                raise ValueError(f"its meta is {meta!r}; make it again")
            features = torch.from_numpy(file["features"]) if "features" in keys else None
            thumbnails = file["thumbnails"] if "thumbnails" in keys else None
    except DAMAGES as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path} is no reference: {reason}") from error
    stem = path.stem
    if not meta:
        images = path if "arr_0" in keys else None
        resolution = open_images(path).size if images else None
        meta = {
            "name": ADM_NAMES.get(stem, stem),
            "purpose": "generation",
            "resolution": resolution,
            "extractor": Inception.name,
        }
    elif meta.get("format") != FORMAT:
        raise ValueError(f"{path} is a reference of the format {meta.get('format')}; this version reads {FORMAT}")
    else:
        images = None
    if lacking := [key for key in ("name", "purpose", "extractor") if not meta.get(key)]:
        raise ValueError(f"{path} is no reference: it does not say its {', '.join(lacking)}; make it again")
    _check_shapes(path, parts)
    known = {key: meta.get(key) for key in ("count", "resolution", "crop", "extractor_checksum", "checksum")}
    return Reference(
        name=checked_name(name or meta["name"]),
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
    """See that means, (F,) or (1, F), and covariances (F, F) fit together, and are numbers."""
    for mean, covariance in (STATISTICS, SPATIAL):
        if mean not in parts:
            continue
        shape, other, count = parts[mean].shape, parts[covariance].shape, parts[mean].numel()
        if shape not in ((count,), (1, count)) or other != (count, count):
            raise ValueError(
                f"{path} is no reference: {mean} is {tuple(shape)}, but {covariance} {tuple(other)}; they must be "
                "(F,) and (F, F)"
            )
        if not (parts[mean].isfinite().all() and parts[covariance].isfinite().all()):
            raise ValueError(f"{path} is no reference: {mean} or {covariance} is not finite; get or make it again")
        if not parts[covariance].any():
            raise ValueError(
                f"{path} is no reference: {covariance} is zero everywhere, so all its images were the same; make it "
                "again of others"
            )


def checked_name(name: str) -> str:
    """A name that can be part of a metric's.

    Raises:
        ValueError: if it is empty, or has a slash or white space.
    """
    if not name or "/" in name or any(letter.isspace() for letter in name):
        raise ValueError(f"a reference cannot be named {name!r}; give a name without slashes and white space")
    return name


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
    """Take the statistics of images, with a progress bar.

    Args:
        images: of one size.
        extractor: of features.
        name: of the reference.
        purpose: see :class:`Reference`.
        batch_size: images that are looked at together.
        num_workers: processes that read images.
        device: where the extractor runs.
        max_features: of how many images the features are kept, for precision, recall, KID and nearest neighbours.

    Raises:
        ValueError: if the name is none, or images are too few or cannot be read.
    """
    if purpose not in get_args(Purpose):
        raise ValueError(f"purpose is {purpose!r}; give {' or '.join(get_args(Purpose))}")
    name, count = checked_name(name), len(images)
    fid, sfid = FID(extractor, images.size).to(device), None
    kept = np.unique(np.linspace(0, count - 1, min(count, max_features)).round().astype(int))
    excerpt, seen = _Excerpt(len(kept)), 0
    for batch, index, found, _ in look_at(images, extractor, batch_size, num_workers, device, f"looking at {name}"):
        if found.spatial is not None and sfid is None:
            sfid = SFID(extractor, images.size).to(device)
        for metric in (fid, sfid):
            if metric is not None:
                metric.update(found, real=True)
        some = torch.from_numpy(np.isin(index.numpy(), kept))
        excerpt.add(found.pool[some.to(found.pool.device)], batch[some])
        seen += len(batch)
    features, thumbnails = excerpt.whole()
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


def completed(
    reference: Reference, extractor: nn.Module, device: str | torch.device, show_progress: bool = True
) -> Reference:
    """A reference with features, where it has only images to take them of, as ADM's have."""
    if reference.images is None:
        return reference
    images = open_images(reference.images)
    excerpt = _Excerpt(len(images))
    task = f"looking at the images of {reference.name}"
    for batch, _, found, _ in look_at(images, extractor, 64, 0, device, task, show_progress):
        excerpt.add(found.pool, batch)
    features, thumbnails = excerpt.whole()
    return replace(reference, features=features, thumbnails=thumbnails, images=None)


class _Excerpt:
    """Features and thumbnails of some images.

    Their memory is taken at once: small pieces that stay, between large ones that come and go, would keep those from
    being used again.
    """

    def __init__(self, most: int) -> None:
        self.most, self.count = most, 0
        self.features, self.thumbnails = torch.empty(0), np.empty(0, dtype=np.uint8)

    def add(self, pool: Tensor, images: Tensor) -> None:
        """Take features (B, F) and images (B, 3, H, W) uint8."""
        for row, image in zip(pool.float().cpu(), images.permute(0, 2, 3, 1).numpy(), strict=True):
            small = thumbnail(image)
            if not self.count:
                self.features = torch.empty(self.most, len(row))
                self.thumbnails = np.empty((self.most, *small.shape), dtype=np.uint8)
            self.features[self.count], self.thumbnails[self.count] = row, small
            self.count += 1

    def whole(self) -> tuple[Tensor, np.ndarray]:
        """(M, F) float32 and (M, h, w, 3) uint8."""
        return self.features[: self.count].clone(), self.thumbnails[: self.count].copy()


def look_at(
    images: ImageSet,
    extractor: nn.Module,
    batch_size: int,
    num_workers: int,
    device: str | torch.device,
    task: str,
    show_progress: bool = True,
) -> Iterator[tuple[Tensor, Tensor, Features, Tensor]]:
    """Images (B, 3, H, W) uint8 with index (B,), features and labels (B,), batch by batch, with a progress bar.

    At the end it warns of images that could not be read, and of what is unusual about them.

    Raises:
        ValueError: if they cannot be images, see :func:`~evaluation.content_check.check_content`.
    """
    check_content(images, num_workers)
    extractor.eval()
    batches = images.batches(batch_size, num_workers=num_workers)
    with tqdm(total=len(images), desc=task, unit="image", disable=not show_progress) as bar:
        for batch in batches:
            yield batch.images, batch.index, extract(extractor, batch.images.to(device)), batch.labels
            bar.update(len(batch.images))
    if bad := images.skipped:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(bad.items()))
        rank_zero_warn(f"{sum(bad.values())} images of {images.name} cannot be read and are left out ({reasons})")
    warn_of_content(images)


def thumbnail(image: np.ndarray) -> np.ndarray:
    """An image (H, W, 3) uint8, at most 64 pixels high and wide."""
    small = Image.fromarray(image)
    if max(small.size) > THUMBNAIL:
        small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return np.array(small)


def _on_cpu(statistics: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return statistics[0].cpu(), statistics[1].cpu()
