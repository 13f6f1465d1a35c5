"""Codes by number and epoch: (L,) int64 and a condition. A views of an image, h × w grid, L = h · w.

Apart from their DataModule: worker processes import this file, and not Lightning.
"""

from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from datamodules.datasets.base import ExampleDataset
from datamodules.datasets.captions import caption_of
from datamodules.loading.order import NO_EPOCH, Address, draw
from datamodules.storage.bad_examples import BadExampleError, Skipped
from datamodules.storage.features import StoredFeatures
from datamodules.storage.index import NO_LABEL, ExampleIndex
from datamodules.storage.shards import META_FILE

if TYPE_CHECKING:
    from datamodules.loading.stream import StreamIndex

SHORT = 0x5407
"""Goes into the seed of the draws of short captions, so that they do not hang on the draws of views."""
SHARE_STEPS = 1 << 30


class CodeDataset(ExampleDataset):
    """Reads the codes of examples; in training a view is drawn at random for each example and epoch, and as many get the
    first sentence of their caption instead of all of it as are asked for.

    Args:
        examples: with an npy member (A, h, w) uint16.
        meta: description of the set: vocabulary, grid, number of classes, views.
        choose_view: within an epoch, draw one of the views by (seed, epoch, example); else take the first.
        seed: of the draws.
        labels: read classes, where there are any.
        captions: read captions; an example without one cannot be used.
        clean: clean them.
        features: read the captions' features, and not the captions.
        short_share: within an epoch, share of the examples with short captions, drawn by (seed, epoch, example).
        never_empty: see :class:`~datamodules.datasets.base.ExampleDataset`.
    """

    def __init__(
        self,
        examples: "ExampleIndex | StreamIndex",
        meta: dict[str, Any],
        choose_view: bool,
        seed: int,
        labels: bool = True,
        captions: bool = False,
        clean: bool = False,
        features: StoredFeatures | None = None,
        short_share: float = 0.0,
        never_empty: bool = False,
    ) -> None:
        super().__init__(examples, never_empty)
        self.choose_view, self.seed, self.labels, self.captions = choose_view, seed, labels, captions
        self.clean, self.features, self.short_share = clean, features, short_share
        self.vocabulary, self.num_classes = meta["vocabulary"], meta["num_classes"]
        self.shape = (meta["views"], *meta["grid"])
        buffer = BytesIO()
        np.save(buffer, np.empty(self.shape, np.uint16))
        self._size = len(buffer.getvalue())
        self._header = buffer.getvalue()[: self._size - 2 * int(np.prod(self.shape))]

    def read(self, number: int, epoch: int) -> dict[str, Any]:
        """Codes, class and key of an example.

        Raises:
            BadExampleError: if it has none, or not what ``meta.json`` says.
        """
        examples, _, skipped = self.read_many([(number, epoch)])
        if skipped:
            raise BadExampleError(skipped[0].reason, skipped[0].message)
        return examples[0]

    def read_many(self, addresses: list[Address]) -> tuple[list[dict[str, Any]], list[int], list[Skipped]]:
        """What of the addressed examples can be used, their numbers, and what cannot."""
        numbers = np.array([number for number, _ in addresses], np.int64)
        epoch = addresses[0][1]
        views = (
            draw(self.seed, epoch, numbers, self.shape[0]) if self.choose_view and epoch != NO_EPOCH else 0 * numbers
        )
        share = self.short_share if epoch != NO_EPOCH else 0.0
        short = draw(self.seed + SHORT, epoch, numbers, SHARE_STEPS) < share * SHARE_STEPS if share else numbers < 0
        examples, good, skipped = [], [], []
        for number, view, is_short in zip(numbers.tolist(), views.tolist(), short.tolist(), strict=True):
            try:
                examples.append(self._read_view(number, view) | self._read_caption(number, is_short))
                good.append(number)
            except BadExampleError as error:
                skipped.append(Skipped(number, self._key(number), error.reason, str(error)))
        return examples, good, skipped

    def _read_view(self, number: int, view: int) -> dict[str, Any]:
        index, place = self.examples.locate(number)
        member = index.member(place, "npy")
        data = index.files.read(*member) if member is not None and member.size == self._size else b""
        if len(data) == self._size and data.startswith(self._header):
            length = self.shape[1] * self.shape[2]
            codes = np.frombuffer(data, np.uint16, length, len(self._header) + 2 * length * view)
        else:  # written by another program, or broken
            codes = self._parse(index, place)[view].flatten()
        if (highest := codes.max()) >= self.vocabulary:
            raise self._broken(index, place, f"code {highest}, outside of the vocabulary of {self.vocabulary}")
        parts = {"codes": codes, "keys": index.keys[place]}
        if self.labels and (label := int(index.labels[place])) != NO_LABEL:
            if label >= self.num_classes:
                raise self._broken(
                    index, place, f"class {label}, outside of the {self.num_classes} classes", "wrong label"
                )
            parts["condition"] = label
        return parts

    def _read_caption(self, number: int, short: bool) -> dict[str, Any]:
        if self.features is None and not self.captions:
            return {}
        index, place = self.examples.locate(number)
        if self.features is not None:
            return {"caption_features": self.features.read(self.features.example_of(index, place), short)}
        return {"captions": caption_of(index[place], self.clean, short)}

    def _parse(self, index: ExampleIndex, place: int) -> np.ndarray:
        file = BytesIO(index[place].read("npy"))
        try:
            version = np.lib.format.read_magic(file)
            read_header = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            shape, fortran_order, dtype = read_header(file)
            # Nothing is made of the size that a header claims: it is compared first.
            if shape == self.shape and dtype == np.uint16:
                return np.frombuffer(file.read(), dtype).reshape(shape, order="F" if fortran_order else "C")
        except Exception as error:  # of an npy file that may hold anything
            raise self._broken(index, place, f"an npy file that cannot be read ({error})") from error
        raise self._broken(index, place, f"{dtype} codes of shape {shape}, not uint16 of {self.shape}")

    @staticmethod
    def _broken(index: ExampleIndex, place: int, what: str, reason: str = "broken codes") -> BadExampleError:
        example = index[place]
        again = f"extract the codes again, or correct {META_FILE}"
        return BadExampleError(reason, f"example {example.key} of {example.source} holds {what}; {again}")

    def join(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """``codes`` (B, L) int64, ``keys``, and as far as there are any ``condition`` (B,) int64, and ``captions`` or
        their features, see :meth:`~datamodules.storage.features.StoredFeatures.join`.
        """
        batch: dict[str, Any] = {name: [example[name] for example in examples] for name in examples[0]}
        batch["codes"] = torch.from_numpy(np.stack(batch["codes"]).astype(np.int64))
        if "condition" in batch:
            batch["condition"] = torch.tensor(batch["condition"])
        return batch if self.features is None else batch | self.features.join(batch["caption_features"])
