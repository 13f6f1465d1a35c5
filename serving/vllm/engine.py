"""The engine of a worker that runs the autoregressive model in vLLM: continuous batching, tensor parallelism.

vLLM samples codes, and our tokenizer decodes them. Codes equal those of :func:`~llamagen.sampling.generate`.
"""

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from llamagen import LlamaGen
from llamagen.command import one_line
from llamagen.finite import NotFiniteError
from llamagen.option_checks import check_integer
from llamagen.pretrained.conditions import to_condition
from llamagen.pretrained.exported_config import ARCHITECTURE
from llamagen.pretrained.loading import load_parts
from llamagen.pretrained.source import find_source
from llamagen.sampling import Images
from llamagen.sampling.automatic import should_compile
from serving.engine.engine import ImageReport, Inbox, Report, RowsReport, Work
from serving.engine.facts import ModelFacts
from serving.engine.failures import blame, raise_if_device_failed, report_failure
from serving.engine.previews import GrowingImages, PreviewBudget
from serving.engine.spec import WorkerSpec
from serving.engine.uploads import read_image
from serving.vllm.export import is_guided, vllm_folder
from serving.vllm.hf_config import not_finite_code
from serving.vllm.prompts import caption_prompt, embedder_of, label_prompt
from serving.vllm.ranks import cache_bytes, check_ranks
from serving.vllm.settings import RequestSettings, check_guidance
from serving.vllm.versions import check_version, installed_version

LOGGER = logging.getLogger("serving")
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the loop runs in this process, which is a worker's
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # by default it reserves a core; OMP_NUM_THREADS sets the threads
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Settings of vLLM, unless the user has set them."""
MAX_REASON = 500
"""Maximum length of vLLM's reason in an error message."""
PROMPTS = 32
"""Encoded prompts that are kept, each of one or two megabytes for the published models."""


@dataclass
class _Running:
    """An image that vLLM generates.

    Attributes:
        work: the image.
        codes: its codes so far, the kept ones first.
        growing: its preview; None if none is wanted.
        budget: time for previews.
    """

    work: Work
    codes: list[int]
    growing: GrowingImages | None
    budget: PreviewBudget


