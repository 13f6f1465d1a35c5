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
from typing import Protocol

import torch
from torch import Tensor

from llamagen.sampling.draws import Draws
from llamagen.sampling.inputs import SamplingRequest


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

    def move_row(self, source: int, target: int) -> None:
        """Row ``source`` of a pass becomes row ``target``."""

    def read_windows(self, tokens: Tensor, rows: list[int], starts: Tensor) -> Tensor:
        """(R, T) → logits (R, T, V)."""

    def draw(self, logits: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Draw N codes."""


class PassRows:
    """Rows of the cache that passes compute. Rows of finished images, and of branches that no later code needs, leave.

    Rows 0 … B − 1 of the cache are the conditional ones, the next B the unconditional ones.

    Attributes:
        rows: row of the cache of each row of a pass.
        row_images: (R,) image of each row of a pass.
        images: (A,) images that are not finished.
        conditional: (A,) row of a pass with the conditional branch of each image.
        unconditional: (A,) row with the unconditional branch; equal to ``conditional`` if the image has none.
    """

    def __init__(self, state: WindowState) -> None:
        self._state, self._batch = state, state.batch
        self.rows = list(range(2 * state.batch if state.guided else state.batch))
        self._index()

    def keep(self, unfinished: list[bool], guided: list[bool]) -> None:
        """Remove the rows that images do not need any more.

        Args:
            unfinished: for each image of the batch, whether it needs its conditional row.
            guided: for each image of the batch, whether it needs its unconditional row.
        """
        needed = unfinished + guided
        if all(needed[row] for row in self.rows):
            return
        for place in reversed(range(len(self.rows))):
            if needed[self.rows[place]]:
                continue
            last = self.rows.pop()
            if place < len(self.rows):
                self.rows[place] = last
                self._state.move_row(len(self.rows), place)
        self._index()

    def after_tokens(self, span: int) -> tuple[Tensor, Tensor]:
        """Rows of flat logits (R · T, V) after each token, of both branches, each (A, T)."""
        offsets = torch.arange(span, device=self.conditional.device)
        return self.conditional[:, None] * span + offsets, self.unconditional[:, None] * span + offsets

    def _index(self) -> None:
        device = self._state.codes.device
        place = {row: number for number, row in enumerate(self.rows)}
        images = [row for row in self.rows if row < self._batch]
        self.images = torch.tensor(images, dtype=torch.int64, device=device)
        self.row_images = torch.tensor([row % self._batch for row in self.rows], dtype=torch.int64, device=device)
        conditional = [place[image] for image in images]
        unconditional = [place.get(image + self._batch, place[image]) for image in images]
        self.conditional = torch.tensor(conditional, dtype=torch.int64, device=device)
        self.unconditional = torch.tensor(unconditional, dtype=torch.int64, device=device)


class WindowLoop:
    """Samples the codes of a batch in windows.

    Args:
        state: state of the call, after the condition and the kept codes were read.
        first: number of codes that are final, at least 1. ``state.codes`` has them.
        logits: (R, V), the logits of the first code; None if codes were kept.

    Attributes:
        counts: (B,) number of final codes of each image. Guesses follow them in ``state.codes``.
        passes: number of passes so far.
    """

    def __init__(self, state: WindowState, first: int, logits: Tensor | None) -> None:
        self.state, self.device, batch = state, state.codes.device, state.batch
        config, length = state.request.config, state.length
        self.counts = torch.full((batch,), first, dtype=torch.int64, device=self.device)
        self.passes = 0
        self._guessed = self.counts.clone()  # number of codes of each image that are final or guessed
        self._scales = torch.tensor(config.guidance_scales(length), dtype=torch.float32, device=self.device)
        self._guided_steps = config.guided_steps(length) if state.guided else 0
        self._rows = PassRows(state)
        self._logits = logits  # of the last pass, and the rows after the last token of each image
        self._last = self._rows.conditional.clone(), self._rows.unconditional.clone()

    def run(self, window: int, report: Callable[[int], None]) -> None:
        """Sample all codes.

        Args:
            window: number of tokens of an image in a pass.
            report: called with the number of codes that all images have, before each pass and at the end.
        """
        state, length = self.state, self.state.length
        state.start_windows()
        while True:
            counts = self.counts.tolist()
            report(min(counts))
            if min(counts) == length:
                return
            self._rows.keep([count < length for count in counts], [count < self._guided_steps for count in counts])
            self.advance(min(window, length - 1))

    def advance(self, span: int) -> None:
        """One pass over ``span`` tokens of each image that is not finished."""
        state, rows, images = self.state, self._rows, self._rows.images
        # 1. Read the last final code and guesses after it. At the end of an image the window moves to the left, over
        # codes that were read before.
        starts = (self.counts - 1).clamp(max=state.length - 1 - span)
        offsets = torch.arange(span, device=self.device)
        places = starts[:, None] + offsets  # (B, T)
        self._guess(starts + span)
        tokens, cached = state.codes.gather(1, places), state.condition_length + starts
        logits = state.read_windows(tokens[rows.row_images], rows.rows, cached[rows.row_images])
        # 2. Draw the codes after them.
        steps = places[images] + 1
        conditional, unconditional = rows.after_tokens(span)
        self._logits = logits.flatten(0, 1)
        found, broken = self._draw(conditional, unconditional, images[:, None].expand_as(steps), steps)
        # 3. Up to the first one that differs from its guess they are final.
        old, new = state.codes[images].gather(1, steps), steps >= self.counts[images, None]
        right = ((found == old) | ~new)[:, :-1].cumprod(1).sum(1)  # (A,)
        state.codes[images[:, None], steps] = torch.where(new, found, old)
        state.broken[images] |= (broken & new & (offsets <= right[:, None])).any(1)
        self.counts[images] = steps[:, 0] + right + 1
        self._guessed[images] = steps[:, -1] + 1
        for last, rows_after in zip(self._last, (conditional, unconditional), strict=True):
            last[images] = rows_after[:, -1]
        self.passes += 1

    def _guess(self, ends: Tensor) -> None:
        """Guess the codes up to, not including, ``ends`` (B,) that have no guess yet."""
        missing = ends[self._rows.images] - self._guessed[self._rows.images]
        longest = int(missing.max())
        if longest <= 0:
            return
        images = self._rows.images[:, None].expand(-1, longest)
        steps = self._guessed[images] + torch.arange(longest, device=self.device)
        wanted = steps < ends[images]
        images, steps = images[wanted], steps[wanted]
        if self._logits is None:
            guesses = self.state.codes[images, self._guessed[images] - 1]
        else:
            guesses, _ = self._draw(self._last[0][images], self._last[1][images], images, steps)
        self.state.codes[images, steps] = guesses
        self._guessed[self._rows.images] = ends[self._rows.images]

    def _draw(self, conditional: Tensor, unconditional: Tensor, images: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Codes ``steps`` of ``images`` from rows of the logits of the last pass; all arguments have the same shape."""
        assert self._logits is not None
        # As without windows, the unconditional branch is neither used nor checked after the last guided code.
        unconditional = torch.where(steps < self._guided_steps, unconditional, conditional)
        request, flat = self.state.request, images.flatten()
        draws = Draws(
            conditional.flatten(),
            unconditional.flatten(),
            self._scales[steps.flatten()],
            request.seeds[flat],
            request.indices[flat],
            steps.flatten(),
        )
        codes, broken = self.state.draw(self._logits, draws)
        return codes.view_as(steps), broken.view_as(steps)
