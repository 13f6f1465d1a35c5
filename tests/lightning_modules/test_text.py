"""Text models: stored features equal online encoding, and data that does not match is rejected."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import pytest
import torch

import main
from callbacks import SampleGrid
from datamodules import ClassRequestDataModule, CodeDataModule, PromptDataModule
from lightning_modules import ARGenModule
from llamagen.models.gpt import GPTConfig
from llamagen.text import TextEncoderConfig, pad_left
from tests.datamodules.caption_datasets import write_caption_codes
from tests.datamodules.shard_files import assert_one_line
from tests.golden import fill
from tests.lightning_modules.runs import argen_module, evaluator
from tests.pipeline import GPT_NET
from tests.text_pipeline import TEXT_NET, TextPipeline
from tests.tiny_t5 import save_tiny_t5

WORDS = (
    "A red house.",
    "The cat sits!",
    "See www.example.com now.",
    "A dog under a tree, and a cat.",
    "Photo of a dog?",
)
TRAIN = [f"{WORDS[i % 5]} {WORDS[(i // 5) % 5]} {WORDS[i % 3]}" for i in range(23)]
VAL = [f"{WORDS[i % 4]} {WORDS[i % 3]}" for i in range(7)]


def text_module(pipeline: TextPipeline, dtype: Any = "float32", t5: Path | None = None, **net: Any) -> ARGenModule:
    """A text model with all dropouts, always with the same weights."""
    pl.seed_everything(0, verbose=False)
    config = GPTConfig(**{**TEXT_NET, "drop_path": 0.1, **net})
    return ARGenModule(config, text_encoder=TextEncoderConfig(str(t5 or pipeline.t5), dtype))


def sampling_module(pipeline: TextPipeline, dtype: Any = "float32", t5: Path | None = None) -> ARGenModule:
    """The same model with a tokenizer."""
    module = text_module(pipeline, dtype, t5)
    encoder = TextEncoderConfig(str(t5 or pipeline.t5), dtype)
    return ARGenModule(module.gpt.config, tokenizer=pipeline.images.tokenizer, text_encoder=encoder)


def data_of(root: Path, batch_size: int = 6, **options: Any) -> CodeDataModule:
    return CodeDataModule(root, batch_size=batch_size, num_workers=0, **options)


class Losses(pl.Callback):
    """Records the loss of each step and of the validation after the last one."""

    def __init__(self) -> None:
        self.train: list[float] = []
        self.val = 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.train.append(outputs["loss"].item())

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.val = trainer.callback_metrics["val/loss"].item()


def losses(module: ARGenModule, data: CodeDataModule, steps: int = 8) -> Losses:
    found = Losses()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        val_check_interval=steps,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        limit_val_batches=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[found],
    )
    trainer.fit(module, data)
    return found


def extracted(pipeline: TextPipeline, codes: Path, folder: Path, dtype: str, *more: str) -> Path:
    arguments = pipeline.feature_arguments(folder)
    main.main([*arguments, f"--data.init_args.root={codes}", f"--model.init_args.encoder.dtype={dtype}", *more])
    return folder


@pytest.mark.parametrize(
    ("dtype", "stored", "close", "share"),
    [
        ("bfloat16", "bfloat16", 1e-4, 0.5),  # bfloat16 rounding depends on the lengths in a batch
        ("float32", "float16", 1e-4, 0.0),  # storing rounds
        pytest.param("bfloat16", "bfloat16", 1e-4, 0.0, marks=pytest.mark.slow),
        pytest.param("float32", "float16", 1e-4, 0.5, marks=pytest.mark.slow),
    ],
)
def test_stored_features_and_online_encoding_give_the_same_loss(
    dtype: str, stored: str, close: float, share: float, text_pipeline: TextPipeline, tmp_path: Path
) -> None:
    write_caption_codes(tmp_path / "codes", TRAIN, VAL)
    more = f"--trainer.callbacks.dtype={stored}"
    extracted(text_pipeline, tmp_path / "codes", tmp_path / "features", dtype, more)

    def found(name: str, clean: bool, short_share: float) -> Losses:
        module = text_module(text_pipeline, dtype)
        fill(module.gpt)  # the output of a new model is the same for all captions
        return losses(module, data_of(tmp_path / name, clean_captions=clean, short_caption_share=short_share))

    from_features, online = found("features", True, share), found("codes", True, share)
    assert from_features.train == pytest.approx(online.train, rel=close)
    assert from_features.val == pytest.approx(online.val, rel=close)
    assert len(set(online.train)) == 8
    for other in (found("codes", True, 1.0), found("codes", False, share)):  # captions matter
        assert max(abs(a / b - 1) for a, b in zip(online.train, other.train, strict=True)) > 10 * close


def test_features_of_another_dataset_train_like_those_next_to_the_codes(text_pipeline: TextPipeline) -> None:
    def found(root: Path, features: Path | None = None) -> list[float]:
        module = text_module(text_pipeline)
        fill(module.gpt)
        return losses(module, data_of(root, 100, short_caption_share=0.5, features=features), steps=3).train

    assert found(text_pipeline.codes, text_pipeline.features) == found(text_pipeline.features)


def test_rejects_features_of_another_dataset_that_do_not_match_the_model(
    text_pipeline: TextPipeline, tmp_path: Path
) -> None:
    features = changed(text_pipeline, tmp_path / "set", caption_length=9)
    with pytest.raises(ValueError) as error:
        evaluator().validate(text_module(text_pipeline), data_of(text_pipeline.codes, features=features), verbose=False)
    assert_one_line(error, "up to 9 tokens", "caption_length is 8")


@pytest.mark.parametrize("name", ["features", "codes"])
def test_trains_on_streams(name: str, text_pipeline: TextPipeline) -> None:
    root = text_pipeline.features if name == "features" else text_pipeline.codes
    module = text_module(text_pipeline)
    fill(module.gpt)
    data = data_of(root, 32, resampled_epoch=320, clean_captions=True)
    found = losses(module, data, steps=3)
    assert len(set(found.train)) == 3
    assert found.val > 0


def test_short_captions_have_their_share_and_change_between_epochs(text_pipeline: TextPipeline, tmp_path: Path) -> None:
    captions = [f"A cat number {i}. It sits." for i in range(400)]
    write_caption_codes(tmp_path / "codes", captions, VAL)
    data = data_of(tmp_path / "codes", batch_size=400, short_caption_share=0.3)
    data.setup("fit")
    short = []
    for _ in range(2):
        (batch,) = data.train_dataloader()
        of_key = dict(zip(batch["keys"], batch["captions"], strict=True))
        assert set(of_key.values()) <= {*captions, *(text.split(" It")[0] for text in captions)}
        short.append({key for key, text in of_key.items() if "sits" not in text})
        data.load_state_dict({"train": {"epoch": 1, "consumed": 0}})
    assert all(80 < len(keys) < 160 for keys in short)
    assert len(short[0] & short[1]) < 80
    assert all("sits" in text for text in data.datasets["train"].__getitems__([(i, -1) for i in range(9)])["captions"])


def test_samples_without_a_caption_are_skipped_and_counted(text_pipeline: TextPipeline, tmp_path: Path) -> None:
    captions = [*TRAIN[:20], "", "http://example.com/a.jpg", " \t"]
    write_caption_codes(tmp_path / "codes", captions, VAL)
    data = data_of(tmp_path / "codes", batch_size=23, clean_captions=True, max_bad_share=0.2)
    seen: list[list[str]] = []

    class Seen(Losses):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:  # type: ignore[override]
            seen.append(batch["keys"])

    module = text_module(text_pipeline)
    with pytest.warns(
        UserWarning, match=r"3 examples of train were skipped in this epoch \(no caption: 3; e\.g\. example"
    ):
        pl.Trainer(
            accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, num_sanity_val_steps=0, callbacks=[Seen()],
        ).fit(module, data)  # fmt: skip
    assert sorted(seen[0], key=lambda key: int(key.split("/")[1])) == [f"train/{i}" for i in range(20)]


def test_captions_of_a_stream_are_encoded_online(text_pipeline: TextPipeline) -> None:
    found = losses(text_module(text_pipeline), data_of(text_pipeline.codes, resampled_epoch=12), steps=3)
    assert len(found.train) == 3
    assert all(0 < loss < 4 for loss in found.train)


def test_the_encoder_is_loaded_only_when_needed(text_pipeline: TextPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)  # as without the extra
    module = text_module(text_pipeline)
    (metrics,) = evaluator(limit_val_batches=1).validate(module, data_of(text_pipeline.features), verbose=False)
    assert metrics["val/loss"] > 0
    with pytest.raises(ValueError) as error:
        evaluator().validate(text_module(text_pipeline), data_of(text_pipeline.codes))
    assert_one_line(error, 'pip install -c constraints.txt -e ".[text]"')
    with pytest.raises(ValueError) as error:
        evaluator().predict(sampling_module(text_pipeline), PromptDataModule(["a cat"]))
    assert_one_line(error, 'pip install -c constraints.txt -e ".[text]"')
    grid = SampleGrid(prompts=["a cat"])
    with pytest.raises(ValueError) as error:
        evaluator(grid).validate(sampling_module(text_pipeline), data_of(text_pipeline.features))
    assert_one_line(error, 'pip install -c constraints.txt -e ".[text]"')


def changed(pipeline: TextPipeline, folder: Path, **features: Any) -> Path:
    """A copy of the dataset with other values in its meta.json."""
    shutil.copytree(pipeline.features, folder)
    meta = json.loads((folder / "meta.json").read_text())
    meta["features"] |= features
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.mark.parametrize(
    ("net", "features", "options", "phrases"),
    [
        ({"caption_dim": 16}, {}, {}, ("width 32", "caption_dim 16; set both")),
        ({"caption_length": 7}, {}, {}, ("up to 8 tokens", "caption_length is 7")),
        ({}, {"width": 0}, {}, ("features in meta.json", "extract them again")),
        ({}, {"dtype": "int8"}, {}, ("features in meta.json", "extract them again")),
        (
            {},
            {"cleaned": False},
            {"clean_captions": True},
            ("clean_captions is web", "were not cleaned; set it to false", "again with clean_captions web"),
        ),
        ({}, {"short": False}, {"short_caption_share": 0.1}, ("no features of short captions",)),
    ],
)
def test_rejects_features_that_do_not_match_the_model(
    net: dict[str, int],
    features: dict[str, Any],
    options: dict[str, Any],
    phrases: tuple[str, ...],
    text_pipeline: TextPipeline,
    tmp_path: Path,
) -> None:
    root = changed(text_pipeline, tmp_path / "set", **features)
    with pytest.raises(ValueError) as error:
        evaluator().validate(text_module(text_pipeline, **net), data_of(root, **options))
    assert_one_line(error, *phrases)


CLASSES: Any = {
    "an encoder": lambda p: ARGenModule(GPTConfig(**GPT_NET), text_encoder=TextEncoderConfig("t5")),
    "prompts": lambda p: evaluator().predict(argen_module(tokenizer=p.images.tokenizer), PromptDataModule(["a"])),
}
TEXT: Any = {
    "classes": lambda p: evaluator().predict(sampling_module(p), ClassRequestDataModule(3)),
    "a grid of classes": lambda p: evaluator(SampleGrid()).validate(sampling_module(p), data_of(p.features)),
    "codes without captions": lambda p: evaluator().validate(text_module(p), data_of(p.images.codes)),
    "a share above 1": lambda p: data_of(p.codes, short_caption_share=1.5),
}


@pytest.mark.parametrize(
    ("make", "phrase"),
    [
        (CLASSES["an encoder"], "the model is class-conditional; leave it out"),
        (CLASSES["prompts"], "the model is class-conditional; give classes"),
        (TEXT["classes"], "the model is text-conditional; give prompts"),
        (TEXT["a grid of classes"], "the model is text-conditional; give prompts"),
        (TEXT["codes without captions"], "neither captions nor their features"),
        (TEXT["a share above 1"], "short_caption_share is 1.5"),
    ],
)
def test_rejects_data_of_the_other_kind_of_model(
    make: Callable[[TextPipeline], Any], phrase: str, text_pipeline: TextPipeline
) -> None:
    with pytest.raises(ValueError) as error:
        make(text_pipeline)
    assert_one_line(error, phrase)


def test_rejects_another_encoder_than_that_of_training(text_pipeline: TextPipeline, tmp_path: Path) -> None:
    other = save_tiny_t5(tmp_path / "t5", seed=1)
    module = sampling_module(text_pipeline, t5=other)
    with pytest.raises(ValueError) as error:
        evaluator().predict(module, PromptDataModule(["a cat"]), ckpt_path=text_pipeline.argen, weights_only=True)
    assert_one_line(error, "the checkpoint has another encoder", other, "set model.init_args.text_encoder")
    prompts = SampleGrid(prompts=["a cat"], per_class=1)
    with pytest.raises(ValueError) as error:
        evaluator(prompts).validate(sampling_module(text_pipeline, t5=other), data_of(text_pipeline.features))
    assert_one_line(error, "the encoder of the features has another encoder")
    module = ARGenModule(
        GPTConfig(**TEXT_NET),
        init_from=text_pipeline.argen,
        tokenizer=text_pipeline.images.tokenizer,
        text_encoder=TextEncoderConfig(str(other), "float32"),
    )
    with pytest.raises(ValueError) as error:
        evaluator().predict(module, PromptDataModule(["a cat"]))
    assert_one_line(error, "the text encoder", "has another encoder", f"than {text_pipeline.argen}, EMA weights")


def test_accepts_the_same_encoder_in_another_precision(text_pipeline: TextPipeline) -> None:
    module = sampling_module(text_pipeline, "bfloat16")
    prompts = PromptDataModule(["a cat"], clean_captions=True)
    (outputs,) = evaluator().predict(module, prompts, ckpt_path=text_pipeline.argen, weights_only=True) or ()
    assert cast(Any, outputs)["codes"].shape == (1, 16)
    assert module.caption_metadata["encoder"] == str(text_pipeline.t5)


def test_accepts_features_without_an_encoder_checksum(text_pipeline: TextPipeline, tmp_path: Path) -> None:
    root = Path(shutil.copytree(text_pipeline.features, tmp_path / "features"))
    meta = json.loads((root / "meta.json").read_text())
    del meta["features"]["weights"], meta["features"]["tokenizer"]
    (root / "meta.json").write_text(json.dumps(meta))
    prompts = SampleGrid(prompts=["a cat"], per_class=1)
    (metrics,) = evaluator(prompts, limit_val_batches=1, default_root_dir=tmp_path).validate(
        sampling_module(text_pipeline), data_of(root), ckpt_path=text_pipeline.argen, verbose=False
    )
    assert metrics["val/loss"] > 0


@torch.no_grad()
def test_prompts_are_sampled_from_the_features_of_the_encoder(text_pipeline: TextPipeline) -> None:
    module = sampling_module(text_pipeline).eval()
    prompts = ["a cat", "a red house on a tree and a dog and a house", ""]
    batch = {"captions": prompts, "index": torch.tensor([4, 0, 7])}
    cut = r"1 of 3 captions have more than 8 tokens and were truncated, first 'a red house"
    with pytest.warns(UserWarning, match=cut):
        outputs = module.predict_step(dict(batch), 0)
    assert module._text is not None
    features, lengths, _ = module._text.encoder(prompts)
    assert lengths.tolist() == [3, 8, 1]
    images, codes = module.sample(pad_left(features, lengths), batch["index"], 0, lengths)
    assert torch.equal(outputs["codes"], codes)
    assert torch.equal(outputs["images"].tensor(), images)
    assert outputs["truncated"].tolist() == [False, True, False]
    assert module.state_dict().keys() == argen_keys(text_pipeline)
    assert not any("text" in name for name, _ in module.named_modules())


def argen_keys(pipeline: TextPipeline) -> Any:
    keys = torch.load(pipeline.argen, weights_only=True)["state_dict"].keys()
    assert "gpt.cls_embedding.uncond_embedding" in keys
    return keys
