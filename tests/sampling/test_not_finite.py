"""Each engine stops if a value is not finite: in any weight, branch, sample or step."""

import numpy as np
import pytest
import torch
from torch import Tensor

from llamagen.models.gpt import GPT
from llamagen.sampling import Images, ImageSampler, PixelDecoder, Sampler, SamplingConfig, generate
from llamagen.sampling.draws import next_code
from llamagen.sampling.noise import code_counters, seed_tensor
from tests.small_models import caption_lengths_for, condition_for, small_gpt, small_vqgan

ENGINES = {"eager": {}, "compiled": {"compiled": True}, "int8": {"compiled": True, "int8": True}}
NAN, INF = float("nan"), float("inf")


def broken_gpt(name: str, value: float = NAN, row: int = -1) -> GPT:
    """A model with one weight entry that is not finite."""
    gpt = small_gpt()
    with torch.no_grad():
        weight = gpt.get_parameter(name)
        (weight if weight.dim() == 1 else weight[row])[0] = value
    return gpt


def message(gpt: GPT, config: SamplingConfig | None = None, count: int = 3, **engine: bool) -> str:
    with pytest.raises(FloatingPointError) as error:
        Sampler(gpt, 2, **engine)(torch.arange(count), config or SamplingConfig())
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("engine", ENGINES)
def test_each_engine_names_a_weight_that_is_not_finite(engine: str) -> None:
    names = [name for name, _ in small_gpt().named_parameters() if "layers.1" not in name]
    assert len(names) >= 11
    for name in names:
        if name in ("tok_embeddings.weight", "cls_embedding.embedding_table.weight"):
            continue  # only some rows are read
        for value in (NAN, INF):
            error = message(broken_gpt(name, value), SamplingConfig(temperature=0.0), **ENGINES[engine])
            assert error == (
                f"the logits of the autoregressive model are not finite (precision float32): weight {name} is not "
                "finite; the weights are broken: use an earlier checkpoint or another file"
            ), name


@pytest.mark.parametrize("engine", ENGINES)
def test_codes_excluded_by_top_k_and_top_p_are_not_an_error(engine: str) -> None:
    config = SamplingConfig(top_k=3, top_p=0.5, temperature=1e-30, guidance_scale=2.0)
    assert Sampler(small_gpt(), 2, **ENGINES[engine])(torch.arange(3), config).shape == (3, 16)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("scale", [2.0, 0.0])
def test_an_error_in_the_unconditional_branch_alone_is_detected(engine: str, scale: float) -> None:
    gpt = broken_gpt("cls_embedding.embedding_table.weight")  # the last row means no class
    plain = Sampler(gpt, 2, **ENGINES[engine])
    assert plain(torch.arange(3), SamplingConfig()).shape == (3, 16)
    assert "are not finite (" in message(gpt, SamplingConfig(guidance_scale=scale), **ENGINES[engine])
    late = SamplingConfig(guidance_scale=scale, guidance_start=3)
    assert "are not finite (" in message(gpt, late, **ENGINES[engine])


@pytest.mark.parametrize("engine", ENGINES)
def test_one_broken_sample_of_a_batch_is_named(engine: str) -> None:
    gpt = broken_gpt("cls_embedding.embedding_table.weight", row=1)  # class 1
    error = message(gpt, **ENGINES[engine])
    assert "not finite in 1 of 3 examples (first: number 1) (precision float32)" in error
    assert Sampler(gpt, 2, **ENGINES[engine])(torch.tensor([0, 2, 3]), SamplingConfig()).shape == (3, 16)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_error_in_the_last_steps_is_detected(engine: str) -> None:
    codes = Sampler(small_gpt(), 1, **ENGINES[engine])(torch.tensor([0]), SamplingConfig(temperature=0.0))[0]
    late = int(codes[-2])  # read in the last step, or earlier
    gpt = broken_gpt("tok_embeddings.weight", row=late)
    assert "weight tok_embeddings.weight" in message(gpt, SamplingConfig(temperature=0.0), 1, **ENGINES[engine])


@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_an_overflow_names_the_layer(engine: str) -> None:
    gpt = small_gpt()
    with torch.no_grad():
        gpt.layers[1].feed_forward.w1.weight.fill_(1e38)  # type: ignore[union-attr]
        gpt.layers[1].feed_forward.w3.weight.fill_(1e38)  # type: ignore[union-attr]
    error = message(gpt, **ENGINES[engine])
    assert "the output of layer layers.1.feed_forward.w" in error
    assert error.endswith("use 32-true (float32), or weights of an earlier checkpoint")


