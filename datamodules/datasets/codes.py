"""Dataset of codes: (L,) int64 and a condition. A: views of an image, h × w: grid, L = h · w.

Separate from the DataModule, so that worker processes import it without Lightning.
"""

from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from datamodules.datasets.base import ExampleDataset
from datamodules.datasets.captions import caption_of
from datamodules.loading.order import NO_EPOCH, Address, random_integers
from datamodules.storage.bad_examples import BadExampleError, Skipped
from datamodules.storage.code_dtype import code_dtype
from datamodules.storage.features import StoredFeatures
from datamodules.storage.index import NO_LABEL, ExampleIndex
from datamodules.storage.shards import META_FILE
from llamagen.text.cleaning import Cleaning

if TYPE_CHECKING:
    from datamodules.loading.stream import StreamIndex

SHORT_CAPTION_SEED = 0x5407
"""Offset of the seed that chooses short captions, to make this choice independent of the choice of views."""
SHARE_STEPS = 1 << 30
"""Resolution of the share of short captions."""


class CodeDataset(ExampleDataset):
    """Dataset of codes. In training, views and short captions are chosen at random for each example and epoch.

    Args:
        examples: examples with an npy member (A, h, w) in the dtype of
            :func:`~datamodules.storage.code_dtype.code_dtype`.
        meta: content of ``meta.json``: vocabulary, grid, number of classes, views.
        choose_view: in training, choose a random view by (seed, epoch, example); otherwise use the first.
        seed: seed of the random choices.
        labels: read classes, if there are any.
        captions: read captions; an example without one is bad.
        cleaning: cleaning of the captions.
        features: read caption features instead of captions.
        short_share: in training, share of the examples with short captions, chosen by (seed, epoch, example).
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
        cleaning: Cleaning | None = None,
        features: StoredFeatures | None = None,
        short_share: float = 0.0,
        never_empty: bool = False,
    ) -> None:
        super().__init__(examples, never_empty)
        self.choose_view, self.seed, self.labels, self.captions = choose_view, seed, labels, captions
        self.cleaning, self.features, self.short_share = cleaning, features, short_share
        self.vocabulary, self.num_classes = meta["vocabulary"], meta["num_classes"]
        self.shape = (meta["views"], *meta["grid"])
        self.dtype = code_dtype(self.vocabulary)
        codes, buffer = np.empty(self.shape, self.dtype), BytesIO()
        np.save(buffer, codes)
        self._size = len(buffer.getvalue())
        self._header = buffer.getvalue()[: self._size - codes.nbytes]

    def read(self, number: int, epoch: int) -> dict[str, Any]:
        """Read codes, class and key of an example.

        Raises:
            BadExampleError: if it has no codes, or they do not match ``meta.json``.
        """
        examples, _, skipped = self.read_many([(number, epoch)])
        if skipped:
            raise BadExampleError(skipped[0].reason, skipped[0].message)
        return examples[0]

    def read_many(self, addresses: list[Address]) -> tuple[list[dict[str, Any]], list[int], list[Skipped]]:
        """Read examples. Returns the good ones, their numbers, and the bad ones."""
        numbers = np.array([number for number, _ in addresses], np.int64)
        epoch = addresses[0][1]
        views, short = np.zeros_like(numbers), np.zeros(len(numbers), bool)
        if epoch != NO_EPOCH and self.choose_view:
            views = random_integers(self.seed, epoch, numbers, self.shape[0])
        if epoch != NO_EPOCH and self.short_share:
            steps = random_integers(self.seed + SHORT_CAPTION_SEED, epoch, numbers, SHARE_STEPS)
            short = steps < self.short_share * SHARE_STEPS
        examples, good, skipped = [], [], []
        for number, view, is_short in zip(numbers.tolist(), views.tolist(), short.tolist(), strict=True):
            try:
                examples.append(self._read_view(number, view) | self._read_caption(number, is_short))
                good.append(number)
            except BadExampleError as error:
                skipped.append(Skipped(number, self._key(number), error.reason, str(error)))
        return examples, good, skipped

    def _read_view(self, number: int, view: int) -> dict[str, Any]:
        index, position = self.examples.locate(number)
        member = index.member(position, "npy")
        data = index.files.read(*member) if member is not None and member.size == self._size else b""
        if len(data) == self._size and data.startswith(self._header):
            length = self.shape[1] * self.shape[2]
            codes = np.frombuffer(data, self.dtype, length, len(self._header) + self.dtype.itemsize * length * view)
        else:  # written by another program, or broken
            codes = self._parse(index, position)[view].flatten()
        if (highest := codes.max()) >= self.vocabulary:
            raise self._broken(index, position, f"code {highest}, outside of the vocabulary of {self.vocabulary}")
        parts = {"codes": codes, "keys": index.keys[position]}
        if self.labels and (label := int(index.labels[position])) != NO_LABEL:
            if label >= self.num_classes:
                problem = f"class {label}, outside of the {self.num_classes} classes"
                raise self._broken(index, position, problem, "wrong label")
            parts["condition"] = label
        return parts

    def _read_caption(self, number: int, short: bool) -> dict[str, Any]:
        if self.features is None and not self.captions:
            return {}
        index, position = self.examples.locate(number)
        if self.features is not None:
            example = self.features.example_with_features(index, position)
            return {"caption_features": self.features.read(example, short)}
        return {"captions": caption_of(index[position], self.cleaning, short)}

    def _parse(self, index: ExampleIndex, position: int) -> np.ndarray:
        file = BytesIO(index[position].read("npy"))
        try:
            version = np.lib.format.read_magic(file)
            read_header = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            shape, fortran_order, dtype = read_header(file)
            # footgun: a header may claim any size. It is compared with the expected one before memory is allocated.
            if shape == self.shape and dtype == self.dtype:
                return np.frombuffer(file.read(), dtype).reshape(shape, order="F" if fortran_order else "C")
        except Exception as error:  # an npy file may hold anything
            raise self._broken(index, position, f"an npy file that cannot be read ({error})") from error
        expected = f"{self.dtype} of {self.shape} for the vocabulary of {self.vocabulary}"
        raise self._broken(index, position, f"{dtype} codes of shape {shape}, not {expected}")

    @staticmethod
    def _broken(index: ExampleIndex, position: int, problem: str, reason: str = "broken codes") -> BadExampleError:
        example = index[position]
        remedy = f"extract the codes again, or correct {META_FILE}"
        return BadExampleError(reason, f"example {example.key} of {example.source} holds {problem}; {remedy}")

    def collate(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """``codes`` (B, L) int64, ``keys``, and, if present, ``condition`` (B,) int64 and ``captions`` or
        their features, see :meth:`~datamodules.storage.features.StoredFeatures.collate`.
        """
        batch: dict[str, Any] = {name: [example[name] for example in examples] for name in examples[0]}
        batch["codes"] = torch.from_numpy(np.stack(batch["codes"]).astype(np.int64))
        if "condition" in batch:
            batch["condition"] = torch.tensor(batch["condition"])
        return batch if self.features is None else batch | self.features.collate(batch["caption_features"])
