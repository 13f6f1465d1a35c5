"""Condition → codes, for many calls with the same memory and compiled code."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llamagen.finite import FiniteCheck, find_source, not_finite_error
from llamagen.models.gpt import GPT
from llamagen.models.sharding import is_sharded, reshard
from llamagen.sampling.config import SamplingConfig
from llamagen.sampling.cpu.decoder import CPUCodeDecoder
from llamagen.sampling.decoder import CodeDecoder, DecodedCodes
from llamagen.sampling.eager import EagerCodeDecoder
from llamagen.sampling.evaluation_mode import evaluation_mode
from llamagen.sampling.gpu.decoder import GPUCodeDecoder
from llamagen.sampling.inputs import Condition, Numbers, SamplingRequest, as_config, as_int
from llamagen.sampling.order import to_order

OnRow = Callable[[Tensor, int, int], object]
"""Called with codes (B, L), the number of final codes of each image, and the number of the first image."""


class Sampler:
    """Samples the codes of images (arXiv 2406.06525, section 2.3).

    The condition is read once (prefill), then each step decodes one code. Keys and values are cached, in memory that
    later calls reuse. With guidance both branches run in one batch. Compiled steps read each weight once: C++ on CPUs
    (float32, bfloat16), Triton kernels in CUDA graphs on NVIDIA GPUs.

    The random numbers of a sample depend on seed and index only. In float32, and compiled on CPUs also in bfloat16, its
    codes are the same in any batch. Otherwise the rounding of logits depends on the batch size. Where two codes are
    almost equally likely, another one may then be sampled, and the rest of the image differs, too. The distribution of
    the images does not change.

    Several threads may call one sampler at the same time, except when it is compiled on a GPU: then a call raises a
    ``RuntimeError`` while another one runs.

    Args:
        gpt: the model. Calls run it in evaluation mode and restore its mode at the end.
        batch_size: number of images that are sampled at a time; a call may request more or fewer.
        compiled: sample with compiled steps. Weights that need conversion (to bfloat16 under autocast, or to int8) are
            copied, and copied again after the model's weights have changed in place.
        int8: let compiled steps read the weights as int8, with a scale for each output. This copies the weights.

    Raises:
        ValueError: if ``batch_size`` is below 1, or compilation is not possible on this device, in this precision, with
            sharded parameters or with ``code_factors``.
    """

    # footgun: Lightning predicts in inference mode, whose tensors fail outside of it. Memory that is allocated in one
    # call must serve calls in both modes, so all methods leave inference mode.
    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, gpt: GPT, batch_size: int, *, compiled: bool = False, int8: bool = False) -> None:
        batch_size = as_int(batch_size, "batch_size")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        if int8 and not compiled:
            raise ValueError("int8 weights are for compiled sampling; set compiled too")
        if compiled and is_sharded(gpt):
            raise ValueError("sampling cannot be compiled while parameters are sharded over ranks; leave compiled out")
        self.gpt, self.batch_size = gpt, batch_size
        self.decoder = _build_decoder(gpt, batch_size, compiled, int8)
        self._addresses = _addresses(gpt) if compiled else None
        self._versions = _versions(gpt)

    @property
    def any_order(self) -> bool:
        """Whether the engine can generate in other orders than raster order, if the model can."""
        return self.decoder.any_order

    @torch.inference_mode(False)
    @torch.no_grad()
    def prepare(self, config: SamplingConfig) -> None:
        """Allocate memory and, if compiled, compile for calls with these settings, before the first call."""
        with self._ready():
            self.decoder.prepare(self._settings(as_config(config)))

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(
        self,
        condition: Condition,
        config: SamplingConfig | Mapping[str, Any] | None = None,
        *,
        caption_lengths: Numbers | None = None,
        seed: int | Numbers = 0,
        indices: Numbers | None = None,
        kept: Numbers | None = None,
        order: Numbers | None = None,
        on_row: OnRow | None = None,
    ) -> Tensor:
        """Sample the codes of one image for each condition.

        Tensors, NumPy arrays and lists are accepted and moved to the model's device.

        Args:
            condition: (N,) integer labels, or one label; or (N, C, caption_dim) caption features padded on the left,
                or (C, caption_dim) for one caption.
            config: settings of sampling, or a mapping of its fields; by default the model's own distribution.
            caption_lengths: (N,), number of real caption tokens, which come last; None if no caption is padded. The
                unconditional branch uses the same padding.
            seed: seed of the run, any integer; or N, one for each image.
            indices: (N,), index of each sample within the run; 0 … N − 1 by default. The random numbers of a sample
                depend on seed and index only, not on the rest of the batch.
            kept: (N, K) integers with K from 0 to L, the first K codes of each image in raster order, or in ``order``.
                They are not sampled but kept exactly, and the others are generated after them. Settings and random
                numbers count from the first code of the image. With K = L the result is ``kept``.
            order: (N, L) integers, or (L,) for all images: entry t is the raster position of the code that is generated
                at step t. None is raster order. Other orders need a target-aware model, which was trained in random
                orders, and decode one code in each pass.
            on_row: called as ``on_row(codes, count, start)`` after each complete row of the grid, and first for the
                complete rows of ``kept``. ``codes`` (B, L) int64, a copy on the model's device, are those of images
                ``start`` to ``start + B − 1`` of the call. The first ``count`` codes of each image, a multiple of the
                grid's side, are final; the others are 0. With ``order`` these are the first ``count`` codes in that
                order, at their places in raster order, and the first call has all of ``kept``. If it raises an
                exception, sampling stops with it, and the sampler can be used again. footgun: with sharded parameters
                all ranks must raise it at the same row.

        Returns:
            (N, L) int64 codes in raster order, L = ``block_size``; (0, L) for no conditions.

        Raises:
            ValueError: if a label is not one of the model's classes, a caption length is not in 1 … C, a kept code is
                not in the vocabulary, the model has another kind of condition, types or shapes do not fit, windows are
                set while parameters are sharded over ranks or with ``order``, or the model or the engine generates in
                raster order only.
            FloatingPointError: if some logits are not finite.
            RuntimeError: if another thread is using the same compiled sampler on a GPU.
        """
        request = SamplingRequest.from_inputs(self.gpt, condition, config, caption_lengths, seed, indices, kept, order)
        codes, check = self.unchecked(request, on_row)
        check()
        return codes

    @torch.inference_mode(False)
    @torch.no_grad()
    def unchecked(self, request: SamplingRequest, on_row: OnRow | None = None) -> tuple[Tensor, FiniteCheck]:
        """Sample without waiting for the device.

        Args:
            request: N images.
            on_row: see :meth:`__call__`; it may wait for the device.

        Returns:
            (N, L) int64 codes, and a check that waits for them and raises a ``FloatingPointError`` if some logits were
            not finite.
        """
        request = replace(request, config=self._settings(request.config))
        count, batches = len(request), list[DecodedCodes]()
        with self._ready():
            for start in range(0, count, self.batch_size):
                size = self.batch_size if self.decoder.full_batches else min(self.batch_size, count - start)
                rows = torch.arange(start, start + size, device=request.indices.device)
                # A batch that must be full repeats the last image; the copies are cut off below.
                report = None if on_row is None else _report_of(on_row, start, min(size, count - start))
                batches.append(self.decoder(request.rows(rows.clamp(max=count - 1)), report))
        codes = request.indices.new_empty((0, self.gpt.config.block_size))
        broken = torch.zeros(0, dtype=torch.bool, device=codes.device)
        if batches:
            codes, broken = (torch.cat(parts)[:count] for parts in zip(*batches, strict=True))
        return codes, self._finite_check(broken, codes, request)

    def _settings(self, config: SamplingConfig) -> SamplingConfig:
        return sharded_settings(config) if is_sharded(self.gpt) else config

    def _finite_check(self, broken: Tensor, codes: Tensor, request: SamplingRequest) -> FiniteCheck:
        sharded, precision = is_sharded(self.gpt), str(compute_dtype(self.gpt)).removeprefix("torch.")
        if sharded:  # ranks wait for each other in every pass, so all of them must stop
            anywhere = broken.any().int()
            torch.distributed.all_reduce(anywhere, torch.distributed.ReduceOp.MAX)
            broken = broken | anywhere.bool()

        def score(row: int) -> None:
            pair = request.rows(torch.tensor([row, row], device=codes.device))
            dropped = torch.tensor([False, True], device=codes.device)
            sequence = to_order(codes[row].expand(2, -1), pair.order)
            with evaluation_mode(self.gpt):
                hidden = self.gpt.features(
                    sequence[:, :-1],
                    pair.condition,
                    caption_lengths=pair.caption_lengths,
                    drop_condition=dropped,
                    positions=None if pair.order is None else pair.order[:, :-1],
                    targets=pair.order,
                )
                for term in self.gpt.head_terms(hidden, sequence):
                    term.head(term.hidden)

        def explain(rows: list[int]) -> FloatingPointError:
            # With sharded parameters no layer can be run again: the other ranks do not take part.
            blame = find_source(self.gpt, None if sharded else partial(score, rows[0]))
            numbers = [int(request.indices[row]) for row in rows]
            return not_finite_error(
                "the logits of the autoregressive model are", precision, blame, numbers, len(broken)
            )

        return FiniteCheck(broken, explain)

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """Evaluation mode, on the model's device, with compiled steps that have its current weights."""
        if self._addresses is not None:
            if _addresses(self.gpt) != self._addresses:
                raise ValueError(
                    "the model was moved, or its weights were replaced, after the sampler was built; build a new one"
                )
            if (versions := _versions(self.gpt)) != self._versions:
                self.decoder.refresh()  # two threads may do this at once: they write the same values
                self._versions = versions
        device = self.gpt.output.weight.device
        # Triton launches kernels on the current device.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext(), evaluation_mode(self.gpt):
            yield
        if self.gpt.second_factor is not None and is_sharded(self.gpt):
            reshard(self.gpt)  # passes without the head leave embeddings and heads gathered


