"""configs/published/: one file per published model, with which each stage runs as the paper did."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import main
from command_line.config_files import configs_of_stage
from datamodules import ClassRequestDataModule
from datamodules.digits import NAMES as WORDS
from lightning_modules import ARGenModule
from llamagen.checkpoints.export import export
from llamagen.checkpoints.weights import read_weights
from llamagen.class_names import imagenet_classes
from llamagen.hub.published import PUBLISHED
from llamagen.models.gpt import GPT, GPTConfig
from tests.callbacks.test_fid import EXTRACTOR, reference
from tests.command_line.test_configs import CONFIGS, parse
from tests.hub_server import HubServer
from tests.lightning_modules.runs import evaluator
from tests.pipeline import GPT_NET, Pipeline

FOLDER = CONFIGS / "published"
NAMES = {
    kind: [name for name, model in PUBLISHED.items() if model.kind == kind] for kind in ("tokenizer", "class", "text")
}
FIRST_OF_KIND = [(stage, names[-1]) for names in NAMES.values() for stage in ("fit", "validate", "test", "predict")]
CLASSES = [207, 360, 387, 974, 88, 979, 417, 279]
DIGITS = [f"digit {word}" for word in WORDS]
QUIET = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu")

__all__ = ["reference"]  # a fixture


def merged(stage: str, name: str) -> dict[str, Any]:
    """The settings of a file in a stage, merged without the parser: dictionaries are merged, other values replaced."""

    def merge(old: Any, new: Any) -> Any:
        if isinstance(old, dict) and isinstance(new, dict):
            return old | {key: merge(old.get(key), value) for key, value in new.items()}
        return new

    settings: dict[str, Any] = {}
    for part in configs_of_stage(str(FOLDER / f"{name}.yaml"), stage):
        settings = merge(settings, yaml.safe_load(part))
    return settings


def published_gpt(folder: Path, num_classes: int = 1000) -> Path:
    """Small weights in the published layout."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(**{**GPT_NET, "num_classes": num_classes}))
    torch.nn.init.normal_(gpt.output.weight, std=0.5)  # a new model's head is zero
    torch.save({"model": gpt.state_dict()}, folder / "published.pt")
    return folder / "published.pt"


def arguments(stage: str, tmp_path: Path, *more: str) -> list[str]:
    """The command of a published class model, for small weights."""
    net = {key: value for key, value in GPT_NET.items() if key != "num_classes"}
    return [
        *(stage, "--config", str(FOLDER / "c2i_B_384.yaml"), *more, *QUIET),
        *(f"--model.init_args.net.{key}={value}" for key, value in net.items()),
        f"--trainer.default_root_dir={tmp_path / stage}",
    ]


def weights(pipeline: Pipeline, tmp_path: Path) -> list[str]:
    """Arguments with small weights, in place of the names of the published files."""
    return [
        f"--model.init_args.tokenizer={pipeline.tokenizer}",
        f"--model.init_args.init_from={published_gpt(tmp_path)}",
    ]


