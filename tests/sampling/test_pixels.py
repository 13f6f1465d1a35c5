"""Pixels are those of the tokenizer, whatever the batch, and the tokenizer stays as it is."""

import threading

import pytest
import torch

from llamagen.models.vqgan import to_uint8
from llamagen.sampling import Pictures, PictureSampler, PixelDecoder, SamplingConfig, pixels
from tests.small_models import assert_same, small_gpt, small_vqgan

CPU = torch.device("cpu")


def some_codes(count: int) -> torch.Tensor:
    return torch.randint(64, (count, 4, 4), generator=torch.Generator().manual_seed(0))


def test_pixels_are_those_of_the_tokenizer() -> None:
    vqgan, codes = small_vqgan(), some_codes(5)
    pictures = PixelDecoder(vqgan, CPU, torch.float32)(codes)
    with torch.no_grad():
        expected = to_uint8(vqgan.decode_codes(codes)).permute(0, 2, 3, 1)
    assert pictures.tensor().dtype is torch.uint8
    assert (pictures.tensor().int() - expected.int()).abs().max() <= 1
    assert (pictures.numpy() == pictures.tensor().numpy()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_a_time", [1, 3, 64])
def test_a_picture_has_the_same_pixels_in_any_batch(
    at_a_time: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(pixels.PIXELS, "cpu", at_a_time * 16 * 16)
    decode, codes = PixelDecoder(small_vqgan(), CPU, dtype), some_codes(7)
    together = decode(codes).tensor()
    assert together.shape == (7, 16, 16, 3)
    assert torch.equal(torch.cat([decode(part).tensor() for part in codes.split(2)]), together)
    assert torch.equal(decode(codes[[6, 0]]).tensor(), together[[6, 0]])
    assert len(together.flatten(1).unique(dim=0)) == 7


def test_no_codes_are_no_pictures() -> None:
    assert PixelDecoder(small_vqgan(), CPU, torch.float32)(some_codes(0)).numpy().shape == (0, 16, 16, 3)
    sampler = PictureSampler(small_gpt(vocab_size=64), small_vqgan(), 3)
    pictures, codes = sampler(torch.empty(0, dtype=torch.int64), SamplingConfig())
    assert pictures.numpy().shape == (0, 16, 16, 3)
    assert codes.shape == (0, 16)


def test_a_copy_in_bfloat16_leaves_the_tokenizer_as_it_is() -> None:
    vqgan, before = small_vqgan(), small_vqgan().state_dict()
    decode = PixelDecoder(vqgan, CPU, torch.bfloat16)
    assert {weight.dtype for weight in decode._decoder.parameters()} == {torch.bfloat16}
    assert_same(vqgan.state_dict(), before)


def test_several_threads_get_the_same_array() -> None:
    pictures, found = PixelDecoder(small_vqgan(), CPU, torch.float32)(some_codes(3)), []
    threads = [threading.Thread(target=lambda: found.append(pictures.numpy())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(array is found[0] for array in found)


def test_pictures_of_several_batches_come_in_order() -> None:
    parts = [torch.full((n, 2, 2, 3), n, dtype=torch.uint8) for n in (1, 2)]
    both = Pictures.together([Pictures([part], [None]) for part in parts])
    assert both.numpy()[:, 0, 0, 0].tolist() == both.tensor()[:, 0, 0, 0].tolist() == [1, 2, 2]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_call_for_more_pictures_than_a_batch_gives_those_of_single_calls(compiled: bool) -> None:
    gpt, labels = small_gpt(vocab_size=64), torch.arange(7)
    sampler = PictureSampler(gpt, small_vqgan(), 3, compiled=compiled)
    pictures, codes = sampler(labels, SamplingConfig(guidance_scale=2.0), seed=5)
    for index in range(7):
        one, alone = sampler(
            labels[index : index + 1], SamplingConfig(guidance_scale=2.0), seed=5, indices=torch.tensor([index])
        )
        assert torch.equal(alone[0], codes[index])
        assert (one.numpy()[0] == pictures.numpy()[index]).all()
