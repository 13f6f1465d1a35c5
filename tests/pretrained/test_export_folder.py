"""Exported models generate the images of their run; a folder is complete or absent; uploads."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from llamagen import LlamaGen
from llamagen.checkpoints.contents import load_vqgan
from llamagen.checkpoints.export import main
from llamagen.checkpoints.weights import Weights, read_weights
from llamagen.checkpoints.writing import write_weights
from llamagen.hub.published import PUBLISHED
from llamagen.models.gpt import GPT, GPTConfig
from llamagen.models.vqgan import VQGAN, VQGANConfig
from llamagen.pretrained import export_folder
from llamagen.pretrained.export_folder import Export, export_model
from llamagen.pretrained.exported_config import SAVED
from llamagen.pretrained.sizes import SIZES, infer_gpt_config
from llamagen.pretrained.source import TEXT_SAMPLING
from llamagen.sampling import IMAGE_SETTINGS, generate
from tests.datamodules.shard_files import assert_one_line
from tests.golden import fill
from tests.hub_server import HubServer
from tests.pipeline import TOKENIZER_NET, Pipeline
from tests.rounding import Rounding
from tests.small_models import assert_same, small_gpt, small_vqgan
from tests.text_pipeline import TextPipeline

OPTIONS = {"qk_norm": True, "adaptive_norm": True, "target_aware": True}
FACTORS = {"code_factors": (4, 16)}
MODEL_FILES = {"README.md", "config.json", "model.safetensors", "samples.png", "tokenizer.safetensors"}


@pytest.fixture(scope="module")
def exported(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The class model of the pipeline, exported; tests only read it."""
    folder = tmp_path_factory.mktemp("exported") / "digits"
    main([str(pipeline.argen), "--to", str(folder), "--samples=3", "--license=mit"])
    return folder


def arrays(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_an_exported_class_model_generates_the_images_of_predict(pipeline: Pipeline, exported: Path) -> None:
    assert names(exported) == MODEL_FILES
    model = LlamaGen.from_pretrained(exported)
    with np.load(pipeline.samples / "samples.npz") as archive:
        assert np.array_equal(arrays(model.generate(range(10), images_per_prompt=3, progress=False)), archive["arr_0"])
    assert (model.name, model.dtype) == ("digits", "float32")
    assert model.class_names is not None
    assert model.class_names.names == tuple("0123456789")


def test_an_export_has_no_window_but_may_get_one(pipeline: Pipeline, exported: Path, tmp_path: Path) -> None:
    assert "    window: 1\n" in (pipeline.root / "argen/fit.yaml").read_text()
    sampling = json.loads((exported / "config.json").read_text())["sampling"]
    assert sampling.keys() == set(IMAGE_SETTINGS)  # earlier versions refuse other options
    shutil.copytree(exported, tmp_path / "mine")
    change(sampling={**sampling, "window": 3})(tmp_path / "mine")
    model = LlamaGen.from_pretrained(tmp_path / "mine")
    assert model.sampling.window == 3
    codes = model.generate_codes(range(4), progress=False)
    assert torch.equal(model.generate_codes(range(4), progress=False, window=1), codes)


def test_an_exported_text_model_generates_the_images_of_the_run(text_pipeline: TextPipeline, tmp_path: Path) -> None:
    run = text_pipeline.root / "argen"
    export_model(Export(str(run), samples=0), tmp_path / "text")
    assert names(tmp_path / "text") == MODEL_FILES - {"samples.png"}
    prompts = ["a handwritten three", "one"]
    expected = LlamaGen.from_pretrained(run).generate(prompts, progress=False)
    exported = LlamaGen.from_pretrained(tmp_path / "text")
    assert np.array_equal(arrays(exported.generate(prompts, progress=False)), arrays(expected))
    assert read_weights(tmp_path / "text/model.safetensors").captions == read_weights(text_pipeline.argen).captions


def test_an_exported_tokenizer_reconstructs_as_that_of_the_run(pipeline: Pipeline, tmp_path: Path) -> None:
    main([str(pipeline.root / "tokenizer"), "--to", str(tmp_path / "vq")])
    assert names(tmp_path / "vq") == {"README.md", "config.json", "reconstructions.png", "tokenizer.safetensors"}
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8))
    exported, trained = (LlamaGen.from_pretrained(each) for each in (tmp_path / "vq", pipeline.tokenizer))
    assert torch.equal(exported.encode(image), trained.encode(image))
    assert np.array_equal(exported.reconstruct(image), trained.reconstruct(image))
    newest = max((pipeline.root / "tokenizer/reconstructions").iterdir())
    assert (tmp_path / "vq/reconstructions.png").read_bytes() == newest.read_bytes()


