"""Sampling for FIDMonitor, by class or by caption. N images, B batch, C caption positions, W feature width."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from callbacks.protocols import SamplesImages
from llamagen.text import unpack_left


class ConditionBatch(NamedTuple):
    """Conditions of B images.

    Attributes:
        condition: (B,) int64 classes or (B, C, W) features, padded on the left.
        lengths: (B,) int64, number of tokens of each caption.
        labels: (B,) int64 classes.
        captions: B texts, if the data has them.
    """

    condition: Tensor
    lengths: Tensor | None = None
    labels: Tensor | None = None
    captions: list[str] | None = None


class RankShare(NamedTuple):
    """Images that one rank samples. All ranks have the same number: ranks of a sharded model wait for each other.

    Attributes:
        numbers: (N,) int64 on the CPU, numbers of the rank's images. Numbers at the end that are not below the total
            count are padding: these images are sampled only because the other ranks sample, too.
        conditions: maps numbers (B,) to the conditions of these images.
    """

    numbers: Tensor
    conditions: Callable[[Tensor], ConditionBatch]


def share_of_classes(count: int, num_classes: int, rank: int, ranks: int, device: torch.device) -> RankShare:
    """The rank's share of ``count`` images, whose classes follow in cycles: every ``ranks``-th image."""

    def conditions(numbers: Tensor) -> ConditionBatch:
        labels = (numbers % num_classes).to(device)
        return ConditionBatch(labels, labels=labels)

    return RankShare(rank + ranks * torch.arange(-(-count // ranks)), conditions)


class ValidationCaptions:
    """The captions of a rank's validation batches, kept for sampling: features without padding, on the CPU.

    Image i is sampled from the caption with number i in its dataset; if there are fewer captions than images, they are
    repeated in order. So image i is the same on any number of ranks and in any batch. Images of captions that cannot be
    read are left out.

    Args:
        count: number of images. No more captions are kept.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._tokens: dict[int, Tensor] = {}
        self._texts: dict[int, str] = {}
        self._size, self._positions = 0, 0
        self._no_tokens = torch.empty(0)

    def keep(self, batch: dict[str, Any], module: SamplesImages) -> None:
        """Keep the captions of a batch that will be sampled; they are encoded unless the batch has their features.

        Args:
            batch: has ``numbers`` (B,), the number of each example in its dataset, and the captions or features.
            module: computes the condition.
        """
        numbers = batch["numbers"].tolist()
        self._size = max(self._size, *(number + 1 for number in numbers))
        rows = [row for row, number in enumerate(numbers) if number < self.count]
        if not rows and self._positions:
            return
        features, lengths, _ = module.batch_condition(batch)
        self._positions = features.shape[1]
        self._no_tokens = features.new_zeros(1, features.shape[2], device="cpu")
        sizes = [self._positions] * len(numbers) if lengths is None else lengths.tolist()
        is_token = torch.arange(self._positions) >= self._positions - torch.tensor(sizes).unsqueeze(1)
        chosen = torch.zeros(len(numbers), 1, dtype=torch.bool)
        chosen[rows] = True
        packed = features[(is_token & chosen).to(features.device)].cpu()
        for row, tokens in zip(rows, packed.split([sizes[row] for row in rows]), strict=True):
            self._tokens[numbers[row]] = tokens
            if "captions" in batch:
                self._texts[numbers[row]] = batch["captions"][row]

    def share(self, rank: int, ranks: int, device: torch.device) -> RankShare:
        """The rank's share of the images. A collective call: all ranks must make it."""
        kept: list[Any] = [(sorted(self._tokens), self._size)]
        if ranks > 1:
            kept *= ranks
            dist.all_gather_object(kept, (sorted(self._tokens), self._size))
        size, taken, shares = max(size for _, size in kept), set[int](), list[list[int]]()
        for numbers, _ in kept:  # a rank whose own examples are all unreadable has a copy of another rank's example
            own = [number for number in numbers if number not in taken]
            taken.update(own)
            shares.append([n + first for first in range(0, self.count, size) for n in own if n + first < self.count])
        if size < self.count:
            rank_zero_warn(
                f"FIDMonitor samples {self.count} images from only {len(taken)} captions, which are repeated; set its "
                "count to the number of captions, or use more validation data"
            )
        index = shares[rank] + [self.count] * (max(map(len, shares)) - len(shares[rank]))

        def conditions(images: Tensor) -> ConditionBatch:
            numbers = (images % size).tolist()
            tokens = [self._tokens.get(number, self._no_tokens) for number in numbers]
            lengths = torch.tensor([len(each) for each in tokens], device=device)
            texts = [self._texts.get(number, "") for number in numbers] if self._texts else None
            features = unpack_left(torch.cat(tokens).to(device), lengths, self._positions)
            return ConditionBatch(features, lengths, captions=texts)

        return RankShare(torch.tensor(index, dtype=torch.int64), conditions)
