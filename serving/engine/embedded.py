"""The engine that is always there: batches through our own compiled sampler."""

import logging
import time
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor

from llamagen import LlamaGen
from llamagen.pretrained.inpainting import known_codes
from llamagen.pretrained.loading import load_parts
from llamagen.pretrained.source import find_source
from llamagen.sampling import Images
from llamagen.sampling.config import Window
from serving.engine.engine import ImageReport, Inbox, Report, RowsReport, Work
from serving.engine.facts import ModelFacts
from serving.engine.failures import blame, report_failure
from serving.engine.previews import GrowingImages, MaskedImages, PreviewBudget
from serving.engine.spec import WorkerSpec
from serving.engine.uploads import read_image

LOGGER = logging.getLogger("serving")


class EmbeddedEngine:
    """Generates batches of images of one group with a loaded model.

    Args:
        model: the model. All calls must come from one thread.
        clock: seconds, for the share of time of previews.
        window: see ``SamplingConfig.window``. A choice of the server, which requests do not know: it changes no image.

    Attributes:
        decodes_later: whether a batch is decoded while the next one is sampled, as a GPU can. A CPU cannot, so there
            finished images are reported at once.
    """

    is_continuous = False

    def __init__(self, model: LlamaGen, clock: Callable[[], float] = time.monotonic, window: Window = 1) -> None:
        self.model, self.facts, self.capacity = model, ModelFacts.from_model(model), model.batch_size
        self._clock, self._window, self.decodes_later = clock, window, model.device.type == "cuda"

    def prepare(self) -> None:
        """Compile and allocate memory, in the thread that will call :meth:`run`: the first request does not wait."""
        gpt = self.model.gpt
        if gpt is not None:
            self.model.prepare(window=self._window)
            codes = torch.zeros(self.capacity, gpt.config.block_size, dtype=torch.int64, device=self.model.device)
            self.model.preview(codes, 1)

    def run(self, inbox: Inbox, report: Callable[[Report], None]) -> None:
        """Work until the inbox is closed."""
        batch = inbox.take(block=True)
        while batch:
            decoding = self._generate(batch, inbox, report)
            # A GPU decodes the pixels of a batch while it samples the next one, if there is one.
            while decoding is not None and (following := inbox.take(block=False)):
                decoding = self._generate(following, inbox, report, decoding)
            if decoding is not None:
                decoding.finish()
            batch = inbox.take(block=True)

    def _generate(
        self, batch: Sequence[Work], inbox: Inbox, report: Callable[[Report], None], earlier: "_Decoding | None" = None
    ) -> "_Decoding | None":
        """Generate a batch.

        Args:
            batch: images of one group.
            inbox: says which of them are cancelled.
            report: takes what happens.
            earlier: the last batch, which is finished once the sampling of this one has begun.

        Returns:
            The pixels, which a GPU may still be decoding; None if there are none.
        """
        try:
            if batch[0].condition is None:
                self._reconstruct(batch, inbox, report)
                return None
            codes = self._codes(batch, inbox, report, earlier)
            cancelled = inbox.cancelled()
            wanted = [row for row, work in enumerate(batch) if work.key not in cancelled]
            if not wanted:
                return None
            pixels = _Decoding(self.model, [batch[row] for row in wanted], codes[wanted], report)
            if self.decodes_later:
                return pixels
            pixels.finish()
            return None
        except _StoppedError:
            return None
        except Exception as error:
            failed, parts = blame(error, len(batch))
            report_failure(error, [batch[row] for row in failed], report)
            for part in parts:  # innocent images are generated again
                if (decoding := self._generate([batch[row] for row in part], inbox, report)) is not None:
                    decoding.finish()
            return None
        finally:
            if earlier is not None:
                earlier.finish()

    def _codes(
        self, batch: Sequence[Work], inbox: Inbox, report: Callable[[Report], None], earlier: "_Decoding | None"
    ) -> Tensor:
        """Codes (B, h, w) of a batch.

        Raises:
            _StoppedError: if all images are cancelled, or the inbox is closed.
        """
        first, model = batch[0], self.model
        assert first.settings is not None
        assert self.facts.grid is not None
        side, kept_rows = self.facts.grid, first.keep_rows if first.image is not None else 0
        uploads = {file: self._read(file) for file in {work.image for work in batch} if file is not None}
        kept, order = None, None
        if kept_rows or first.mask is not None:
            encoded = {file: model.encode(image)[0] for file, image in uploads.items()}
            codes = torch.stack([encoded[work.image] for work in batch if work.image is not None])
            if first.mask is None:
                kept = codes[:, :kept_rows]
            else:  # all masks of a group have equally many codes
                (known,) = known_codes(codes, self._masks(batch))
                kept, order = known.kept, known.order
        watched = [row for row, work in enumerate(batch) if work.previews]
        shown = [uploads.get(batch[row].image or b"") for row in watched]
        growing: GrowingImages | MaskedImages
        if first.mask is None:
            growing = GrowingImages(model, shown, kept_rows)
        else:
            growing = MaskedImages(shown, [batch[row].mask or () for row in watched], side)
        budget, pace = PreviewBudget(self._clock), _Pace(model.device)

        def on_row(codes: Tensor, count: int, start: int) -> None:
            cancelled = inbox.cancelled()
            if inbox.closed or all(work.key in cancelled for work in batch):
                raise _StoppedError
            pace.wait()
            if earlier is not None:
                earlier.finish()
            row = count // side
            previews = growing.update(codes[watched], row, budget) if watched and row < side else []
            with_previews = set(watched) if previews else set()
            if previews:
                report(RowsReport(tuple(batch[each].key for each in watched), row, tuple(previews)))
            if others := tuple(work.key for each, work in enumerate(batch) if each not in with_previews):
                report(RowsReport(others, row))

        return model.generate_codes(
            [work.condition for work in batch if work.condition is not None],
            kept=kept,
            order=order,
            seed=[work.seed for work in batch],
            indices=[work.index for work in batch],
            progress=False,
            on_row=on_row,
            **first.settings.image_settings(),
            window=self._window if order is None else 1,
        )

    def _masks(self, batch: Sequence[Work]) -> Tensor:
        """Masks (B, h, w) of a batch."""
        side = self.facts.grid or 0
        masks = torch.zeros(len(batch), side * side, dtype=torch.bool)
        for row, work in enumerate(batch):
            masks[row, list(work.mask or ())] = True
        return masks.view(-1, side, side).to(self.model.device)

    def _reconstruct(self, batch: Sequence[Work], inbox: Inbox, report: Callable[[Report], None]) -> None:
        """Encode and decode images, one at a time: those of a tokenizer alone have different sizes."""
        for work in batch:
            if inbox.closed or work.key in inbox.cancelled():
                continue
            try:
                codes = self.model.encode(self._read(work.image or b""))
            except Exception as error:
                report_failure(error, [work], report)
            else:
                _Decoding(self.model, [work], codes, report).finish()

    def _read(self, file: bytes) -> Image.Image:
        return read_image(file, self.facts.resolution, self.facts.downsampling)