def test_raw_weights_are_exported_with_the_averaged_tokenizer(pipeline: Pipeline, tmp_path: Path) -> None:
    main([str(pipeline.argen), "--to", str(tmp_path / "raw"), "--raw", "--samples=0"])
    found = read_weights(tmp_path / "raw/model.safetensors")
    assert_same(found.state, read_weights(pipeline.argen, averaged=False).state)
    assert_same(
        load_vqgan(tmp_path / "raw/tokenizer.safetensors").state_dict(), load_vqgan(pipeline.tokenizer).state_dict()
    )
    main([str(pipeline.tokenizer), "--to", str(tmp_path / "vq"), "--raw"])
    found = read_weights(tmp_path / "vq/tokenizer.safetensors")
    assert_same(found.state, read_weights(pipeline.tokenizer, averaged=False).state)


def test_a_tokenizer_with_a_custom_quantiser_is_exported(tmp_path: Path) -> None:
    quantizer = {"class_path": "tests.rounding.Rounding", "init_args": {"levels": 5}}
    vqgan = fill(VQGAN(VQGANConfig(**TOKENIZER_NET, quantizer=quantizer))).eval()
    torch.save({"model": vqgan.state_dict()}, tmp_path / "state.pt")
    write_weights(vqgan, read_weights(tmp_path / "state.pt"), tmp_path / "rounding.pt")
    export_model(Export(str(tmp_path / "rounding.pt")), tmp_path / "rounding")
    model = LlamaGen.from_pretrained(tmp_path / "rounding")
    assert isinstance(model.tokenizer.quantize, Rounding)
    assert_same(model.tokenizer.state_dict(), vqgan.state_dict())
    assert "quantizer `tests.rounding.Rounding`" in (tmp_path / "rounding/README.md").read_text()


@pytest.mark.parametrize("options", [OPTIONS, FACTORS, {}], ids=["options", "factors", "before there were options"])
def test_options_of_the_model_are_in_its_file_and_off_in_older_ones(options: dict[str, Any], tmp_path: Path) -> None:
    gpt, vqgan = small_gpt(vocab_size=64, **options), small_vqgan()
    for name, model in (("gpt", gpt), ("tokenizer", vqgan)):
        state = dict(model.state_dict())
        write_weights(model, Weights(state, None, None, None, name), tmp_path / f"{name}.safetensors")
    if not options:
        with safe_open(tmp_path / "gpt.safetensors", "pt") as file:
            entry = json.loads(file.metadata()["llamagen"])
        entry["config"] = {name: value for name, value in entry["config"].items() if name not in OPTIONS | FACTORS}
        save_file(dict(gpt.state_dict()), tmp_path / "gpt.safetensors", {"llamagen": json.dumps(entry)})
    arguments = {"checkpoint": tmp_path / "gpt.safetensors", "tokenizer": tmp_path / "tokenizer.safetensors"}
    export_model(Export(**{name: str(path) for name, path in arguments.items()}, samples=0), tmp_path / "folder")
    model = LlamaGen.from_pretrained(tmp_path / "folder", compile=options != FACTORS)
    assert model.gpt is not None
    assert model.gpt.config == gpt.config
    assert model.generate_codes([1, 2], seed=3).flatten(1).tolist() == generate(gpt, [1, 2], seed=3).tolist()


@pytest.mark.parametrize("options", [{}, OPTIONS | {"code_factors": (64, 256)}])
def test_options_are_recognised_by_the_names_of_the_weights(options: dict[str, Any]) -> None:
    with torch.device("meta"):
        gpt = GPT(GPTConfig(**SIZES["B"], **options))
    assert infer_gpt_config(gpt.state_dict(), 256, "gpt.pt") == gpt.config


