"""Each quantiser's configuration can be combined with that of the small tokenizer."""

from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from lightning_modules import VQGANModule, models_on_meta_device
from tests.command_line.test_configs import CONFIGS, parse

QUANTIZERS = sorted(path.name for path in (CONFIGS / "vqgan/quantizer").iterdir())


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_small_tokenizer_with_this_quantiser_is_built(name: str) -> None:
    config = parse("fit", ("vqgan/base.yaml", "vqgan/small.yaml", f"vqgan/quantizer/{name}"))
    parser = ArgumentParser()
    parser.add_class_arguments(VQGANModule, "model")
    with models_on_meta_device():
        module = parser.instantiate(parser.parse_object({"model": config["model"]["init_args"]})).model
    has_codes_to_move = Path(name).stem in ("ema", "ibq")
    assert (module.revival is not None) == has_codes_to_move
    assert module.vqgan.quantize.size == module.vqgan.config.codebook_size > 512
