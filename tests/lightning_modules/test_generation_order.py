"""Random generation orders in training, annealed to raster order."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.nn import functional as F

from callbacks import EMA
from lightning_modules import AdamWConfig, ARGenModule, GenerationOrder
from lightning_modules.generation_order import example_numbers, generation_orders, validation_orders
from llamagen.checkpoints.contents import describe
from llamagen.checkpoints.weights import ENTRY, read_weights
from llamagen.models.gpt import GPT
from tests.golden import fill
from tests.lightning_modules.runs import argen_module, datamodule_for, evaluator, train
from tests.pipeline import Pipeline
from tests.small_models import assert_same, codes_for, condition_for, small_gpt

ALL = {"qk_norm": True, "adaptive_norm": True, "n_kv_head": 2}
NUMBERS = torch.arange(2000) * 7919


@pytest.mark.parametrize(
    ("order", "total", "expected"),
    [
        (GenerationOrder(2, 6), math.inf, [1, 1, 1, 0.75, 0.5, 0.25, 0, 0]),
        (GenerationOrder(0.25, 0.75), 8, [1, 1, 1, 0.75, 0.5, 0.25, 0, 0]),
        (GenerationOrder(2, 0.75), 8, [1, 1, 1, 0.75, 0.5, 0.25, 0, 0]),
        (GenerationOrder(1.0, 1.0), 4, [1, 1, 1, 1]),
        (GenerationOrder(0, 0), 4, [0, 0, 0, 0]),
        (GenerationOrder(2, 2), 4, [1, 1, 0, 0]),
        (GenerationOrder(), 4, [1, 1, 1, 0]),
    ],
    ids=str,
)
def test_the_probability_falls_linearly_from_one_to_zero(
    order: GenerationOrder, total: float, expected: list[float]
) -> None:
    assert [order.probability(step, total) for step in range(len(expected))] == expected


@pytest.mark.parametrize(
    ("bounds", "total", "phrase"),
    [
        ((1.5, 2.0), 1, "order.random_until is 1.5; a share of the run is between 0.0 and 1.0"),
        ((0.5, float("nan")), 1, "order.raster_from is nan; a share"),
        ((-1, 5), 1, "order.random_until is -1; it must be at least 0"),
        ((True, 5), 1, "order.random_until is True; it must be an integer"),
        ((0.9, 0.75), 1, "order.raster_from is 0.75, before order.random_until, 0.9; give a later one"),
        ((9, 5), 1, "order.raster_from is 5, before order.random_until, 9; give a later one"),
        ((9, 0.5), 10, r"order.raster_from is 0.5, before order.random_until, 9 \(steps 5 and 9 of 10\)"),
        ((0.5, 0.75), math.inf, "the run has no end; set trainer.max_epochs or trainer.max_steps, or give steps"),
    ],
)  # fmt: skip
def test_rejects_bounds_that_do_not_fit(bounds: tuple[Any, Any], total: float, phrase: str) -> None:
    with pytest.raises(ValueError, match=phrase):
        GenerationOrder(*bounds).bounds(total)


def test_each_example_is_permuted_with_the_probability_and_all_orders_are_equally_likely() -> None:
    raster = torch.arange(4)
    random = generation_orders(NUMBERS, 0, 5, 1.0, 4)
    assert torch.equal(random.sort(dim=1).values, raster.expand(2000, 4))
    _, counts = (random * 10 ** torch.arange(4)).sum(dim=1).unique(return_counts=True)
    assert len(counts) == 24
    assert ((counts - 2000 / 24) ** 2 / (2000 / 24)).sum() < 50  # chi-square with 23 degrees: 50 in 1 of 1,000 runs
    assert torch.equal(generation_orders(NUMBERS, 0, 5, 0.0, 4), raster.expand(2000, 4))
    some = generation_orders(NUMBERS, 0, 5, 0.3, 16)
    permuted = (some != torch.arange(16)).any(dim=1)
    assert permuted.float().mean().item() == pytest.approx(0.3, abs=0.04)
    assert torch.equal(some[permuted], generation_orders(NUMBERS, 0, 5, 1.0, 16)[permuted])


def test_an_order_depends_on_seed_step_and_example_and_not_on_the_batch() -> None:
    keys = [f"train/{number:05d}" for number in range(8)]
    numbers = example_numbers({"keys": keys}, 8, torch.device("cpu"))
    orders = generation_orders(numbers, 3, 7, 0.5, 16)
    for start in (0, 4):
        part = example_numbers({"keys": keys[start : start + 4]}, 4, torch.device("cpu"))
        assert torch.equal(generation_orders(part, 3, 7, 0.5, 16), orders[start : start + 4])
    assert len(generation_orders(numbers, 3, 7, 1.0, 16).unique(dim=0)) == 8
    for seed, step in ((4, 7), (3, 8)):
        assert not torch.equal(generation_orders(numbers, seed, step, 0.5, 16), orders)
    assert example_numbers({}, 3, torch.device("cpu")).tolist() == [0, 1, 2]


def plain_nats(gpt: GPT, codes: Tensor, label: int, order: list[int]) -> Tensor:
    """Nats of each code of one image in the order of generation, (L,) float64, from the definition of the model.

    Each step computes everything again for the sequence so far, with loops over tokens and heads, in float64.
    """
    weights, config = {name: value.double() for name, value in gpt.state_dict().items()}, gpt.config
    side, pairs, head_dim = config.grid_size, config.head_dim // 4, config.head_dim

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean() + config.norm_eps).sqrt() * weight

    def rotated(x: Tensor, position: int | None) -> Tensor:
        if position is None:  # the published models set queries and keys of the condition to zero
            return torch.zeros_like(x)
        turns = [config.rope_base ** (-2 * pair / (head_dim // 2)) for pair in range(pairs)]
        row, column = divmod(position, side)
        angles = [row * turn for turn in turns] + [column * turn for turn in turns]
        numbers = torch.view_as_complex(x.view(-1, 2)) * torch.polar(
            torch.ones(2 * pairs).double(), torch.tensor(angles).double()
        )
        return torch.view_as_real(numbers).flatten()

    embedding = weights["cls_embedding.embedding_table.weight"][label]

    def adapt(name: str) -> list[Tensor]:
        vectors = weights[f"{name}.linear.weight"] @ F.silu(embedding) + weights[f"{name}.linear.bias"]
        return list(vectors.view(-1, config.dim))

    nats = []
    for step, target in enumerate(order):
        positions = [None, *order[:step]]
        stream = [embedding, *(weights["tok_embeddings.weight"][codes[place]] for place in order[:step])]
        stream = [x + weights["target_embeddings.weight"][order[at]] for at, x in enumerate(stream)]
        for layer in range(config.n_layer):
            here = f"layers.{layer}."
            gain, shift, gate, ffn_gain, ffn_shift, ffn_gate = adapt(f"{here}adaptive_norm")
            queries, keys, values = [], [], []
            for x, position in zip(stream, positions, strict=True):
                normed = norm(x, weights[f"{here}attention_norm.weight"]) * (1 + gain) + shift
                heads = (weights[f"{here}attention.wqkv.weight"] @ normed).view(-1, head_dim)
                query, key, value = heads.split([config.n_head, config.kv_heads, config.kv_heads])
                queries.append([rotated(norm(q, weights[f"{here}attention.q_norm.weight"]), position) for q in query])
                keys.append([rotated(norm(k, weights[f"{here}attention.k_norm.weight"]), position) for k in key])
                values.append(value)
            for at in range(step + 1):
                attended = []
                for head in range(config.n_head):
                    group = head // (config.n_head // config.kv_heads)
                    scores = torch.stack([queries[at][head] @ keys[past][group] for past in range(at + 1)])
                    shares = (scores / math.sqrt(head_dim)).softmax(0)
                    attended.append(sum(shares[past] * values[past][group] for past in range(at + 1)))
                x = stream[at] + gate * (weights[f"{here}attention.wo.weight"] @ torch.cat(attended))
                normed = norm(x, weights[f"{here}ffn_norm.weight"]) * (1 + ffn_gain) + ffn_shift
                w1, w2, w3 = (weights[f"{here}feed_forward.w{number}.weight"] for number in (1, 2, 3))
                stream[at] = x + ffn_gate * (w2 @ (F.silu(w1 @ normed) * (w3 @ normed)))
        gain, shift = adapt("adaptive_norm")
        logits = weights["output.weight"] @ (norm(stream[-1], weights["norm.weight"]) * (1 + gain) + shift)
        nats.append(-logits.log_softmax(0)[codes[target]])
    return torch.stack(nats)


def test_the_likelihood_of_a_permuted_sequence_is_that_of_the_permuted_model_computed_without_a_cache() -> None:
    module = ARGenModule(small_gpt(**ALL).config, order=GenerationOrder()).eval()
    fill(module.gpt)
    batch = {"codes": codes_for(module.gpt, 2, 9), "condition": condition_for(module.gpt, 2)}
    order = generation_orders(torch.arange(2), 0, 0, 1.0, 9)
    codes = batch["codes"].gather(1, order).flatten()
    with torch.no_grad():
        nats = F.cross_entropy(module.gpt.output(module._hidden(batch, order)), codes, reduction="none").view(2, 9)
        for row in range(2):
            expected = plain_nats(module.gpt, batch["codes"][row], int(batch["condition"][row]), order[row].tolist())
            torch.testing.assert_close(nats[row].double(), expected, atol=1e-4, rtol=0)


def loss_of(gpt: GPT, batch: dict[str, Any], order: Tensor) -> float:
    """Mean cross entropy of a batch in these orders, in evaluation mode."""
    codes = batch["codes"].gather(1, order)
    with torch.no_grad():
        logits = gpt.eval()(codes[:, :-1], batch["condition"], positions=order[:, :-1], targets=order)
    return F.cross_entropy(logits.flatten(0, 1), codes.flatten()).item()


class Recorder(pl.Callback):
    """Records each batch, the weights before it, its loss, and the logged metrics."""

    def __init__(self) -> None:
        self.steps: list[tuple[dict[str, Any], dict[str, Tensor]]] = []
        self.losses: list[float] = []
        self.random: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append((batch, {name: value.clone() for name, value in pl_module.gpt.state_dict().items()}))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].item())
        self.random.append(trainer.callback_metrics["train/random_order"].item())


class Trained(NamedTuple):
    """A trained module, what was recorded, its last checkpoint, and the metrics at the end."""

    module: ARGenModule
    recorder: Recorder
    checkpoint: Path
    metrics: dict[str, float]


@pytest.fixture(scope="module")
def trained(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A model trained for 8 steps without dropout, annealed from the third to the seventh step, and its validation."""
    plain = argen_module(drop_path=0.0, token_dropout=0.0, resid_dropout=0.0, ffn_dropout=0.0, condition_dropout=0.0)
    pl.seed_everything(5, verbose=False)
    module = ARGenModule(plain.gpt.config, AdamWConfig(lr=1e-2), order=GenerationOrder(2, 0.75))
    recorder, folder = Recorder(), tmp_path_factory.mktemp("random")
    callbacks = [EMA(0.5, validate_raw=True), recorder, ModelCheckpoint(folder, save_last=True)]
    trainer = train(module, pipeline, folder, callbacks=callbacks, max_steps=8)
    return Trained(module, recorder, folder / "last.ckpt", {k: v.item() for k, v in trainer.callback_metrics.items()})