def sharded_settings(config: SamplingConfig) -> SamplingConfig:
    """Settings of sampling while parameters are sharded over ranks: one code in each pass.

    Ranks then wait for each other in every pass, and with windows some would need more passes than others.

    Raises:
        ValueError: in one line, if a window is set.
    """
    return config.one_code_a_pass(
        "the parameters are sharded over ranks, which need the same number of passes; set window to 1 or auto"
    )


def _report_of(on_row: OnRow, start: int, images: int) -> Callable[[Tensor, int], object]:
    """Callback for the batch whose first ``images`` rows are the images from ``start`` on."""
    return lambda codes, count: on_row(codes[:images], count, start)


def _build_decoder(gpt: GPT, batch_size: int, compiled: bool, int8: bool) -> CodeDecoder:
    dtype, device = compute_dtype(gpt), gpt.output.weight.device.type
    if not compiled:
        return EagerCodeDecoder(gpt, batch_size, dtype)
    if gpt.config.code_factors is not None:
        raise ValueError("sampling is not compiled for models with code_factors; leave compiled out")
    if device == "cpu":
        return CPUCodeDecoder(gpt, batch_size, dtype, int8)
    if device == "cuda":
        return GPUCodeDecoder(gpt, batch_size, dtype, int8)
    raise ValueError(f"sampling cannot be compiled for {device}; leave compiled out")


def _addresses(gpt: GPT) -> list[tuple[int, torch.dtype]]:
    return [(parameter.data_ptr(), parameter.dtype) for parameter in gpt.parameters()]


def _versions(gpt: GPT) -> list[int]:
    """Counters that grow with each change in place. Inference tensors have none."""
    return [0 if parameter.is_inference() else parameter._version for parameter in gpt.parameters()]


def compute_dtype(gpt: GPT) -> torch.dtype:
    """Dtype in which the model computes its keys and values."""
    weight = gpt.output.weight
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype
