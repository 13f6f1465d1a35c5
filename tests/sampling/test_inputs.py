"""Samplers accept labels, features, seeds and settings in several forms, and reject others in one line."""

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
def class_gpt() -> GPT:
    return GPT(GPTConfig(**SHAPE, vocab_size=64, num_classes=4)).eval()  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def text_gpt() -> GPT:
    config = GPTConfig(**SHAPE, vocab_size=64, condition="text", caption_dim=8, caption_length=5)  # type: ignore[arg-type]
    return GPT(config).eval()


def assert_rejects(phrase: str, call: Any, *given: Any, **options: Any) -> None:
    with pytest.raises(ValueError) as error:
        call(*given, **options)
    assert phrase in str(error.value)
    assert "\n" not in str(error.value)


def test_accepts_labels_of_any_integer_type(class_gpt: GPT) -> None:
    expected = generate(class_gpt, torch.tensor([0, 3]), seed=1)
    for given in (
        [0, 3],
        (0, 3),
        np.array([0, 3], np.uint16),
        np.array([0, 3], ">i4"),
        torch.tensor([0, 3], dtype=torch.uint8),
        [torch.tensor(0), torch.tensor(3)],
        range(0, 4, 3),
    ):
        assert torch.equal(generate(class_gpt, given, seed=1), expected)
    assert torch.equal(generate(class_gpt, 0, seed=1), expected[:1])
    assert torch.equal(generate(class_gpt, np.int64(0), seed=1), expected[:1])


def test_no_conditions_give_no_codes(class_gpt: GPT, text_gpt: GPT) -> None:
    for given in ([], (), np.zeros(0, np.int64), torch.zeros(0, dtype=torch.int64)):
        codes = generate(class_gpt, given)
        assert codes.shape == (0, 4)
        assert codes.dtype == torch.int64
    assert generate(text_gpt, []).shape == (0, 4)


def test_rejects_invalid_labels(class_gpt: GPT) -> None:
    assert_rejects("class 4 was requested", generate, class_gpt, [0, 4])
    assert_rejects("class -1 was requested", generate, class_gpt, [-1])
    assert_rejects("not torch.float64", generate, class_gpt, [0.0])
    assert_rejects("not torch.bool", generate, class_gpt, [True])
    assert_rejects("not caption features", generate, class_gpt, torch.zeros(2, 5, 8))
    assert_rejects("not (1, 2)", generate, class_gpt, [[0, 1]])
    assert_rejects("class labels must be numbers", generate, class_gpt, "dog")
    assert_rejects("class labels must be numbers", generate, class_gpt, ["dog"])
    assert_rejects("class labels must be numbers", generate, class_gpt, None)
    assert_rejects("one shape", generate, class_gpt, [[0, 1], [2]])


def test_accepts_features_in_tensors_and_arrays(text_gpt: GPT) -> None:
    features = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    expected = generate(text_gpt, features, caption_lengths=torch.tensor([2, 5]))
    for lengths in ([2, 5], np.array([2, 5], np.int32)):
        assert torch.equal(generate(text_gpt, features.numpy(), caption_lengths=lengths), expected)
    assert torch.equal(generate(text_gpt, features[0]), generate(text_gpt, features[:1]))


def test_rejects_invalid_caption_features(text_gpt: GPT) -> None:
    assert_rejects("not texts; encode them first", generate, text_gpt, "a dog")
    assert_rejects("not texts; encode them first", generate, text_gpt, ["a dog"])
    assert_rejects("not (2,) of torch.int64", generate, text_gpt, [0, 1])
    assert_rejects("not () of torch.float64", generate, text_gpt, 3.0)
    assert_rejects("not (2, 6, 8)", generate, text_gpt, torch.zeros(2, 6, 8))
    assert_rejects("not (2, 5, 9)", generate, text_gpt, torch.zeros(2, 5, 9))
    assert_rejects("caption_lengths holds 0", generate, text_gpt, torch.zeros(2, 5, 8), caption_lengths=[0, 5])
    assert_rejects("it has shape (1,)", generate, text_gpt, torch.zeros(2, 5, 8), caption_lengths=[5])
    assert_rejects("caption_lengths must be integers", generate, text_gpt, torch.zeros(1, 5, 8), caption_lengths=[1.0])


def test_accepts_any_integer_as_a_seed(class_gpt: GPT) -> None:
    for seed in (-1, 2**70, np.int64(3)):
        assert generate(class_gpt, [0], seed=seed).shape == (1, 4)
    for other in (1.5, None, "1"):
        assert_rejects("it must be an integer", generate, class_gpt, [0], seed=other)


def test_accepts_a_mapping_of_settings(class_gpt: GPT) -> None:
    expected = generate(class_gpt, [0], SamplingConfig(temperature=0.0, top_k=3))
    assert torch.equal(generate(class_gpt, [0], {"temperature": 0.0, "top_k": 3}), expected)
    assert_rejects("config has no 'topk'; it has temperature, top_k", generate, class_gpt, [0], {"topk": 3})
    assert_rejects("config must be a SamplingConfig", generate, class_gpt, [0], 3.0)
    assert_rejects("temperature is '1'; it must be a number", SamplingConfig, temperature="1")
    assert_rejects("top_p is None", SamplingConfig, top_p=None)
    assert_rejects("guidance_start is None", SamplingConfig, guidance_start=None)


def test_rejects_indices_and_batch_sizes_that_are_not_integers(class_gpt: GPT) -> None:
    expected = generate(class_gpt, [0, 1], indices=torch.tensor([5, 6]))
    assert torch.equal(generate(class_gpt, [0, 1], indices=[5, 6]), expected)
    assert_rejects("indices must be integers", generate, class_gpt, [0, 1], indices=[5.0, 6.0])
    for size in (0, -1, 1.5, None, "8"):
        assert_rejects("batch_size is", Sampler, class_gpt, size)


def test_an_image_sampler_accepts_the_same_inputs(class_gpt: GPT) -> None:
    sampler = ImageSampler(class_gpt, VQGAN(SMALL_VQGAN), 2)
    images, codes = sampler([0, 1, 2], seed=3)
    assert torch.equal(codes, generate(class_gpt, [0, 1, 2], seed=3))
    assert images.numpy().shape[0] == 3
    assert sampler([])[1].shape == (0, 4)
    assert_rejects("indices must have shape (3,)", sampler, [0, 1, 2], indices=[1, 2])
    assert_rejects("class 9 was requested", sampler, [0, 1, 9])
    assert_rejects("image_size is 1.5", ImageSampler, class_gpt, VQGAN(SMALL_VQGAN), 2, image_size=1.5)
    larger = GPT(GPTConfig(**SHAPE, vocab_size=SMALL_VQGAN.codebook_size + 1, num_classes=4))  # type: ignore[arg-type]
    assert_rejects("the tokenizer has only", ImageSampler, larger, VQGAN(SMALL_VQGAN), 2)
