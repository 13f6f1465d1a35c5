"""Condition → codes, batch after batch with the same memory."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from llamagen.finite import FiniteCheck, find_source, not_finite_error
from llamagen.models.gpt import GPT
from llamagen.models.sharding import is_sharded
from llamagen.sampling.config import SamplingConfig
from llamagen.sampling.cpu.decoder import CPUDecoder
from llamagen.sampling.decoder import Decoder
from llamagen.sampling.gpu.decoder import GPUDecoder
from llamagen.sampling.inputs import Condition, Numbers, as_condition, as_config, as_int, as_numbers


class Sampler:
    """Draws the codes of images (arXiv 2406.06525, section 2.3).

    The condition is read once (prefill), then one code a step is decoded with a key-value cache, which is allocated
    once for all calls. Guidance runs both branches in one batch. Compiled, a step reads each weight once: on CPUs
    (float32, bfloat16) by C++ code for the processor, on NVIDIA GPUs by Triton kernels in a CUDA graph.

    A sample's random numbers depend on seed and index alone. In float32 its codes are the same in any batch. In
    bfloat16 and float16 they are on CPUs, compiled; else logits are rounded differently in batches of another size,
    and where two codes are almost equally likely the other one may follow, and with it another image of the same
    distribution.

    Args:
        gpt: the model. It is used in evaluation mode and left as it was found.
        batch_size: images that are drawn together; a call may ask for more or fewer.
        compiled: draw with compiled steps. Weights that must be converted (to bfloat16 under autocast, or to int8) are
            copied, and copied again when those of the model have changed.
        int8: compiled steps read weights as int8, with a factor for each output; a copy beside the model's own.

    Raises:
        ValueError: if it cannot be compiled here.
    """

    # Nothing here is made in inference mode, in which Lightning predicts: it must serve calls outside of it, too.
    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, gpt: GPT, batch_size: int, *, compiled: bool = False, int8: bool = False) -> None:
        batch_size = as_int(batch_size, "batch_size")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        if int8 and not compiled:
            raise ValueError("int8 weights are for compiled sampling; set compiled too")
        if compiled and is_sharded(gpt):
            raise ValueError("sampling cannot be compiled while parameters are spread over ranks; leave it out")
        self.gpt, self.batch_size = gpt, batch_size
        self._compiled, self._one_at_a_time = compiled, Lock()
        dtype, kind = compute_dtype(gpt), gpt.output.weight.device.type
        if not compiled:
            self.decoder = Decoder(gpt, batch_size, dtype)
        elif kind == "cpu":
            self.decoder = CPUDecoder(gpt, batch_size, dtype, int8)
        elif kind == "cuda":
            self.decoder = GPUDecoder(gpt, batch_size, dtype, int8)
        else:
            raise ValueError(f"sampling cannot be compiled for {kind}; leave compiled out")
        if compiled:
            self._places, self._versions = _places(gpt), _versions(gpt)

    def _follow(self) -> None:
        """See changes of the model.

        Raises:
            ValueError: if its weights lie elsewhere than when the sampler was made.
        """
        if not self._compiled:
            return
        if _places(self.gpt) != self._places:
            raise ValueError("the model was moved, or its weights were replaced, behind the sampler; make a new one")
        if (versions := _versions(self.gpt)) != self._versions:
            self.decoder.refresh()
            self._versions = versions

    @torch.inference_mode(False)
    @torch.no_grad()
    def prepare(self, config: SamplingConfig) -> None:
        """Allocate the memory, and compile what is compiled, for calls with these settings."""
        config = as_config(config)
        with self._one_at_a_time, _evaluating(self.gpt):
            self._follow()
            self.decoder.prepare(config)

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(
        self,
        condition: Condition,
        config: SamplingConfig | Mapping[str, Any] | None = None,
        *,
        caption_lengths: Numbers | None = None,
        seed: int = 0,
        indices: Numbers | None = None,
    ) -> Tensor:
        """Draw the codes of one image for each condition.

        Tensors, arrays of numpy and lists are taken, and moved to the model's device.

        Args:
            condition: (N,) labels of any whole type, or one label; or (N, C, caption_dim) caption features padded on
                the left, or (C, caption_dim) of one caption.
            config: how to draw, or a mapping of its fields; the model's own distribution by default.
            caption_lengths: (N,), how many of the last caption positions are real; all, if not given. The unconditional
                branch uses the same padding.
            seed: seed of the run, any whole number.
            indices: (N,), number of each sample within the run; 0 … N − 1, if not given. Seed and number decide a
                sample's random numbers, whatever else is in the batch.

        Returns:
            (N, L) int64 codes in raster order, L = ``block_size``; of no conditions (0, L).

        Raises:
            ValueError: if a label is outside the model's classes, a caption length outside 1 … C, the condition is that
                of another kind of model, or types or shapes do not fit.
            FloatingPointError: if some logits are not finite.
        """
        codes, check = self.unchecked(condition, config, caption_lengths=caption_lengths, seed=seed, indices=indices)
        check()
        return codes

    @torch.inference_mode(False)
    @torch.no_grad()
    def unchecked(
        self,
        condition: Condition,
        config: SamplingConfig | Mapping[str, Any] | None = None,
        *,
        caption_lengths: Numbers | None = None,
        seed: int = 0,
        indices: Numbers | None = None,
    ) -> tuple[Tensor, FiniteCheck]:
        """As a call, but without waiting for the codes.

        Arguments and errors are those of a call.

        Returns:
            The codes, and what waits for them and raises a ``FloatingPointError`` if some logits were not finite.
        """
        config, seed = as_config(config), as_int(seed, "seed")
        condition = as_condition(self.gpt, condition)
        caption_lengths = as_numbers(caption_lengths, "caption_lengths", condition.device)
        numbers = as_numbers(indices, "indices", condition.device)
        indices = torch.arange(len(condition), device=condition.device) if numbers is None else numbers
        _check(self.gpt, condition, caption_lengths, indices)
        codes, broken = list[Tensor](), list[Tensor]()
        with self._one_at_a_time, _evaluating(self.gpt):
            self._follow()
            for start in range(0, len(condition), self.batch_size):
                stop = start + self.batch_size if self.decoder.full_batches else len(condition)
                rows = torch.arange(start, min(stop, start + self.batch_size), device=condition.device)
                rows = rows.clamp(max=len(condition) - 1)
                lengths = None if caption_lengths is None else caption_lengths[rows]
                drawn = self.decoder(condition[rows], config, lengths, seed, indices[rows])
                for kept, found in ((codes, drawn), (broken, self.decoder.broken)):
                    kept.append(found[: len(condition) - start].clone())  # the next batch may use its memory
        if not codes:
            codes = [condition.new_empty((0, self.gpt.config.block_size), dtype=torch.int64)]
            broken = [condition.new_empty(0, dtype=torch.bool)]
        together = torch.cat(codes)
        return together, self._check_of(torch.cat(broken), together, condition, caption_lengths, indices)

    def _check_of(
        self, broken: Tensor, codes: Tensor, condition: Tensor, lengths: Tensor | None, indices: Tensor
    ) -> FiniteCheck:
        sharded, precision = is_sharded(self.gpt), str(compute_dtype(self.gpt)).removeprefix("torch.")
        if sharded:  # its ranks wait for each other, so they stop together
            anywhere = broken.any().int()
            torch.distributed.all_reduce(anywhere, torch.distributed.ReduceOp.MAX)
            broken = broken | anywhere.bool()

        def score(row: int) -> None:
            rows = torch.tensor([row, row], device=codes.device)
            dropped = torch.tensor([False, True], device=codes.device)
            some = None if lengths is None else lengths[rows]
            with _evaluating(self.gpt):
                self.gpt(codes[rows, :-1], condition[rows], caption_lengths=some, drop_condition=dropped)

        def explain(rows: list[int]) -> FloatingPointError:
            # Without the ranks that share the parameters no layer can be computed.
            blame = find_source(self.gpt, None if sharded else partial(score, rows[0]))
            numbers = [int(indices[row]) for row in rows]
            return not_finite_error(
                "the logits of the autoregressive model are", precision, blame, numbers, len(broken)
            )

        return FiniteCheck(broken, explain)


@contextmanager
def _evaluating(gpt: GPT) -> Iterator[None]:
    modes = [(module, module.training) for module in gpt.modules()]
    device = gpt.output.weight.device
    gpt.eval()
    try:
        # Triton launches on the current device; blocks that are compiled for training would be so for each position.
        here = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with here, torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _check(gpt: GPT, condition: Tensor, caption_lengths: Tensor | None, indices: Tensor) -> None:
    """Once for all codes, what the model does not check at each of them: it would have to wait for the device."""
    batch, config = len(condition), gpt.config
    if indices.shape != (batch,):
        raise ValueError(f"indices must have shape ({batch},), one for each condition, not {tuple(indices.shape)}")
    shape = () if config.condition == "class" else (config.caption_length, config.caption_dim)
    if condition.shape[1:] != shape:
        kind = "class labels" if config.condition == "class" else "caption features"
        wanted = ", ".join(["B", *map(str, shape)]) + ("" if shape else ",")
        raise ValueError(f"{kind} must have shape ({wanted}), not {tuple(condition.shape)}")
    if caption_lengths is not None and (config.condition == "class" or caption_lengths.shape != (batch,)):
        raise ValueError(
            f"caption_lengths must have shape ({batch},) and belongs to a text-conditional model; it has shape "
            f"{tuple(caption_lengths.shape)} and the model's condition is {config.condition!r}"
        )
    if batch and config.condition == "class":
        lowest, highest = int(condition.min()), int(condition.max())
        if lowest < 0 or highest >= config.num_classes:
            raise ValueError(
                f"class {lowest if lowest < 0 else highest} was requested, but the model has classes "
                f"0 to {config.num_classes - 1}"
            )
    if batch and caption_lengths is not None:
        lowest, highest = int(caption_lengths.min()), int(caption_lengths.max())
        if lowest < 1 or highest > config.condition_length:
            raise ValueError(
                f"caption_lengths holds {lowest if lowest < 1 else highest}, not 1 to {config.condition_length}"
            )


def _places(gpt: GPT) -> list[tuple[int, torch.dtype]]:
    return [(parameter.data_ptr(), parameter.dtype) for parameter in gpt.parameters()]


def _versions(gpt: GPT) -> list[int]:
    """Grow with each change in place; inference tensors have none."""
    return [0 if parameter.is_inference() else parameter._version for parameter in gpt.parameters()]


def compute_dtype(gpt: GPT) -> torch.dtype:
    """The dtype in which the model computes its keys and values."""
    weight = gpt.output.weight
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype
