"""The plain loops that benchmarks compare with sample the same codes as ours, so that the comparison is fair."""

import pytest
import torch

from benchmarks.plain_sampling import COMPILED, WAYS, StaticSampler, StaticStep, choose
from llamagen.sampling import SamplingConfig, generate
from tests.small_models import small_gpt

GREEDY = SamplingConfig(temperature=0.0, guidance_scale=3.0)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_samples_the_codes_of_our_sampler(way: str) -> None:
    gpt, labels = small_gpt(n_layer=4), torch.arange(5)
    sampler = StaticSampler(gpt, 5, GREEDY, way, backend="eager")
    expected = generate(gpt, labels, GREEDY)
    for _ in range(2):  # the cache of the first call is full of its own keys
        assert torch.equal(sampler(labels), expected)
    assert torch.equal(sampler(labels, 6), expected[:, :6])


def test_all_blocks_share_one_compilation() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    StaticSampler(small_gpt(n_layer=6), 2, GREEDY, COMPILED, backend="eager")
    counters = torch._dynamo.utils.counters["stats"]
    assert counters["unique_graphs"] == 2  # a block, and the choice of a code
    torch._dynamo.reset()


def test_the_weights_are_shared_with_the_model() -> None:
    gpt = small_gpt()
    step = StaticStep(gpt, 2, GREEDY)
    assert step.output.weight.data_ptr() == gpt.output.weight.data_ptr()
    assert step.layers[1].block.attention["wo"].weight.data_ptr() == gpt.layers[1].attention.wo.weight.data_ptr()


def test_a_code_is_chosen_from_the_guided_top_k() -> None:
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    guided = logits[1] + 2.0 * (logits[0] - logits[1])
    torch.manual_seed(0)
    config = SamplingConfig(guidance_scale=2.0, top_k=3)
    chosen = {int(choose(logits, config)) for _ in range(300)}
    assert chosen == set(guided.topk(3).indices.tolist())
