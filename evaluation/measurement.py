"""All that is measured of images, in one pass of the extractor. B images of H × W pixels."""

from typing import cast

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from evaluation.image_content import ImageContent
from evaluation.reference import Purpose, Reference
from llamagen.metrics import FID, KID, SFID, Features, InceptionScore, PrecisionRecall, extract, extractor_name
from llamagen.metrics.image_metric import ImageMetric
from llamagen.metrics.inception import Inception
from llamagen.metrics.inception_score import SplitStatistics

PREFIX = {"generation": "g", "reconstruction": "r"}
DISTANCES = ("fid", "sfid", "kid", "kid_std")
SYMBOLS = (*DISTANCES, "precision", "recall", "inception_score", "inception_score_std")
"""Of all that can be measured."""
OWN_NAME = "val"
"""What the images that are reconstructed are called, where they are the reference: those of validation."""


class Measurement:
    """FID, sFID, KID, precision and recall of images against a reference, and their Inception Score.

    What the extractor does not give (``spatial``, ``logits``) or the reference does not hold is left out, of which one
    warning tells; so are, when it is computed, numbers for which there are too few images. The names say what was
    measured how, against what: ``gfid/imagenet256-adm``, ``rfid/imagenet-val``, with another extractor than
    Inception ``gfid_digits-classifier/digits-train``. All states are reduced over ranks.

    Args:
        extractor: of features.
        image_size: side of the images in pixels.
        kind: of the images: ``generation`` or ``reconstruction``.
        reference: what to compare with; None if the real images are shown, too.
        name: of the real images, if there is no reference.

    Raises:
        ValueError: if the reference is of another extractor or size.
    """

    def __init__(
        self,
        extractor: nn.Module,
        image_size: int,
        kind: Purpose,
        reference: Reference | None = None,
        name: str = OWN_NAME,
    ) -> None:
        if reference is not None:
            reference.check(extractor, image_size)
        self.extractor, self.kind, self.reference = extractor, kind, reference
        self.name = name if reference is None else reference.name
        self.count = 0
        self._content, self._is_told = ImageContent(), False
        extractor.eval()
        probe = extract(
            extractor, torch.zeros(2, 3, image_size, image_size, dtype=torch.uint8, device=_device(extractor))
        )
        self.metrics: dict[str, ImageMetric] = {}
        self.metrics["fid"] = FID(extractor, image_size, None if reference is None else reference.statistics)
        if probe.spatial is not None and (reference is None or reference.spatial_statistics is not None):
            self.metrics["sfid"] = SFID(
                extractor, image_size, None if reference is None else reference.spatial_statistics
            )
        if reference is None or reference.features is not None:
            rows = None if reference is None else reference.features
            self.metrics["precision_recall"] = PrecisionRecall(extractor, image_size, rows)
            self.metrics["kid"] = KID(extractor, image_size, rows)
        if probe.logits is not None and kind == "generation":
            self.metrics["inception_score"] = InceptionScore(extractor, image_size)
        if missing := self._missing(probe):
            rank_zero_warn(f"left out: {'; '.join(missing)}")

    def _missing(self, probe: Features) -> list[str]:
        """What is not measured, and why."""
        here, missing = extractor_name(self.extractor), []
        if probe.spatial is None:
            missing.append(f"sfid, as the extractor {here} gives no spatial features")
        elif "sfid" not in self.metrics:
            missing.append(f"sfid, as the reference {self.name} has no spatial statistics (mu_s and sigma_s)")
        if "kid" not in self.metrics:
            missing.append(f"precision, recall and kid, as the reference {self.name} has no features")
        if probe.logits is None and self.kind == "generation":
            missing.append(f"inception_score, as the extractor {here} gives no logits")
        return missing

    def to(self, device: str | torch.device) -> "Measurement":
        """The same on another device."""
        for metric in self.metrics.values():
            metric.to(device)
        return self

    def update(self, images: Tensor, index: Tensor | None = None, real: bool = False) -> Features:
        """Take images into account.

        Args:
            images: (B, 3, H, W) uint8, on the device of the measurement.
            index: (B,) int64, number of each image in its set; see
                :meth:`~llamagen.metrics.image_metric.RowMetric.keep`.
            real: these are the images to compare with.

        Returns:
            Their features.

        Raises:
            ValueError: if they are no images of the right size.
        """
        self.metrics["fid"].check_images(images)
        features = extract(self.extractor, images)
        if not real:
            self._content.add(images)
        self.add(features, index, real)
        return features

    def add(self, features: Features, index: Tensor | None = None, real: bool = False) -> None:
        """As :meth:`update`, for features that were extracted before."""
        self.count += 0 if real else len(features.pool)
        for name, metric in self.metrics.items():
            if name in ("fid", "sfid"):
                metric.update(features, real=real)
            else:
                metric.update(features, real=real, index=index)

    def compute(self) -> dict[str, Tensor]:
        """Numbers by name, float64 scalars on the CPU; all ranks must call it together.

        The first time that all images are the same, or only have the levels of floats that were cast to bytes, a
        warning says so: a model may generate such images.

        Raises:
            ValueError: if there are fewer than two images.
            FloatingPointError: if a number is not finite.
        """
        numbers: dict[str, Tensor] = {}
        if (fault := self._content.fault()) and not self._is_told:  # once, however often a model is measured
            self._is_told = True
            rank_zero_warn(f"what is measured says little: {fault}")

        def note(symbol: str, value: Tensor) -> None:
            name = name_of(symbol, self.kind, extractor_name(self.extractor), self.name)
            if not value.isfinite():
                raise FloatingPointError(f"{name} is {value.item()} (precision float64); see what its features are of")
            numbers[name] = value.cpu()

        for name, metric in self.metrics.items():
            try:
                found = metric.compute()
            except ValueError as error:
                if name == "fid":
                    raise
                rank_zero_warn(f"{name} is left out: {error}")
                continue
            if name == "fid":
                self._warn_of_few_images()
            if name == "inception_score":
                found = self._unsorted(found)
            if name == "precision_recall":
                note("precision", found.precision)
                note("recall", found.recall)
            elif name in ("fid", "sfid"):
                note(name, found)
            else:
                note(name, found.mean)
                note(f"{name}_std", found.std)
        return numbers

    def _warn_of_few_images(self) -> None:
        fid = cast(FID, self.metrics["fid"])
        if fid.seen < fid.width:
            rank_zero_warn(
                f"{fid.seen} images are fewer than the {fid.width} features of {extractor_name(self.extractor)}, which "
                "makes FID far too large; compare it only with one of equally many images, or measure more "
                "(publications take 50,000)"
            )

    def _unsorted(self, found: SplitStatistics) -> SplitStatistics:
        """The Inception Score that people mean: of images in random order."""
        shuffled = cast(InceptionScore, self.metrics["inception_score"]).shuffled
        if shuffled is None:
            return found
        rank_zero_warn(
            f"the images seem to be sorted by class: in their order the Inception Score is {found.mean:.4g}, as each "
            f"of its splits has some classes only; {shuffled.mean:.4g} is given, that of a random order"
        )
        return shuffled

    def reset(self) -> None:
        """Forget all images."""
        self.count, self._content = 0, ImageContent()
        for metric in self.metrics.values():
            metric.reset()


def name_of(symbol: str, kind: Purpose, extractor: str, reference: str) -> str:
    """What a number is called: ``gfid/imagenet256-adm``, ``rfid/val``, ``precision_digits-classifier/digits-train``.

    Args:
        symbol: of the metric.
        kind: of the images; says what a distance is one of.
        extractor: name of it.
        reference: name of it, which the Inception Score goes without.
    """
    prefix = PREFIX[kind] if symbol in DISTANCES else ""
    suffix = "" if extractor == Inception.name else f"_{extractor}"
    return f"{prefix}{symbol}{suffix}" + ("" if symbol.startswith("inception_score") else f"/{reference}")


def _device(extractor: nn.Module) -> torch.device:
    return next((value.device for value in extractor.state_dict().values()), torch.device("cpu"))