def test_an_overflow_of_float16_names_the_layer_and_a_better_precision() -> None:
    gpt = small_gpt()
    with torch.no_grad():
        gpt.layers[0].feed_forward.w2.weight.fill_(6e4)  # type: ignore[union-attr]
    gpt.half()
    error = message(gpt)
    assert "(precision float16): the output of layer layers.0.feed_forward.w2 is the first that is not finite" in error
    assert error.endswith("values overflow in float16: use bf16-mixed or 32-true (bfloat16 or float32)")


def test_both_engines_detect_an_overflow_of_guidance() -> None:
    gpt = small_gpt()
    with torch.no_grad():
        gpt.output.weight.mul_(1e37)
    for engine in ("eager", "compiled"):
        assert Sampler(gpt, 2, **ENGINES[engine])(torch.arange(2), SamplingConfig()).shape == (2, 16)
        assert "are not finite" in message(gpt, SamplingConfig(guidance_scale=1e6), **ENGINES[engine])


def test_generate_and_text_models_are_checked() -> None:
    with pytest.raises(FloatingPointError, match="in 1 of 2 examples"):
        generate(broken_gpt("cls_embedding.embedding_table.weight", row=1), torch.arange(2))
    gpt = small_gpt(condition="text")
    features = condition_for(gpt, 3)
    features[1, -1, 0] = NAN
    with pytest.raises(FloatingPointError, match=r"in 1 of 3 examples \(first: number 1\)"):
        generate(gpt, features, caption_lengths=caption_lengths_for(gpt, 3))


def test_a_sampler_works_after_a_batch_that_was_not_finite() -> None:
    gpt = broken_gpt("cls_embedding.embedding_table.weight", row=1)
    for engine in ENGINES.values():
        sampler, fresh = Sampler(gpt, 2, **engine), Sampler(gpt, 2, **engine)
        with pytest.raises(FloatingPointError):
            sampler(torch.tensor([1, 0]))
        assert torch.equal(sampler(torch.tensor([0, 2])), fresh(torch.tensor([0, 2])))


def test_pixels_that_are_not_finite_are_an_error() -> None:
    tokenizer = small_vqgan()
    codes = torch.arange(2 * 16).view(2, 4, 4)
    with torch.no_grad():
        tokenizer.quantize.embedding.weight[20] = NAN  # a code of the second image only
    pixels = PixelDecoder(tokenizer, torch.device("cpu"), torch.float32)
    assert pixels(codes[:1]).numpy().shape == (1, 16, 16, 3)
    with pytest.raises(FloatingPointError, match=r"the pixels that the tokenizer decodes are not finite in 1 of 2 .*"):
        pixels(codes)
    with torch.no_grad():
        tokenizer.quantize.embedding.weight[20] = 1.0
        tokenizer.decoder.mid[0].conv1.weight.fill_(3e38)  # type: ignore[union-attr]
    sampler = ImageSampler(small_gpt(vocab_size=64), tokenizer, 2)
    with pytest.raises(
        FloatingPointError, match=r"the output of layer decoder\.mid\.0\.conv1 is the first that is not"
    ):
        sampler(torch.arange(2), SamplingConfig())


def test_pending_images_are_checked_when_they_are_read() -> None:
    tokenizer = small_vqgan()
    with torch.no_grad():
        tokenizer.quantize.embedding.weight[20] = NAN
    pixels = PixelDecoder(tokenizer, torch.device("cpu"), torch.float32)
    codes = torch.arange(2 * 16).view(2, 4, 4)
    images, broken = pixels._decode(codes)
    pending = Images([images], [None], [pixels._finite_check(broken, codes)])
    both = Images.concatenate([Images([images[:1]], [None]), pending])
    for fetch in (pending.numpy, pending.tensor, both.numpy, both.tensor):
        with pytest.raises(FloatingPointError, match=r"weight quantize\.embedding\.weight is not finite"):
            fetch()
    assert isinstance(Images([images], [None]).numpy(), np.ndarray)


def test_flags_need_no_synchronization() -> None:
    """CUDA graphs and Inductor need it."""

    def flags(logits: Tensor, scale: float) -> list[bool]:
        step = torch.tensor(0)
        arguments = SamplingConfig(), torch.tensor(scale), seed_tensor(0), torch.arange(2), step, code_counters(8)
        return torch.compile(next_code, fullgraph=True, backend="eager")(logits, *arguments)[1].tolist()

    logits = torch.zeros(4, 8)
    assert flags(logits, 2.0) == [False, False]
    logits[3, 5] = INF
    assert flags(logits, 1.0) == flags(logits, 2.0) == [False, True]
    logits[3, 5], logits[0, 0] = 0.0, -INF
    assert flags(logits[:2], 1.0) == [True, False]
