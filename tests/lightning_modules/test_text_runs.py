"""Text models on the command line: resumed, on two ranks, sharded, compiled; and sampling of prompts."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import main
from datamodules import PromptDataModule
from lightning_modules import ARGenModule
from llamagen.checkpoints.contents import read_checkpoint
from llamagen.models.gpt import GPTConfig
from llamagen.text import TextEncoderConfig
from tests.lightning_modules.runs import assert_moved_alike, evaluator
from tests.pipeline import SAMPLING
from tests.ranks import succeeds, two_processes
from tests.text_pipeline import TEXT_NET, TextPipeline

DROPOUTS = ("token_dropout", "resid_dropout", "ffn_dropout", "condition_dropout")
NO_DROPOUT = tuple(f"--model.init_args.net.{name}=0.0" for name in DROPOUTS)
STEPS = 8
LONG = "the cat and the dog and the red house on the photo of a tree " * 12
ODD = {
    "nothing": "",
    "spaces": " \t ",
    "too long": LONG,
    "another script": "猫が木の下に座っている。",
    "right to left": "قطة تحت شجرة",
    "emoji": "🐕‍🦺 under a 🌳",
    "control characters": "a\0cat\x1b[31m\u202e on\x07 \u2028the house",
    "half a pair": "a \ud83d dog",
    "specials of T5": "</s> <pad> <extra_id_0> a cat",
    "a path": "../../etc/passwd",
}


def fit(pipeline: TextPipeline, folder: Path, *more: str, online: bool = False, batch_size: int = 32) -> list[str]:
    """Arguments of a training that validates and saves at its end."""
    root = pipeline.codes if online else pipeline.features
    return [
        *("fit", *pipeline.argen_arguments(folder), f"--data.init_args.root={root}"),
        *(f"--data.init_args.batch_size={batch_size}", "--data.init_args.short_caption_share=0.3"),
        *("--data.init_args.clean_captions=true", "--data.init_args.remainder=drop"),
        *(f"--trainer.val_check_interval={STEPS}", *more),
    ]


def state(folder: Path) -> dict[str, torch.Tensor]:
    """Weights, buffers, moments and averages of the last checkpoint."""
    checkpoint = read_checkpoint(folder / "checkpoints/last.ckpt", wanted=lambda _: True)
    assert checkpoint["global_step"] == STEPS
    found: dict[str, torch.Tensor] = dict(checkpoint["state_dict"])
    for number, entries in checkpoint["optimizer_states"][0]["state"].items():
        found |= {f"{number} {name}": torch.as_tensor(value) for name, value in entries.items()}
    assert any(name.endswith(" ema") for name in found)
    assert "gpt.cls_embedding.uncond_embedding" in found
    return found


@pytest.fixture(scope="module")
def one(text_pipeline: TextPipeline, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The final state of one process without dropout."""
    folder = tmp_path_factory.mktemp("one")
    main.main(fit(text_pipeline, folder, *NO_DROPOUT))
    return state(folder)


