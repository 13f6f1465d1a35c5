"""Checkpoints and caption features record the cleaning of their captions, and another one is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from callbacks import ImageWriter, SampleGrid
from datamodules import CodeDataModule, PromptDataModule
from lightning_modules import ARGenModule
from llamagen.checkpoints.export import export
from llamagen.models.gpt import GPTConfig
from llamagen.text import TextEncoderConfig
from tests.datamodules.shard_files import assert_one_line
from tests.lightning_modules.runs import evaluator
from tests.text_pipeline import TEXT_NET, TextPipeline


def module_of(pipeline: TextPipeline, **options: Any) -> ARGenModule:
    encoder = TextEncoderConfig(str(pipeline.t5), "float32")
    return ARGenModule(GPTConfig(**TEXT_NET), tokenizer=pipeline.images.tokenizer, text_encoder=encoder, **options)


def data_of(root: Path, **options: Any) -> CodeDataModule:
    return CodeDataModule(root, batch_size=6, num_workers=0, **options)


def predict(module: ARGenModule, data: PromptDataModule, checkpoint: Path | None, *callbacks: pl.Callback) -> Any:
    return evaluator(*callbacks).predict(module, data, ckpt_path=checkpoint, weights_only=True)


def validate(module: ARGenModule, data: CodeDataModule, checkpoint: Path | None = None) -> None:
    evaluator(limit_val_batches=1).validate(module, data, ckpt_path=checkpoint, weights_only=True, verbose=False)


@pytest.fixture(scope="module")
def exported(text_pipeline: TextPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the model as safetensors, which keep the record, and as .pt, which do not."""
    folder = tmp_path_factory.mktemp("exported")
    for name in ("gpt.safetensors", "gpt.pt"):
        export(text_pipeline.argen, folder / name)
    return folder


def with_record(pipeline: TextPipeline, folder: Path, cleaned: Any) -> Path:
    """The features with another record of their cleaning."""
    shutil.copytree(pipeline.features, folder)
    meta = json.loads((folder / "meta.json").read_text())
    meta["features"]["cleaned"] = cleaned
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def test_features_and_checkpoint_record_the_cleaning(text_pipeline: TextPipeline) -> None:
    assert json.loads((text_pipeline.features / "meta.json").read_text())["features"]["cleaned"] == "web"
    checkpoint = torch.load(text_pipeline.argen, weights_only=True, mmap=True)
    assert checkpoint["llamagen"]["captions"]["cleaned"] == "web"


def test_prompts_are_cleaned_as_the_checkpoint_records(text_pipeline: TextPipeline) -> None:
    data = PromptDataModule(["A CAT"])
    assert data.prompts == ["A CAT"]
    module = module_of(text_pipeline)
    predict(module, data, text_pipeline.argen)
    assert data.prompts == [data.request(0)["captions"]] == ["a cat"]
    assert module.caption_cleaning == "web"


def test_exported_weights_record_the_cleaning_or_warn(text_pipeline: TextPipeline, exported: Path) -> None:
    data = PromptDataModule(["A CAT"])
    predict(module_of(text_pipeline, init_from=exported / "gpt.safetensors"), data, None)
    assert data.prompts == ["a cat"]
    data = PromptDataModule(["A CAT"])
    with pytest.warns(UserWarning, match="prompts are not cleaned, because the weights do not record.* published"):
        predict(module_of(text_pipeline, init_from=exported / "gpt.pt"), data, None)
    assert data.prompts == ["A CAT"]
    data = PromptDataModule(["A CAT"], clean_captions="published")
    predict(module_of(text_pipeline, init_from=exported / "gpt.pt"), data, None)
    assert data.prompts == ["a cat"]


@pytest.mark.parametrize(("option", "words"), [(False, "not cleaned"), ("published", "cleaned with published")])
def test_prompts_with_another_cleaning_are_refused_before_anything_is_written(
    option: Any, words: str, text_pipeline: TextPipeline, tmp_path: Path
) -> None:
    def run(clean_captions: Any) -> None:
        trainer = evaluator(ImageWriter(), default_root_dir=tmp_path)
        data = PromptDataModule(["A CAT"], clean_captions=clean_captions)
        trainer.predict(module_of(text_pipeline), data, ckpt_path=text_pipeline.argen, weights_only=True)

    with pytest.raises(ValueError) as error:
        run(option)
    assert_one_line(error, f"prompts are {words}", "were cleaned with web", "clean_captions to web or auto")
    assert list(tmp_path.iterdir()) == []
    run(True)  # as in configurations from before there were two cleanings
    assert (tmp_path / "samples.npz").exists()


