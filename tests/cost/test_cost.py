"""The estimated costs equal those of the models themselves."""

import contextlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from callbacks.ema import EMA
from lightning_modules.generation_order import generation_orders
from lightning_modules.optimization import AdamWConfig, build_adamw
from llamagen.cost import __main__ as cost
from llamagen.cost import gpt as gpt_cost
from llamagen.losses import heads_cross_entropy
from llamagen.models.gpt import GPT, GPTConfig, KVCache
from llamagen.models.sharding import shard
from tests.ranks import run_on_ranks
from tests.small_models import TEXT_GPT, caption_lengths_for, codes_for, condition_for

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "argen"
SIZES = sorted(path.stem for path in (CONFIGS / "size").iterdir())
SMALL = GPTConfig(dim=64, n_layer=2, n_head=4, multiple_of=32, vocab_size=64, block_size=64, num_classes=10)
WIDE = replace(SMALL, dim=256, n_layer=3, n_head=8, vocab_size=128)
GROUPED = replace(SMALL, dim=128, n_layer=4, n_kv_head=2, block_size=16, drop_path=0.2, code_factors=(4, 16))
TEXT = replace(SMALL, condition="text", caption_dim=48, caption_length=9)
RECIPES = replace(SMALL, dim=128, n_kv_head=2, qk_norm=True, adaptive_norm=True, target_aware=True)
TEXT_RECIPES = replace(TEXT, qk_norm=True, target_aware=True)
NO_DROPOUT = {"token_dropout": 0.0, "resid_dropout": 0.0, "ffn_dropout": 0.0}
SHAPES = {
    "small": SMALL,
    "wide": WIDE,
    "grouped": GROUPED,
    "text": TEXT,
    "recipes": RECIPES,
    "text recipes": TEXT_RECIPES,
}


def net_for(size: str) -> GPTConfig:
    return cost.read_run([CONFIGS / "base.yaml", CONFIGS / "size" / f"{size}.yaml"]).net


def built(config: GPTConfig, precision: str, checkpointing: bool = False) -> GPT:
    torch.manual_seed(0)
    gpt = GPT(config).train()
    gpt.checkpoint_activations(checkpointing)
    return gpt.bfloat16() if precision == "bf16-true" else gpt


def loss_of(gpt: GPT, batch_size: int, precision: str) -> Tensor:
    condition, codes = condition_for(gpt, batch_size), codes_for(gpt, batch_size, gpt.config.block_size)
    autocast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else contextlib.nullcontext()
    order = generation_orders(torch.arange(batch_size), 0, 0, 1.0, codes.shape[1])
    places = {"positions": order[:, :-1], "targets": order} if gpt.config.target_aware else {}
    with autocast:
        hidden = gpt.features(codes[:, :-1], condition, caption_lengths=caption_lengths_for(gpt, batch_size), **places)
        return heads_cross_entropy(gpt.head_terms(hidden.flatten(0, 1), codes.flatten())).loss


def logits_of(gpt: GPT, codes: Tensor, condition: Tensor, caption_lengths: Tensor | None = None) -> Tensor:
    """Sum of the logits of all heads in a training step."""
    hidden = gpt.features(codes[:, :-1], condition, caption_lengths=caption_lengths)
    return torch.stack([term.head(term.hidden).sum() for term in gpt.head_terms(hidden, codes)]).sum()


