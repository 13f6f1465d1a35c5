"""Ways to guess codes that no pass has computed yet, for ``benchmarks/windows.py``.

B images, N guesses, L codes of an image, V vocabulary size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from llamagen.sampling import code_counters, decoder, gumbel
from llamagen.sampling.windows import Array, WindowLoop, WindowPolicy

PRIOR = 20.0  # weight of the frequencies of the codes alone in the distributions of neighbours


class RecordedLoop(WindowLoop):
    """A loop that knows how many passes each image took.

    Attributes:
        finished: (B,) number of passes after which an image was complete.
    """

    loops: "list[RecordedLoop]"

    def run(self, window: int | WindowPolicy, report: object) -> None:
        """Sample all codes, and remember this loop."""
        self.finished: Array = np.zeros(self.state.batch, np.int64)
        self.loops.append(self)
        super().run(window, report)  # type: ignore[arg-type]

    def advance(self, span: int) -> Array:
        """One pass."""
        right = super().advance(span)
        self.finished[(self.counts == self.state.length) & (self.finished == 0)] = self.passes
        return right


class LeftLoop(RecordedLoop):
    """Guesses the code to the left."""

    def first_guesses(self, images: Array, steps: Array) -> Array:
        """Guess codes (N,)."""
        return np.asarray(self.codes[images, self._guessed[images] - 1])


class AboveLoop(RecordedLoop):
    """Guesses the code above, and in the first row the one to the left."""

    def first_guesses(self, images: Array, steps: Array) -> Array:
        """Guess codes (N,)."""
        side = round(self.state.length**0.5)
        for image, step in zip(images.tolist(), steps.tolist(), strict=True):  # in order: the one above may be a guess
            self.codes[image, step] = self.codes[image, step - side if step >= side else step - 1]
        return np.asarray(self.codes[images, steps])


class ZeroLoop(RecordedLoop):
    """Guesses code 0, which is hardly ever right."""

    def first_guesses(self, images: Array, steps: Array) -> Array:
        """Guess codes (N,)."""
        return np.zeros_like(steps)


class NeighbourLoop(RecordedLoop):
    """Draws from the distribution of a code given its left and its upper neighbour, with the noise of the code.

    The distribution, log p(left, c) + log p(above, c) − log p(c) up to constants, is counted in the training set.
    """

    tables: tuple[Tensor, Tensor, Tensor]

    @staticmethod
    def count(codes: Tensor, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
        """Logarithms of p(c), p(c | left) and p(c | above) of codes (N, h, w)."""
        single = torch.bincount(codes.flatten(), minlength=vocabulary).float() + 0.1
        single /= single.sum()

        def conditional(first: Tensor, second: Tensor) -> Tensor:
            pairs = torch.bincount(first.flatten() * vocabulary + second.flatten(), minlength=vocabulary**2)
            table = pairs.view(vocabulary, vocabulary).float() + PRIOR * single
            return (table / table.sum(1, keepdim=True)).log()

        left = conditional(codes[:, :, :-1], codes[:, :, 1:])
        return single.log(), left, conditional(codes[:, :-1], codes[:, 1:])

    def first_guesses(self, images: Array, steps: Array) -> Array:
        """Guess codes (N,)."""
        single, left, above = self.tables
        side, counters = round(self.state.length**0.5), code_counters(len(single))
        guesses = np.zeros_like(steps)
        for number, (image, step) in enumerate(zip(images.tolist(), steps.tolist(), strict=True)):
            logits = left[self.codes[image, step - 1]]
            if step >= side:
                logits = logits + above[self.codes[image, step - side]] - single
            seed, index = (torch.tensor([int(each[image])]) for each in (self._seeds, self._indices))
            noise = gumbel(seed, index, torch.tensor(step), counters)
            self.codes[image, step] = guesses[number] = int((logits + noise[0]).argmax())
        return guesses


WAYS: dict[str, type[RecordedLoop]] = {
    "last distribution": RecordedLoop,
    "neighbours": NeighbourLoop,
    "left": LeftLoop,
    "above": AboveLoop,
    "zero": ZeroLoop,
}


@contextmanager
def guessing(way: str) -> Iterator[list[RecordedLoop]]:
    """Let samplers guess in one of the :data:`WAYS`, and collect their loops."""
    loop = WAYS[way]
    loop.loops = []
    with mock.patch.object(decoder, "WindowLoop", loop):
        yield loop.loops
