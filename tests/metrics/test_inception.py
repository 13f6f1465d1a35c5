"""Inception equals torch-fidelity's for images of every size, in TensorFlow's order."""

import copy
import pickle
from collections.abc import Callable
from math import sqrt
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llamagen.metrics import Inception, InceptionNet
from llamagen.metrics.features import Features, extract, extractor_name
from llamagen.metrics.inception import inception_shapes, resize_tf1
from tests.golden import assert_matches, golden, integer_input, normal_input

SIZES = ["64x64", "299x299", "384x384", "200x333"]
EXTRACTED = ["64x64", "200x333"]
"""Sizes of which features are compared; features follow from the resized images, which are compared for all sizes."""


def inception_golden(entry: str) -> Any:
    return golden(entry, "inception.json")


def filled(name: str, shape: torch.Size) -> Tensor:
    """The weights with which the values were recorded; convolutions preserve the scale of activations."""
    values = normal_input(name, shape)
    if len(shape) == 4:
        return values * sqrt(2 * shape[0] / values.numel())
    if len(shape) == 2:
        return values * sqrt(shape[0] / values.numel())
    if name.endswith("bn.weight"):
        return 1 + 0.1 * values
    if name.endswith("running_var"):
        return 1 + 0.1 * values.abs()
    return 0.02 * values


def random_images(size: str) -> Tensor:
    """Two images of noise, the second of which is dark."""
    height, width = map(int, size.split("x"))
    images = integer_input(f"inception-{size}", 256, (2, 3, height, width)).to(torch.uint8)
    images[1] //= 4
    return images


@pytest.fixture(scope="module")
def net() -> InceptionNet:
    with torch.device("meta"):
        net = InceptionNet()
    net.load_state_dict({name: filled(name, shape) for name, shape in inception_shapes().items()}, assign=True)
    return net


@pytest.fixture(scope="module")
def branch() -> list[Tensor]:
    """Outputs of the branch that gives the spatial features, of all images of :func:`found`, by size."""
    return []


@pytest.fixture(scope="module")
def found(net: InceptionNet, branch: list[Tensor]) -> dict[str, Features]:
    hook = net.get_submodule("Mixed_6d.branch1x1").register_forward_hook(lambda *call: branch.append(call[2]))
    try:
        return {size: extract(net, random_images(size)) for size in EXTRACTED}
    finally:
        hook.remove()


@pytest.fixture(scope="module")
def second(net: InceptionNet) -> Features:
    """Features of one image alone."""
    return extract(net, random_images("200x333")[1:])


def test_names_and_shapes_match_the_published_weights() -> None:
    shapes = {name: list(shape) for name, shape in inception_shapes().items()}
    assert shapes == inception_golden("entries")
    assert len(shapes) == 94 * 5 + 2  # of each convolution its weight, and four of its normalisation
    parameters = [value for name, value in inception_shapes().items() if "running" not in name]
    assert sum(shape.numel() for shape in parameters) == 23_850_960


def assert_equals_torch_fidelity(features: Features, size: str) -> None:
    for entry, output in (
        *(("2048", "pool"), ("spatial", "spatial")),
        *(("logits_unbiased", "logits"), ("logits", "biased_logits")),
    ):
        record = inception_golden("sizes")[size][entry]
        assert_matches(getattr(features, output), record, tolerance=1e-4 * record["std"])


@pytest.mark.parametrize("size", EXTRACTED)
def test_features_equal_those_of_torch_fidelity(found: dict[str, Features], size: str) -> None:
    assert_equals_torch_fidelity(found[size], size)


@pytest.mark.slow
@pytest.mark.parametrize("size", sorted(set(SIZES) - set(EXTRACTED)))
def test_features_of_further_sizes_equal_those_of_torch_fidelity(net: InceptionNet, size: str) -> None:
    assert_equals_torch_fidelity(extract(net, random_images(size)), size)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("size", SIZES)
def test_features_on_a_gpu_equal_those_of_torch_fidelity(net: InceptionNet, size: str) -> None:
    features = extract(copy.deepcopy(net).cuda(), random_images(size).cuda())
    for entry, output in (("2048", "pool"), ("spatial", "spatial"), ("logits_unbiased", "logits")):
        record = inception_golden("sizes")[size][entry]
        assert_matches(getattr(features, output).cpu(), record, tolerance=1e-3 * record["std"])


@pytest.mark.parametrize("size", SIZES)
def test_resizes_like_torch_fidelity(size: str) -> None:
    resized = resize_tf1(random_images(size).float(), (299, 299))
    assert_matches(resized, inception_golden("sizes")[size]["resized"], tolerance=1e-4)