def test_every_published_model_has_a_file() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_file_has_the_facts_of_its_model(name: str) -> None:
    model = PUBLISHED[name]
    for stage in ("fit", "test", "predict"):
        settings = merged(stage, name)
        options = settings["model"]["init_args"]
        assert options["init_from"] == name
        assert options.get("tokenizer") == model.tokenizer
        folders = {"test": f"runs/{name}-evaluation", "predict": f"runs/{name}"}
        if model.kind == "tokenizer":
            folders["predict"] += "-codes"
            assert (settings["data"]["init_args"]["root"], settings["data"]["init_args"]["image_size"]) == (None, 256)
        elif model.kind == "class":
            assert options["sampling"] == {"guidance_scale": model.guidance, "top_k": 0}
            assert f"{model.fid:.2f};" in (FOLDER / f"{name}.yaml").read_text()
        else:
            assert options["sampling"] == {"guidance_scale": 7.5, "top_k": 1000}
        if model.kind != "tokenizer":
            assert options["net"].get("block_size", 256) == (model.resolution // 16) ** 2
            assert options.get("init_adapt", []) == []
            assert settings["trainer"]["precision"] == ("bf16-mixed" if stage == "fit" else "bf16-true")
        assert settings["trainer"]["default_root_dir"] == folders.get(stage, f"runs/{name}")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_file_is_short(name: str) -> None:
    assert len((FOLDER / f"{name}.yaml").read_text().splitlines()) <= 20


@pytest.mark.parametrize(("stage", "name"), FIRST_OF_KIND, ids=lambda value: value)
def test_each_stage_of_a_published_file_parses(stage: str, name: str) -> None:
    parsed = parse(stage, (f"published/{name}.yaml",))
    model, data, trainer = parsed["model"]["init_args"], parsed["data"], parsed["trainer"]
    kind, last = PUBLISHED[name].kind, trainer["callbacks"][-1]["class_path"].rpartition(".")[2]
    assert not {"fit", "validate", "test", "predict", "extends"} & parsed.keys()
    wanted = {"tokenizer": "ImageDataModule", "class": "CodeDataModule", "text": "CodeDataModule"}
    if stage == "test":
        assert last == "FIDMonitor"  # --trainer.callbacks.reference is an option of the last callback
        wanted |= {"class": "ClassRequestDataModule", "text": "PromptDataModule"}
    if stage == "predict":
        assert last == ("CodeWriter" if kind == "tokenizer" else "SamplingProgress")
        wanted |= {"class": "ClassRequestDataModule", "text": "PromptDataModule"}
    assert data["class_path"].endswith(wanted[kind])
    if kind == "text":
        assert data["init_args"]["clean_captions"] == "published"
    if kind == "class":
        sampling = {**model["sampling"]}
        assert [sampling.pop(option) for option in ("temperature", "top_k", "top_p", "guidance_scale")] == [
            1,
            0,
            1,
            1.65,
        ]
        assert model["image_size"] == (256 if stage == "test" else None)
        if stage == "test":
            assert data["init_args"] == {"classes": 1000, "per_class": 50, "batch_size": 64}
        if stage == "predict":
            found = [imagenet_classes().find(name) for name in data["init_args"]["classes"]]
            assert (found, data["init_args"]["per_class"]) == (CLASSES, 1)


def test_predict_needs_no_more_than_the_file(hub: HubServer, pipeline: Pipeline, tmp_path: Path) -> None:
    """Both files of weights are downloaded from a local hub, by their names."""
    export(pipeline.tokenizer, tmp_path / "tokenizer.pt")
    hub.add_published("vq_ds16_c2i", tmp_path / "tokenizer.pt")
    hub.add_published("c2i_B_384", published_gpt(tmp_path))
    main.main(arguments("predict", tmp_path))
    written = sorted(path.name for path in (tmp_path / "predict/images").rglob("*.png"))
    assert written == [f"{index:06d}_class{label}.png" for index, label in enumerate(CLASSES)]
    archive = np.load(tmp_path / "predict/samples.npz")
    assert archive["arr_0"].shape == (8, 8, 8, 3)  # not resized
    assert len({image.tobytes() for image in archive["arr_0"]}) == 8
    saved = yaml.safe_load((tmp_path / "predict/predict.yaml").read_text())
    assert saved["data"]["init_args"]["classes"][0] == "golden retriever"
    assert "extends" not in saved
    # A chosen class is the same as its number.
    main.main(
        [
            *arguments("predict", tmp_path),
            "--data.init_args.classes=[Golden Retriever, 360]",
            f"--trainer.default_root_dir={tmp_path / 'chosen'}",
        ]
    )
    for file in ("207/000000_class207.png", "360/000001_class360.png"):
        images = [np.array(Image.open(tmp_path / run / "images" / file)) for run in ("predict", "chosen")]
        assert np.array_equal(*images), file


def test_test_measures_images_of_all_classes_at_256_px(pipeline: Pipeline, reference: Path, tmp_path: Path) -> None:
    cli = main.main(
        arguments(
            "test", tmp_path, *weights(pipeline, tmp_path), f"--trainer.callbacks.reference={reference}",
            f"--trainer.callbacks.features={EXTRACTOR}", "--data.init_args.classes=10", "--data.init_args.per_class=2",
            "--model.init_args.image_size=8",
        )
    )  # fmt: skip
    assert cli.trainer.callback_metrics["gfid_everything/digits"] > 0
    assert (tmp_path / "test/report").is_dir()


def test_names_are_not_looked_up_before_the_checkpoint_that_has_its_own(pipeline: Pipeline, tmp_path: Path) -> None:
    """In Python, Lightning loads the checkpoint after the requests have been resolved."""
    net = GPTConfig(**{**GPT_NET, "num_classes": 1000})
    module = ARGenModule(net, tokenizer=pipeline.tokenizer)
    checkpoint = {"state_dict": module.state_dict(), "pytorch-lightning_version": pl.__version__}
    module.on_save_checkpoint(checkpoint)
    checkpoint["llamagen"]["classes"] = [f"otter {number}" for number in range(1000)]
    torch.save(checkpoint, tmp_path / "run.ckpt")
    requests = ClassRequestDataModule(["otter"], 1, 1)
    with pytest.raises(ValueError, match="call take_class_names of the module with its path first"):
        evaluator().predict(module, requests, ckpt_path=tmp_path / "run.ckpt")
    requests, module = ClassRequestDataModule(["otter 7"], 1, 1), ARGenModule(net, tokenizer=pipeline.tokenizer)
    module.take_class_names(tmp_path / "run.ckpt")
    evaluator().predict(module, requests, ckpt_path=tmp_path / "run.ckpt")
    assert requests.classes == [7]


def codes_with(pipeline: Pipeline, folder: Path, **changes: object) -> Path:
    """The pipeline's codes, with changes of their meta.json."""
    folder.mkdir()
    for split in ("train", "val"):
        (folder / split).symlink_to(pipeline.codes / split)
    meta = json.loads((pipeline.codes / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | changes))
    return folder


def test_finetuning_takes_number_and_names_of_the_classes_from_the_codes(
    pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = codes_with(pipeline, tmp_path / "codes", classes=DIGITS)
    finetune = ["--config", "configs/finetune.yaml"]
    command = [
        *arguments("fit", tmp_path, *weights(pipeline, tmp_path), *finetune, f"--data.init_args.root={codes}"),
        *("--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--trainer.precision=32-true"),
        "--data.init_args.num_workers=0",
    ]
    cli = main.main(command)
    assert cli.model.num_classes == 10
    run, before = tmp_path / "fit/checkpoints/last.ckpt", read_weights(tmp_path / "published.pt").state
    trained = read_weights(run, averaged=False)
    assert trained.classes == DIGITS
    name = "layers.0.attention.wqkv.weight"
    assert 0 < (trained.state[name] - before[name]).abs().max() < 1e-4  # goes on from the published weights
    export(run, tmp_path / "run.safetensors")
    assert read_weights(tmp_path / "run.safetensors").classes == DIGITS
    # Classes of the run are found by their own names, whether its weights come from the checkpoint or from the export.
    # With a checkpoint, the weights that the run started from are not needed any more.
    (tmp_path / "published.pt").unlink()
    sample = ["predict", "--config", str(tmp_path / "fit/fit.yaml"), "--config", "configs/argen/sample.yaml", *QUIET]
    sample += ["--data.init_args.per_class=1", "--trainer.precision=32-true"]
    exported = [f"--ckpt_path={tmp_path / 'run.safetensors'}"]
    for number, source in enumerate(([f"--ckpt_path={run}"], exported)):
        folder = tmp_path / f"samples{number}"
        main.main([*sample, *source, f"--trainer.default_root_dir={folder}", "--data.init_args.classes=[seven, 2]"])
        written = sorted(path.name for path in folder.rglob("images/*/*.png"))
        assert written == ["000000_class7.png", "000001_class2.png"]
    with pytest.raises((SystemExit, ValueError)) as error:
        main.main(
            [
                *sample,
                *exported,
                f"--trainer.default_root_dir={tmp_path / 'no'}",
                "--data.init_args.classes=[nine, digit]",
            ]
        )
    assert "'digit' fits 10 classes: 0 (digit zero)" in str(error.value) + capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "phrase"),
    [
        (None, "does not exist; write the codes first"),
        ('{"num_classes": 0}', "have no classes, but num_classes is to be their number; extract codes of images in"),
        ("", "data.init_args.root is null; give --data.init_args.root FOLDER"),
    ],
    ids=["no folder", "no classes", "no root"],
)
def test_finetuning_without_classes_is_an_error_of_one_line(
    content: str | None, phrase: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = [] if content == "" else [f"--data.init_args.root={tmp_path / 'codes'}"]
    if content:
        (tmp_path / "codes").mkdir()
        (tmp_path / "codes/meta.json").write_text(content)
    files = ["--config", str(FOLDER / "c2i_B_256.yaml"), "--config", "configs/finetune.yaml"]
    with pytest.raises(SystemExit) as end:
        main.main(["fit", *files, *root])
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert phrase in error
    assert len([line for line in error.splitlines() if line]) == 1


def test_codes_of_another_tokenizer_are_refused(pipeline: Pipeline, tmp_path: Path) -> None:
    codes = codes_with(pipeline, tmp_path / "codes", tokenizer="0" * 64)
    command = arguments(
        "fit",
        tmp_path,
        *weights(pipeline, tmp_path),
        "--config",
        "configs/finetune.yaml",
        f"--data.init_args.root={codes}",
    )
    with pytest.raises(ValueError, match="the codes were extracted with a tokenizer of other weights"):
        main.main([*command, "--trainer.precision=32-true"])


def test_digits_in_quotes_stay_a_text_on_the_command_line() -> None:
    data = parse("predict", ("published/c2i_B_256.yaml",), '--data.init_args.classes=["10", 10, "otter"]')["data"]
    assert data["init_args"]["classes"] == ["10", 10, "otter"]


def test_the_decoder_of_a_published_tokenizer_is_fine_tuned_alone() -> None:
    parsed = parse("fit", ("published/vq_ds16_c2i.yaml", "vqgan/finetune_decoder.yaml"))
    options = parsed["model"]["init_args"]
    assert (options["init_from"], options["freeze"]) == ("vq_ds16_c2i", ["encoder", "quantizer"])
    assert options["loss"]["adversarial_start"] == 0
    assert options["optimizer"]["lr"] == 5e-5
