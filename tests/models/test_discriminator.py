"""PatchGAN gives logits of patches, StyleGAN one logit per image; both reject images of unsuitable sizes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llamagen.distributed.sync_batch_norm import SyncBatchNorm2d
from llamagen.models.discriminator import Blur, Discriminator, PatchGAN, StyleGAN
from tests.golden import assert_matches, fill, golden, normal_input, published_state_dict
from tests.small_models import images_for


@pytest.mark.parametrize(("layers", "smallest"), [(1, 6), (2, 12), (3, 24), (4, 48)])
def test_the_smallest_image_gives_one_patch_and_smaller_ones_are_rejected(layers: int, smallest: int) -> None:
    model = PatchGAN(channels=4, num_layers=layers)
    assert model(images_for(2, smallest, smallest)).shape == (2, 1, 1, 1)
    for size in [(smallest - 1, smallest), (smallest, smallest - 1)]:
        with pytest.raises(RuntimeError):
            model.main(images_for(2, *size))
        with pytest.raises(ValueError) as error:
            model(images_for(2, *size))
        assert f"images have {smallest - 1} px, but the discriminator needs at least {smallest}" in str(error.value)


@pytest.mark.parametrize(
    ("size", "patches"), [((256, 256), (30, 30)), ((128, 128), (14, 14)), ((64, 96), (6, 10)), ((32, 24), (2, 1))]
)
def test_the_number_of_patches_depends_on_the_image_size(size: tuple[int, int], patches: tuple[int, int]) -> None:
    assert PatchGAN(channels=2)(images_for(1, *size)).shape == (1, 1, *patches)


def test_the_receptive_field_is_70_pixels() -> None:
    model = fill(PatchGAN(channels=4)).eval()
    images = images_for(1, 128, 128).requires_grad_()
    model(images)[0, 0, 7, 7].backward()
    assert images.grad is not None
    seen = images.grad[0].abs().sum(0) > 0
    assert (seen.any(0).sum().item(), seen.any(1).sum().item()) == (70, 70)


def test_channels_double_up_to_a_factor_of_eight() -> None:
    model = PatchGAN(channels=4, num_layers=5)
    widths = [weight.shape[0] for name, weight in model.named_parameters() if weight.dim() == 4]
    assert widths == [4, 8, 16, 32, 32, 32, 1]


def test_weights_are_initialised_as_published() -> None:
    torch.manual_seed(0)
    model = PatchGAN()
    for name, module in model.main.named_children():
        if isinstance(module, torch.nn.Conv2d):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1), name
            assert (module.bias is not None) == (name in ("0", "11"))
        elif isinstance(module, torch.nn.BatchNorm2d):
            assert module.weight.mean().item() == pytest.approx(1.0, abs=0.01)
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.25)
            assert module.bias.abs().max() == 0


@pytest.mark.parametrize("options", [{"channels": 0}, {"num_layers": 0}, {"channels": -3, "num_layers": 2}], ids=str)
def test_rejects_invalid_options_with_their_values(options: dict[str, int]) -> None:
    with pytest.raises(ValueError) as error:
        PatchGAN(**options)
    assert [f"{name} {value}" for name, value in options.items() if f"{name} {value}" not in str(error.value)] == []


def test_norms_are_synchronised_over_ranks() -> None:
    norms = [module for module in PatchGAN(channels=2).modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert [type(norm) for norm in norms] == [SyncBatchNorm2d] * 3


def test_stylegan_matches_the_published_logits() -> None:
    record = golden("StyleGAN")
    images = normal_input("StyleGAN/image", (2, 3, record["size"], record["size"])).tanh()
    with torch.no_grad():
        logits = fill(StyleGAN(record["size"])).train()(images)
    assert_matches(logits, record["logits_train"])


def test_stylegan_has_the_published_state_dict_and_256_px_by_default() -> None:
    parameters, entries = published_state_dict("StyleGAN 256")
    with torch.device("meta"):
        model = StyleGAN()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    found = {
        name: (str(value.dtype).removeprefix("torch."), tuple(value.shape))
        for name, value in model.state_dict().items()
    }
    assert found == entries


@pytest.mark.parametrize(
    ("size", "widths"),
    [
        (8, [512, 512]),
        (32, [512, 512, 512, 512]),
        (64, [256, 512, 512, 512, 512]),
        (1024, [16, 32, 64, 128, 256, 512, 512, 512, 512]),
    ],
)
def test_stylegan_has_more_channels_at_lower_resolutions(size: int, widths: list[int]) -> None:
    with torch.device("meta"):
        model = StyleGAN(size)
        assert model(torch.empty(2, 3, size, size)).shape == (2, 1)
    weights = dict(model.named_parameters())
    blocks = [weights[f"blocks.{2 + index}.conv_res.weight"] for index in range(len(widths) - 1)]
    assert [weights["blocks.0.weight"].shape[0], *(weight.shape[0] for weight in blocks)] == widths
    assert f"blocks.{1 + len(widths)}.conv_res.weight" not in weights


@pytest.mark.parametrize("size", [0, 4, 48, 100, 2048, -8])
def test_stylegan_rejects_sizes_that_are_not_supported(size: int) -> None:
    with pytest.raises(ValueError, match=f"image_size is {size}; .*power of two from 8 to 1024"):
        StyleGAN(size)


@pytest.mark.parametrize(("height", "width", "named"), [(8, 8, 8), (16, 32, 32), (32, 16, 32)])
def test_stylegan_rejects_images_of_another_size(height: int, width: int, named: int) -> None:
    with torch.device("meta"):
        model = StyleGAN(16)
        with pytest.raises(ValueError, match=f"images have {named} px, but the discriminator is built for 16"):
            model(torch.empty(1, 3, height, width))


@pytest.mark.parametrize(
    ("model", "fitting", "others"), [("patch", (24, 25, 256), (23, 8)), ("style", (32,), (31, 64))]
)
def test_check_size_needs_no_images(model: str, fitting: tuple[int, ...], others: tuple[int, ...]) -> None:
    with torch.device("meta"):
        discriminator: Discriminator = PatchGAN() if model == "patch" else StyleGAN(32)
    for size in fitting:
        discriminator.check_size(size)
    for size in others:
        with pytest.raises(ValueError, match=f"images have {size} px"):
            discriminator.check_size(size)


def test_blur_is_binomial_and_reflects_at_the_border() -> None:
    images = torch.zeros(1, 2, 5, 5)
    images[0, 0, 2, 2] = 16.0
    images[0, 1, 0, 1] = 16.0
    inside, border = Blur()(images)[0]
    binomial = torch.tensor([0.0, 1.0, 2.0, 1.0, 0.0])
    torch.testing.assert_close(inside, torch.outer(binomial, binomial))
    # Reflection: the row above the first is the second, and so is the column left of the first, which has the point.
    torch.testing.assert_close(
        border, torch.outer(torch.tensor([2.0, 1.0, 0.0, 0.0, 0.0]), torch.tensor([2.0, 2.0, 1.0, 0.0, 0.0]))
    )


@pytest.mark.parametrize("kind", ["patch", "style"])
def test_logits_do_not_depend_on_the_memory_format(kind: str) -> None:
    model = fill(PatchGAN(channels=4, num_layers=1) if kind == "patch" else StyleGAN(8)).eval()
    images = images_for(2, 8, 8)
    other = model.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(other, model.to(memory_format=torch.contiguous_format)(images), atol=1e-5, rtol=1e-5)


def test_stylegan_trains_under_autocast() -> None:
    model = fill(StyleGAN(8))
    images = images_for(2, 8, 8).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), model(images), atol=0.05, rtol=0)
    logits.sum().backward()
    for tensor in (images, *model.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.abs().sum() > 0


def test_kornia_is_imported_only_when_it_is_used() -> None:
    code = (
        "import sys, llamagen.models.discriminator, llamagen.models.augmentation, llamagen.models.lpips;"
        "assert not {'kornia', 'safetensors', 'torchmetrics'} & set(sys.modules)"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, timeout=120)
