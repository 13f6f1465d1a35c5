"""Frozen parts of the tokenizer, for a run that trains the rest of it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from llamagen.checkpoints.lineage import codes_of
from llamagen.models.vqgan import VQGAN

PARTS = ("encoder", "quantizer")
FREEZE = "freeze"
"""Key of the frozen parts in ``checkpoint["llamagen"]``."""


class FrozenParts:
    """The parts of a tokenizer that keep their initial weights, bit for bit.

    Args:
        parts: any of :data:`PARTS`; ``encoder`` includes ``quant_conv``.
        init_from: initial weights of the run.
        revive_codes_every: its interval of code revival, which moves codes.
        entropy_weight: its weight of the entropy loss, whose means over ranks need a quantiser in training mode.

    Attributes:
        parts: the parts in the order of :data:`PARTS`.

    Raises:
        ValueError: in one line, if a part is unknown, there are no initial weights, or another option needs the part.
    """

    def __init__(
        self, parts: Sequence[str], init_from: str | Path | None, revive_codes_every: int, entropy_weight: float
    ) -> None:
        if isinstance(parts, str):
            raise ValueError(f"freeze is {parts!r}; give a list, [{parts}]")
        if unknown := [part for part in parts if part not in PARTS]:
            raise ValueError(f"freeze has {unknown[0]!r}; choose from {', '.join(PARTS)}")
        if parts and init_from is None:
            raise ValueError(f"freeze is {_listed(parts)}, but init_from is not given; give the weights to freeze")
        if "quantizer" in parts and revive_codes_every:
            raise ValueError(
                f"revive_codes_every is {revive_codes_every}, but freeze has quantizer, whose codes do not move; set "
                "revive_codes_every to 0"
            )
        if "quantizer" in parts and "encoder" not in parts and entropy_weight > 0:
            raise ValueError(
                f"loss.entropy_weight is {entropy_weight}, but freeze has quantizer; set loss.entropy_weight to 0, or "
                "also freeze the encoder"
            )
        self.parts = tuple(part for part in PARTS if part in parts)

    @property
    def keeps_codes(self) -> bool:
        """Whether everything that determines codes is frozen."""
        return self.parts == PARTS

    def freeze(self, vqgan: VQGAN) -> None:
        """Freeze the parts of a tokenizer that holds its initial weights, and record whose codes it keeps.

        Images need no gradient, so a frozen encoder keeps no activations and has no backward pass.
        """
        for module in self._modules_of(vqgan):
            module.requires_grad_(False)
        if "encoder" in self.parts:
            vqgan.encoder.checkpoint_activations = False  # nothing is computed again
        if self.keeps_codes:
            vqgan.codes_of = codes_of(vqgan)

    def eval(self, vqgan: VQGAN) -> None:
        """Put the parts into evaluation mode: no dropout, and no update of codes."""
        for module in self._modules_of(vqgan):
            module.eval()

    def _modules_of(self, vqgan: VQGAN) -> list[nn.Module]:
        encoder = [vqgan.encoder, vqgan.quant_conv] if "encoder" in self.parts else []
        return [*encoder, *([vqgan.quantize] if "quantizer" in self.parts else [])]

    def check_precision(self, precision: Any) -> None:
        """Check that the precision of training does not change frozen weights.

        Raises:
            ValueError: in one line, if it casts them.
        """
        if self.parts and precision == "bf16-true":
            raise ValueError(
                f"trainer.precision is bf16-true, which would round the weights of freeze {_listed(self.parts)}; train "
                "in bf16-mixed, 16-mixed or 32-true"
            )

    def check_resumed(self, entry: Mapping[str, Any]) -> None:
        """Check that a run is resumed with the same parts: the optimizer's state is that of all other parameters.

        Args:
            entry: ``checkpoint["llamagen"]``.

        Raises:
            ValueError: in one line, if they differ.
        """
        saved = entry.get(FREEZE, [])
        if list(saved) != list(self.parts):
            raise ValueError(
                f"the checkpoint's run has freeze {_listed(saved)}, but model.init_args.freeze is "
                f"{_listed(self.parts)}; set it to {_listed(saved)}, or start a new run with model.init_args.init_from"
            )


def _listed(parts: Sequence[str]) -> str:
    return f"[{', '.join(parts)}]"
