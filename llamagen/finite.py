"""Whether what a model computes is finite, and which of its parts is to blame where it is not. B examples.

Nothing here waits for a device unless it is asked to raise: a :class:`FiniteCheck` keeps its flags where they were
computed, and is looked at once a batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

HALF = ("16-true", "16-mixed", "float16")
"""What a precision with the range of float16 is called."""


class FiniteCheck:
    """Flags of a batch, and how to explain them.

    Args:
        broken: (B,) bool, on any device: True for each example of which something is not finite.
        explain: the rows that are broken → the error. Called only if there are any.
    """

    def __init__(self, broken: Tensor, explain: Callable[[list[int]], FloatingPointError]) -> None:
        self.broken, self.explain = broken, explain

    def __call__(self) -> None:
        """Wait for the flags, and look at them.

        Raises:
            FloatingPointError: if one is set.
        """
        self.look(self.broken)

    def look(self, broken: Tensor) -> None:
        """The same for flags that were fetched already."""
        if rows := broken.nonzero().flatten().tolist():
            raise self.explain(rows)


def not_finite(values: Tensor) -> Tensor:
    """Which of B examples hold something that is not finite, (B,) bool on the same device.

    Args:
        values: (B, …) of any dtype.
    """
    finite = values.isfinite()
    return ~(finite.all(tuple(range(1, values.dim()))) if values.dim() > 1 else finite)


def check_finite(what: str, values: Tensor, precision: str, model: nn.Module, run: Callable[[], Any]) -> None:
    """Look at a batch now.

    Args:
        what: is checked, with its verb: ``the latent is``.
        values: (B, …).
        precision: of the computation.
        model: that made the values.
        run: makes them again.

    Raises:
        FloatingPointError: if something is not finite, see :func:`refusal`.
    """
    broken = not_finite(values)
    FiniteCheck(broken, lambda rows: refusal(what, precision, culprit(model, run), rows, len(broken)))()


def refusal(
    what: str, precision: str, blame: str = "", rows: Sequence[int] = (), count: int = 0, where: str = ""
) -> FloatingPointError:
    """The error of values that are not finite, in one line.

    Args:
        what: is not finite, with its verb.
        precision: of the computation, as it was set, or the name of a dtype.
        blame: see :func:`culprit`.
        rows: which examples of the batch.
        count: size B of the batch.
        where: stage and batch.
    """
    some = f" in {len(rows)} of {count} examples (first: number {rows[0]})" if 0 < len(rows) < count else ""
    if precision in HALF:
        advice = "values leave the range of float16: use bf16-mixed or 32-true (bfloat16 or float32)"
        advice += " and, if that does not help, other weights" if blame.startswith("weight") else ""
    elif blame.startswith("weight"):
        advice = "the weights are broken: use an earlier checkpoint or another file"
    else:
        advice = "use 32-true (float32), or weights of an earlier checkpoint"
    cause = f": {blame}" if blame else ""
    return FloatingPointError(f"{what} not finite{some}{where} (precision {precision}){cause}; {advice}")


@torch.no_grad()
def culprit(model: nn.Module | Mapping[str, nn.Module], run: Callable[[], Any] | None = None) -> str:
    """Where values that are not finite come from: a weight, or else the first layer whose output is not finite.

    It takes as long as a forward pass, so it is for the path of an error only.

    Args:
        model: one, or several by name.
        run: computes the values again, by calls of modules of the model.

    Returns:
        What to say of it; nothing if it cannot be found.
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
    """Name of the first parameter or buffer that is not finite; of parameters spread over ranks those of this rank."""
    for tensors in (model.named_parameters(), model.named_buffers()):
        for name, tensor in tensors:
            if not is_finite(tensor.to_local() if isinstance(tensor, DTensor) else tensor):
                return name
    return None


def is_finite(tensor: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether all numbers of a tensor are finite, also when it is converted. Waits for its device.

    Args:
        tensor: of any dtype; integers and tensors on the meta device are finite.
        dtype: what it will be converted to.
    """
    if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
        return True
    dtype = dtype if dtype is not None and dtype.is_floating_point else tensor.dtype
    # NaN passes through, and no other memory is needed.
    low, high = (tensor.detach() if tensor.itemsize > 1 else tensor.detach().float()).aminmax()
    limit = min(torch.finfo(dtype).max, torch.finfo(tensor.dtype).max)
    return bool((low >= -limit) & (high <= limit))


@contextmanager
def _watching(model: nn.Module, found: list[str]) -> Iterator[None]:
    """Note the first module with an output that is not finite."""

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
