"""Published models by name, from a local hub: golden values, and the same images as the command line."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import main
from llamagen import LlamaGen
from llamagen.hub.published import PUBLISHED
from llamagen.models.gpt import GPT, GPTConfig
from llamagen.models.vqgan import VQGAN, VQGANConfig
from llamagen.pretrained.sizes import SIZES
from llamagen.sampling import SamplingConfig
from llamagen.text import clean_caption
from tests.golden import assert_matches, fill, golden, integer_input
from tests.hub_server import HubServer
from tests.tiny_t5 import WIDTH, save_tiny_model, tiny_tokenizer

SMALL = {"dim": 32, "n_layer": 2, "n_head": 2}
SMALL_VQ16 = VQGANConfig(channels=32, channel_multipliers=(1, 1, 1, 1, 1), num_res_blocks=1, z_channels=16)


def publish(hub: HubServer, name: str, model: nn.Module, folder: Path) -> Path:
    """Serve filled weights in the published layout, and return their file."""
    path = folder / PUBLISHED[name].file
    state = fill(model).state_dict()
    torch.save(state if "3B" in name else {"model": state}, path)  # as from FSDP
    hub.add_published(name, path)
    return path


@pytest.fixture
def small(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """A hub with a class and a text model of few parameters."""
    for size in ("L", "XL", "3B"):
        monkeypatch.setitem(SIZES, size, SMALL)
    publish(hub, "vq_ds16_c2i", VQGAN(SMALL_VQ16), tmp_path)
    publish(hub, "c2i_L_384", GPT(GPTConfig(**SMALL, block_size=576)), tmp_path)
    publish(hub, "c2i_3B_384", GPT(GPTConfig(**SMALL, block_size=576)), tmp_path)
    publish(hub, "vq_ds16_t2i", VQGAN(SMALL_VQ16), tmp_path)
    text = GPTConfig(**SMALL, block_size=1024, condition="text", caption_length=6, caption_dim=WIDTH)
    publish(hub, "t2i_XL_stage2_512", GPT(text), tmp_path)
    return hub


def test_prompts_of_a_published_text_model_are_cleaned_as_published(
    small: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model(tmp_path / "t5")
    tiny_tokenizer(("a", "dog")).save_pretrained(tmp_path / "t5")
    model = LlamaGen.from_pretrained("t2i_XL_stage2_512", text_encoder=tmp_path / "t5")
    assert (model.resolution, model.condition, model.dtype) == (512, "text", "bfloat16")
    assert model.sampling == SamplingConfig(guidance_scale=7.5, top_k=1000)
    assert model._text is not None
    read: list[list[str]] = []
    encode = model._text.condition.encode
    monkeypatch.setattr(
        model._text.condition,
        "encode",
        lambda texts, *more, **options: read.append(texts) or encode(texts, *more, **options),
    )
    codes = model.generate_codes([" A_Dog.jpg on\x00the #Lawn", "\ud83d\ude00 dog"], progress=False, seed=1)
    assert codes.shape == (2, 32, 32)
    assert read == [[clean_caption("A_Dog.jpg on the #Lawn", "published"), "😀 dog"]]


def test_a_tokenizer_that_is_given_replaces_the_default_one(
    small: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, own = tmp_path / "own/c2i_L_384.pt", tmp_path / "own/vq.pt"
    own.parent.mkdir()
    shutil.copy(tmp_path / "c2i_L_384.pt", file)
    shutil.copy(tmp_path / "vq_ds16_c2i.pt", own)
    assert LlamaGen.from_pretrained(file, tokenizer=own).resolution == 384
    assert small.requests == []
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vq_ds16_c2i").mkdir()  # a folder with the name of the default one
    assert LlamaGen.from_pretrained("c2i_L_384").resolution == 384
    with pytest.raises(ValueError, match="is a tokenizer itself; leave it out"):
        LlamaGen.from_pretrained("vq_ds16_t2i", tokenizer=own)


def test_a_name_loads_the_model_with_its_tokenizer_and_settings(small: HubServer, tmp_path: Path) -> None:
    model = LlamaGen.from_pretrained("c2i_L_384")
    assert model.gpt is not None
    assert (model.name, model.resolution, model.condition, model.dtype) == ("c2i_L_384", 384, "class", "bfloat16")
    assert model.sampling == SamplingConfig(guidance_scale=4.0, top_k=2000)
    assert model.class_names is not None
    assert model.class_names.find("golden retriever") == 207
    assert model.gpt.output.weight.dtype is torch.bfloat16
    assert small.downloads("c2i_L_384.pt") == small.downloads("vq_ds16_c2i.pt") == 1
    beside = LlamaGen.from_pretrained(tmp_path / "c2i_L_384.pt")  # downloaded by hand, both files in one folder
    assert small.downloads("c2i_L_384.pt") == 1
    assert (beside.resolution, beside.name) == (384, "c2i_L_384")
    assert torch.equal(beside.gpt.output.weight, model.gpt.output.weight)
    assert LlamaGen.from_pretrained("c2i_3B_384", dtype="float32").resolution == 384
    assert LlamaGen.from_pretrained("vq_ds16_c2i").gpt is None
    address = "hf://FoundationVision/LlamaGen/c2i_L_384.pt"
    assert LlamaGen.from_pretrained(address, tokenizer="vq_ds16_c2i").resolution == 384


def test_a_name_that_is_not_published_lists_near_ones(small: HubServer) -> None:
    with pytest.raises(ValueError, match=r"c2i_L_385.*c2i_L_384") as error:
        LlamaGen.from_pretrained("c2i_L_385")
    assert "\n" not in str(error.value)


def test_a_file_of_another_size_is_refused(small: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "L", {"dim": 64, "n_layer": 2, "n_head": 2})
    monkeypatch.setitem(SIZES, "3B", {"dim": 64, "n_layer": 2, "n_head": 2})
    monkeypatch.setitem(SIZES, "XL", {"dim": 64, "n_layer": 2, "n_head": 2})
    with pytest.raises(ValueError, match="2 layers of width 32 has none of the published sizes"):
        LlamaGen.from_pretrained("c2i_L_384")
    renamed = (tmp_path / "c2i_L_384.pt").rename(tmp_path / "mine.pt")
    with pytest.raises(ValueError, match=r"mine\.pt does not record the size of its images"):
        LlamaGen.from_pretrained(renamed, tokenizer="vq_ds16_c2i")


@pytest.mark.slow  # weights of the published sizes
@pytest.mark.timeout(400)
def test_golden_values_and_images_of_the_command_line(hub: HubServer, tmp_path: Path) -> None:
    publish(hub, "vq_ds16_c2i", VQGAN(VQGANConfig()), tmp_path)
    publish(hub, "c2i_B_256", GPT(GPTConfig(**SIZES["B"])), tmp_path)
    record = golden("GPT-B")
    model = LlamaGen.from_pretrained("c2i_B_256", dtype="float32")
    assert model.gpt is not None
    labels, codes = integer_input("GPT-B/cond", 1000, (2,)), integer_input("GPT-B/idx", 16384, (2, 256))
    with torch.no_grad():
        assert_matches(model.gpt(codes[:, :-1], labels), record["train_logits"])
    classes = ["golden retriever", "volcano"]
    main.main(
        [
            *(
                "predict",
                "--config",
                "configs/published/c2i_B_256.yaml",
                f"--trainer.default_root_dir={tmp_path / 'run'}",
            ),
            *('--data.init_args.classes=["golden retriever", "volcano"]', "--data.init_args.per_class=1"),
            "--trainer.enable_progress_bar=false",
        ]
    )
    with np.load(tmp_path / "run/samples.npz") as archive:
        written = archive["arr_0"]
    images = LlamaGen.from_pretrained("c2i_B_256").generate(
        classes, guidance_scale=PUBLISHED["c2i_B_256"].guidance, top_k=0, progress=False
    )
    assert np.array_equal(np.stack(images), written)
    assert written.shape == (2, 256, 256, 3)