def test_each_step_trains_the_orders_of_its_seed_step_and_examples(trained: Trained) -> None:
    module, recorder = trained.module, trained.recorder
    assert recorder.random == [1, 1, 1, 0.75, 0.5, 0.25, 0, 0]
    gpt = GPT(module.gpt.config)
    for step, (batch, weights) in enumerate(recorder.steps):
        gpt.load_state_dict(weights)
        numbers = example_numbers(batch, len(batch["codes"]), torch.device("cpu"))
        order = generation_orders(numbers, 5, step, recorder.random[step], 16)
        assert recorder.losses[step] == pytest.approx(loss_of(gpt, batch, order), rel=1e-5)


def test_validation_measures_raster_order_and_random_orders_that_are_always_the_same(
    trained: Trained, pipeline: Pipeline
) -> None:
    module, metrics = trained.module, trained.metrics
    data = datamodule_for(module, pipeline, batch_size=300)
    (validated,) = evaluator().validate(module, data, verbose=False)
    (tested,) = evaluator().test(module, datamodule_for(module, pipeline, batch_size=70), verbose=False)
    whole = next(iter(data.val_dataloader()))
    orders = validation_orders(whole)
    gpt = GPT(module.gpt.config)
    gpt.load_state_dict(module.gpt.state_dict())
    expected = {
        "loss": loss_of(gpt, whole, torch.arange(16).expand(300, 16)),
        "loss_random_order": loss_of(gpt, whole, orders),
    }
    assert (orders != torch.arange(16)).any(dim=1).all()
    assert abs(expected["loss"] - expected["loss_random_order"]) > 1e-3
    for name, value in expected.items():
        assert validated[f"val/{name}"] == pytest.approx(value, rel=1e-5)
        assert tested[f"test/{name}"] == pytest.approx(value, rel=1e-5)
    first = {name: value[:8] for name, value in whole.items()}  # what the validation of the training reads
    assert metrics["val_raw/loss_random_order"] == pytest.approx(loss_of(gpt, first, orders[:8]), rel=1e-5)
    assert metrics["val/loss_random_order"] != pytest.approx(metrics["val_raw/loss_random_order"], rel=1e-4)
    assert set(module.metric_names()) <= set(metrics)


