"""Labels, features, seeds and settings are taken as people pass them, and else refused in one line."""

from typing import Any

import numpy as np
import pytest
import torch

from llamagen.models.gpt import GPT, GPTConfig
from llamagen.models.vqgan import VQGAN
from llamagen.sampling import ImageSampler, Sampler, SamplingConfig, generate
from tests.small_models import SMALL_VQGAN

SHAPE = {"dim": 32, "n_layer": 1, "n_head": 2, "multiple_of": 32, "block_size": 4}


@pytest.fixture(scope="module")
def of_classes() -> GPT:
    return GPT(GPTConfig(**SHAPE, vocab_size=64, num_classes=4)).eval()  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def of_text() -> GPT:
    config = GPTConfig(**SHAPE, vocab_size=64, condition="text", caption_dim=8, caption_length=5)  # type: ignore[arg-type]
    return GPT(config).eval()


def refused(phrase: str, call: Any, *given: Any, **options: Any) -> None:
    with pytest.raises(ValueError) as error:
        call(*given, **options)
    assert phrase in str(error.value)
    assert "\n" not in str(error.value)


def test_labels_are_taken_in_any_form(of_classes: GPT) -> None:
    expected = generate(of_classes, torch.tensor([0, 3]), seed=1)
    for given in (
        [0, 3],
        (0, 3),
        np.array([0, 3], np.uint16),
        np.array([0, 3], ">i4"),
        torch.tensor([0, 3], dtype=torch.uint8),
        [torch.tensor(0), torch.tensor(3)],
        range(0, 4, 3),
    ):
        assert torch.equal(generate(of_classes, given, seed=1), expected)
    assert torch.equal(generate(of_classes, 0, seed=1), expected[:1])
    assert torch.equal(generate(of_classes, np.int64(0), seed=1), expected[:1])


def test_no_labels_give_no_codes(of_classes: GPT, of_text: GPT) -> None:
    for given in ([], (), np.zeros(0, np.int64), torch.zeros(0, dtype=torch.int64)):
        codes = generate(of_classes, given)
        assert codes.shape == (0, 4)
        assert codes.dtype == torch.int64
    assert generate(of_text, []).shape == (0, 4)


def test_what_are_no_labels_is_refused(of_classes: GPT) -> None:
    refused("class 4 was requested", generate, of_classes, [0, 4])
    refused("class -1 was requested", generate, of_classes, [-1])
    refused("not torch.float64", generate, of_classes, [0.0])
    refused("not torch.bool", generate, of_classes, [True])
    refused("not caption features", generate, of_classes, torch.zeros(2, 5, 8))
    refused("not (1, 2)", generate, of_classes, [[0, 1]])
    refused("class labels must be numbers", generate, of_classes, "dog")
    refused("class labels must be numbers", generate, of_classes, ["dog"])
    refused("class labels must be numbers", generate, of_classes, None)
    refused("one shape", generate, of_classes, [[0, 1], [2]])


def test_features_are_taken_in_any_form(of_text: GPT) -> None:
    features = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    expected = generate(of_text, features, caption_lengths=torch.tensor([2, 5]))
    for lengths in ([2, 5], np.array([2, 5], np.int32)):
        assert torch.equal(generate(of_text, features.numpy(), caption_lengths=lengths), expected)
    assert torch.equal(generate(of_text, features[0]), generate(of_text, features[:1]))


def test_what_are_no_features_is_refused(of_text: GPT) -> None:
    refused("not texts; encode them first", generate, of_text, "a dog")
    refused("not texts; encode them first", generate, of_text, ["a dog"])
    refused("not (2,) of torch.int64", generate, of_text, [0, 1])
    refused("not () of torch.float64", generate, of_text, 3.0)
    refused("not (2, 6, 8)", generate, of_text, torch.zeros(2, 6, 8))
    refused("not (2, 5, 9)", generate, of_text, torch.zeros(2, 5, 9))
    refused("caption_lengths holds 0", generate, of_text, torch.zeros(2, 5, 8), caption_lengths=[0, 5])
    refused("it has shape (1,)", generate, of_text, torch.zeros(2, 5, 8), caption_lengths=[5])
    refused("caption_lengths must be integers", generate, of_text, torch.zeros(1, 5, 8), caption_lengths=[1.0])


def test_seeds_are_any_whole_numbers(of_classes: GPT) -> None:
    for seed in (-1, 2**70, np.int64(3)):
        assert generate(of_classes, [0], seed=seed).shape == (1, 4)
    for other in (1.5, None, "1"):
        refused("it must be an integer", generate, of_classes, [0], seed=other)


def test_settings_may_be_a_mapping(of_classes: GPT) -> None:
    expected = generate(of_classes, [0], SamplingConfig(temperature=0.0, top_k=3))
    assert torch.equal(generate(of_classes, [0], {"temperature": 0.0, "top_k": 3}), expected)
    refused("config has no 'topk'; it has temperature, top_k", generate, of_classes, [0], {"topk": 3})
    refused("config must be a SamplingConfig", generate, of_classes, [0], 3.0)
    refused("temperature is '1'; it must be a number", SamplingConfig, temperature="1")
    refused("top_p is None", SamplingConfig, top_p=None)
    refused("guidance_start is None", SamplingConfig, guidance_start=None)


def test_indices_and_batch_sizes_are_whole_numbers(of_classes: GPT) -> None:
    expected = generate(of_classes, [0, 1], indices=torch.tensor([5, 6]))
    assert torch.equal(generate(of_classes, [0, 1], indices=[5, 6]), expected)
    refused("indices must be integers", generate, of_classes, [0, 1], indices=[5.0, 6.0])
    for size in (0, -1, 1.5, None, "8"):
        refused("batch_size is", Sampler, of_classes, size)


def test_a_sampler_of_images_takes_the_same(of_classes: GPT) -> None:
    sampler = ImageSampler(of_classes, VQGAN(SMALL_VQGAN), 2)
    images, codes = sampler([0, 1, 2], seed=3)
    assert torch.equal(codes, generate(of_classes, [0, 1, 2], seed=3))
    assert images.numpy().shape[0] == 3
    assert sampler([])[1].shape == (0, 4)
    refused("indices must have shape (3,)", sampler, [0, 1, 2], indices=[1, 2])
    refused("class 9 was requested", sampler, [0, 1, 9])
    refused("image_size is 1.5", ImageSampler, of_classes, VQGAN(SMALL_VQGAN), 2, image_size=1.5)
    larger = GPT(GPTConfig(**SHAPE, vocab_size=SMALL_VQGAN.codebook_size + 1, num_classes=4))  # type: ignore[arg-type]
    refused("the tokenizer has only", ImageSampler, larger, VQGAN(SMALL_VQGAN), 2)
