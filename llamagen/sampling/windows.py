"""Several codes of an image in one pass, for exactly the image that one code at a time gives.

A code is the largest sum of logit and noise, and the noise depends on (seed, index, step) only. So a code is a function
of the codes before it. A pass reads the last code and guesses of the codes after it, and draws all of them again with
their own noise. A draw is final if all codes that were read before it are: all up to and including the first that
differs from its guess. The others are the guesses of the next pass. This is Jacobi iteration, whose fixed point is the
image; keeping the noise from pass to pass is the Gumbel coupling of MC-SJD (arXiv 2510.24211).

Shapes: B images, A images that are not finished, R rows of a pass, T tokens of a row in a pass (the window), L codes of
an image, V vocabulary size.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llamagen.sampling.draws import Draws
from llamagen.sampling.inputs import SamplingRequest

Array = NDArray[Any]


class WindowPolicy(Protocol):
    """The choice of the window of each pass: see :class:`~llamagen.sampling.window_choice.WindowChoice`."""

    def choose(self, rows: int) -> int:
        """Window of the next pass over this many rows."""

    def observe(self, window: int, right: list[int]) -> None:
        """Learn how many guesses of each image were right."""


class WindowState(Protocol):
    """What the loop needs of a decode state: see :class:`~llamagen.sampling.decoder.DecodeState`."""

    request: SamplingRequest
    batch: int
    length: int
    condition_length: int
    guided: bool
    codes: Tensor
    broken: Tensor

    def start_windows(self) -> None:
        """Prepare the cache."""

    def advance_from(self, step: int, rows: int) -> Tensor:
        """Sample code ``step`` of all images from a pass over the first ``rows`` rows; return its logits (R, V)."""

    def move_row(self, source: int, target: int) -> None:
        """Row ``source`` of a pass becomes row ``target``."""

    def read_windows(self, tokens: Array, rows: list[int], starts: Array) -> Tensor:
        """(R, T) → logits (R, T, V)."""

    def draw(self, logits: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Draw N codes."""


class Plan(NamedTuple):
    """Indices of a pass with a window of T.

    Attributes:
        offsets: (T,) 0 … T − 1.
        images: (A, T) image of each draw.
        conditional: (A, T) row of the logits, flattened to (R · T, V), of each draw.
        unconditional: (A, T) the same for the unconditional branch.
    """

    offsets: Array
    images: Array
    conditional: Array
    unconditional: Array


class PassRows:
    """Rows of the cache that passes compute. Rows of finished images, and of branches that no later code needs, leave.

    Rows 0 … B − 1 of the cache are the conditional ones, the next B the unconditional ones.

    Attributes:
        rows: row of the cache of each row of a pass.
        row_images: (R,) image of each row of a pass.
        order: (R,) number of that image among ``images``.
        images: (A,) images that are not finished.
        conditional: (A,) row of a pass with the conditional branch of each image.
        unconditional: (A,) row with the unconditional branch; equal to ``conditional`` if the image has none.
    """

    def __init__(self, state: WindowState) -> None:
        self._state, self._batch = state, state.batch
        self.rows = list(range(2 * state.batch if state.guided else state.batch))
        self._index()

    def keep(self, conditional: Array, unconditional: Array) -> None:
        """Remove the rows that images do not need any more.

        Args:
            conditional: (B,) bool, whether an image needs its conditional row.
            unconditional: (B,) bool, whether an image needs its unconditional row.
        """
        if int(conditional.sum() + unconditional.sum()) == len(self.rows):
            return
        needed = [*conditional.tolist(), *unconditional.tolist()]
        for place in reversed(range(len(self.rows))):
            if needed[self.rows[place]]:
                continue
            last = self.rows.pop()
            if place < len(self.rows):
                self.rows[place] = last
                self._state.move_row(len(self.rows), place)
        self._index()

    def plan(self, span: int) -> "Plan":
        """Cached indices for passes with these rows and this window."""
        if span not in self._plans:
            offsets = np.arange(span)
            images = np.repeat(self.images[:, None], span, axis=1)
            conditional, unconditional = (
                each[:, None] * span + offsets for each in (self.conditional, self.unconditional)
            )
            self._plans[span] = Plan(offsets, images, conditional, unconditional)
        return self._plans[span]

    def _index(self) -> None:
        self._plans = dict[int, Plan]()
        place = {row: number for number, row in enumerate(self.rows)}
        images = [row for row in self.rows if row < self._batch]
        self.images = np.array(images, np.int64)
        self.row_images = np.array([row % self._batch for row in self.rows], np.int64)
        number = {image: number for number, image in enumerate(images)}
        self.order = np.array([number[image] for image in self.row_images.tolist()], np.int64)
        self.conditional = np.array([place[image] for image in images], np.int64)
        unconditional = [place.get(image + self._batch, place[image]) for image in images]
        self.unconditional = np.array(unconditional, np.int64)


