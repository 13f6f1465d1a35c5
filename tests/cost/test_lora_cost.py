"""The estimated costs of fine-tuning with LoRA equal those of the models themselves."""

from dataclasses import replace
from pathlib import Path

import pytest
from torch.utils.flop_counter import FlopCounterMode

from lightning_modules.optimization import AdamWConfig, build_adamw
from llamagen.cost import __main__ as cost
from llamagen.cost import gpt as gpt_cost
from llamagen.cost import lora as lora_cost
from llamagen.models.gpt import GPT, GPTConfig
from llamagen.models.lora import Adapters, BaseWeights, LoRAConfig, add_adapters
from tests.cost.test_cost import CONFIGS, SHAPES, SMALL, built, kept_bytes, logits_of, loss_of
from tests.small_models import caption_lengths_for, codes_for, condition_for

LORA = LoRAConfig(rank=8)


def adapted(config: GPTConfig, precision: str, checkpointing: bool = False) -> GPT:
    gpt = built(config, precision, checkpointing)
    add_adapters(gpt, Adapters(LORA, BaseWeights("", "", False), 0), train_classes=True)
    return gpt.bfloat16() if precision == "bf16-true" else gpt


@pytest.mark.parametrize("shape", SHAPES)
def test_trained_parameters_and_operations_equal_those_of_the_model(shape: str) -> None:
    config = SHAPES[shape]
    gpt = adapted(config, "32-true")
    trained = sum(parameter.numel() for parameter in gpt.parameters() if parameter.requires_grad)
    assert lora_cost.trained_parameters(config, LORA, trains_classes=True) == trained
    table = (config.num_classes + 1) * config.dim if config.condition == "class" else 0
    assert lora_cost.adapter_parameters(config, LORA) == trained - table
    condition, codes = condition_for(gpt, 1).requires_grad_(config.condition == "text"), codes_for(gpt, 1, 64)
    with FlopCounterMode(display=False) as counter:
        logits_of(gpt, codes, condition, caption_lengths_for(gpt, 1)).backward()
    products = sum(count for name, count in counter.get_flop_counts()["Global"].items() if "mm" in str(name))
    length = gpt_cost.positions(config)
    attention = 12 * config.n_layer * config.dim * length * (length + 1) / 2
    assert lora_cost.training_flops(config, LORA) - attention == products


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("precision", gpt_cost.PRECISIONS)
@pytest.mark.parametrize("shape", ["small", "grouped", "text"])
def test_activations_equal_those_that_autograd_keeps(shape: str, precision: str, checkpointing: bool) -> None:
    config = SHAPES[shape]
    batch_size = 16 if config.dim == 64 else 4
    estimate = lora_cost.adapter_activations(config, LORA, batch_size, precision, checkpointing, cuda=False)
    # For recomputed blocks autograd does not count autocast's copies of the weights, but those between two heads.
    between = gpt_cost.second_factor_parameters(config) + LORA.rank * lora_cost.second_factor_widths(config)
    recomputed = 2 * between if precision == "bf16-mixed" else 0
    copies = recomputed if checkpointing else estimate.narrow_weights
    expected = estimate.kept + copies + lora_cost.frozen_head(config, batch_size, precision).kept
    measured = kept_bytes(adapted(config, precision, checkpointing), batch_size, precision)
    assert measured == pytest.approx(expected, rel=1e-2 if shape == "text" else 1e-4)


def test_weights_gradients_and_moments_equal_those_of_a_step() -> None:
    gpt = adapted(SMALL, "32-true")
    optimizer = build_adamw([gpt], AdamWConfig())["optimizer"]
    loss_of(gpt, 2, "32-true").backward()
    optimizer.step()
    parts = cost.memory(cost.Run(SMALL, 2, ema=True, lora=LORA, trains_classes=True))
    states = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    assert parts["weights"] == sum(parameter.nbytes for parameter in gpt.parameters())
    assert parts["gradients"] == parts["EMA"] == sum(p.grad.nbytes for p in gpt.parameters() if p.grad is not None)
    assert parts["moments of AdamW"] == sum(state.nbytes for state in states)


def test_the_command_reads_adapters_from_the_configuration(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    files = [CONFIGS / "base.yaml", CONFIGS / "finetune_lora.yaml"]
    run = cost.read_run(files)
    assert run.lora == LoRAConfig(rank=16, alpha=32)
    assert not run.trains_classes
    cost.main([item for file in files for item in ("--config", str(file))])
    assert f"{lora_cost.adapter_parameters(run.net, LoRAConfig(rank=16)):,}" in capsys.readouterr().out
    overlay = tmp_path / "classes.yaml"
    overlay.write_text("model: {init_args: {init_adapt: [num_classes], lora: {rank: 4}}}")
    assert cost.read_run([*files, overlay]) == replace(run, lora=LoRAConfig(rank=4), trains_classes=True)
    for lora, message in (
        ("{depth: 4}", r"model.init_args.lora is not a valid configuration \(.*depth"),
        ("{rank: 999}", "lora.rank is 999, but the smallest layer has a width of 768; choose less"),
        ("true", "model.init_args.lora is True; it must be null, or hold rank, alpha and dropout"),
    ):
        overlay.write_text(f"model: {{init_args: {{lora: {lora}}}}}")
        with pytest.raises(ValueError, match=message):
            cost.read_run([*files, overlay])
