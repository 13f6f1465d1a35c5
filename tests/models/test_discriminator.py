"""The PatchGAN judges patches, and says so when a picture is smaller than one."""

import pytest
import torch

from llamagen.models.discriminator import PatchGAN
from tests.golden import fill
from tests.small_models import images_for


@pytest.mark.parametrize(("layers", "smallest"), [(1, 6), (2, 12), (3, 24), (4, 48)])
def test_the_smallest_picture_gives_one_patch_and_a_smaller_one_is_refused(layers: int, smallest: int) -> None:
    model = PatchGAN(channels=4, num_layers=layers)
    assert model(images_for(2, smallest, smallest)).shape == (2, 1, 1, 1)
    for size in [(smallest - 1, smallest), (smallest, smallest - 1)]:
        with pytest.raises(RuntimeError):
            model.main(images_for(2, *size))
        with pytest.raises(ValueError) as error:
            model(images_for(2, *size))
        assert f"at least {smallest} px, not {size}" in str(error.value)


@pytest.mark.parametrize(
    ("size", "patches"), [((256, 256), (30, 30)), ((128, 128), (14, 14)), ((64, 96), (6, 10)), ((32, 24), (2, 1))]
)
def test_the_number_of_patches_follows_the_size(size: tuple[int, int], patches: tuple[int, int]) -> None:
    assert PatchGAN(channels=2)(images_for(1, *size)).shape == (1, 1, *patches)


def test_a_patch_sees_seventy_pixels() -> None:
    model = fill(PatchGAN(channels=4)).eval()
    images = images_for(1, 128, 128).requires_grad_()
    model(images)[0, 0, 7, 7].backward()
    assert images.grad is not None
    seen = images.grad[0].abs().sum(0) > 0
    assert (seen.any(0).sum().item(), seen.any(1).sum().item()) == (70, 70)


def test_widths_double_up_to_eight_times() -> None:
    model = PatchGAN(channels=4, num_layers=5)
    widths = [weight.shape[0] for name, weight in model.named_parameters() if weight.dim() == 4]
    assert widths == [4, 8, 16, 32, 32, 32, 1]


def test_weights_start_as_published() -> None:
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
def test_a_shape_that_cannot_be_built_is_refused_by_value(options: dict[str, int]) -> None:
    with pytest.raises(ValueError) as error:
        PatchGAN(**options)
    assert [f"{name} {value}" for name, value in options.items() if f"{name} {value}" not in str(error.value)] == []
