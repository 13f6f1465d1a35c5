"""Checks that outputs of a model are finite; if they are not, finds the layer or weight. B examples.

footgun: reading a flag waits for the GPU. So a :class:`FiniteCheck` keeps its flags on their device, and they are read
once per batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

HALF = ("16-true", "16-mixed", "float16")
"""Precisions with the range of float16."""


class NotFiniteError(FloatingPointError):
    """Values of some examples are not finite.

    Args:
        message: one line.
        rows: these examples, by their positions in the batch.
    """

    def __init__(self, message: str, rows: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.rows = tuple(rows)


class FiniteCheck:
    """Flags of a batch, and the error to raise for them.

    Args:
        broken: (B,) bool, on any device: True for examples with values that are not finite.
        explain: called with the broken rows, if there are any; returns the error.
    """

    def __init__(self, broken: Tensor, explain: Callable[[list[int]], FloatingPointError]) -> None:
        self.broken, self.explain = broken, explain

    def __call__(self) -> None:
        """Wait for the flags and read them.

        Raises:
            FloatingPointError: if one is set.
        """
        self.raise_if(self.broken)

    def raise_if(self, broken: Tensor) -> None:
        """Like calling the check, but with a copy of the flags, for example on the CPU."""
        if rows := broken.nonzero().flatten().tolist():
            raise NotFiniteError(str(self.explain(rows)), rows)


def not_finite(values: Tensor) -> Tensor:
    """(B,) bool on the same device, True for examples with values that are not finite.

    Args:
        values: (B, …) of any dtype.
    """
    finite = values.isfinite()
    return ~(finite.all(tuple(range(1, values.dim()))) if values.dim() > 1 else finite)


def check_finite(what: str, values: Tensor, precision: str, model: nn.Module, run: Callable[[], Any]) -> None:
    """Check a batch of values, and wait for the result.

    Args:
        what: name of the values with a verb, such as ``the latent is``.
        values: (B, …).
        precision: precision of the computation.
        model: the model that computed the values.
        run: computes the values again, to find the layer.

    Raises:
        FloatingPointError: if values are not finite, see :func:`not_finite_error`.
    """
    broken = not_finite(values)
    FiniteCheck(broken, lambda rows: not_finite_error(what, precision, find_source(model, run), rows, len(broken)))()


def not_finite_error(
    what: str, precision: str, source: str = "", rows: Sequence[int] = (), count: int = 0, where: str = ""
) -> FloatingPointError:
    """Build the one-line error for values that are not finite.

    Args:
        what: name of the values with a verb.
        precision: precision of the computation: Lightning's name, or that of a dtype.
        source: layer or weight, see :func:`find_source`.
        rows: affected examples of the batch.
        count: size B of the batch.
        where: stage and batch.
    """
    examples = f" in {len(rows)} of {count} examples (first: number {rows[0]})" if 0 < len(rows) < count else ""
    if precision in HALF:
        advice = "values overflow in float16: use bf16-mixed or 32-true (bfloat16 or float32)"
        advice += " and, if that does not help, other weights" if source.startswith("weight") else ""
    elif source.startswith("weight"):
        advice = "the weights are broken: use an earlier checkpoint or another file"
    else:
        advice = "use 32-true (float32), or weights of an earlier checkpoint"
    cause = f": {source}" if source else ""
    return FloatingPointError(f"{what} not finite{examples}{where} (precision {precision}){cause}; {advice}")


@torch.no_grad()
def find_source(model: nn.Module | Mapping[str, nn.Module], run: Callable[[], Any] | None = None) -> str:
    """Find the origin of values that are not finite: a weight, or else the first layer with such an output.

    Takes as long as a forward pass, so call it only after a failed check.

    Args:
        model: one model, or several by name.
        run: computes the values again by calling modules of the model.

    Returns:
        A phrase for the message; empty if nothing was found.
    """
    model = model if isinstance(model, nn.Module) else nn.ModuleDict(model)
    if (name := broken_weight(model)) is not None:
        return f"weight {name} is not finite"
    found: list[str] = []
    if run is not None:
        with _watching(model, found), torch.compiler.set_stance("force_eager"):
            run()
    return found[0] if found else ""


def broken_weight(model: nn.Module) -> str | None:
    """Name of the first parameter or buffer that is not finite. Of sharded ones, only this rank's part is checked."""
    for tensors in (model.named_parameters(), model.named_buffers()):
        for name, tensor in tensors:
            if not is_finite(tensor.to_local() if isinstance(tensor, DTensor) else tensor):
                return name
    return None


def is_finite(tensor: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether all values of a tensor are finite, also after conversion to ``dtype``. Waits for its device.

    Args:
        tensor: a tensor of any shape and dtype. Integers and tensors on the meta device count as finite.
        dtype: dtype to which the tensor will be converted; None for its own.
    """
    if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
        return True
    dtype = dtype if dtype is not None and dtype.is_floating_point else tensor.dtype
    # aminmax propagates NaN, and needs no memory for a mask.
    low, high = (tensor.detach() if tensor.itemsize > 1 else tensor.detach().float()).aminmax()
    limit = min(torch.finfo(dtype).max, torch.finfo(tensor.dtype).max)
    return bool((low >= -limit) & (high <= limit))


@contextmanager
def _watching(model: nn.Module, found: list[str]) -> Iterator[None]:
    """Record the first module whose output is not finite while the model runs."""

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and not _all_finite(output):
                side = "output" if _all_finite(inputs) else "input"
                found.append(f"the {side} of layer {name} is the first that is not finite")

        return hook

    handles = [
        module.register_forward_hook(watch(name or type(model).__name__)) for name, module in model.named_modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _all_finite(values: Any) -> bool:
    if isinstance(values, Tensor):
        return is_finite(values.to_local() if isinstance(values, DTensor) else values)
    if isinstance(values, Mapping):
        return all(map(_all_finite, values.values()))
    return all(map(_all_finite, values)) if isinstance(values, list | tuple) else True