def test_returns_all_features_with_a_row_per_image(found: dict[str, Features]) -> None:
    features = found["64x64"]
    assert [tuple(rows.shape) for rows in features] == [(2, 2048), (2, 17 * 17 * 7), (2, 1008), (2, 1008)]
    assert {rows.dtype for rows in features} == {torch.float32}
    assert not any(rows.requires_grad for rows in features)


def test_spatial_features_have_the_order_of_tensorflow(found: dict[str, Features], branch: list[Tensor]) -> None:
    spatial = found["64x64"].spatial
    assert spatial is not None
    expected = [branch[0][1, channel, row, column] for row in range(17) for column in range(17) for channel in range(7)]
    torch.testing.assert_close(spatial[1], torch.stack(expected))


def test_logits_differ_by_the_bias(net: InceptionNet, found: dict[str, Features]) -> None:
    _, _, logits, biased = found["200x333"]
    assert logits is not None
    assert biased is not None
    torch.testing.assert_close(biased - logits, net.fc.bias.expand(2, -1), atol=1e-6, rtol=0)


def test_the_batch_size_does_not_change_results(second: Features, found: dict[str, Features]) -> None:
    for rows, both in zip(second, found["200x333"], strict=True):
        assert rows is not None
        assert both is not None
        torch.testing.assert_close(rows, both[1:], atol=1e-5, rtol=1e-4)


def test_interpolates_from_the_top_left() -> None:
    row = torch.tensor([[0.0, 30.0, 90.0]])
    wider = resize_tf1(row.view(1, 1, 1, 3), (1, 6)).flatten()
    assert wider.tolist() == [0, 15, 30, 60, 90, 90]  # half-pixel centers would give 0, 7.5, 22.5, …
    column = torch.tensor([0.0, 30.0, 90.0]).view(1, 1, 3, 1)
    assert resize_tf1(column, (6, 2)).squeeze().tolist() == [[value, value] for value in wider.tolist()]


def test_shrinks_without_antialiasing() -> None:
    row = torch.tensor([10.0, 1.0, 2.0, 20.0, 5.0, 6.0]).view(1, 1, 1, 6)
    assert resize_tf1(row, (1, 2)).flatten().tolist() == [10, 20]
    assert resize_tf1(row, (1, 4)).flatten().tolist() == [10, 1.5, 20, 5.5]


def test_interpolates_both_axes() -> None:
    square = torch.tensor([[0.0, 100.0], [200.0, 240.0]]).view(1, 1, 2, 2)
    assert resize_tf1(square, (4, 4)).squeeze().tolist() == [
        [0, 50, 100, 100],
        [100, 135, 170, 170],
        [200, 220, 240, 240],
        [200, 220, 240, 240],
    ]


def test_keeps_an_image_of_the_right_size() -> None:
    batch = random_images("299x299").float()
    assert torch.equal(resize_tf1(batch, (299, 299)), batch)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
        torch.zeros(3, 8, 8),
        torch.zeros(1, 1, 8, 8),
        torch.zeros(1, 8, 8, 3),
    ],
)
def test_rejects_tensors_that_are_not_images(net: InceptionNet, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"needs floats with levels 0 … 255 of shape \(B, 3, H, W\), not") as error:
        net(images)
    assert str(images.dtype) in str(error.value)
    assert str(tuple(images.shape)) in str(error.value)


def test_stays_frozen_and_in_evaluation_mode(net: InceptionNet) -> None:
    owner = nn.Sequential(net)
    owner.train()
    assert not any(module.training for module in net.modules())
    assert not any(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize("way", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_gives_the_same_features(
    net: InceptionNet, second: Features, way: Callable[[InceptionNet], InceptionNet]
) -> None:
    with torch.device("meta"):  # a pickle of 95 MB takes longer than the features
        original = InceptionNet()
    copied = way(original)
    assert copied.fc.weight is not original.fc.weight
    copied.load_state_dict(net.state_dict(), assign=True)
    torch.testing.assert_close(extract(copied, random_images("200x333")[1:]).pool, second.pool)


def test_random_weights_distinguish_images() -> None:
    torch.manual_seed(0)
    pool = extract(InceptionNet(), random_images("64x64")).pool
    assert (pool[0] - pool[1]).std() > 0.01 * pool.std()
    assert 0.01 < pool.std() < 10


def test_metric_names_use_its_name() -> None:
    with torch.device("meta"):
        assert extractor_name(InceptionNet()) == "InceptionNet"
    assert Inception.name == "inception"
