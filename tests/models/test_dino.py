"""Features of a ViT of DINO: those of other implementations with the same weights."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from llamagen.models.dino import DINO, WEIGHTS, read_dino
from tests.dino import DEPTH, GRID, PATCH, dino_state, save_dino
from tests.golden import normal_input

SIDE = GRID * PATCH


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> DINO:
    return read_dino(save_dino(tmp_path_factory.mktemp("dino") / "vit.pth", width=128))


def images_for(height: int = SIDE, width: int = SIDE) -> Tensor:
    return normal_input("dino/images", (2, 3, height, width)).tanh()


def encoder_layer(state: dict[str, Tensor], block: int, width: int) -> nn.Module:
    """Torch's own pre-norm block, in float64."""
    layer = nn.TransformerEncoderLayer(width, width // 64, 4 * width, 0.0, "gelu", 1e-6, True, True, dtype=torch.double)
    names = {
        "self_attn.in_proj_": "attn.qkv.",
        "self_attn.out_proj.": "attn.proj.",
        "linear1.": "mlp.fc1.",
        "linear2.": "mlp.fc2.",
        "norm1.": "norm1.",
        "norm2.": "norm2.",
    }
    layer.load_state_dict(
        {
            f"{own}{kind}": state[f"blocks.{block}.{other}{kind}"]
            for own, other in names.items()
            for kind in ("weight", "bias")
        }
    )
    return layer.eval()


def test_tokens_match_torchs_transformer_layers_in_float64(dino: DINO) -> None:
    state, images = dino_state(width=128), images_for()
    levels = (images.double() + 1) * 127.5
    mean, std = (torch.tensor(v).double()[:, None, None] * 255 for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    patches = F.unfold((levels - mean) / std, PATCH, stride=PATCH).transpose(1, 2)
    x = patches @ state["patch_embed.proj.weight"].flatten(1).T.double() + state["patch_embed.proj.bias"]
    x = torch.cat([state["cls_token"].double().expand(2, -1, -1), x], dim=1) + state["pos_embed"]
    found = dino(images, [0, 2])
    assert [each.shape for each in found] == [(2, 128, GRID**2)] * 2
    for block in range(DEPTH):
        x = encoder_layer(state, block, 128)(x)
        if block != 1:
            torch.testing.assert_close(found[block // 2], x[:, 1:].transpose(1, 2).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.slow  # imports transformers' vision models
@pytest.mark.parametrize(("height", "width"), [(SIDE, SIDE), (24, 40)])
def test_tokens_match_transformers_also_at_other_sizes(height: int, width: int, dino: DINO) -> None:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=128, num_hidden_layers=DEPTH, num_attention_heads=2, intermediate_size=512, layer_norm_eps=1e-6,
        image_size=SIDE, patch_size=PATCH, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    reference, state = ViTModel(config, add_pooling_layer=False).eval(), dino_state(width=128)
    renamed = {}
    for name, value in state.items():
        for own, other in (
            (r"^(cls_token)", r"embeddings.\1"),
            ("^pos_embed", "embeddings.position_embeddings"),
            ("^patch_embed.proj", "embeddings.patch_embeddings.projection"),
            (r"^blocks\.", "layers."),
            (r"\.norm1\.", ".layernorm_before."),
            (r"\.norm2\.", ".layernorm_after."),
            (r"^norm\.", "layernorm."),
            (r"attn\.proj", "attention.o_proj"),
        ):
            name = re.sub(own, other, name)
        if ".attn.qkv." in name:
            for part, third in zip("qkv", value.chunk(3), strict=True):
                renamed[name.replace("attn.qkv", f"attention.{part}_proj")] = third
        else:
            renamed[name] = value
    reference.load_state_dict(renamed)
    images = images_for(height, width)
    pixels = ((images + 1) / 2 - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor(
        [0.229, 0.224, 0.225]
    )[:, None, None]
    expected = reference(pixels, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
    for block, tokens in enumerate(dino(images, range(DEPTH))[:-1]):  # transformers normalises the last ones
        torch.testing.assert_close(tokens, expected[block + 1][:, 1:].transpose(1, 2), atol=1e-5, rtol=1e-5)


def test_position_embeddings_are_interpolated_along_each_axis() -> None:
    dino = DINO(64, 1, PATCH, GRID)
    rows = torch.arange(GRID).float()[:, None].expand(GRID, GRID).flatten()
    values = torch.cat([torch.tensor([9.0]), rows])[None, :, None].expand(1, 1 + GRID**2, 64)
    dino.pos_embed = nn.Parameter(values, requires_grad=False)
    assert dino.position_embeddings(GRID, GRID) is dino.pos_embed
    resized = dino.position_embeddings(8, 5)
    assert resized[0, 0, 0] == 9.0
    grid = resized[0, 1:, 0].unflatten(0, (8, 5))
    torch.testing.assert_close(grid, grid[:, :1].expand(8, 5))
    assert (grid[:, 0].diff() > 0).all()
    assert grid.mean().item() == pytest.approx(1.5)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_width_depth_and_patch_size_are_those_of_the_file(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"vit.{suffix}"
    state = dino_state(128, 2, 8, 3)
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    dino = read_dino(path)
    assert (dino.width, len(dino.blocks), dino.patch_size, dino.grid) == (128, 2, 8, 3)
    assert all(torch.equal(value, state[name]) for name, value in dino.state_dict().items())
    assert not any(parameter.requires_grad for parameter in dino.parameters())


def test_vit_s_16_is_the_default_with_the_published_number_of_parameters() -> None:
    dino = DINO()
    assert dino.cls_token.is_meta
    assert sum(parameter.numel() for parameter in dino.parameters()) == 21_665_664 - 2 * 384  # without the last norm
    assert dino.pos_embed.shape == (1, 197, 384)
    assert WEIGHTS.address == f"https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/{WEIGHTS.name}"


OTHERS = {
    "more": ({"mask_token": torch.zeros(1, 64)}, "unexpected: mask_token"),
    "less": ({"blocks.1.attn.proj.bias": None}, "missing: blocks.1.attn.proj.bias"),
    "narrow": ({"blocks.0.mlp.fc1.bias": torch.zeros(3)}, "blocks.0.mlp.fc1.bias is (3,), expected (256,)"),
    "not square": ({"pos_embed": torch.zeros(1, 16, 64)}, "pos_embed is (1, 16, 64), expected (1, 10, 64)"),
    "flat": ({"pos_embed": torch.zeros(64), "patch_embed.proj.weight": torch.zeros(3)}, "pos_embed is (64,), expected"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_rejects_other_weights_in_one_line(case: str, tmp_path: Path) -> None:
    changes, phrase = OTHERS[case]
    state = {name: value for name, value in (dino_state() | changes).items() if value is not None}
    torch.save(state, tmp_path / "vit.pth")
    with pytest.raises(ValueError) as error:
        read_dino(tmp_path / "vit.pth")
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'vit.pth'} is not a ViT of DINO: ")
    assert phrase in message
    assert message.endswith(f"get {WEIGHTS.address}")
    assert "\n" not in message


def test_rejects_a_width_without_heads_of_64(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vit.pth is not a ViT of DINO: it has 96 features; get https://"):
        read_dino(save_dino(tmp_path / "vit.pth", width=96))