def kept_bytes(gpt: GPT, batch_size: int, precision: str) -> int:
    """Bytes of the storages that autograd keeps for the backward pass, without parameters and buffers."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*gpt.parameters(), *gpt.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in own:
            kept.setdefault(place, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(gpt, batch_size, precision)
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("config", [*map(net_for, SIZES), *SHAPES.values()], ids=[*SIZES, *SHAPES])
def test_parameters_equal_those_of_the_model(config: GPTConfig) -> None:
    with torch.device("meta"):
        gpt = GPT(config)
    assert gpt_cost.parameters(config) == sum(parameter.numel() for parameter in gpt.parameters())


@pytest.mark.parametrize("shape", SHAPES)
def test_operations_of_matrix_products_equal_those_that_pytorch_counts(shape: str) -> None:
    config = SHAPES[shape]
    gpt = built(config, "32-true")
    condition, codes = condition_for(gpt, 3).requires_grad_(config.condition == "text"), codes_for(gpt, 3, 64)
    counter = FlopCounterMode(display=False)
    with counter:
        logits_of(gpt, codes, condition).backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for name, count in counts.items() if "mm" in str(name))
    length = gpt_cost.positions(config)
    attention = 12 * config.n_layer * config.dim * length * (length + 1) / 2
    assert 3 * (gpt_cost.flops_per_sequence(config) - attention) == products


def test_operations_count_causal_attention_and_the_head_but_no_embedding() -> None:
    config = net_for("B")
    blocks = 12 * (4 * 768 * 768 + 3 * 768 * 2048)
    assert gpt_cost.flops_per_token(config) == 6 * (blocks + 768 * 16384) + 12 * 12 * 768 * 257 / 2
    assert gpt_cost.flops_per_sequence(config) == 256 * gpt_cost.flops_per_token(config)
    assert gpt_cost.flops_per_sequence(replace(config, num_classes=5)) == gpt_cost.flops_per_sequence(config)


def test_days_follow_from_operations_and_peak() -> None:
    config = net_for("L")
    assert gpt_cost.gpu_days(config, 1000, 0.25, 400.0) == pytest.approx(
        1000 * gpt_cost.flops_per_sequence(config) / (1e14 * 24 * 3600)
    )


@pytest.mark.parametrize("dropout", [True, False], ids=["dropout", "no dropout"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("precision", gpt_cost.PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_activations_equal_those_that_autograd_keeps(
    shape: str, precision: str, checkpointing: bool, dropout: bool
) -> None:
    config = SHAPES[shape] if dropout else replace(SHAPES[shape], **NO_DROPOUT)
    batch_size = 16 if config.dim == 64 else 4
    estimate = gpt_cost.activations(config, batch_size, precision, checkpointing, cuda=False)
    # For recomputed blocks autograd does not count autocast's copies of the weights, but those of the last adaptive
    # norm and of what is between two heads.
    last = 2 * 2 * config.dim**2 if config.adaptive_norm and precision == "bf16-mixed" else 0
    last += 2 * gpt_cost.second_factor_parameters(config) if precision == "bf16-mixed" else 0
    copies = last if checkpointing else estimate.narrow_weights
    expected = estimate.kept + copies + gpt_cost.head(config, batch_size, precision).kept
    measured = kept_bytes(built(config, precision, checkpointing), batch_size, precision)
    assert measured == pytest.approx(expected, rel=1e-2 if "text" in shape else 1e-4)


def test_a_recomputed_block_takes_the_memory_of_a_kept_one() -> None:
    one, two = (kept_bytes(built(replace(WIDE, n_layer=layers), "32-true"), 4, "32-true") for layers in (1, 2))
    estimate = gpt_cost.activations(WIDE, 4, "32-true", checkpointing=True, cuda=False)
    assert estimate.recomputed == pytest.approx(two - one, rel=0.01)
    assert gpt_cost.activations(WIDE, 4, "32-true").recomputed == 0


def test_masks_are_bytes_and_gpus_pad_odd_heads() -> None:
    length, batch_size = gpt_cost.positions(SMALL), 2
    gpu, cpu = (gpt_cost.activations(SMALL, batch_size, "32-true", cuda=cuda).kept for cuda in (True, False))
    assert cpu == gpu
    without_dropout = gpt_cost.activations(replace(SMALL, **NO_DROPOUT), batch_size, "32-true").kept
    assert gpu - without_dropout == batch_size * length * 64 * (2 * SMALL.n_layer + 1)
    odd = replace(SMALL, n_head=16, **NO_DROPOUT)  # heads of 4, padded to 8
    padded, plain = (gpt_cost.activations(odd, batch_size, "bf16-mixed", cuda=cuda).kept for cuda in (True, False))
    # Queries, keys, values and output are twice as wide. An output without padding is kept too, but not that of wqkv.
    # Also kept is a logsumexp, which attention in bfloat16 on CPUs does not need.
    more = 2 * 64 * (4 * 2 + 1 - 6) + 4 * odd.n_head
    assert padded - plain == batch_size * length * odd.n_layer * more


@pytest.mark.parametrize("precision", gpt_cost.PRECISIONS)
def test_weights_gradients_moments_and_averages_equal_those_of_a_step(precision: str) -> None:
    gpt = built(SMALL, precision)
    optimizer = build_adamw([gpt], AdamWConfig())["optimizer"]
    ema = EMA()
    ema._optimizer, ema._parameters = optimizer, list(gpt.parameters())
    optimizer.register_step_pre_hook(ema._before_step)
    optimizer.register_step_post_hook(ema._after_step)
    loss_of(gpt, 2, precision).backward()
    optimizer.step()
    parts = cost.memory(cost.Run(SMALL, 2, precision, ema=True))
    states = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    assert parts["weights"] == sum(parameter.nbytes for parameter in gpt.parameters())
    assert parts["gradients"] == sum(
        parameter.grad.nbytes for parameter in gpt.parameters() if parameter.grad is not None
    )
    assert parts["moments of AdamW"] + parts["EMA"] == sum(state.nbytes for state in states)
    assert parts["EMA"] * 3 == parts["moments of AdamW"] + parts["EMA"]


def test_memory_without_averages_and_with_ddp() -> None:
    alone = cost.memory(cost.Run(SMALL, 2))
    assert alone["EMA"] == alone["buckets of DDP"] == 0
    assert cost.memory(cost.Run(SMALL, 2, gpus=2))["buckets of DDP"] == alone["gradients"]


def test_the_head_holds_a_limited_number_of_logits() -> None:
    small, large = (gpt_cost.head(net_for("B"), batch_size, "32-true").temporary for batch_size in (256, 512))
    assert large - small == 4 * 256 * 256 * 768  # hidden states only
    assert small - 4 * 256 * 256 * 768 == 4 * (1 << 24)
    assert gpt_cost.head(SMALL, 1, "32-true").temporary == 4 * 64 * 64 + 4 * 64 * 64


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)])
@pytest.mark.parametrize("config", [GROUPED, TEXT_GPT, RECIPES], ids=["grouped", "text", "recipes"])
def test_cache_bytes_per_token_equal_those_of_the_cache(config: GPTConfig, precision: str, dtype: torch.dtype) -> None:
    cache = KVCache.allocate(config, 3, dtype=dtype)
    size = 3 * gpt_cost.positions(config) * gpt_cost.cache_bytes_per_token(config, precision)
    assert size == cache.keys.nbytes + cache.values.nbytes
    vectors = 0 if cache.adaptive is None else cache.adaptive.nbytes
    assert 3 * gpt_cost.cache_bytes_of_adaptive_norms(config) == vectors


def test_the_recipe_of_rar_counts_the_embeddings_of_its_orders(capsys: pytest.CaptureFixture[str]) -> None:
    files = [CONFIGS / "base.yaml", CONFIGS / "rar.yaml"]
    run = cost.read_run(files)
    assert (run.net.target_aware, run.net.qk_norm, run.net.adaptive_norm, run.ema) == (True, True, True, False)
    cost.main([argument for file in files for argument in ("--config", str(file))])
    output = capsys.readouterr().out
    assert f"{gpt_cost.parameters(run.net):,}" in output
    assert f"{4 * (6 * 24 + 2) * 768:,} bytes per sequence" in output
    assert "for 512,000,000 images" in output  # 400 epochs of ImageNet
    assert 255e6 < gpt_cost.parameters(replace(run.net, vocab_size=1024)) < 267e6  # the paper's B has 261 million


def test_later_files_override_earlier_ones_and_the_command_line_overrides_both(tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(
        "trainer: {precision: 32-true, max_epochs: -1, callbacks: [{class_path: callbacks.LearningCurves}]}\n"
        "model: {init_args: {activation_checkpointing: true, net: {dim: 1536, norm_eps: 1e-6}}}\n"
        "data: {init_args: {root: '${nowhere}'}}\n"
    )
    base, both = [CONFIGS / "base.yaml"], [CONFIGS / "base.yaml", overlay]
    net = GPTConfig(dim=768, n_layer=12, n_head=12)
    assert cost.read_run(base) == cost.Run(net, 256, "bf16-mixed", ema=True, gpus=8)
    wider = replace(net, dim=1536, norm_eps=1e-6)
    assert cost.read_run(both) == cost.Run(wider, 256, "32-true", checkpointing=True, gpus=8)
    assert cost.read_run(both, 8, "bf16-true", 3) == cost.Run(wider, 8, "bf16-true", checkpointing=True, gpus=3)


def test_hardware_overlays_set_gpus_batch_size_and_sharding() -> None:
    def run_on(name: str) -> cost.Run:
        return cost.read_run([CONFIGS / "base.yaml", CONFIGS / "hardware" / f"{name}.yaml"])

    found = {path.stem: run_on(path.stem) for path in (CONFIGS / "hardware").iterdir()}
    gpus = {name: (run.gpus, run.batch_size, run.sharded) for name, run in found.items()}
    assert gpus == {
        "one_gpu": (1, 64, False),
        "ddp": (8, 32, False),
        "ddp_nodes": (32, 8, False),
        "fsdp": (8, 64, True),
        "fsdp_nodes": (32, 16, True),
    }
    assert found["fsdp"].checkpointing


@pytest.mark.parametrize("config", [SMALL, RECIPES], ids=["small", "recipes"])
def test_sharding_divides_the_memory_of_parameters(config: GPTConfig) -> None:
    full, parts = (cost.memory(cost.Run(config, 2, ema=True, gpus=4, sharded=flag)) for flag in (False, True))
    for name in ("weights", "gradients", "moments of AdamW", "EMA"):
        assert parts[name] == pytest.approx(full[name] / 4, abs=2)
    assert parts["buckets of DDP"] == parts["autocast's weights"] == full["gathered parameters"] == 0
    block = sum(parameter.numel() for parameter in GPT(config).layers[0].parameters())
    ends = gpt_cost.parameters(config) - config.n_layer * block
    assert parts["gathered parameters"] == 4 * 2 * ends + (2 * 4 + 4 + 4) * block


def _local_bytes(rank: int, config: dict[str, Any]) -> int:
    gpt = GPT(GPTConfig(**config))
    shard(gpt, torch.distributed.init_device_mesh("cpu", (2,)))
    return sum(parameter.to_local().nbytes for parameter in gpt.parameters())  # type: ignore[attr-defined]


def test_a_rank_keeps_the_estimated_part_of_the_parameters(tmp_path: Path) -> None:
    kept = run_on_ranks(_local_bytes, tmp_path, asdict(SMALL))
    estimate = cost.memory(cost.Run(SMALL, 2, gpus=2, sharded=True))["weights"]
    assert kept[0] == pytest.approx(estimate, rel=0.05)
    assert sum(kept) == 4 * gpt_cost.parameters(SMALL)


def test_the_command_prints_the_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--config", str(CONFIGS / "size/L.yaml")]
    cost.main(["--config", str(CONFIGS / "base.yaml"), *size, "--images=1000", "--gpus=2", "--batch_size=16"])
    output = capsys.readouterr().out.splitlines()
    lines = {line[:34].strip(): line[34:].strip() for line in output}
    assert lines["parameters"] == "342,910,976"
    assert lines["training FLOPs per sequence"] == f"{gpt_cost.flops_per_sequence(net_for('L')):.4g} (256 codes)"
    assert lines["memory of a GPU"] == "batch of 16, bf16-mixed, 2 GPUs"
    parts = cost.memory(cost.Run(net_for("L"), 16, "bf16-mixed", ema=True, gpus=2))
    assert lines["EMA"] == f"{4 * 342910976 / 1e9:.2f} GB"
    assert lines["total"] == f"{sum(parts.values()) / 1e9:.2f} GB"
    assert lines["days on all GPUs"].split()[0] == f"{gpt_cost.gpu_days(net_for('L'), 1000, 0.5, 989) / 2:.4g}"


@pytest.mark.parametrize(
    ("text", "options", "complaint"),
    [
        ("model: {init_args: {net: {dim: 64, layers: 2}}}", [], "model.init_args.net has no 'layers'"),
        ("model: {init_args: {net: {dim: 64}}}", [], "model.init_args.net is not a valid configuration"),
        ("model: {init_args: {net: {dim: 64, n_layer: 2, n_head: 3}}}", [], "over n_head 3"),
        ("model: {init_args: {}}", [], "model.init_args.net is missing"),
        ("a: [", [], "cannot be read as YAML"),
        ("- a", [], "is not a mapping"),
        (None, [], "cannot be read"),
        ("{net}", [], "batch_size is None"),
        ("{net}", ["--batch_size=0"], "batch_size is 0"),
        ("{net}\ntrainer: {precision: 16-mixed}", ["--batch_size=2"], "precision is 16-mixed"),
        ("{net}", ["--batch_size=2", "--mfu=1.5"], "mfu is 1.5"),
        ("{net}", ["--batch_size=2", "--peak_tflops=0"], "peak_tflops is 0"),
        ("{net}", ["--batch_size=2", "--images=-1"], "images is -1"),
        ("{net}", ["--batch_size=2", "--gpus=0"], "gpus is 0"),
    ],
)
def test_reports_a_mistake_in_one_line(
    text: str | None, options: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text.replace("{net}", "model: {init_args: {net: {dim: 64, n_layer: 2, n_head: 4}}}"))
    with pytest.raises(SystemExit) as end:
        cost.main(["--config", str(path), *options])
    assert end.value.code == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert complaint in error[0]
    assert len(error) == 1
