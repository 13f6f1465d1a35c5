"""What FIDMonitor draws by itself: classes in turn, or captions. N images, B at a time, C positions, W wide."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from llamagen.sampling import ImageSampler
from llamagen.text import unpack_left


class Draws(Protocol):
    """A module that draws images of classes or captions."""

    device: torch.device
    sampler: ImageSampler | None
    sampling: Any
    sample_seed: int

    @property
    def output_size(self) -> int:
        """Of the images that it draws, in pixels."""

    @property
    def num_classes(self) -> int:
        """Of the labels that it knows."""

    @property
    def needs_captions(self) -> bool:
        """Whether it draws images of captions, and not of classes."""

    @property
    def caption_metadata(self) -> dict[str, Any]:
        """Of which encoder the captions' features are."""

    def build_sampler(self, batch_size: int) -> ImageSampler:
        """A sampler with memory for many calls."""

    def check_requests(self, classes: Sequence[int]) -> None:
        """A ``ValueError`` if images of these classes cannot be drawn."""

    def batch_condition(self, batch: dict[str, Any]) -> Any:
        """Features or texts of captions → ``features`` (B, C, W) padded on the left and ``lengths`` (B,)."""

    def sample(
        self, condition: Tensor, indices: Tensor, seed: int, caption_lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Conditions and sample numbers (B,) → images (B, H, W, 3) uint8 and codes."""


class ConditionBatch(NamedTuple):
    """What B images are asked with.

    Attributes:
        condition: (B,) classes or (B, C, W) features.
        lengths: (B,) of captions.
        labels: (B,) classes.
        captions: B texts, where they are known.
    """

    condition: Tensor
    lengths: Tensor | None = None
    labels: Tensor | None = None
    captions: list[str] | None = None


class RankShare(NamedTuple):
    """What a rank draws: as many images on each, as ranks wait for each other where they share the parameters.

    Attributes:
        numbers: (N,) int64 on the CPU, of its images. Those at the end that are not below the number of images
            in all are drawn for the sake of the other ranks.
        ask: numbers (B,) of some of them → what they are asked with.
    """

    numbers: Tensor
    ask: Callable[[Tensor], ConditionBatch]


def share_of_classes(count: int, num_classes: int, rank: int, ranks: int, device: torch.device) -> RankShare:
    """Of ``count`` images of all classes in turn a rank draws every ``ranks``-th."""

    def ask(index: Tensor) -> ConditionBatch:
        labels = (index % num_classes).to(device)
        return ConditionBatch(labels, labels=labels)

    return RankShare(rank + ranks * torch.arange(-(-count // ranks)), ask)


class ValidationCaptions:
    """The captions of the validation batches of a rank, kept for drawing: features without padding, on the CPU.

    Image i is one of the caption with number i in its set; where there are fewer captions than images, they come in
    turn. So image i is the same on any number of ranks, in any batches. Captions that cannot be used leave a gap.

    Args:
        count: images to draw. No more captions are kept.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._tokens: dict[int, Tensor] = {}
        self._texts: dict[int, str] = {}
        self._size, self._positions = 0, 0
        self._nothing = torch.empty(0)

    def keep(self, batch: dict[str, Any], module: Draws) -> None:
        """Keep what of a batch will be drawn; its captions are encoded, if the module has not done so before.

        Args:
            batch: has ``numbers`` (B,), of each sample in its set, and what the module makes conditions of.
            module: makes them.
        """
        numbers = batch["numbers"].tolist()
        self._size = max(self._size, *(number + 1 for number in numbers))
        rows = [row for row, number in enumerate(numbers) if number < self.count]
        if not rows and self._positions:
            return
        features, lengths, _ = module.batch_condition(batch)
        self._positions = features.shape[1]
        self._nothing = features.new_zeros(1, features.shape[2], device="cpu")
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
        """What this rank draws; all ranks must call it together."""
        known: list[Any] = [(sorted(self._tokens), self._size)]
        if ranks > 1:
            known *= ranks
            dist.all_gather_object(known, (sorted(self._tokens), self._size))
        size, taken, shares = max(size for _, size in known), set[int](), list[list[int]]()
        for numbers, _ in known:  # a rank that can use none of its own samples has one of another rank
            own = [number for number in numbers if number not in taken]
            taken.update(own)
            shares.append([n + first for first in range(0, self.count, size) for n in own if n + first < self.count])
        if size < self.count:
            rank_zero_warn(
                f"FIDMonitor draws {self.count} images of {len(taken)} captions, so several of each; set its count "
                "to the number of captions, or give more of them"
            )
        index = shares[rank] + [self.count] * (max(map(len, shares)) - len(shares[rank]))

        def ask(some: Tensor) -> ConditionBatch:
            numbers = (some % size).tolist()
            tokens = [self._tokens.get(number, self._nothing) for number in numbers]
            lengths = torch.tensor([len(each) for each in tokens], device=device)
            texts = [self._texts.get(number, "") for number in numbers] if self._texts else None
            return ConditionBatch(
                unpack_left(torch.cat(tokens).to(device), lengths, self._positions), lengths, captions=texts
            )

        return RankShare(torch.tensor(index, dtype=torch.int64), ask)