class VLLMEngine:
    """Generates images with vLLM. It belongs in a process of its own: vLLM changes settings of its process.

    Args:
        source: see :meth:`LlamaGen.from_pretrained <llamagen.pretrained.model.LlamaGen.from_pretrained>`. What is not
            an exported folder is exported to a temporary one first.
        tokenizer: see there.
        text_encoder: see there.
        device: device of tokenizer and text encoder; None for a GPU if there is one. vLLM chooses its own.
        dtype: see there; ``mixed`` means ``bfloat16``.
        capacity: maximum number of images at a time. The cache has room for all of them.
        tensor_parallel: number of devices that share the model; it must divide the number of heads.
        compiled: whether vLLM compiles the model; None for models of at least 20 million parameters.
        options: other arguments of ``vllm.EngineArgs``.

    Raises:
        ValueError: in one line, if vLLM is not installed or of another version, the model cannot be loaded, or vLLM
            does not start with it.
    """

    is_continuous = True

    def __init__(
        self,
        source: str | Path,
        *,
        tokenizer: str | Path | None = None,
        text_encoder: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: Any = None,
        capacity: int = 16,
        tensor_parallel: int = 1,
        compiled: bool | None = None,
        **options: Any,
    ) -> None:
        check_version(installed_version())
        check_integer("capacity", capacity)
        check_integer("tensor_parallel", tensor_parallel)
        found = find_source(source, tokenizer)
        dtype = str(found.dtype if dtype is None else dtype).removeprefix("torch.")
        # On the CPU, because only vLLM needs the blocks, and several GPUs may share them.
        parts = load_parts(found, text_encoder, "cpu", "bfloat16" if dtype == "mixed" else dtype)
        if parts.gpt is None:
            raise ValueError(f"{found.name} is a tokenizer; vLLM needs an autoregressive model, such as c2i_B_256")
        self.capacity, self.gpt_config = capacity, parts.gpt.config
        check_ranks(tensor_parallel, self.gpt_config)
        own = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if own.type == "cuda" and own.index:
            raise ValueError(
                f"device is {own}, but vLLM takes the first GPUs that it sees; leave device out and set "
                f"CUDA_VISIBLE_DEVICES={own.index}"
            )
        if own.type == "cuda" and tensor_parallel > (count := torch.cuda.device_count()):
            raise ValueError(f"tensor_parallel is {tensor_parallel}, but there are {count} GPUs; give at most {count}")
        self.model = LlamaGen(parts, capacity, compile=False)
        parts.tokenizer.to(own)
        self.facts = replace(ModelFacts.from_model(self.model), can_inpaint=False)  # it generates in raster order
        compiled = should_compile(parts.gpt) if compiled is None else compiled
        parts.gpt.layers = nn.ModuleList()
        self._gpt, self._conditions = parts.gpt.to(own), parts.text or parts.class_names
        self._encode = lru_cache(PROMPTS)(self._encode_once)
        if parts.text is not None:
            self._encode("")  # loads the T5: the first request does not wait, and a wrong one ends the start
        self._dtype, side = parts.gpt.output.weight.dtype, self.gpt_config.grid_size
        self.model.preview(torch.zeros(1, side * side, dtype=torch.int64, device=own), 1)  # loads the decoder
        with vllm_folder(found) as folder:
            self.guided = is_guided(folder)
            arguments = {
                "model": str(folder),
                "served_model_name": found.name,
                "dtype": str(self._dtype).removeprefix("torch."),
                "tensor_parallel_size": tensor_parallel,
                "max_num_seqs": capacity,
                "enforce_eager": not compiled,
                "kv_cache_memory_bytes": cache_bytes(
                    self.gpt_config, self.guided, capacity, tensor_parallel, self._dtype.itemsize
                ),
                "disable_log_stats": True,
            }
            self.engine = _start_vllm(arguments | options)
        self._running: dict[int, _Running] = {}
        self._decoding: list[tuple[list[tuple[Work, list[int]]], Images]] = []

    def run(self, inbox: Inbox, report: Callable[[Report], None]) -> None:
        """Work until the inbox is closed; see :meth:`Engine.run <serving.engine.engine.Engine.run>`."""
        try:
            while not inbox.closed:
                # 1. Forget what nobody wants any more.
                self._abort(inbox.cancelled() & self._running.keys())
                # 2. Take what is new; wait only if there is nothing to do.
                for work in inbox.take(block=not self._running):
                    self._start(work, report)
                # 3. One more code for each image. A GPU may decode the last finished images meanwhile.
                finished = self._step(report) if self._running else []
                self._deliver(report)
                self._decode(finished, report)
                if not self._running:
                    self._deliver(report)
        finally:
            self._abort(set(self._running))

    def close(self) -> None:
        """End the processes of vLLM. The engine cannot be used afterwards."""
        self.engine.engine_core.shutdown()

    def _start(self, work: Work, report: Callable[[Report], None]) -> None:
        """Give an image to vLLM, or finish it at once if there is nothing to sample."""
        try:
            image = (
                None if work.image is None else read_image(work.image, self.facts.resolution, self.facts.downsampling)
            )
            kept = [] if image is None else self._kept(work, image)
            if len(kept) == self.gpt_config.block_size or work.condition is None:
                self._decode([(work, kept)], report)
                return
            assert work.settings is not None
            settings = RequestSettings(work.settings, work.seed, work.index)
            check_guidance(settings, self.guided)
            prompt = self._prompt(work, kept)
            rows = len(kept) // self.gpt_config.grid_size
            growing = GrowingImages(self.model, [image], rows) if work.previews else None
            self.engine.add_request(str(work.key), prompt, self._parameters(settings, len(kept)))
        except Exception as error:
            report_failure(error, [work], report)
            return
        self._running[work.key] = _Running(work, list(kept), growing, PreviewBudget(time.monotonic))
        if rows:
            report(RowsReport((work.key,), rows))

    @torch.no_grad()
    def _encode_once(self, condition: int | str) -> tuple[Tensor, int | None]:
        """A label (), or features (C, W) of a prompt and their length. The images of a prompt arrive one by one."""
        found, lengths = to_condition([condition], self._conditions, self.model.device)
        return found[0], None if lengths is None else int(lengths[0])

    @torch.no_grad()
    def _prompt(self, work: Work, kept: Sequence[int]) -> dict[str, Any]:
        assert work.condition is not None
        condition, length = self._encode(work.condition)
        if self.gpt_config.condition == "class":
            return label_prompt(self.gpt_config, int(condition), kept)
        embedder = embedder_of(self._gpt)
        prompt = caption_prompt(self.gpt_config, embedder, condition, length, kept, self.guided)
        return prompt | {"prompt_embeds": prompt["prompt_embeds"].to("cpu", self._dtype)}

    def _parameters(self, settings: RequestSettings, kept: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=0.0,
            max_tokens=self.gpt_config.block_size - kept,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args=settings.extra_args(),
        )

    def _kept(self, work: Work, image: Image.Image) -> list[int]:
        """Codes of an image to complete or to reconstruct."""
        codes = self.model.encode(image)[0]
        rows = len(codes) if work.condition is None else work.keep_rows
        check_integer("keep_rows", rows, 0, len(codes))
        kept: list[int] = codes[:rows].flatten().tolist()
        return kept

    def _step(self, report: Callable[[Report], None]) -> list[tuple[Work, list[int]]]:
        """One step of vLLM; returns the images that are complete, with their codes."""
        side, length = self.gpt_config.grid_size, self.gpt_config.block_size
        grown: dict[int, list[int]] = {}
        finished, broken = list[tuple[Work, list[int]]](), list[Work]()
        for output in self.engine.step():
            running = self._running.get(int(output.request_id))
            if running is None:  # aborted while the step ran
                continue
            before, new = len(running.codes) // side, output.outputs[0].token_ids
            running.codes.extend(new)
            if not_finite_code(self.gpt_config) in new:
                broken.append(running.work)
            elif (row := len(running.codes) // side) > before:
                if row < side and (previews := self._preview(running, row)):
                    report(RowsReport((running.work.key,), row, previews))
                else:
                    grown.setdefault(row, []).append(running.work.key)
            if len(running.codes) == length and running.work not in broken:
                finished.append((running.work, running.codes))
                del self._running[running.work.key]
        for row, keys in grown.items():
            report(RowsReport(tuple(keys), row))
        if broken:
            self._abort({work.key for work in broken})
            advice = "" if self.facts.dtype == "float32" else "; use float32"
            message = f"the logits of the autoregressive model are not finite in {self.facts.dtype}{advice}"
            report_failure(NotFiniteError(message), broken, report)
        return finished

    def _preview(self, running: _Running, row: int) -> tuple[bytes, ...]:
        if running.growing is None:
            return ()
        codes = running.codes + [0] * (self.gpt_config.block_size - len(running.codes))
        try:
            grid = torch.tensor([codes], device=self.model.device)
            return tuple(running.growing.update(grid, row, running.budget))
        except Exception as error:  # the image itself may well succeed
            raise_if_device_failed(error)
            LOGGER.exception("an image has no previews any more")
            running.growing = None
            return ()

    def _decode(self, finished: list[tuple[Work, list[int]]], report: Callable[[Report], None]) -> None:
        """Begin to decode images."""
        if not finished:
            return
        side = self.gpt_config.grid_size
        codes = torch.tensor([codes for _, codes in finished], device=self.model.device).view(-1, side, side)
        try:
            self._decoding.append((finished, self.model.pixels(codes)))
        except Exception as error:
            self._blame(error, finished, report)

    def _deliver(self, report: Callable[[Report], None]) -> None:
        """Report the images that were decoded; waits for a GPU."""
        side = self.gpt_config.grid_size
        while self._decoding:
            finished, images = self._decoding.pop(0)
            try:
                pixels = images.numpy()
            except Exception as error:
                self._blame(error, finished, report)
                continue
            for (work, codes), image in zip(finished, pixels, strict=True):
                report(ImageReport(work.key, image, np.array(codes, dtype=np.int64).reshape(side, side)))

    def _blame(
        self, error: Exception, finished: list[tuple[Work, list[int]]], report: Callable[[Report], None]
    ) -> None:
        """Report images that could not be decoded, and decode the others again."""
        failed, parts = blame(error, len(finished))
        report_failure(error, [finished[row][0] for row in failed], report)
        for part in parts:
            self._decode([finished[row] for row in part], report)

    def _abort(self, keys: set[int]) -> None:
        if keys:
            self.engine.abort_request([str(key) for key in keys])
            for key in keys:
                del self._running[key]


def load_engine(spec: WorkerSpec) -> VLLMEngine:
    """Load a model for a worker of the server. Its options are those of :class:`VLLMEngine`.

    Raises:
        ValueError: in one line, as :class:`VLLMEngine` does.
    """
    return VLLMEngine(
        spec.source,
        tokenizer=spec.tokenizer,
        text_encoder=spec.text_encoder,
        device=spec.device,
        dtype=spec.dtype,
        capacity=spec.batch_size,
        **spec.options,
    )


def _start_vllm(arguments: dict[str, Any]) -> Any:
    """An engine of vLLM in this process.

    Raises:
        ValueError: in one line with vLLM's reason, if it does not start.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from vllm import ModelRegistry
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    from serving.vllm.model import LlamaGenGPT
    from serving.vllm.plugin import register

    register()  # footgun: an old *.egg-info in the working directory hides the entry point
    # The class itself: otherwise vLLM starts a process, which imports it to look at it.
    ModelRegistry.register_model(ARCHITECTURE, LlamaGenGPT)
    try:
        return LLMEngine.from_engine_args(EngineArgs(**arguments))
    except Exception as error:
        LOGGER.debug("vLLM did not start", exc_info=error)
        reason = one_line(str(error)) or type(error).__name__
        raise ValueError(
            f"vLLM does not start: {reason[:MAX_REASON]}; a smaller batch size needs less memory, "
            "VLLM_LOGGING_LEVEL=INFO shows more, and docs/vllm.md says what vLLM needs"
        ) from error
