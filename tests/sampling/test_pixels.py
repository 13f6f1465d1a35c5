"""Pixels equal those of the tokenizer, in any batch. The tokenizer is not changed."""

import threading
from math import floor

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from llamagen.models.vqgan import to_uint8
from llamagen.sampling import Images, ImageSampler, PixelDecoder, SamplingConfig, pixels
from llamagen.sampling.pixels import to_pixels
from tests.golden import normal_input
from tests.small_models import assert_same, small_gpt, small_vqgan

CPU = torch.device("cpu")


def some_codes(count: int) -> torch.Tensor:
    return torch.randint(64, (count, 4, 4), generator=torch.Generator().manual_seed(0))


def test_pixels_equal_those_of_the_tokenizer() -> None:
    vqgan, codes = small_vqgan(), some_codes(5)
    images = PixelDecoder(vqgan, CPU, torch.float32)(codes)
    with torch.no_grad():
        expected = to_uint8(vqgan.decode_codes(codes)).permute(0, 2, 3, 1)
    assert images.tensor().dtype is torch.uint8
    assert (images.tensor().int() - expected.int()).abs().max() <= 1
    assert (images.numpy() == images.tensor().numpy()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tokenizer_in_training_decodes_without_dropout(dtype: torch.dtype) -> None:
    codes = some_codes(5)
    expected = PixelDecoder(small_vqgan(), CPU, dtype)(codes).tensor()
    assert torch.equal(PixelDecoder(small_vqgan(dropout=0.5).train(), CPU, dtype)(codes).tensor(), expected)


def bicubic_matrix(new: int, old: int) -> np.ndarray:
    """Weights (new, old) of one axis: Keys' kernel with a = −0.75, half-pixel centres, edges repeated."""
    a, weights = -0.75, np.zeros((new, old))
    for row in range(new):
        centre = (row + 0.5) * old / new - 0.5
        for tap in range(floor(centre) - 1, floor(centre) + 3):
            x = abs(centre - tap)
            near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
            weights[row, min(max(tap, 0), old - 1)] += near if x <= 1 else far
    return weights


@pytest.mark.parametrize(("old", "new"), [(384, 256), (16, 11), (8, 13)])
def test_resizing_is_bicubic_without_antialiasing_before_pixels_are_clamped(old: int, new: int) -> None:
    decoded = normal_input("pixels/decoded", (2, 3, old, old))  # a third of the values are outside of [-1, 1]
    matrix = bicubic_matrix(new, old)
    expected = np.clip(127.5 * (matrix @ decoded.double().numpy() @ matrix.T) + 128, 0, 255).transpose(0, 2, 3, 1)
    found = to_pixels(decoded, new, new).numpy()
    assert (found.dtype, found.shape) == (np.uint8, (2, new, new, 3))
    sure = abs(expected - expected.round()) > 1e-3  # float32 may round the others to either integer
    sure |= (expected == 0) | (expected == 255)
    assert sure.mean() > 0.98
    assert (found == expected.astype(np.uint8))[sure].all()
    clamped = to_pixels(decoded.clamp(-1, 1), new, new).numpy()
    smoothed = to_uint8(F.interpolate(decoded, (new, new), mode="bicubic", antialias=True)).permute(0, 2, 3, 1).numpy()
    assert (abs(clamped - expected) > 2).mean() > 0.2
    assert new > old or (abs(smoothed - expected) > 2).mean() > 0.2


def test_height_and_width_are_resized_independently() -> None:
    decoded = normal_input("pixels/decoded", (2, 3, 8, 12))
    assert to_pixels(decoded, 6, 8).shape == (2, 6, 8, 3)
    assert torch.equal(to_pixels(decoded, 8, 12), to_uint8(decoded).permute(0, 2, 3, 1))


def test_bytes_are_truncated_and_clamped() -> None:
    level = torch.arange(256)
    for part in (0.01, 0.5, 0.99):
        decoded = ((level + part - 128) / 127.5).view(1, 1, 16, 16).expand(1, 3, 16, 16)
        assert to_pixels(decoded, 16, 16)[0, :, :, 1].flatten().tolist() == level.tolist()
    exact = {-1.0: 0, 0.0: 128, 1.0: 255, -1.01: 0, 1.01: 255, -40.0: 0, 40.0: 255, 126.0 / 127.5: 254, 2 / 127.5: 130}
    found = to_pixels(torch.tensor(list(exact)).expand(1, 3, 1, -1), 1, len(exact))
    assert found[0, 0, :, 2].tolist() == list(exact.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoded_images_are_resized_in_float32(dtype: torch.dtype) -> None:
    vqgan, codes = small_vqgan(), some_codes(4)
    decode = PixelDecoder(vqgan, CPU, dtype, image_size=11)
    with torch.no_grad():
        decoded = decode._decoder(decode._post(decode._quantize.lookup(codes).to(dtype)))  # type: ignore[operator]
    assert decoded.dtype is dtype
    resized = F.interpolate(decoded.float(), size=(11, 11), mode="bicubic", align_corners=False, antialias=False)
    difference = decode(codes).tensor().int() - to_uint8(resized).permute(0, 2, 3, 1).int()
    assert (difference != 0).float().mean() < 0.02


def test_images_of_the_right_size_are_not_resized() -> None:
    codes = some_codes(3)
    assert torch.equal(
        PixelDecoder(small_vqgan(), CPU, torch.float32, image_size=16)(codes).tensor(),
        PixelDecoder(small_vqgan(), CPU, torch.float32)(codes).tensor(),
    )


@pytest.mark.parametrize("image_size", [0, -256])
def test_rejects_invalid_image_sizes(image_size: int) -> None:
    with pytest.raises(ValueError, match=rf"image_size is {image_size}; it must be at least 1, or null"):
        ImageSampler(small_gpt(vocab_size=64), small_vqgan(), 3, image_size=image_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("at_a_time", "image_size"), [(1, None), (3, None), (64, None), (3, 11)])
def test_pixels_do_not_depend_on_the_batch(
    at_a_time: int, image_size: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(pixels.PIXELS, "cpu", at_a_time * 16 * 16)
    decode, codes = PixelDecoder(small_vqgan(), CPU, dtype, image_size), some_codes(7)
    together = decode(codes).tensor()
    side = image_size or 16
    assert together.shape == (7, side, side, 3)
    assert torch.equal(torch.cat([decode(part).tensor() for part in codes.split(2)]), together)
    assert torch.equal(decode(codes[[6, 0]]).tensor(), together[[6, 0]])
    assert len(together.flatten(1).unique(dim=0)) == 7


def test_no_codes_give_no_images() -> None:
    assert PixelDecoder(small_vqgan(), CPU, torch.float32)(some_codes(0)).numpy().shape == (0, 16, 16, 3)
    sampler = ImageSampler(small_gpt(vocab_size=64), small_vqgan(), 3)
    images, codes = sampler(torch.empty(0, dtype=torch.int64), SamplingConfig())
    assert images.numpy().shape == (0, 16, 16, 3)
    assert codes.shape == (0, 16)


def test_a_bfloat16_copy_does_not_change_the_tokenizer() -> None:
    vqgan, before = small_vqgan(), small_vqgan().state_dict()
    decode = PixelDecoder(vqgan, CPU, torch.bfloat16)
    assert {weight.dtype for weight in decode._decoder.parameters()} == {torch.bfloat16}
    assert_same(vqgan.state_dict(), before)


def test_several_threads_get_the_same_array() -> None:
    images, found = PixelDecoder(small_vqgan(), CPU, torch.float32)(some_codes(3)), []
    threads = [threading.Thread(target=lambda: found.append(images.numpy())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(array is found[0] for array in found)


def test_images_of_several_batches_keep_their_order() -> None:
    parts = [torch.full((n, 2, 2, 3), n, dtype=torch.uint8) for n in (1, 2)]
    both = Images.concatenate([Images([part], [None]) for part in parts])
    assert both.numpy()[:, 0, 0, 0].tolist() == both.tensor()[:, 0, 0, 0].tolist() == [1, 2, 2]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_call_for_several_batches_gives_the_images_of_single_calls(compiled: bool) -> None:
    gpt, labels = small_gpt(vocab_size=64), torch.arange(7)
    sampler = ImageSampler(gpt, small_vqgan(), 3, compiled=compiled)
    images, codes = sampler(labels, SamplingConfig(guidance_scale=2.0), seed=5)
    for index in range(7):
        one, alone = sampler(
            labels[index : index + 1], SamplingConfig(guidance_scale=2.0), seed=5, indices=torch.tensor([index])
        )
        assert torch.equal(alone[0], codes[index])
        assert (one.numpy()[0] == images.numpy()[index]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_preview_decodes_the_first_rows_and_reads_no_others(dtype: torch.dtype) -> None:
    codes = some_codes(3)
    pixels = PixelDecoder(small_vqgan(), CPU, dtype, image_size=8)
    for rows in (1, 3, 4):
        preview = pixels.preview(codes.flatten(1), rows)
        assert preview.shape == (3, 4 * rows, 16, 3)
        assert preview.dtype is torch.uint8
        other = codes.clone()
        other[:, rows:] = 10**6  # no code of the codebook
        assert torch.equal(pixels.preview(other, rows), preview)
        expected = PixelDecoder(small_vqgan(), CPU, dtype)(codes[:, :rows]).tensor()
        assert (preview.int() - expected.int()).abs().max() <= 1
    for wrong in (0, 5):
        with pytest.raises(ValueError, match=f"rows is {wrong}; a preview of this grid has 1 to 4 rows"):
            pixels.preview(codes, wrong)
