"""Our modules and data satisfy the protocols of the callbacks; others are refused by name."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest

from callbacks import (
    EMA,
    CodebookHistogram,
    CodeWriter,
    CompiledSampling,
    FeatureWriter,
    FIDMonitor,
    ImageWriter,
    PositionLoss,
    ReconstructionGrid,
    SampleGrid,
    SamplingProgress,
    Throughput,
    protocols,
)
from callbacks.protocols import (
    EncodesCaptions,
    GeneratesImages,
    HasImageSize,
    ReconstructsImages,
    missing_members,
    optional,
    require,
)
from datamodules import ClassRequestDataModule, CodeDataModule, DigitsDataModule, PromptDataModule
from lightning_modules import CaptionModule
from tests.datamodules.shard_files import assert_one_line
from tests.lightning_modules.runs import argen_module, evaluator, vqgan_module
from tests.pipeline import Pipeline

ARGEN = (
    "HasGenerator",
    "EvaluatesStages",
    "CountsOperations",
    "PredictsCodes",
    "SamplesImages",
    "KeepsSampler",
    "PredictsImages",
    "GeneratesImages",
)
VQGAN = ("HasGenerator", "CountsCodes", "ReconstructsImages", "TokenizesImages")


def satisfied(instance: object) -> set[str]:
    """Names of the protocols of ``callbacks/protocols.py`` that an object satisfies."""
    members = {name: value for name, value in vars(protocols).items() if getattr(value, "_is_runtime_protocol", False)}
    of_modules = {*ARGEN, *VQGAN, "EncodesCaptions"}
    names = of_modules if isinstance(instance, pl.LightningModule) else members.keys() - of_modules
    return {name for name in names if not missing_members(members[name], instance)}


def test_our_modules_satisfy_the_protocols_of_their_callbacks() -> None:
    # Without a tokenizer `output_size` raises: the check must not evaluate properties.
    assert satisfied(argen_module()) == set(ARGEN)
    assert satisfied(vqgan_module()) == set(VQGAN)
    assert not missing_members(EncodesCaptions, CaptionModule.__new__(CaptionModule))


def test_our_data_satisfies_the_protocols_of_the_writers(pipeline: Pipeline) -> None:
    images = DigitsDataModule(pipeline.digits, image_size=8, num_workers=0)
    images.setup("predict")
    assert satisfied(images) == {"HasImageSize", "ShardableData", "ShardableImages"}
    assert satisfied(ClassRequestDataModule(2, 1)) == {"ImageRequests"}
    assert satisfied(PromptDataModule(["a"])) == {"ImageRequests", "PromptRequests", "CleansCaptions"}


def test_a_missing_member_is_named_with_the_callback_and_a_remedy() -> None:
    module = vqgan_module()
    with pytest.raises(ValueError) as error:
        require(GeneratesImages, module, SampleGrid())
    assert_one_line(
        error, "SampleGrid needs a module that generates images from classes or captions, but VQGANModule has"
    )
    assert_one_line(error, "check_requests", "remove SampleGrid from trainer.callbacks")
    with pytest.raises(ValueError) as error:
        require(HasImageSize, SimpleNamespace(), "FIDMonitor")
    assert_one_line(error, "SimpleNamespace has no image_size; change data.class_path")
    with pytest.raises(ValueError) as error:
        require(HasImageSize, None, "FIDMonitor")
    assert_one_line(error, "FIDMonitor needs a DataModule with images of one size, but there is none")


def test_an_object_that_satisfies_a_protocol_is_returned() -> None:
    module = vqgan_module()
    assert require(ReconstructsImages, module, "a test") is optional(ReconstructsImages, module) is module
    assert optional(GeneratesImages, module) is None
    assert isinstance(module, ReconstructsImages)


@pytest.mark.parametrize(
    ("make", "module", "phrase"),
    [
        (lambda: EMA(), pl.LightningModule, "EMA needs a module with a generator"),
        (lambda: CodebookHistogram(), argen_module, "CodebookHistogram needs a module with a codebook"),
        (lambda: ReconstructionGrid(), argen_module, "ReconstructionGrid needs a module that reconstructs images"),
        (lambda: SampleGrid(), vqgan_module, "SampleGrid needs a module that samples images"),
        (lambda: PositionLoss(), vqgan_module, "PositionLoss needs a module that predicts codes"),
        (lambda: Throughput(), vqgan_module, "Throughput needs a module that counts its operations"),
        (
            lambda: CompiledSampling(),
            vqgan_module,
            "CompiledSampling needs a module that keeps an image sampler",
        ),
        (lambda: FIDMonitor(), pl.LightningModule, "FIDMonitor needs a module that generates or reconstructs images"),
    ],
)
def test_callbacks_refuse_a_module_that_does_not_suit_them_at_setup(
    make: Callable[[], pl.Callback], module: Callable[[], Any], phrase: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError) as error:
        make().setup(evaluator(default_root_dir=tmp_path), module(), "fit")
    assert_one_line(error, phrase, f"but {type(module()).__name__}")


@pytest.mark.parametrize(
    ("make", "module", "phrase"),
    [
        (lambda: ImageWriter(), vqgan_module, "ImageWriter needs a module whose predict step samples images"),
        (lambda: ImageWriter(), argen_module, "ImageWriter needs a DataModule that requests images"),
        (lambda: SamplingProgress(), argen_module, "SamplingProgress needs a DataModule that requests images"),
        (lambda: CodeWriter(), argen_module, "CodeWriter needs a module whose generator is an image tokenizer"),
        (lambda: CodeWriter(), vqgan_module, "CodeWriter needs a DataModule of images"),
        (lambda: FeatureWriter(), vqgan_module, "FeatureWriter needs a module that encodes captions"),
    ],
)
def test_writers_refuse_modules_and_data_that_do_not_suit_them_at_setup(
    make: Callable[[], pl.Callback], module: Callable[[], Any], phrase: str, pipeline: Pipeline, tmp_path: Path
) -> None:
    trainer: Any = evaluator(default_root_dir=tmp_path)
    trainer.datamodule = CodeDataModule(pipeline.codes, num_workers=0)
    with pytest.raises(ValueError) as error:
        make().setup(trainer, module(), "predict")
    assert_one_line(error, phrase)
