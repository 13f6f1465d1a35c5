"""LPIPS matches published values and is a fixed function."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llamagen.models import lpips
from llamagen.models.lpips import LPIPS
from tests.golden import golden, normal_input
from tests.small_models import images_for
from tests.vgg16 import PUBLISHED, vgg16_state

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    return dict(vgg16_state())


@pytest.fixture(scope="module")
def model(state: State) -> LPIPS:
    return LPIPS(state)


def pair(size: int = 32) -> tuple[Tensor, Tensor]:
    x = images_for(2, size, size)
    return x, x.flip(3) * 0.5


def test_distances_match_published_values(model: LPIPS) -> None:
    record = golden("lpips")
    size = record["size"]
    x, y = (normal_input(f"lpips/{name}", (2, 3, size, size)).tanh() for name in "xy")
    distance = model(x, y)
    assert distance.shape == (2,)
    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance, torch.tensor(record["values"]), atol=1e-6, rtol=0)


def test_weights_have_torchvision_names_and_shapes() -> None:
    found = {name: tuple(shape) for name, shape in LPIPS.vgg16_shapes().items()}
    weights = {f"features.{index}.weight": (width, previous, 3, 3) for index, width, previous in PUBLISHED}
    biases = {f"features.{index}.bias": (width,) for index, width, _ in PUBLISHED}
    assert found == weights | biases


def test_the_distance_is_zero_for_equal_images_and_symmetric(model: LPIPS) -> None:
    x, y = pair()
    assert model(x, x).tolist() == [0.0, 0.0]
    assert (model(x, y) > 1e-3).all()
    torch.testing.assert_close(model(x, y), model(y, x))


def test_distances_are_per_image(model: LPIPS) -> None:
    x, y = pair()
    each = torch.cat([model(x[:1], y[:1]), model(x[1:], y[1:])])
    torch.testing.assert_close(model(x, y), each)
    torch.testing.assert_close(model(x, torch.stack([x[0], y[1]])), torch.stack([torch.tensor(0.0), each[1]]))


def test_every_level_contributes(model: LPIPS) -> None:
    x, y = pair()
    whole = model(x, y)
    parts = torch.zeros(2)
    heads = {name: head for name, head in model.named_buffers() if name.startswith("head")}
    assert len(heads) == 5
    for name, head in heads.items():
        setattr(model, name, torch.zeros_like(head))
        part = whole - model(x, y)
        setattr(model, name, head)
        assert (part > 1e-5).all(), name
        parts += part
    torch.testing.assert_close(parts, whole)


def distance_in_float64(x: Tensor, y: Tensor, state: State, heads: list[Tensor]) -> Tensor:
    """A plain implementation of LPIPS, image by image."""
    mean, std = (torch.tensor(v).double().view(3, 1, 1) for v in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
    features = [(each.double() - mean) / std for each in (x, y)]
    total = torch.zeros(len(x), dtype=torch.float64)
    last_of_level = dict(zip((2, 7, 14, 21, 28), heads, strict=True))
    for index, *_ in sorted(PUBLISHED):
        if index in (5, 10, 17, 24):
            features = [F.max_pool2d(each, 2) for each in features]
        weight, bias = (state[f"features.{index}.{kind}"].double() for kind in ("weight", "bias"))
        features = [F.conv2d(each, weight, bias, padding=1).relu() for each in features]
        if index in last_of_level:
            a, b = (each / (each.square().sum(1, keepdim=True).sqrt() + 1e-10) for each in features)
            total = total + ((a - b).square() * last_of_level[index].double()).sum(1).mean((1, 2))
    return total


def test_distance_and_gradient_match_a_float64_reference(model: LPIPS, state: State) -> None:
    images = pair(48)
    x, exact = (images[0].clone().requires_grad_() for _ in range(2))
    distance = model(x, images[1])
    expected = distance_in_float64(exact, images[1], state, lpips.read_heads())
    torch.testing.assert_close(distance.double(), expected, atol=1e-7, rtol=1e-4)
    distance.sum().backward()
    expected.sum().backward()
    assert x.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(x.grad, exact.grad, atol=1e-4 * exact.grad.abs().max().item(), rtol=1e-3)


def test_the_gradient_is_finite_if_all_features_are_zero(state: State) -> None:
    dead = LPIPS({name: torch.zeros_like(value) if name.endswith("bias") else value for name, value in state.items()})
    x = dead.mean.expand(1, 3, 16, 16).clone().requires_grad_()
    with torch.autograd.detect_anomaly(check_nan=True):
        dead(x, images_for(1, 16, 16)).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_only_images_get_gradients_and_the_target_builds_no_graph(model: LPIPS) -> None:
    x, y = pair(16)
    x.requires_grad_()
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x, y).sum().backward()
    one_sided = sum(tensor.numel() for tensor in saved)
    saved.clear()
    y.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x, y).sum().backward()
    assert one_sided < 0.75 * sum(tensor.numel() for tensor in saved)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())


def test_stays_in_evaluation_mode_when_a_parent_trains(model: LPIPS) -> None:
    parent = nn.ModuleDict({"lpips": model}).train()
    assert parent.training
    assert not any(module.training for module in model.modules())


def test_only_convolutions_use_low_precision_under_autocast(model: LPIPS) -> None:
    x, y = (each.to(torch.bfloat16) for each in pair())
    whole = model(x.float(), y.float())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x, y)
        # A difference below the precision of bfloat16 in the inputs is not lost before the first convolution.
        assert model(x, x).tolist() == [0.0, 0.0]
    assert mixed.dtype == torch.float32
    assert not torch.equal(mixed, whole)
    torch.testing.assert_close(mixed, whole, atol=0, rtol=0.05)


def test_normalise_works_in_float32_over_channels() -> None:
    features = torch.tensor([3e-6, 4e-6, 0.0]).view(1, 3, 1, 1).half()
    unit = lpips.normalise(features)
    assert unit.dtype == torch.float32
    assert unit.square().sum().item() == pytest.approx(1.0, abs=1e-3)


def test_the_result_does_not_depend_on_the_memory_format(state: State, model: LPIPS) -> None:
    x, y = pair()
    other = LPIPS(state).to(memory_format=torch.channels_last)
    found = other(x.to(memory_format=torch.channels_last), y.to(memory_format=torch.channels_last))
    torch.testing.assert_close(found, model(x, y))


def test_compiles_to_one_graph(model: LPIPS) -> None:
    x, y = pair(16)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, y), model(x, y))


def test_the_constructor_uses_no_random_numbers(state: State) -> None:
    before = torch.get_rng_state()
    LPIPS(state)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("shape", "other"), [((1, 3, 15, 16), None), ((1, 3, 16, 15), None), ((2, 3, 16, 16), (1, 3, 16, 16))]
)
def test_rejects_images_that_are_too_small_or_differ_in_shape(
    model: LPIPS, shape: tuple[int, ...], other: tuple[int, ...] | None
) -> None:
    other = other or shape
    with pytest.raises(ValueError) as error:
        model(torch.zeros(shape), torch.zeros(other))
    assert f"at least 16 px, not {shape} and {other}" in str(error.value)
    assert model(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16)).tolist() == [0.0]
