"""Augmentation is differentiable, different for each image, and within its ranges."""

import pytest
import torch
from torch import Tensor

from llamagen.models.augmentation import POLICIES, DiscriminatorAugmentation
from tests.small_models import images_for

SIZES = [(32, 32), (24, 40), (33, 17)]


def changed(policy: str, images: Tensor, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    result: Tensor = DiscriminatorAugmentation([policy])(images)
    return result


def ramp(batch_size: int, height: int, width: int) -> Tensor:
    """Images with consecutive pixel values from 1, equal in all channels."""
    numbers = torch.arange(1, height * width + 1, dtype=torch.float32).view(1, 1, height, width)
    return numbers.repeat(batch_size, 3, 1, 1)


def test_an_empty_policy_returns_the_images_and_uses_no_random_numbers() -> None:
    images = images_for(2, 16, 16)
    before = torch.get_rng_state()
    assert DiscriminatorAugmentation()(images) is images
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("policy", "named"), [(["colour"], "'colour'"), (["color", "flip"], "'flip'"), ([""], "''")])
def test_rejects_an_unknown_name(policy: list[str], named: str) -> None:
    with pytest.raises(ValueError, match=f"{named} is unknown; choose from color, translation, cutout"):
        DiscriminatorAugmentation(policy)


def test_rejects_a_repeated_name() -> None:
    with pytest.raises(ValueError, match=r"\['cutout', 'color', 'cutout'\] repeats a name"):
        DiscriminatorAugmentation(["cutout", "color", "cutout"])


@pytest.mark.parametrize("policy", [*((name,) for name in POLICIES), POLICIES], ids="+".join)
@pytest.mark.parametrize("size", SIZES)
def test_every_policy_augments_each_image_differently_and_reproducibly(
    policy: tuple[str, ...], size: tuple[int, int]
) -> None:
    images = images_for(1, *size).repeat(8, 1, 1, 1)
    augment = DiscriminatorAugmentation(policy)
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(augment(images))
    first, again, other = results
    assert first.shape == images.shape
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(augment(images), other), "a second call uses new random numbers"
    assert len({tuple(image.flatten().tolist()) for image in first}) > 4
    assert sum(not torch.equal(before, after) for before, after in zip(images, first, strict=True)) >= 7


@pytest.mark.parametrize("name", POLICIES)
def test_the_order_of_names_does_not_matter(name: str) -> None:
    images = images_for(3, 16, 16)
    results = []
    for policy in (POLICIES, (name, *(other for other in POLICIES if other != name))):
        torch.manual_seed(3)
        results.append(DiscriminatorAugmentation(policy)(images))
    assert torch.equal(*results)


@pytest.mark.parametrize("name", POLICIES)
def test_values_are_not_clipped(name: str) -> None:
    images = 5 * images_for(4, 32, 32)
    result = changed(name, images)
    assert result.max() > 3
    assert result.min() < -3
    if name != "color":  # pixels are moved or removed, never changed
        assert torch.isin(result[result != 0], images).all()


