"""The engine of a worker that runs the autoregressive model in vLLM: continuous batching, tensor parallelism.

vLLM samples codes, and our tokenizer decodes them. Codes equal those of :func:`~llamagen.sampling.generate`.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from llamagen import LlamaGen
from llamagen.models.gpt_config import GPTConfig
from llamagen.option_checks import check_integer
from llamagen.pretrained.conditions import to_condition
from llamagen.pretrained.loading import load_parts
from llamagen.pretrained.source import find_source
from llamagen.rgb import FORMATS
from llamagen.sampling.automatic import should_compile
from llamagen.sampling.pixels import PixelDecoder
from serving.engine.engine import FailureReport, ImageReport, Inbox, Report, RowsReport, Work
from serving.engine.facts import ModelFacts
from serving.vllm.export import is_guided, vllm_folder
from serving.vllm.prompts import caption_prompt, embedder_of, label_prompt
from serving.vllm.settings import RequestSettings
from serving.vllm.versions import check_version, installed_version

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the loop runs in this process, which is a worker's
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # by default it reserves a core; OMP_NUM_THREADS sets the threads
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Settings of vLLM, unless the user has set them."""
BLOCK = 128
"""Tokens of a block of vLLM's cache on CPUs; on GPUs they are smaller."""


@dataclass
class _Running:
    """An image that vLLM generates."""

    work: Work
    codes: list[int]


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
        ValueError: in one line, if vLLM is not installed or of another version, or the model cannot be loaded.
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
        self.capacity, found = capacity, find_source(source, tokenizer)
        dtype = found.dtype if dtype is None else dtype
        dtype = "bfloat16" if str(dtype).removeprefix("torch.") == "mixed" else dtype
        parts = load_parts(found, text_encoder, "cpu", dtype)
        if parts.gpt is None:
            raise ValueError(f"{found.name} is a tokenizer; vLLM needs an autoregressive model, such as c2i_B_256")
        if parts.gpt.config.n_head % tensor_parallel:
            raise ValueError(
                f"tensor_parallel is {tensor_parallel}; it must divide the model's {parts.gpt.config.n_head} heads"
            )
        own = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        parts.tokenizer.to(own)
        self.model = LlamaGen(parts, capacity)
        self.facts = ModelFacts.from_model(self.model)
        self.gpt_config: GPTConfig = parts.gpt.config
        self._dtype = torch.bfloat16 if parts.dtype == "bfloat16" else torch.float32
        compiled = should_compile(parts.gpt) if compiled is None else compiled
        parts.gpt.layers = nn.ModuleList()  # vLLM loads them itself; the embedding of captions stays
        parts.gpt.to(own)
        self._gpt, self._text = parts.gpt, parts.text or parts.class_names
        self.pixels = PixelDecoder(self.model.tokenizer, own, self._dtype)
        with vllm_folder(found) as folder:
            self.guided = is_guided(folder)
            arguments = {
                "model": str(folder),
                "served_model_name": found.name,
                "dtype": str(self._dtype).removeprefix("torch."),
                "tensor_parallel_size": tensor_parallel,
                "max_num_seqs": capacity,
                "enforce_eager": not compiled,
                "kv_cache_memory_bytes": self._cache_bytes(tensor_parallel),
                "disable_log_stats": True,
            }
            self.engine = _start_vllm(arguments | options)
        self._running: dict[int, _Running] = {}

    def run(self, inbox: Inbox, report: Callable[[Report], None]) -> None:
        """Work until the inbox is closed; see :meth:`Engine.run <serving.engine.engine.Engine.run>`."""
        try:
            while not inbox.closed:
                # 1. Forget what nobody wants any more.
                self._abort(inbox.cancelled() & self._running.keys())
                # 2. Take what is new; wait only if there is nothing to do.
                for work in inbox.take(block=not self._running):
                    self._start(work, report)
                # 3. One more code for each image.
                if self._running:
                    self._step(report)
        finally:
            self._abort(set(self._running))

    def close(self) -> None:
        """End the processes of vLLM. The engine cannot be used afterwards."""
        self.engine.engine_core.shutdown()

    def _start(self, work: Work, report: Callable[[Report], None]) -> None:
        """Give an image to vLLM, or finish it at once if there is nothing to sample."""
        try:
            kept = self._kept(work)
            if len(kept) == self.gpt_config.block_size or work.condition is None:
                self._finish([(work, kept)], report)
                return
            assert work.settings is not None
            settings = RequestSettings(work.settings, work.seed, work.index)
            prompt = self._prompt(work, kept)
            self.engine.add_request(str(work.key), prompt, self._parameters(settings, len(kept)))
        except ValueError as error:
            message = " ".join(str(error).split())
            report(FailureReport((work.key,), message, is_users=True))
            return
        self._running[work.key] = _Running(work, list(kept))
        if rows := len(kept) // self.gpt_config.grid_size:
            report(RowsReport((work.key,), rows))

    @torch.no_grad()
    def _prompt(self, work: Work, kept: Sequence[int]) -> dict[str, Any]:
        condition, lengths = to_condition([work.condition], self._text, self.model.device)
        if self.gpt_config.condition == "class":
            return label_prompt(self.gpt_config, int(condition[0]), kept)
        length = None if lengths is None else int(lengths[0])
        embedder = embedder_of(self._gpt)
        prompt = caption_prompt(self.gpt_config, embedder, condition[0], length, kept, self.guided)
        return prompt | {"prompt_embeds": prompt["prompt_embeds"].to("cpu", self._dtype)}

    def _parameters(self, settings: RequestSettings, kept: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=0.0,
            max_tokens=self.gpt_config.block_size - kept,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args=settings.extra_args(),
        )

    def _kept(self, work: Work) -> list[int]:
        """Codes of an image to complete or to reconstruct."""
        if work.image is None:
            return []
        try:
            image = Image.open(BytesIO(work.image), formats=FORMATS)
            image.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"the image cannot be read; give a {', '.join(FORMATS)} file") from error
        codes = self.model.encode(image)[0]
        rows = len(codes) if work.condition is None else work.keep_rows
        check_integer("keep_rows", rows, 0, len(codes))
        kept: list[int] = codes[:rows].flatten().tolist()
        return kept

    def _step(self, report: Callable[[Report], None]) -> None:
        side, length = self.gpt_config.grid_size, self.gpt_config.block_size
        grown: dict[int, list[int]] = {}
        finished: list[tuple[Work, list[int]]] = []
        broken: list[int] = []
        for output in self.engine.step():
            key = int(output.request_id)
            if key not in self._running:  # it was aborted while the step ran
                continue
            running = self._running[key]
            before = len(running.codes) // side
            running.codes.extend(output.outputs[0].token_ids)
            if self.gpt_config.vocab_size in running.codes[before * side :]:
                broken.append(key)
            elif (row := len(running.codes) // side) > before:
                grown.setdefault(row, []).append(key)
                if len(running.codes) == length:
                    finished.append((self._running.pop(key).work, running.codes))
        for row, keys in grown.items():
            report(RowsReport(tuple(keys), row))
        if broken:
            self._abort(set(broken))
            kind = self.facts.dtype
            message = f"the logits of the autoregressive model are not finite in {kind}; try dtype float32"
            report(FailureReport(tuple(broken), message, is_users=False))
        if finished:
            self._finish(finished, report)

    def _finish(self, finished: list[tuple[Work, list[int]]], report: Callable[[Report], None]) -> None:
        """Decode codes and report the images."""
        side = self.gpt_config.grid_size
        codes = torch.tensor([codes for _, codes in finished], device=self.model.device).view(-1, side, side)
        try:
            pixels = self.pixels(codes).numpy()
        except FloatingPointError as error:
            report(FailureReport(tuple(work.key for work, _ in finished), str(error), is_users=False))
            return
        for (work, _), image, grid in zip(finished, pixels, codes.cpu().numpy(), strict=True):
            report(ImageReport(work.key, image, grid))

    def _abort(self, keys: set[int]) -> None:
        if keys:
            self.engine.abort_request([str(key) for key in keys])
            for key in keys:
                del self._running[key]

    def _cache_bytes(self, ranks: int) -> int:
        """Bytes of keys and values on each device: full images for all of ``capacity``, so that none is preempted."""
        from serving.vllm.hf_config import vllm_sizes

        sizes = vllm_sizes(self.gpt_config, self.guided)
        blocks = self.capacity * -(-sizes["max_position_embeddings"] // BLOCK) + 1
        width = max(1, sizes["num_key_value_heads"] // ranks) * sizes["head_dim"]
        return int(2 * sizes["num_hidden_layers"] * blocks * BLOCK * width * self._dtype.itemsize)


def _start_vllm(arguments: dict[str, Any]) -> Any:
    """An engine of vLLM in this process."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from vllm import ModelRegistry
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    from serving.vllm.plugin import ARCHITECTURE, register

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        from serving.vllm.model import LlamaGenGPT

        # The class itself: otherwise vLLM starts a process, which imports it to look at it.
        ModelRegistry.register_model(ARCHITECTURE, LlamaGenGPT)
    register()  # footgun: an old *.egg-info in the working directory hides the entry point
    return LLMEngine.from_engine_args(EngineArgs(**arguments))
