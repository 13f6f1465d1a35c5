"""Quantisers beyond the paper's, one file each. A configuration names one as ``llamagen.models.quantizers.FSQ``."""

from llamagen.models.quantizers.fsq import FSQ
from llamagen.models.quantizers.ibq import IBQ
from llamagen.models.quantizers.lfq import LFQ
from llamagen.models.quantizers.residual import Residual
from llamagen.models.quantizers.simvq import SimVQ

__all__ = ["FSQ", "IBQ", "LFQ", "Residual", "SimVQ"]