def test_a_checkpoint_is_refused_for_captions_with_another_cleaning(
    text_pipeline: TextPipeline, tmp_path: Path
) -> None:
    with pytest.raises(ValueError) as error:
        validate(module_of(text_pipeline), data_of(text_pipeline.codes), text_pipeline.argen)
    assert_one_line(
        error, "are not cleaned, but those of the checkpoint", "web; set data.init_args.clean_captions to web"
    )
    features = with_record(text_pipeline, tmp_path / "features", "published")
    with pytest.raises(ValueError) as error:
        validate(module_of(text_pipeline), data_of(features), text_pipeline.argen)
    assert_one_line(error, "are cleaned with published", "extract the features again", "clean_captions web")
    validate(module_of(text_pipeline), data_of(text_pipeline.codes, clean_captions="web"), text_pipeline.argen)


def test_true_in_an_older_record_is_our_cleaning(text_pipeline: TextPipeline, tmp_path: Path) -> None:
    features = with_record(text_pipeline, tmp_path / "features", True)
    data = data_of(features, clean_captions="web")
    module = module_of(text_pipeline)
    validate(module, data, text_pipeline.argen)
    assert data.cleaning == module.caption_cleaning == "web"


def test_a_training_on_other_captions_must_be_intended(text_pipeline: TextPipeline, exported: Path) -> None:
    for initial in (text_pipeline.argen, exported / "gpt.safetensors"):
        with pytest.raises(ValueError) as error:
            validate(module_of(text_pipeline, init_from=initial), data_of(text_pipeline.codes))
        assert_one_line(error, f"those of {initial}", "were cleaned with web", "add clean_captions to", "init_adapt")
    module = module_of(text_pipeline, init_from=text_pipeline.argen, init_adapt=["clean_captions"])
    assert module.caption_cleaning == "web"
    validate(module, data_of(text_pipeline.codes))
    assert module.caption_cleaning is None
    module = module_of(text_pipeline, init_from=exported / "gpt.pt")  # without a record, any captions may follow
    validate(module, data_of(text_pipeline.codes))
    assert module.caption_cleaning is None


def test_a_second_stage_resumes_with_its_own_cleaning(text_pipeline: TextPipeline, tmp_path: Path) -> None:
    checkpoint = torch.load(text_pipeline.argen, weights_only=True)
    checkpoint["llamagen"]["captions"]["cleaned"] = False
    torch.save(checkpoint, tmp_path / "second.ckpt")
    module = module_of(text_pipeline, init_from=text_pipeline.argen)
    data = PromptDataModule(["A CAT"])
    predict(module, data, tmp_path / "second.ckpt")
    assert data.prompts == ["A CAT"]
    module = module_of(text_pipeline, init_from=text_pipeline.argen, init_adapt=["clean_captions"])
    validate(module, data_of(text_pipeline.codes), tmp_path / "second.ckpt")
    assert module.caption_cleaning is None


def test_the_option_must_agree_with_stored_features(text_pipeline: TextPipeline) -> None:
    with pytest.raises(ValueError) as error:
        validate(module_of(text_pipeline), data_of(text_pipeline.features, clean_captions="published"))
    assert_one_line(error, "clean_captions is published", "were cleaned with web; set it to web")


def test_prompts_of_grids_are_cleaned_like_stored_features(
    text_pipeline: TextPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, read = module_of(text_pipeline), []
    encode = module._text.encode  # type: ignore[union-attr]
    monkeypatch.setattr(
        module._text, "encode", lambda texts, *more, **options: read.append(texts) or encode(texts, *more, **options)
    )
    grid = SampleGrid(prompts=["A CAT"], per_class=1)
    trainer = evaluator(grid, limit_val_batches=1, default_root_dir=tmp_path)
    trainer.validate(module, data_of(text_pipeline.features), verbose=False)
    assert read == [["a cat"]]
