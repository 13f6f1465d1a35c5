"""Evaluation mode of a model that several threads may sample from at the same time."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import nn


@dataclass
class _Use:
    """Calls that currently use a model, and the mode that each module had before the first of them."""

    modes: list[tuple[nn.Module, bool]]
    calls: int = 0


# All threads share the modes of modules and the compiler's stance. If each call restored the mode that it had found, a
# call could end and switch the model back to training while another one still runs. So the first call switches and the
# last one restores. The lock is held for the switch only, never while a model computes.
_switch = Lock()
_uses: dict[nn.Module, _Use] = {}
_stance: list[Any] = []


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode and run its compiled blocks eagerly; restore both at the end.

    Blocks that are compiled for training would be compiled again for each length of the cache.

    Args:
        model: the model; its submodules may be in different modes.
    """
    with _switch:
        if not _uses:
            _stance.append(torch.compiler.set_stance("force_eager"))
        if model not in _uses:
            modes = [(module, module.training) for module in model.modules()]
            is_training = any(training for _, training in modes)
            _uses[model] = _Use(modes if is_training else [])  # setting modes takes longer than a pass of a tiny model
            if is_training:
                model.eval()
        use = _uses[model]
        use.calls += 1
    try:
        yield
    finally:
        with _switch:
            use.calls -= 1
            if not use.calls:
                del _uses[model]
                for module, training in use.modes:
                    module.training = training
            if not _uses:
                _stance.pop().__exit__(None, None, None)