class WindowLoop:
    """Samples the codes of a batch in windows. Counts and codes are kept on the host, which waits for each pass.

    Args:
        state: state of the call, after the condition and the kept codes were read.
        first: number of codes that are final, at least 1. ``state.codes`` has them.
        logits: (R, V), the logits of the first code; None if codes were kept.

    Attributes:
        counts: (B,) number of final codes of each image.
        codes: (B, L) final codes, then guesses.
        passes: number of passes so far.
    """

    def __init__(self, state: WindowState, first: int, logits: Tensor | None) -> None:
        self.state, batch = state, state.batch
        config, length = state.request.config, state.length
        self.codes: Array = state.codes.cpu().numpy()  # on a CPU the memory of state.codes itself
        self.counts: Array = np.full(batch, first, np.int64)
        self.passes = 0
        self._guessed: Array = self.counts.copy()  # number of codes of each image that are final or guessed
        self._broken: Array = np.zeros(batch, np.bool_)
        self._seeds, self._indices = state.request.seeds.cpu().numpy(), state.request.indices.cpu().numpy()
        self._scales = np.array(config.guidance_scales(length), np.float32)
        self._guided_steps = config.guided_steps(length) if state.guided else 0
        self._rows = PassRows(state)
        self._logits = logits  # of the last pass, and the rows after the last token of each image
        self._last = self._rows.conditional.copy(), self._rows.unconditional.copy()

    def run(self, window: int | WindowPolicy, report: Callable[[int], None]) -> None:
        """Sample all codes.

        Args:
            window: number of tokens of an image in a pass, or the choice of it.
            report: called with the number of codes that all images have, before each pass and at the end.
        """
        state, length = self.state, self.state.length
        state.start_windows()
        while True:
            fewest = int(self.counts.min())
            self._publish()
            report(fewest)
            if fewest == length:
                return
            self._rows.keep(self.counts < length, self.counts < self._guided_steps)
            wanted = window if isinstance(window, int) else window.choose(len(self._rows.rows))
            span = min(wanted, length - fewest)
            whole = self.counts[self._rows.images] + span <= length  # windows that are not moved to the left
            right = self.advance(span)
            if not isinstance(window, int):
                window.observe(span, right[whole].tolist() if span > 1 else [])

    def advance(self, span: int) -> Array:
        """One pass over ``span`` tokens of each image that is not finished.

        Returns:
            (A,) number of guesses that were right before the first wrong one, of images whose window was not moved.
        """
        if span == 1 and self._is_aligned():
            return self._advance_all()
        state, rows, plan, images = self.state, self._rows, self._rows.plan(span), self._rows.images
        # 1. Read the last final code and guesses after it. At the end of an image the window moves to the left, over
        # codes that were read before.
        starts = np.minimum(self.counts - 1, state.length - 1 - span)
        self._guess(starts + span)
        places = starts[images, None] + plan.offsets  # (A, T)
        cached = state.condition_length + starts[rows.row_images]
        logits = state.read_windows(self.codes[plan.images, places][rows.order], rows.rows, cached)
        # 2. Draw the codes after them.
        self._logits, steps = logits.flatten(0, 1), places + 1
        found, broken = self._draw(plan.conditional, plan.unconditional, plan.images, steps)
        # 3. Up to the first one that differs from its guess they are final.
        old, new = self.codes[plan.images, steps], steps >= self.counts[images, None]
        same = (found == old) | ~new
        same[:, -1] = False
        right = same.argmin(1)  # (A,)
        self.codes[plan.images, steps] = np.where(new, found, old)
        if broken.any():
            self._broken[images] |= (broken & new & (plan.offsets <= right[:, None])).any(1)
        self.counts[images] = steps[:, 0] + right + 1
        self._guessed[images] = np.maximum(self._guessed[images], steps[:, -1] + 1)
        for last, after in zip(self._last, (plan.conditional, plan.unconditional), strict=True):
            last[images] = after[:, -1]
        self.passes += 1
        return np.asarray(right)

    def _is_aligned(self) -> bool:
        """Whether all images of the batch have equally many codes, so that no row needs a place of its own."""
        return len(self._rows.images) == self.state.batch and int(self.counts.min()) == int(self.counts.max())

    def _advance_all(self) -> Array:
        """One code of each image by the pass that sampling without windows uses, which is faster."""
        step = int(self.counts[0])
        self._logits = self.state.advance_from(step, len(self._rows.rows))
        if self.state.codes.device.type != "cpu":
            self.codes[:, step] = self.state.codes[:, step].cpu().numpy()
        self.counts += 1
        self._guessed = np.maximum(self._guessed, self.counts)
        self._last = self._rows.conditional.copy(), self._rows.unconditional.copy()
        self.passes += 1
        return np.zeros(self.state.batch, np.int64)

    def _guess(self, ends: Array) -> None:
        """Guess the codes up to, not including, ``ends`` (B,) that have no guess yet."""
        active = self._rows.images
        missing = ends[active] - self._guessed[active]
        if missing.max() <= 0:
            return
        images = np.repeat(active, np.maximum(missing, 0))
        steps = np.concatenate([np.arange(self._guessed[image], ends[image]) for image in active])
        self.codes[images, steps] = self.first_guesses(images, steps)
        self._guessed[active] = np.maximum(self._guessed[active], ends[active])

    def first_guesses(self, images: Array, steps: Array) -> Array:
        """Guesses of codes that no pass has computed yet.

        They are drawn from the distribution of the last code that was computed, with their own noise. Without one, the
        code before them is repeated. See docs/sampling.md for what other guesses give.

        Args:
            images: (N,) image of each guess.
            steps: (N,) index of its code; those of an image are consecutive.
        """
        if self._logits is None:
            return np.asarray(self.codes[images, self._guessed[images] - 1])
        guesses, _ = self._draw(self._last[0][images], self._last[1][images], images, steps)
        return guesses

    def _draw(self, conditional: Array, unconditional: Array, images: Array, steps: Array) -> tuple[Array, Array]:
        """Codes ``steps`` of ``images`` from rows of the logits of the last pass; all arguments have the same shape."""
        assert self._logits is not None
        # As without windows, the unconditional branch is neither used nor checked after the last guided code.
        unconditional = np.where(steps < self._guided_steps, unconditional, conditional)
        flat, device = images.reshape(-1), self._logits.device
        fields = (
            conditional.reshape(-1),
            unconditional.reshape(-1),
            self._scales[steps].reshape(-1),
            self._seeds[flat],
            self._indices[flat],
            steps.reshape(-1),
        )
        draws = Draws(*(torch.from_numpy(field) for field in fields))
        if device.type != "cpu":
            draws = Draws(*(field.to(device) for field in draws))
        codes, broken = self.state.draw(self._logits, draws)
        return codes.cpu().numpy().reshape(steps.shape), broken.cpu().numpy().reshape(steps.shape)

    def _publish(self) -> None:
        """Copy codes and flags to the state."""
        if self.state.codes.device.type != "cpu":
            self.state.codes.copy_(torch.from_numpy(self.codes))
        if self._broken.any():
            self.state.broken |= torch.from_numpy(self._broken).to(self.state.broken.device)
