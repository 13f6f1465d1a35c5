"""Initial weights of tokenizer and discriminator."""

from pathlib import Path

from lightning_utilities.core.rank_zero import rank_zero_warn

from llamagen.checkpoints.contents import check_quantizer
from llamagen.checkpoints.weights import load_weights, read_weights
from llamagen.models.discriminator import Discriminator
from llamagen.models.vqgan import VQGAN
from llamagen.option_checks import option_named


def start_from(
    path: Path | str, averaged: bool, vqgan: VQGAN, discriminator: Discriminator | None
) -> ValueError | None:
    """Load the weights of ``init_from``. A file without a discriminator leaves the new one as it is, with a warning.

    Args:
        path: file of weights, published name or ``hf://`` address.
        averaged: take averaged (EMA) weights if the file has them.
        vqgan: destination.
        discriminator: destination; None if the run has none.

    Returns:
        The error of a discriminator that does not fit, which matters for training only.

    Raises:
        ValueError: in one line, if the weights cannot be read or do not fit the tokenizer.
    """
    with option_named("init_from"):
        weights = read_weights(path, averaged)
    if weights.architecture not in (None, "VQGAN"):
        raise ValueError(f"init_from {path} holds a {weights.architecture}, not a VQGAN; give a tokenizer's weights")
    with option_named("init_from"):
        check_quantizer(weights.config, vqgan, weights.source)
        load_weights(vqgan, weights.state, weights.source)
    vqgan.codes_of = weights.codes_of
    if discriminator is None:
        return None
    if weights.discriminator is None:
        rank_zero_warn(f"{path} has no discriminator: training starts with a new one")
        return None
    remedy = "set model.init_args.discriminator to its class, or remove it with llamagen.checkpoints.export"
    try:
        load_weights(discriminator, weights.discriminator, f"the discriminator of {path} ({remedy})")
    except ValueError as error:
        return error
    return None