@pytest.mark.parametrize(
    ("name", "tokenizer", "saved"),
    [
        ("c2i_B_384", "vq_ds16_c2i", {"sampling": {"guidance_scale": 4.0, "top_k": 2000}}),
        ("t2i_XL_stage1_256", "vq_ds16_t2i", {"sampling": TEXT_SAMPLING}),
    ],
)
def test_published_weights_keep_their_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, tokenizer: str, saved: dict[str, object]
) -> None:
    model = PUBLISHED[name]
    gpt = small_gpt(vocab_size=64, condition=model.kind)
    sizes = {key: getattr(gpt.config, key) for key in ("n_layer", "n_head", "dim", "multiple_of")}
    monkeypatch.setitem(SIZES, "small", sizes)
    torch.save({"model": small_vqgan().state_dict()}, tmp_path / f"{tokenizer}.pt")
    torch.save({"model": gpt.bfloat16().state_dict()}, tmp_path / f"{name}.pt")
    export_model(Export(str(tmp_path / f"{name}.pt"), samples=0), tmp_path / "mine")
    config = json.loads((tmp_path / "mine/config.json").read_text())
    assert {key: config[key] for key in SAVED if key in config} == {"dtype": "bfloat16", **saved}
    found = LlamaGen.from_pretrained(tmp_path / "mine")
    assert found.gpt is not None
    assert (found.gpt.config.block_size, found.dtype) == ((model.resolution // 16) ** 2, "bfloat16")
    weights = read_weights(tmp_path / "mine/model.safetensors")
    assert weights.state["output.weight"].dtype is torch.bfloat16
    assert weights.captions == ({"cleaned": "published"} if model.kind == "text" else None)
    card = (tmp_path / "mine/README.md").read_text()
    assert f"base_model: {model.repository}\n" in card
    assert f"These are the published weights of [{model.repository}]" in card
    assert ("pipeline_tag: text-to-image\n" in card) is (model.kind == "text")


def test_a_checkpoint_without_its_run_needs_its_tokenizer(
    pipeline: Pipeline, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(pipeline.argen, tmp_path / "alone.ckpt")
    arguments = [str(tmp_path / "alone.ckpt"), "--to", str(tmp_path / "out"), "--samples=0", "--name=Digits of mine"]
    with pytest.raises(SystemExit):
        main(arguments)
    assert "alone.ckpt does not name its tokenizer; give tokenizer" in capsys.readouterr().err
    assert names(tmp_path) == {"alone.ckpt"}
    main([*arguments, f"--tokenizer={exported / 'tokenizer.safetensors'}"])
    model = LlamaGen.from_pretrained(tmp_path / "out")
    assert model.name == "Digits of mine"
    card = (tmp_path / "out/README.md").read_text()
    assert "| Optimizer steps | 8 |" in card
    assert "Measured" not in card
    assert "Batch size" not in card


def test_class_names_of_older_runs_are_those_of_their_codes(pipeline: Pipeline, tmp_path: Path) -> None:
    shutil.copytree(pipeline.root / "argen", tmp_path / "argen", symlinks=True)
    (tmp_path / "codes").mkdir()
    meta = json.loads((pipeline.codes / "meta.json").read_text()) | {"classes": [f"digit {n}" for n in range(10)]}
    (tmp_path / "codes/meta.json").write_text(json.dumps(meta))
    config = tmp_path / "argen/fit.yaml"
    config.write_text(config.read_text().replace(str(pipeline.codes), "codes"))
    (checkpoint,) = (tmp_path / "argen/checkpoints").glob("step_*.ckpt")
    content = torch.load(checkpoint, weights_only=True)
    content["llamagen"].pop("classes", None)
    torch.save(content, checkpoint)
    export_model(Export(str(tmp_path / "argen"), samples=1, conditions=("digit 3",)), tmp_path / "out")
    model = LlamaGen.from_pretrained(tmp_path / "out")
    assert model.class_names is not None
    assert model.class_names.find("digit 7") == 7
    assert "- 7: digit 7\n" in (tmp_path / "out/README.md").read_text()


def test_a_folder_is_replaced_only_if_it_is_an_export_and_with_overwrite(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own/thesis.tex").touch()
    (tmp_path / "file").touch()
    for name in ("own", "file"):
        with pytest.raises(ValueError, match="exists and is not an exported model; choose another folder"):
            export_model(Export(str(exported)), tmp_path / name, overwrite=True)
    export_model(Export(str(exported)), tmp_path / "out")
    (tmp_path / "out/old").touch()
    (tmp_path / "out/model.safetensors").unlink()  # broken exports can be replaced, too
    with pytest.raises(SystemExit):
        main([str(exported), "--to", str(tmp_path / "out")])
    assert "out exists already; choose another folder, or give --overwrite" in capsys.readouterr().err
    main([str(exported), "--to", str(tmp_path / "out"), "--overwrite"])
    assert names(tmp_path / "out") == MODEL_FILES
    assert names(tmp_path / "own") == {"thesis.tex"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, FloatingPointError("logits are not finite")])
def test_a_failed_or_stopped_export_leaves_nothing(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(export_folder, "sample_images", fail)
    with pytest.raises(BaseException, match=str(error) if isinstance(error, Exception) else None):
        export_model(Export(str(pipeline.argen)), tmp_path / "new/out")
    assert list((tmp_path / "new").iterdir()) == []


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def truncate(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


def change(**settings: object) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))

    return write


BROKEN: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no model": (drop("model.safetensors"), ("has no model.safetensors; it is incomplete",)),
    "no tokenizer": (drop("tokenizer.safetensors"), ("has no tokenizer.safetensors; it is incomplete",)),
    "no config": (drop("config.json"), ("holds no model",)),
    "half a model": (truncate("model.safetensors"), ("model.safetensors cannot be read", "get it again")),
    "half a tokenizer": (truncate("tokenizer.safetensors"), ("tokenizer.safetensors cannot be read",)),
    "half a config": (truncate("config.json"), ("config.json cannot be read as JSON",)),
    "other program": (change(format=None), ("has the format None, not 'llamagen-lightning 1'",)),
    "later format": (change(format="llamagen-lightning 2"), ("'llamagen-lightning 2'",)),
    "wrong type": (change(classes="a"), ("classes in", "is 'a'; it must be of type list")),
    "class numbers": (change(classes=[1]), ("classes in", "not all texts")),
    "unknown setting": (change(sampling={"scale": 1}), ("sampling in", "has no option scale")),
    "wrong setting": (change(sampling={"top_p": 2}), ("sampling in", "top_p is 2")),
    "wrong dtype": (change(dtype="int8"), ("dtype is 'int8'",)),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_one_line(exported: Path, tmp_path: Path, case: str) -> None:
    shutil.copytree(exported, tmp_path / "broken")
    damage, parts = BROKEN[case]
    damage(tmp_path / "broken")
    with pytest.raises(ValueError) as error:
        LlamaGen.from_pretrained(tmp_path / "broken")
    assert_one_line(error, *parts)


def test_an_upload_is_loaded_by_its_address(
    exported: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["missing.ckpt", "--to", "hf://me/digits"])
    assert "an upload takes a token" in capsys.readouterr().err  # before any work
    monkeypatch.setenv("HF_TOKEN", "hf_valid")
    # An exported folder is uploaded as it is, with the card that its author has edited.
    shutil.copytree(exported, exported.parent / "edited/digits")
    card = exported.parent / "edited/digits/README.md"
    card.write_text(card.read_text() + "\nEdited.\n")
    main([str(card.parent), "--to", "hf://me/digits"])
    assert capsys.readouterr().out.splitlines()[-1] == f"uploaded: {hub.url}/me/digits"
    (commit,) = hub.repositories["me/digits"].commits.values()
    assert set(commit) == MODEL_FILES
    text = commit["README.md"].data().decode()
    assert text.endswith("\nEdited.\n")
    assert 'LlamaGen.from_pretrained("me/digits")' in text
    assert "python -m serving.page me/digits\n" in text
    found, expected = (LlamaGen.from_pretrained(each) for each in ("me/digits", exported))
    assert found.name == "digits"
    assert np.array_equal(found.generate(3, progress=False)[0], expected.generate(3, progress=False)[0])


def test_a_run_is_uploaded_directly(
    pipeline: Pipeline, exported: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_valid")
    export_model(Export(str(pipeline.argen), samples=3, license="mit"), "hf://me/digits")
    (commit,) = hub.repositories["me/digits"].commits.values()
    assert {name: blob.data() for name, blob in commit.items() if name != "README.md"} == {
        name: (exported / name).read_bytes() for name in MODEL_FILES - {"README.md"}
    }


def test_a_text_encoder_of_this_machine_is_not_uploaded(
    text_pipeline: TextPipeline, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_valid")
    with pytest.raises(ValueError, match="t5, which others do not have; give --text-encoder, its name on the hub"):
        export_model(Export(str(text_pipeline.argen), samples=0), "hf://me/text")
    export_model(Export(str(text_pipeline.argen), samples=0, text_encoder="me/t5"), "hf://me/text")
    (commit,) = hub.repositories["me/text"].commits.values()
    assert json.loads(commit["config.json"].data())["text_encoder"] == {"name": "me/t5", "dtype": "float32"}
    assert all(str(text_pipeline.root).encode() not in blob.data() for blob in commit.values())


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"samples": -1}, ("samples is -1",)),
        ({"license": "My own licence"}, ("license is 'My own licence'", "apache-2.0")),
        ({"name": "two\nlines"}, ("name is 'two\\nlines'", "one line")),
        ({"text_encoder": "t5"}, ("text_encoder is t5", "class-conditional")),
        ({"conditions": ("dog",)}, ("no sample images: there is no class 'dog'", "--samples 0")),
    ],
)
def test_wrong_options_are_one_line(
    pipeline: Pipeline, tmp_path: Path, options: dict[str, object], parts: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError) as error:
        export_model(Export(**{"checkpoint": str(pipeline.argen), **options}), tmp_path / "out")
    assert_one_line(error, *parts)
    assert list(tmp_path.iterdir()) == []


def test_an_exported_folder_takes_no_options(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is copied as it is; edit its README\.md and config\.json"):
        export_model(Export(str(exported), license="mit"), tmp_path / "out")


def test_a_model_that_does_not_fit_its_tokenizer_is_not_exported(pipeline: Pipeline, tmp_path: Path) -> None:
    torch.save({"model": small_vqgan().state_dict()}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"with other weights .* than .*other\.pt"):
        export_model(Export(str(pipeline.argen), tokenizer=str(tmp_path / "other.pt")), tmp_path / "out")
    assert names(tmp_path) == {"other.pt"}
