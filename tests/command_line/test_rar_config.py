"""``configs/argen/rar.yaml`` is the recipe of RAR's paper, and other overlays can follow it."""

from lightning_modules import AdamWConfig, GenerationOrder
from llamagen.models.gpt import GPTConfig
from llamagen.sampling import SamplingConfig
from tests.command_line.test_configs import differences, parse


def test_the_recipe_of_rar_has_the_values_of_its_paper_and_is_composable() -> None:
    config = parse("fit", ("argen/base.yaml", "argen/hardware/ddp.yaml", "argen/rar.yaml"))
    trainer, model = config["trainer"], config["model"]["init_args"]
    batch = config["data"]["init_args"]["batch_size"] * trainer["devices"] * trainer["accumulate_grad_batches"]
    steps = trainer["max_epochs"] * 1_281_167 // batch
    assert (batch, steps) == (2048, 250_227)
    order, optimizer = GenerationOrder(**model["order"]), AdamWConfig(**model["optimizer"])
    assert [round(step / 1000) for step in order.bounds(steps)] == [125, 188]
    assert optimizer == AdamWConfig(4e-4, [0.9, 0.96], 0.03, 62_500, "cosine", 1e-5)  # type: ignore[arg-type]
    assert trainer["gradient_clip_val"] == 1.0
    assert not any(each["class_path"].endswith("EMA") for each in trainer["callbacks"])
    net = GPTConfig(**model["net"])
    assert (net.n_layer, net.dim, net.n_head, net.ffn_dim) == (24, 768, 16, 2048)
    assert {net.condition_dropout, net.token_dropout, net.resid_dropout, net.ffn_dropout, net.attn_dropout} == {0.1}
    assert (net.qk_norm, net.adaptive_norm) == (True, True)
    sampling = SamplingConfig(**model["sampling"])
    assert sampling == SamplingConfig(guidance_scale=16.0, guidance_schedule="power_cosine", guidance_power=2.75)
    large = parse("fit", ("argen/base.yaml", "argen/rar.yaml", "argen/size/L.yaml", "argen/384px.yaml"))
    changed = [".model.init_args.net.block_size", ".model.init_args.net.dim"]
    assert sorted(differences(parse("fit", ("argen/base.yaml", "argen/rar.yaml")), large)) == changed