@pytest.mark.parametrize("name", POLICIES)
def test_gradients_match_finite_differences(name: str) -> None:
    images = images_for(3, 16, 16).requires_grad_()
    weights = images_for(3, 16, 16).flip(0)
    (changed(name, images) * weights).sum().backward()
    assert images.grad is not None
    assert (images.grad != 0).float().mean() > 0.5
    direction = images_for(3, 16, 16).flip(3)
    with torch.no_grad():  # every policy is linear in the images, up to a constant
        numeric = ((changed(name, images + direction) - changed(name, images)) * weights).sum()
    torch.testing.assert_close(numeric, (images.grad * direction).sum(), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", ["translation", "cutout"])
def test_only_visible_pixels_get_gradients(name: str) -> None:
    images = ramp(6, 16, 24).requires_grad_()
    result = changed(name, images)
    result.sum().backward()
    assert images.grad is not None
    for image, after, grad in zip(images.detach(), result.detach(), images.grad, strict=True):
        assert torch.equal(grad, torch.isin(image, after).float())


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_translation_shifts_by_full_pixels_up_to_an_eighth_and_fills_with_grey(height: int, width: int) -> None:
    images = ramp(1, height, width).repeat(300, 1, 1, 1)
    result = changed("translation", images)
    seen = set()
    for image in result[:, 0]:
        row, column = (image != 0).nonzero()[0].tolist()
        # The first remaining pixel shows the shift.
        origin = int(image[row, column].item()) - 1
        down, right = row - origin // width, column - origin % width
        expected = torch.zeros(height, width)
        expected[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = images[
            0, 0, max(-down, 0) : height - max(down, 0), max(-right, 0) : width - max(right, 0)
        ]
        assert torch.equal(image, expected)
        seen.add((down, right))
    max_down, max_right = height // 8, width // 8
    assert {down for down, _ in seen} == set(range(-max_down, max_down + 1))
    assert {right for _, right in seen} == set(range(-max_right, max_right + 1))
    assert len({abs(down) - abs(right) for down, right in seen}) > 1, "the two directions are independent"
    assert torch.equal(result[:, 0], result[:, 2]), "channels stay together"


@pytest.mark.parametrize(("size", "side"), [(32, 16), (17, 8)])
def test_cutout_is_a_grey_square_of_half_the_side_at_any_position(size: int, side: int) -> None:
    result = changed("cutout", ramp(400, size, size))
    corners = []
    for image in result:
        holes = (image == 0).nonzero()
        assert len(holes) == 3 * side**2
        first, last = holes.min(0).values, holes.max(0).values
        assert (last - first + 1).tolist() == [3, side, side]
        corners.append(first[1:])
    for corner in torch.stack(corners).T:
        assert set(corner.tolist()) == set(range(size - side + 1))


def test_color_changes_brightness_saturation_and_contrast_within_their_ranges() -> None:
    torch.manual_seed(0)
    count = 500
    # Channels and pixels differ, so the three changes can be measured separately.
    batch = images_for(1, 16, 16)
    result = changed("color", batch.repeat(count, 1, 1, 1))
    brightness = (result - batch).mean((1, 2, 3))
    luma = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)

    def grey_and_rest(images: Tensor) -> tuple[Tensor, Tensor]:
        grey = (images * luma).sum(1, keepdim=True)
        return grey, images - grey

    grey, rest = grey_and_rest(batch)
    new_grey, new_rest = grey_and_rest(result)
    contrast = new_grey.std((1, 2, 3)) / grey.std()
    saturation = new_rest.std((1, 2, 3)) / rest.std() / contrast
    # Contrast preserves the mean, which depends slightly on saturation, because luma weights differ.
    for values, low, high, slack in (
        (brightness, -0.5, 0.5, 0.05),
        (contrast, 0.5, 1.5, 1e-4),
        (saturation, 0, 2, 1e-4),
    ):
        assert low - slack <= values.min() < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < values.max() <= high + slack
        assert abs(values.mean() - (low + high) / 2) < 0.05 * (high - low)
    draws = torch.stack([brightness, contrast, saturation])
    assert (torch.corrcoef(draws) - torch.eye(3)).abs().max() < 0.2, "the three changes are independent"


def test_color_keeps_a_uniform_grey_image_uniform_and_grey() -> None:
    result = changed("color", torch.full((5, 3, 8, 8), 0.25))
    torch.testing.assert_close(result, result[:, :1, :1, :1].expand_as(result))
    assert result.std(0).max() > 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_computes_in_float32_and_returns_the_input_dtype(dtype: torch.dtype) -> None:
    images = images_for(4, 16, 16).to(dtype)
    for policy in POLICIES:
        expected = changed(policy, images.float()).to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            found = changed(policy, images)
        assert found.dtype == dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", POLICIES)
def test_random_numbers_do_not_depend_on_the_default_dtype(name: str) -> None:
    images = images_for(4, 32, 32)
    expected = changed(name, images)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = changed(name, images)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", POLICIES)
def test_the_result_does_not_depend_on_the_memory_format(name: str) -> None:
    images = images_for(4, 16, 16)
    torch.testing.assert_close(
        changed(name, images.to(memory_format=torch.channels_last)), changed(name, images), atol=1e-6, rtol=1e-6
    )


def test_has_no_weights_and_augments_in_evaluation_mode_too() -> None:
    augment = DiscriminatorAugmentation(POLICIES).eval()
    images = images_for(2, 16, 16)
    assert augment.state_dict() == {}
    assert not torch.equal(augment(images), images)