class _StoppedError(Exception):
    """Nobody wants the batch any more."""


class _Pace:
    """Keeps the host at most one row ahead of a GPU, so that rows are reported, and batches stopped, in time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Wait for the row before the one that is queued now."""
        if self._device.type != "cuda":
            return
        if self._last is not None:
            self._last.synchronize()
        self._last = torch.cuda.current_stream(self._device).record_event()


class _Decoding:
    """Pixels of a batch, which a GPU may still be decoding.

    Args:
        model: decodes them.
        batch: the images.
        codes: (B, h, w).
        report: takes the finished images.
    """

    def __init__(self, model: LlamaGen, batch: Sequence[Work], codes: Tensor, report: Callable[[Report], None]) -> None:
        self._model, self._batch, self._codes, self._report = model, batch, codes, report
        self._done = False
        try:
            self._images: Images | Exception = model.pixels(codes)
        except Exception as error:  # on a CPU; raised again by finish
            self._images = error

    def finish(self) -> None:
        """Wait for the pixels, and report the images. Harmless when repeated."""
        if self._done:
            return
        self._done = True
        try:
            if isinstance(self._images, Exception):
                raise self._images
            pixels = self._images.numpy()
        except Exception as error:
            failed, parts = blame(error, len(self._batch))
            report_failure(error, [self._batch[row] for row in failed], self._report)
            for part in parts:
                _Decoding(self._model, [self._batch[row] for row in part], self._codes[part], self._report).finish()
            return
        for work, image, codes in zip(self._batch, pixels, self._codes.cpu().numpy(), strict=True):
            self._report(ImageReport(work.key, image, codes))


def load_engine(spec: WorkerSpec) -> EmbeddedEngine:
    """Load a model, and prepare it in the thread that calls this.

    Raises:
        ValueError: in one line, as ``LlamaGen.from_pretrained`` does.
    """
    parts = load_parts(find_source(spec.source, spec.tokenizer), spec.text_encoder, spec.device, spec.dtype)
    # In other precisions than float32 only compiled steps round the logits of an image in the same way in any batch.
    # On a CPU they are also much faster, for small models too, and compiled once for all.
    must_compile = parts.gpt is not None and (parts.dtype != "float32" or parts.gpt.output.weight.device.type == "cpu")
    engine = EmbeddedEngine(
        LlamaGen(parts, spec.batch_size, compile=True if must_compile else None), window=spec.window
    )
    try:
        engine.prepare()
    except Exception as error:
        if not must_compile:
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        effect = "it is slower"
        if parts.dtype != "float32":
            effect += ", and images may depend on their batch; use float32 to avoid this"
        LOGGER.warning("sampling in %s is not compiled (%s), so %s", parts.dtype, reason, effect)
        engine = EmbeddedEngine(LlamaGen(parts, spec.batch_size, compile=False), window=spec.window)
        engine.prepare()
    return engine
