"""All metrics of an image dataset, in one pass of the extractor. B images of H × W pixels."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from evaluation.image_content import ImageContent
from evaluation.reference import CONTENT, Reference
from llamagen.metrics import FID, KID, SFID, Features, InceptionScore, PrecisionRecall, extract, extractor_name
from llamagen.metrics.features import PARTS, probe
from llamagen.metrics.image_metric import ImageMetric
from llamagen.metrics.result_names import Purpose
from llamagen.rank_zero import warn_on_rank_zero

METRICS: tuple[type[ImageMetric], ...] = (FID, SFID, PrecisionRecall, KID, InceptionScore)
"""Metrics of ``FIDMonitor`` and ``python -m evaluation compare``. To add a metric, add its class to this list."""
OWN_NAME = "val"
"""Name of the reference if reconstructions are compared with the validation images themselves."""


class Measurement:
    """Metrics of images against a reference.

    Metrics are left out if the extractor or the reference does not provide what they need; one warning lists them.
    ``compute`` also leaves out those that need more images. Result names include metric, reference and, except for
    Inception, extractor: ``gfid/imagenet256-adm``, ``rfid/imagenet-val``, ``gfid_digits-classifier/digits-train``. All
    states are reduced over ranks.

    Args:
        extractor: extractor of the features.
        image_size: side of the images in pixels.
        purpose: whether the images are generated or reconstructed.
        reference: the reference to compare with; None if the real images are passed to :meth:`update`, too.
        name: name of the real images, if there is no reference.
        metrics: classes of the metrics.

    Raises:
        ValueError: if the reference is of another extractor or size, or two metrics have the same symbol.
    """

    def __init__(
        self,
        extractor: nn.Module,
        image_size: int,
        purpose: Purpose,
        reference: Reference | None = None,
        name: str = OWN_NAME,
        metrics: Sequence[type[ImageMetric]] = METRICS,
    ) -> None:
        if reference is not None:
            reference.check(extractor, image_size)
        check_metrics(metrics)
        self.extractor, self.purpose, self.reference = extractor, purpose, reference
        self.name = name if reference is None else reference.name
        self.count = 0
        self._content, self._has_warned = ImageContent(), False
        extractor.eval()
        provided = probe(extractor, image_size)
        self.metrics: dict[str, ImageMetric] = {}
        missing: dict[str, list[str]] = {}
        for metric in metrics:
            if purpose not in metric.purposes:
                continue
            if reason := self._obstacle(metric, provided):
                missing.setdefault(reason, []).append(metric.symbol)
                continue
            if reference is None or metric.reference_part is None:
                self.metrics[metric.symbol] = metric(extractor, image_size)
            else:
                part = getattr(reference, metric.reference_part)
                self.metrics[metric.symbol] = metric(extractor, image_size, reference=part)
        if missing:
            listed = "; ".join(f"{' and '.join(symbols)}, because {reason}" for reason, symbols in missing.items())
            warn_on_rank_zero(f"not measured: {listed}")
        if not self.metrics:
            raise ValueError("there is no metric to measure; use another extractor or reference")

    def _obstacle(self, metric: type[ImageMetric], provided: Features) -> str | None:
        """Why a metric cannot be measured; None if it can."""
        if getattr(provided, metric.part) is None:
            return f"the extractor {extractor_name(self.extractor)} gives no {PARTS[metric.part]}"
        part = metric.reference_part
        if self.reference is not None and part is not None and getattr(self.reference, part) is None:
            return f"the reference {self.name} has no {CONTENT[part]}"
        return None

    def to(self, device: str | torch.device) -> "Measurement":
        """Move all states to a device."""
        for metric in self.metrics.values():
            metric.to(device)
        return self

    def update(self, images: Tensor, index: Tensor | None = None, real: bool = False) -> Features:
        """Add images.

        Args:
            images: (B, 3, H, W) uint8, on the device of the measurement.
            index: (B,) int64, position of each image in its dataset; see
                :meth:`~llamagen.metrics.image_metric.RowMetric.keep`.
            real: whether these are the real images, with which the others are compared.

        Returns:
            The features of the images.

        Raises:
            ValueError: if the images are not uint8, or have another size.
        """
        next(iter(self.metrics.values())).check_images(images)
        features = extract(self.extractor, images)
        if not real:
            self._content.add(images)
        self.add(features, index, real)
        return features

    def add(self, features: Features, index: Tensor | None = None, real: bool = False) -> None:
        """Add images by their features; see :meth:`update`."""
        self.count += 0 if real else len(features.pool)
        for metric in self.metrics.values():
            metric.update(features, real=real, index=index)

    def compute(self) -> dict[str, Tensor]:
        """Results by name, float64 scalars on the CPU; all ranks must call it together.

        Warns once if all images are the same, or look like floats that were cast to bytes: a broken model generates
        such images.

        Raises:
            ValueError: if there are too few images for every metric.
            FloatingPointError: if a result is not finite.
        """
        if (fault := self._content.fault()) and not self._has_warned:
            self._has_warned = True
            warn_on_rank_zero(f"the results are not meaningful: {fault}")
        results: dict[str, Tensor] = {}
        errors: dict[str, ValueError] = {}
        for symbol, metric in self.metrics.items():
            try:
                values = metric.results()
            except ValueError as error:
                errors[symbol] = error
                continue
            for name in metric.result_names:
                full = name.full(self.purpose, extractor_name(self.extractor), self.name)
                value = values[name.symbol]
                if not value.isfinite():
                    raise FloatingPointError(
                        f"{full} is {value.item()} (precision float64); check the images and the extractor"
                    )
                results[full] = value.cpu()
            for caveat in metric.caveats():
                warn_on_rank_zero(caveat)
        if not results:
            raise next(iter(errors.values()))
        for symbol, reason in errors.items():
            warn_on_rank_zero(f"{symbol} is not measured: {reason}")
        return results

    def reset(self) -> None:
        """Forget all images."""
        self.count, self._content = 0, ImageContent()
        for metric in self.metrics.values():
            metric.reset()


def check_metrics(metrics: Iterable[type[ImageMetric]]) -> None:
    """Check that the symbols of metrics and of their results differ.

    Raises:
        ValueError: if two are the same.
    """
    symbols: set[str] = set()
    results: set[str] = set()
    for metric in metrics:
        names = {name.symbol for name in metric.result_names}
        if metric.symbol in symbols or names & results:
            raise ValueError(
                f"two metrics are named {metric.symbol} or report {', '.join(sorted(names))}; give "
                f"{metric.__name__} symbols of its own"
            )
        symbols.add(metric.symbol)
        results |= names


def result_names(
    metrics: Iterable[type[ImageMetric]], purpose: Purpose, extractor: str, reference: str = OWN_NAME
) -> list[str]:
    """Names of all results that metrics may report.

    Args:
        metrics: classes of the metrics.
        purpose: whether the images are generated or reconstructed.
        extractor: name of the extractor.
        reference: name of the reference.
    """
    return [
        name.full(purpose, extractor, reference)
        for metric in metrics
        if purpose in metric.purposes
        for name in metric.result_names
    ]
