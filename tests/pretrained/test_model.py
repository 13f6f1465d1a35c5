"""``LlamaGen``: the same images as the command line, golden values, completion, errors."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import main
from llamagen import LlamaGen
from llamagen.checkpoints.weights import read_weights
from llamagen.checkpoints.writing import write_weights
from llamagen.class_names import ClassNames
from llamagen.pretrained.loading import Parts
from llamagen.pretrained.run_folder import find_run
from llamagen.sampling import SamplingConfig
from tests.datamodules.shard_files import assert_one_line
from tests.golden import assert_matches, golden, integer_input
from tests.golden_gpts import golden_gpt, golden_inputs
from tests.pipeline import Pipeline
from tests.small_models import small_gpt, small_vqgan
from tests.text_pipeline import TextPipeline


@pytest.fixture(scope="module")
def model(pipeline: Pipeline) -> LlamaGen:
    return LlamaGen.from_pretrained(pipeline.root / "argen")


@pytest.fixture(scope="module")
def text_model(text_pipeline: TextPipeline) -> LlamaGen:
    return LlamaGen.from_pretrained(text_pipeline.root / "argen")


def arrays(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def written(folder: Path) -> np.ndarray:
    with np.load(folder / "samples.npz") as archive:
        images: np.ndarray = archive["arr_0"]
    return images


def random_pixels(count: int, side: int) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (side, side, 3), np.uint8)) for _ in range(count)]


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_images_are_those_of_the_command_line_whatever_the_batch(pipeline: Pipeline, batch_size: int) -> None:
    model = LlamaGen.from_pretrained(pipeline.root / "argen", batch_size=batch_size)
    images = model.generate(list(range(10)), images_per_prompt=3, progress=False)
    assert np.array_equal(arrays(images), written(pipeline.samples))
    assert images[0].mode == "RGB"


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", "mixed"), ("bf16-true", "bfloat16")])
def test_images_are_those_of_the_command_line_in_each_precision(
    pipeline: Pipeline, tmp_path: Path, precision: str, dtype: str
) -> None:
    options = [f"--ckpt_path={pipeline.argen}", f"--trainer.precision={precision}", "--data.init_args.per_class=1"]
    main.main([*pipeline.sample_arguments(tmp_path), *options, "--model.init_args.sample_seed=5"])
    model = LlamaGen.from_pretrained(pipeline.root / "argen", dtype=dtype)
    images = model.generate(range(10), seed=5, progress=False)
    assert np.array_equal(arrays(images), written(tmp_path))
    assert (model.gpt.output.weight.dtype is torch.bfloat16) is (dtype == "bfloat16")


def test_images_of_prompts_are_those_of_the_command_line(
    text_pipeline: TextPipeline, text_model: LlamaGen, tmp_path: Path
) -> None:
    prompts = ["a handwritten three", "one", "the digit seven, written by hand"]
    main.main(text_pipeline.prompt_arguments(tmp_path, str(prompts).replace("'", '"')))
    assert np.array_equal(arrays(text_model.generate(prompts, progress=False)), written(tmp_path))
    alone = text_model.generate(prompts[:1], progress=False)
    assert np.array_equal(alone[0], written(tmp_path)[0])


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("32-true", "float32"), ("bf16-mixed", "mixed"), ("bf16-true", "bfloat16"), (16, "float32")],
)
def test_the_dtype_of_a_run_is_its_precision(tmp_path: Path, precision: str | int, dtype: str) -> None:
    (tmp_path / "fit.yaml").write_text(f"trainer: {{precision: {precision}}}")
    assert find_run(tmp_path).dtype == dtype


@pytest.mark.parametrize("where", ["run", "parent", "checkpoint", "moved"])
def test_a_run_is_found_by_folder_or_checkpoint_and_may_move(
    pipeline: Pipeline, model: LlamaGen, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = {"run": pipeline.root / "argen", "parent": pipeline.root, "checkpoint": pipeline.argen}.get(where)
    if source is None:  # with the other runs, so that the tokenizer is beside it, as a relative path
        for name in ("argen", "tokenizer"):
            shutil.copytree(pipeline.root / name, tmp_path / "moved" / name)
        config = tmp_path / "moved/argen/fit.yaml"
        config.write_text(config.read_text().replace(str(pipeline.tokenizer), "moved/tokenizer/checkpoints/last.ckpt"))
        monkeypatch.chdir("/")
        source = tmp_path / "moved/argen"
    found = LlamaGen.from_pretrained(source)
    assert found.resolution == 8
    assert found.sampling == model.sampling != SamplingConfig()
    assert np.array_equal(found.generate("3", progress=False)[0], model.generate(3, progress=False)[0])


@pytest.mark.parametrize("entry", ["gpt_tiny_c2i", "gpt_tiny_t2i"])
@pytest.mark.parametrize("compiled", [False, True])
def test_golden_logits_and_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str, compiled: bool) -> None:
    gpt = golden_gpt(entry)
    torch.save({"model": gpt.state_dict()}, tmp_path / "gpt.pt")
    write_weights(gpt, read_weights(tmp_path / "gpt.pt"), tmp_path / "gpt.safetensors")
    vqgan = small_vqgan(codebook_size=gpt.config.vocab_size)
    torch.save({"model": vqgan.state_dict()}, tmp_path / "tokenizer.pt")
    model = LlamaGen.from_pretrained(
        tmp_path / "gpt.safetensors", tokenizer=tmp_path / "tokenizer.pt", compile=compiled, batch_size=2
    )
    assert model.gpt is not None
    condition, lengths = golden_inputs(entry, gpt.config)
    codes = integer_input(f"{entry}/idx", gpt.config.vocab_size, (len(condition), gpt.config.block_size))
    with torch.no_grad():
        logits = model.gpt(codes[:, :-1], condition, caption_lengths=lengths)
    assert_matches(logits, golden(entry)["train_logits"])
    conditions: list[Any] = condition.tolist() if lengths is None else ["0", "1", "2", "3"][: len(condition)]

    def features(prompts: list[str], device: torch.device) -> tuple[Tensor, Tensor | None]:
        rows = [int(prompt) for prompt in prompts]
        return condition[rows], None if lengths is None else lengths[rows]

    if lengths is not None:  # the record has features instead of prompts
        monkeypatch.setattr(model, "_text", features)
    greedy = model.generate_codes(conditions, temperature=0.0, guidance_scale=1.75, progress=False)
    assert greedy.flatten(1).tolist() == golden(entry)["greedy"]["1.75"]


@pytest.mark.parametrize("condition", ["class", "text"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_completion_keeps_rows_exactly(condition: str, compiled: bool, scale: float) -> None:
    gpt = small_gpt(condition=condition)
    names = ClassNames([f"class {number}" for number in range(7)])

    def features(given: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(len(given), 6, 12, generator=generator), torch.tensor([2, 6])[: len(given)]

    text = features if condition == "text" else None
    parts = Parts("small", small_vqgan(), gpt, SamplingConfig(guidance_scale=scale), "float32", names, text)
    model = LlamaGen(parts, compile=compiled)
    given = ["a", "b"] if text else ["class 1", 2]
    images = random_pixels(2, 40)  # other than the model's 16 px: cropped and resized
    codes = model.encode(images) % 48
    generated = model.generate_codes(given, seed=3, progress=False)
    for rows in range(5):
        completed = model.generate_codes(given, kept=codes[:, :rows], seed=3, progress=False)
        assert torch.equal(completed[:, :rows], codes[:, :rows])
        assert torch.equal(completed, generated) is (rows == 0)
        again = model.generate_codes(given, kept=generated[:, :rows], seed=3, progress=False)
        assert torch.equal(again, generated)
    assert torch.equal(model.generate_codes(given, kept=codes, progress=False), codes)


def test_keeping_nothing_generates_and_keeping_all_reconstructs(model: LlamaGen) -> None:
    image = random_pixels(1, 20)[0]
    assert np.array_equal(model.complete(image, 0, 7, seed=2, progress=False), model.generate(7, seed=2)[0])
    assert np.array_equal(model.complete(image, keep_rows=4, condition=7, progress=False), model.reconstruct(image))
    pair = model.complete(random_pixels(2, 8), 4, [1, 2], progress=False)
    assert np.array_equal(arrays(pair), arrays(model.reconstruct(random_pixels(2, 8))))


@pytest.mark.parametrize("condition", [7, [7], np.array([7, 3]), [7, 3]])
def test_a_completion_has_the_upper_rows_of_the_image(model: LlamaGen, condition: Any) -> None:
    image = random_pixels(1, 20)[0]
    upper = model.encode(image)[0, :2]
    completed = model.complete(image, 2, condition, seed=1, images_per_prompt=2, progress=False)
    codes = model.generate_codes(condition, kept=upper, seed=1, images_per_prompt=2, progress=False)
    assert len(completed) == 2 * np.size(condition) == len(codes)
    assert np.array_equal(arrays(completed), arrays(model.decode(codes)))
    assert all(torch.equal(each[:2], upper) for each in codes)
    assert not torch.equal(codes[0, 2:], codes[1, 2:])


def test_images_of_all_kinds_are_encoded_alike(model: LlamaGen, tmp_path: Path) -> None:
    image = random_pixels(1, 8)[0]
    image.save(tmp_path / "image.png")
    pixels = np.asarray(image)
    planes = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    expected = model.encode(image)
    for same in (tmp_path / "image.png", str(tmp_path / "image.png"), pixels, planes, planes[None], [image]):
        assert torch.equal(model.encode(same), expected)
    assert torch.equal(model.encode((planes / 127.5 - 1)[None]), expected)
    assert model.encode([image, image]).shape == (2, 4, 4)


def test_a_tokenizer_alone_encodes_and_decodes_images_of_any_size(pipeline: Pipeline) -> None:
    tokenizer = LlamaGen.from_pretrained(pipeline.tokenizer)
    assert (tokenizer.gpt, tokenizer.resolution, tokenizer.condition) == (None, None, None)
    image = Image.fromarray(np.zeros((11, 17, 3), np.uint8))
    assert tokenizer.encode(image).shape == (1, 5, 8)
    assert tokenizer.reconstruct(image).size == (16, 10)
    with pytest.raises(ValueError, match="is a tokenizer"):
        tokenizer.generate(1)
    for options in ({"dtype": "bfloat16"}, {"text_encoder": "t5"}, {"tokenizer": pipeline.tokenizer}):
        with pytest.raises(ValueError, match=r"is a tokenizer.*; leave it out"):
            LlamaGen.from_pretrained(pipeline.tokenizer, **options)


def test_rows_are_reported_and_a_call_can_be_stopped(model: LlamaGen, capfd: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[int, int, int]] = []
    images = model.generate(range(10), on_row=lambda codes, count, start: seen.append((len(codes), count, start)))
    assert seen == [(size, count, start) for start, size in ((0, 8), (8, 2)) for count in (4, 8, 12, 16)]
    assert "8/8" in capfd.readouterr().err  # rows of two batches

    def stop(codes: Tensor, count: int, start: int) -> None:
        assert model.preview(codes, count // 4)[0].size == (8, 2 * count // 4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate([1], on_row=stop, progress=False)
    assert np.array_equal(arrays(model.generate(range(10), progress=False)), arrays(images))


def test_conditions_and_settings(model: LlamaGen) -> None:
    assert model.generate([]) == []
    assert model.generate_codes([]).shape == (0, 4, 4)
    assert len(model.generate(np.arange(2), progress=False)) == 2
    greedy, likely = (arrays(model.generate(range(10), progress=False, **settings)) for settings in ({"top_k": 1}, {}))
    assert not np.array_equal(greedy, likely)
    assert "8 px, float32 on cpu" in repr(model)


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda model: model.generate("dog"), ("'dog'", "0 (0)")),
        (lambda model: model.generate(10), ("class 10", "0 to 9")),
        (lambda model: model.generate(1, guidance=3), ("'guidance'", "guidance_scale")),
        (lambda model: model.generate(1, top_p=2), ("top_p is 2",)),
        (lambda model: model.generate(1, images_per_prompt=0), ("images_per_prompt is 0",)),
        (lambda model: model.complete(random_pixels(1, 8)[0], 5, 1), ("keep_rows is 5", "at most 4")),
        (lambda model: model.complete("no.png", 2, 1), ("no.png", "give another file")),
        (lambda model: model.complete(random_pixels(3, 8), 2, [1, 2]), ("(3, 2, 4)", "2 conditions")),
        (lambda model: model.encode([]), ("no images",)),
        (lambda model: model.encode([3]), ("not int",)),
        (lambda model: model.decode([[99]]), ("99", "codebook of 32")),
        (lambda model: model.generate_codes(1, kept=[[[1, 2]]]), ("whole rows of 4",)),
        (lambda model: model.generate(None), ("None is neither a class nor a prompt",)),
        (lambda model: model.generate(2.5), ("2.5 is neither a class nor a prompt",)),
        (lambda model: model.complete(torch.zeros(1, 3, 4, 8), 2, 1), ("2 × 4 codes", "8 × 8 pixels")),
        (lambda model: model.encode(torch.zeros(0, 3, 8, 8)), ("no images",)),
    ],
)
def test_mistakes_are_one_line(model: LlamaGen, call: Callable[[LlamaGen], object], parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:
        call(model)
    assert_one_line(error, *parts)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"source": "no/such/folder"}, ("no/such/folder does not exist",)),
        ({"device": "cuda"}, ("device is 'cuda'", "give cpu")),
        ({"device": "tpu3"}, ("device is 'tpu3'",)),
        ({"dtype": "float16"}, ("dtype is 'float16'", "bfloat16")),
        ({"batch_size": 0}, ("batch_size is 0",)),
        ({"text_encoder": "t5"}, ("text_encoder is t5", "class-conditional")),
        ({"source": None}, ("None", "published name")),
        ({"source": "a" * 300}, ("does not exist",)),
        ({"source": "~nobody/x"}, ("~nobody/x does not exist",)),
    ],
)
def test_wrong_options_are_one_line(pipeline: Pipeline, options: dict[str, object], parts: tuple[str, ...]) -> None:
    if options.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError) as error:
        LlamaGen.from_pretrained(**{"source": pipeline.root / "argen", **options})
    assert_one_line(error, *parts)


def test_another_tokenizer_is_refused(pipeline: Pipeline, tmp_path: Path) -> None:
    shutil.copy(pipeline.argen, tmp_path / "alone.ckpt")
    with pytest.raises(ValueError, match=r"alone\.ckpt does not name its tokenizer; give tokenizer"):
        LlamaGen.from_pretrained(tmp_path / "alone.ckpt")
    assert LlamaGen.from_pretrained(tmp_path / "alone.ckpt", tokenizer=pipeline.tokenizer).resolution == 8
    checkpoint = torch.load(pipeline.tokenizer, weights_only=True)
    checkpoint["state_dict"]["vqgan.decoder.conv_in.bias"] += 1
    checkpoint["optimizer_states"] = []
    torch.save(checkpoint, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="tokenizer with other weights"):
        LlamaGen.from_pretrained(pipeline.argen, tokenizer=tmp_path / "other.ckpt")


def test_folders_without_or_with_several_models_are_refused(pipeline: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no model"):
        LlamaGen.from_pretrained(tmp_path)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        shutil.copy(pipeline.root / "argen/fit.yaml", tmp_path / name)
    with pytest.raises(ValueError, match=r"several runs; give one of .*one, .*two"):
        LlamaGen.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no checkpoints"):
        LlamaGen.from_pretrained(tmp_path / "one")


def test_importing_it_imports_no_lightning_and_importing_llamagen_imports_nothing() -> None:
    code = (
        "import sys, llamagen; assert 'torch' not in sys.modules; llamagen.LlamaGen; "
        "wrong = {'lightning', 'pytorch_lightning', 'transformers', 'gradio', 'huggingface_hub'} & set(sys.modules); "
        "assert not wrong, wrong"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
