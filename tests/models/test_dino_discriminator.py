"""The discriminator on DINO's features trains its heads alone, and treats each image alone."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.adversarial import frozen
from llamagen.models.dino import WEIGHTS
from llamagen.models.discriminator import DINODiscriminator
from tests.dino import PATCH, dino_state, save_dino
from tests.golden import normal_input

BLOCKS = (0, 2)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dino(tmp_path_factory.mktemp("dino") / "vit.pth")


def discriminator(file: Path, **options: Any) -> DINODiscriminator:
    torch.manual_seed(0)
    model = DINODiscriminator(**{"weights": file, "blocks": BLOCKS, "width": 64, "min_size": 16, **options})
    model.load()
    return model


@pytest.fixture
def model(weights: Path) -> DINODiscriminator:
    return discriminator(weights)


def images_for(height: int = 16, width: int = 16) -> Tensor:
    return normal_input("dino/discriminator", (2, 3, height, width)).tanh()


def test_images_and_heads_get_gradients_and_the_vit_stays_frozen(model: DINODiscriminator) -> None:
    images = images_for().requires_grad_()
    with frozen(model):
        model(images).sum().backward()
    assert images.grad is not None
    assert (images.grad.abs().amax((1, 2, 3)) > 0).all()
    assert all(parameter.grad is None for parameter in model.parameters())
    logits = model(images.detach())
    assert logits.shape == (2, len(BLOCKS) * 16)
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad, name
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    (dino,) = model._dino
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in dino.parameters())
    assert all(torch.equal(value, dino_state()[name]) for name, value in dino.state_dict().items())


def test_the_vit_is_in_no_state_dict_and_follows_device_dtype_and_copies(model: DINODiscriminator) -> None:
    assert {name.split(".")[0] for name in model.state_dict()} == {"heads"}
    assert model.state_dict().keys() == DINODiscriminator(blocks=BLOCKS, width=64).state_dict().keys()
    images = images_for()
    copy = deepcopy(model.eval())
    assert torch.equal(copy(images), model(images))
    assert copy._dino[0].cls_token is not model._dino[0].cls_token
    copy.to(torch.bfloat16)
    torch.testing.assert_close(copy(images.bfloat16()).float(), model(images), atol=0.1, rtol=0)
    assert copy.to("meta")._dino[0].cls_token.is_meta
    assert model._dino[0].cls_token.dtype == torch.float32


def test_the_heads_of_vit_s_have_6_million_parameters() -> None:
    with torch.device("meta"):
        model = DINODiscriminator()
    assert (len(model.heads), sum(parameter.numel() for parameter in model.parameters())) == (4, 5_908_996)


def test_loading_after_a_move_moves_the_vit(weights: Path) -> None:
    model = DINODiscriminator(weights, BLOCKS, 64, 16).to(torch.float64)
    model.load()
    (dino,) = model._dino
    assert dino.cls_token.dtype == torch.float64
    model.load()
    assert model._dino[0] is dino


def test_the_logits_of_an_image_do_not_depend_on_the_others(model: DINODiscriminator) -> None:
    images, logits = images_for(), deepcopy(model)(images_for())  # copies, because each pass changes the spectral norm
    alone = torch.cat([deepcopy(model)(image[None]) for image in images])
    torch.testing.assert_close(logits, alone, atol=1e-5, rtol=0)


def test_every_block_has_its_own_head(model: DINODiscriminator, weights: Path) -> None:
    images = images_for()
    both = model.eval()(images)
    reordered = discriminator(weights, blocks=(2, 0)).eval()(images)
    assert torch.equal(both, reordered)
    first, last = (discriminator(weights, blocks=[block]).eval()(images) for block in BLOCKS)
    torch.testing.assert_close(both[:, :16], first)
    assert not torch.allclose(both[:, 16:], last, atol=0.01)  # its head has other weights
    model.heads[1].load_state_dict(discriminator(weights, blocks=[2]).heads[0].state_dict())
    torch.testing.assert_close(model(images)[:, 16:], discriminator(weights, blocks=[2]).eval()(images))


def test_a_head_reads_four_neighbours_on_each_side(model: DINODiscriminator) -> None:
    head = model.eval().heads[0]
    head.mix[1] = torch.nn.Identity()  # the norms read all tokens
    head.project[1] = torch.nn.Identity()
    tokens = normal_input("tokens", (1, 64, 16))
    changed = tokens.clone()
    changed[:, :, 3] += 1
    different = (head(tokens) - head(changed)).abs()[0] > 1e-6
    assert different.nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 15]  # on a circle


def test_small_images_are_enlarged_and_sides_become_multiples_of_the_patch(
    model: DINODiscriminator, weights: Path
) -> None:
    model.eval()
    large = discriminator(weights, min_size=32).eval()
    for given, used in (((16, 16), (32, 32)), ((20, 30), (32, 48)), ((33, 40), (36, 40))):
        images = images_for(*given)
        resized = F.interpolate(images, used, mode="bilinear", align_corners=False)
        logits = large(images)
        assert logits.shape == (2, 2 * used[0] * used[1] // PATCH**2)
        assert torch.equal(logits, model(resized))


def test_weights_of_the_heads_have_a_spectral_norm_of_1_computed_in_float32(
    model: DINODiscriminator, weights: Path
) -> None:
    images, start = images_for(), {name: value.clone() for name, value in model.named_buffers()}
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
    assert logits.dtype == torch.bfloat16
    same = discriminator(weights)
    torch.testing.assert_close(logits.float(), same(images), atol=0.1, rtol=0)
    for name, value in model.named_buffers():
        assert torch.equal(value, same.get_buffer(name)), name  # the power iteration's vectors
        assert "classify" in name or not torch.equal(value, start[name]), name
    model.eval()
    for head in model.heads:
        for convolution in (head.project[0], head.mix[0], head.classify):
            assert torch.linalg.matrix_norm(convolution.weight.flatten(1), 2).item() == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ({"width": 100}, "width is 100; it must be a multiple of 64: 384 for ViT-S, 768 for ViT-B"),
        ({"width": 0}, "width is 0; it must be at least 64"),
        ({"min_size": 1.5}, "min_size is 1.5; it must be an integer of at least 1"),
        ({"blocks": []}, "blocks are []; give at least one, and each once"),
        ({"blocks": [1, 1]}, "blocks are [1, 1]; give at least one, and each once"),
        ({"blocks": [-1]}, "an index in blocks is -1; it must be at least 0"),
        ({"width": 384}, "vit.pth has 64 features, not 384; set model.init_args.discriminator.init_args.width to 64"),
        ({"blocks": [3]}, "vit.pth has 3 blocks, from 0, and no block 3; change"),
        ({"min_size": 7}, "min_size is 7, but {weights} has patches of 4 px; set"),
        ({"weights": "nowhere.pth"}, f"weights nowhere.pth is not a file; get {WEIGHTS.address} and give its path as"),
    ],
)
def test_rejects_unsuitable_options_in_one_line(options: dict[str, Any], phrase: str, weights: Path) -> None:
    with pytest.raises(ValueError) as error:
        discriminator(weights, **options)
    assert phrase.format(weights=weights) in str(error.value)
    assert "\n" not in str(error.value)


def test_rejects_images_of_less_than_16_px(model: DINODiscriminator) -> None:
    model.check_size(16)
    with pytest.raises(ValueError, match="images have 15 px, but the discriminator on DINO's features needs at least"):
        model(images_for(15, 20))