@pytest.mark.parametrize("online", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["stored", "online"])
def test_a_resumed_text_run_equals_the_uninterrupted_one(
    online: bool, text_pipeline: TextPipeline, tmp_path: Path
) -> None:
    main.main(fit(text_pipeline, tmp_path / "whole", online=online))
    main.main(fit(text_pipeline, tmp_path / "parts", "--trainer.max_steps=5", online=online))
    last = f"--ckpt_path={tmp_path / 'parts/checkpoints/last.ckpt'}"
    main.main(fit(text_pipeline, tmp_path / "parts", last, online=online))
    whole, parts = state(tmp_path / "whole"), state(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []


@pytest.mark.parametrize("how", [pytest.param("ddp", marks=pytest.mark.slow), "sharded"])
def test_two_ranks_train_a_text_model_like_one(
    how: str, one: dict[str, torch.Tensor], text_pipeline: TextPipeline, tmp_path: Path
) -> None:
    succeeds(two_processes(fit(text_pipeline, tmp_path, *NO_DROPOUT, f"--trainer.strategy={how}", batch_size=16)))
    two = state(tmp_path)
    assert two.keys() == one.keys()
    start = {name: torch.zeros_like(value) for name, value in one.items()}
    assert_moved_alike(start, one, two)
    unconditional = "gpt.cls_embedding.uncond_embedding"
    assert torch.equal(two[unconditional], one[unconditional])


@pytest.mark.slow
def test_a_compiled_text_model_trains_like_an_eager_one(
    one: dict[str, torch.Tensor], text_pipeline: TextPipeline, tmp_path: Path
) -> None:
    main.main(fit(text_pipeline, tmp_path, *NO_DROPOUT, "--model.init_args.compile=true"))
    start = {name: torch.zeros_like(value) for name, value in one.items()}
    assert_moved_alike(start, one, state(tmp_path))


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def assert_sampled(folder: Path, count: int) -> None:
    """Assert that archive, images and grid exist."""
    with np.load(folder / "samples.npz") as archive:
        assert archive["arr_0"].shape == (count, 8, 8, 3)
    for line in records(folder):
        with Image.open(folder / line["file_name"]) as image:
            assert image.size == (8, 8)
    with Image.open(folder / "grid.png") as grid:
        assert grid.size[0] > 192


def odd_arguments(pipeline: TextPipeline, folder: Path) -> list[str]:
    """The command that generates two images of each odd prompt."""
    arguments = pipeline.prompt_arguments(folder, json.dumps(list(ODD.values())))
    return [*arguments, "--data.init_args.per_prompt=2"]


@pytest.fixture(scope="module")
def odd(text_pipeline: TextPipeline, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder with images of odd prompts, and the warnings."""
    folder = tmp_path_factory.mktemp("odd")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        main.main(odd_arguments(text_pipeline, folder))
    return folder, [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]


def test_odd_prompts_are_sampled_and_truncation_is_reported(odd: tuple[Path, list[str]]) -> None:
    folder, said = odd
    assert any("prompts were longer than the model reads and were truncated: prompt 2" in text for text in said)
    assert_sampled(folder, 2 * len(ODD))
    names = [*ODD, *ODD]
    cut = [name for name, line in zip(names, records(folder), strict=True) if line["truncated"]]
    assert cut.count("too long") == 2
    assert not set(cut) & {"nothing", "spaces"}
    assert all(line["sampling"]["guidance_scale"] == SAMPLING.guidance_scale for line in records(folder))


def test_odd_prompts_are_cleaned_and_sampled(text_pipeline: TextPipeline) -> None:
    encoder = TextEncoderConfig(str(text_pipeline.t5), "float32")
    module = ARGenModule(GPTConfig(**TEXT_NET), tokenizer=text_pipeline.images.tokenizer, text_encoder=encoder)
    batches: Any = evaluator().predict(module, PromptDataModule(list(ODD.values()), clean_captions=True))
    assert sum(len(batch["images"].tensor()) for batch in batches) == len(ODD)


def test_prompts_from_files_with_eager_and_compiled_samplers(text_pipeline: TextPipeline, tmp_path: Path) -> None:
    lines = ["a cat", "a handwritten three"]
    table = ["Prompt\tCategory", *(f"{line}\tAnimals" for line in lines)]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    (tmp_path / "prompts.tsv").write_text("\n".join(table))
    eager, compiled = tmp_path / "eager", tmp_path / "compiled"
    main.main(text_pipeline.prompt_arguments(eager, str(tmp_path / "prompts.txt")))
    on = [{"class_path": "CompiledSampling", "init_args": {"enabled": True}}, {"class_path": "ImageWriter"}]
    callbacks = f"--trainer.callbacks={json.dumps([{'class_path': 'EMA'}, *on])}"
    main.main([*text_pipeline.prompt_arguments(compiled, str(tmp_path / "prompts.tsv")), callbacks])
    for folder, columns in ((eager, {}), (compiled, {"Category": "Animals"})):
        assert_sampled(folder, 2)
        assert [line["prompt"] for line in records(folder)] == lines
        assert [line["columns"] for line in records(folder)] == [columns] * 2
    with np.load(eager / "samples.npz") as one, np.load(compiled / "samples.npz") as other:
        assert np.array_equal(one["arr_0"], other["arr_0"])


def test_two_processes_sample_the_same_images_as_one_with_any_batch_size(
    odd: tuple[Path, list[str]], text_pipeline: TextPipeline, tmp_path: Path
) -> None:
    folder, _ = odd
    succeeds(two_processes([*odd_arguments(text_pipeline, tmp_path), "--data.init_args.batch_size=3"]))
    with np.load(folder / "samples.npz") as one, np.load(tmp_path / "samples.npz") as two:
        assert np.array_equal(one["arr_0"], two["arr_0"])
    assert records(folder) == records(tmp_path)


def test_grids_of_prompts_appear_while_training(text_pipeline: TextPipeline) -> None:
    (grid, *_) = sorted((text_pipeline.argen.parents[1] / "samples").glob("*.png"))
    with Image.open(grid) as image:
        assert image.size[0] > 8 * 192