def test_the_model_of_a_run_in_random_orders_is_target_aware(trained: Trained) -> None:
    weights = read_weights(trained.checkpoint, averaged=False)
    assert weights.config is not None
    assert weights.config["target_aware"]
    plain = replace(trained.module.gpt.config, target_aware=False)
    again = ARGenModule(plain, init_from=trained.checkpoint, init_averaged=False, order=GenerationOrder())
    assert_same(again.gpt.state_dict(), trained.module.gpt.state_dict())
    with pytest.raises(ValueError, match="target_aware is True, but the model's is False; set target_aware to True"):
        ARGenModule(plain, init_from=trained.checkpoint)


@pytest.mark.parametrize("with_config", [True, False], ids=["own", "published"])
def test_weights_that_are_not_target_aware_are_no_start_for_random_orders(with_config: bool, tmp_path: Path) -> None:
    gpt = small_gpt()
    entry = {ENTRY: describe(gpt, "")} if with_config else {}
    torch.save({"model": gpt.state_dict(), **entry}, tmp_path / "plain.pt")
    assert (read_weights(tmp_path / "plain.pt").config is not None) == with_config
    message = (
        "target_aware is False, but the model's is True; set target_aware to False and leave out order, which needs"
    )
    with pytest.raises(ValueError, match=message):
        ARGenModule(gpt.config, init_from=tmp_path / "plain.pt", order=GenerationOrder())
