"""Every shipped configuration parses on top of its base, takes effect, and builds a model of the published size."""

import contextlib
import io
import itertools
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from torch import nn

from command_line.config_files import LOADER
from lightning_modules import ARGenModule, models_on_meta_device
from llamagen.models.gpt import GPT, GPTConfig
from llamagen.models.vqgan import VQGAN, VQGANConfig
from llamagen.pretrained.sizes import SIZES as SHAPES
from llamagen.text import TextEncoderConfig
from main import main

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
MODELS = ("argen", "vqgan")
BASES = [f"{model}/base.yaml" for model in MODELS]
OVERLAYS = {
    model: sorted(
        path.relative_to(CONFIGS).as_posix() for path in (CONFIGS / model).rglob("*.yaml") if path.stem != "base"
    )
    for model in MODELS
}
LOGGERS = sorted(path.relative_to(CONFIGS).as_posix() for path in (CONFIGS / "logger").glob("*.yaml"))
STAGES = {"sample": "predict", "prompts": "predict", "extract": "predict", "evaluate": "test"}
CASES = [
    (STAGES.get(Path(overlay).stem, "fit"), (f"{model}/base.yaml", overlay))
    for model in MODELS
    for overlay in (*OVERLAYS[model], *LOGGERS)
]
# The chains of the quickstart and of the documentation, and the stages that need no overlay.
CASES += [(stage, (base,)) for stage in ("fit", "validate", "test", "predict") for base in BASES]
CASES += [
    ("predict", ("argen/base.yaml", "argen/digits.yaml", "argen/sample.yaml")),
    ("predict", ("argen/base.yaml", "argen/size/XL.yaml", "argen/sample.yaml")),
    ("predict", ("vqgan/base.yaml", "vqgan/digits.yaml", "vqgan/extract.yaml")),
    ("predict", ("vqgan/base.yaml", "vqgan/vq8.yaml", "vqgan/extract.yaml")),
    ("fit", ("argen/base.yaml", "argen/size/XXL.yaml", "logger/wandb.yaml")),
    ("predict", ("text/extract.yaml",)),  # needs no base
    ("predict", ("argen/base.yaml", "argen/t2i_stage2.yaml", "argen/prompts.yaml")),
    ("fit", ("argen/base.yaml", "argen/t2i_stage1.yaml", "argen/t2i_stage2.yaml")),
    ("fit", ("argen/base.yaml", "argen/t2i_stage1.yaml", "argen/size/B.yaml")),
    ("fit", ("argen/base.yaml", "argen/digits.yaml", "argen/text_digits.yaml")),
    ("predict", ("argen/base.yaml", "argen/digits.yaml", "argen/text_digits.yaml", "argen/prompts.yaml")),
    ("predict", ("vqgan/base.yaml", "vqgan/extract.yaml", "vqgan/ten_crop.yaml")),
    ("test", ("argen/base.yaml", "argen/digits.yaml", "argen/evaluate.yaml")),
    ("test", ("argen/base.yaml", "argen/size/L.yaml", "argen/evaluate.yaml")),
    ("test", ("vqgan/base.yaml", "vqgan/small.yaml", "vqgan/evaluate.yaml")),
    ("predict", ("argen/base.yaml", "argen/rar.yaml", "argen/sample.yaml")),
]

# Every base × overlay of the autoregressive model.
SIZES, HARDWARE = (
    [None, *(f"argen/{kind}/{path.name}" for path in sorted((CONFIGS / "argen" / kind).iterdir()))]
    for kind in ("size", "hardware")
)
PIXELS = {None: 256, "argen/256px.yaml": 256, "argen/384px.yaml": 384, "argen/512px.yaml": 512}


def chain(*names: str | None) -> tuple[str, ...]:
    return ("argen/base.yaml", *(name for name in names if name is not None))


# Each overlay once, and each pair of overlays of two kinds.
CHAINS = [chain(size, [*PIXELS][i % 4], HARDWARE[i % 6]) for i, size in enumerate(SIZES)]
PAIRS = [
    chain(size, [*PIXELS][(i + j) % 4], hardware) for i, size in enumerate(SIZES) for j, hardware in enumerate(HARDWARE)
]
SAME_AS_BASE = {"argen/size/B.yaml", "argen/256px.yaml"}
ALSO_IN_BASE = {".model.init_args.net.n_layer", ".model.init_args.net.n_head", ".model.init_args.net.dim"}

# arXiv 2406.06525, table 1, with the class embedding; 16,384 codes and 1,000 classes.
GPT_PARAMETERS = {
    "B": 110_888_448,
    "L": 342_910_976,
    "XL": 774_699_520,
    "XXL": 1_410_972_672,
    "XXXL": 3_893_027_840,
    "1B": 1_199_616_000,
    "3B": 3_096_659_200,
    "7B": 6_614_589_440,
}
TOKENIZER_PARAMETERS = {("vqgan/base.yaml",): 71_883_403, ("vqgan/base.yaml", "vqgan/vq8.yaml"): 70_109_835}


@cache
def parse(stage: str, names: tuple[str, ...], *options: str) -> dict[str, Any]:
    """The whole configuration of a stage, as the command line prints it."""
    arguments = [argument for name in names for argument in ("--config", str(CONFIGS / name))]
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit) as end:
        main([stage, *arguments, *options, "--print_config"])
    assert end.value.code == 0
    parsed: dict[str, Any] = yaml.load(output.getvalue(), LOADER)
    return parsed


def differences(wanted: Any, parsed: Any, where: str = "") -> list[str]:
    """Paths of the values of a YAML file that a configuration does not have."""
    if isinstance(wanted, dict):
        if not isinstance(parsed, dict):
            return [where]
        return [path for key in wanted for path in _differences_at(key, wanted[key], parsed, f"{where}.{key}")]
    if isinstance(wanted, list):
        if not isinstance(parsed, list) or len(parsed) != len(wanted):
            return [where]
        return [
            path
            for i, pair in enumerate(zip(wanted, parsed, strict=True))
            for path in differences(*pair, f"{where}[{i}]")
        ]
    if isinstance(wanted, str) and "${" in wanted:  # an interpolation, which may stand for a number
        return [where] if parsed is None or "${" in str(parsed) else []
    if where.endswith("class_path"):  # printed in full
        return [] if str(parsed).split(".")[-1] == wanted.split(".")[-1] else [where]
    return [] if parsed == wanted else [where]


def _differences_at(key: str, wanted: Any, parsed: dict[str, Any], where: str) -> list[str]:
    if not key.endswith("+"):
        return differences(wanted, parsed.get(key), where)
    whole = parsed.get(key.removesuffix("+"))  # the list was appended to this one
    return differences(wanted, whole[-len(wanted) :], where) if isinstance(whole, list) else [where]


def leaves(tree: Any, where: str = "") -> list[str]:
    """Paths of all values of a YAML file."""
    if isinstance(tree, dict):
        return [path for key, value in tree.items() for path in leaves(value, f"{where}.{key}")]
    return [where]


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("stage", "names"), CASES, ids=lambda value: value if isinstance(value, str) else "+".join(value)
)
def test_every_shipped_configuration_parses_and_the_last_file_takes_effect(stage: str, names: tuple[str, ...]) -> None:
    parsed = parse(stage, names)
    assert differences(yaml.safe_load((CONFIGS / names[-1]).read_text()), parsed) == []


def test_every_file_is_in_a_case() -> None:
    shipped = {path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.y*ml")}
    elsewhere = {name for name in shipped if name.startswith("published/") or name == "finetune.yaml"}
    assert shipped - elsewhere == {name for _, names in CASES for name in names}
    assert set(BASES) <= shipped


def test_differences_lists_the_values_that_do_not_take_effect() -> None:
    assert differences({"a": {"b": [1, {"c": 2}]}}, {"a": {"b": [1, {"c": 3}]}, "d": 1}) == [".a.b[1].c"]
    assert differences({"a": "${b}/x", "c": {"d": 1}}, {"a": "${b}/x", "c": None}) == [".a", ".c"]
    assert differences({"class_path": "EMA"}, {"class_path": "callbacks.EMA"}) == []


def test_overlays_of_different_kinds_share_no_key() -> None:
    keys = [
        {key.replace("+", "") for name in names if name for key in leaves(yaml.safe_load((CONFIGS / name).read_text()))}
        for names in (SIZES, PIXELS, HARDWARE)
    ]
    for one, other in itertools.permutations(keys, 2):
        assert [key for key in one for another in other if f"{another}.".startswith(f"{key}.")] == []


@pytest.mark.parametrize(
    "names",
    [*CHAINS, *(pytest.param(names, marks=pytest.mark.slow) for names in PAIRS if names not in CHAINS)],
    ids=lambda names: "+".join(names[1:]) or "base",
)
def test_every_overlay_takes_effect_together_with_every_other_and_builds_the_published_model(
    names: tuple[str, ...],
) -> None:
    parsed = parse("fit", names)
    for name in names[1:]:  # overlays of different kinds share no key
        assert differences(yaml.safe_load((CONFIGS / name).read_text()), parsed) == []
    parser = ArgumentParser()
    parser.add_class_arguments(ARGenModule, "model")
    with models_on_meta_device():
        module = parser.instantiate(parser.parse_object({"model": parsed["model"]["init_args"]})).model
    size = next((Path(name).stem for name in names if "/size/" in name), "B")
    assert parameters(module.gpt) == GPT_PARAMETERS[size]
    pixels = next(PIXELS[name] for name in [*names, None] if name in PIXELS)
    assert module.gpt.config.grid_size == pixels // 16


@pytest.mark.parametrize("name", [name for name in (*SIZES, *PIXELS, *HARDWARE) if name is not None])
def test_no_key_of_an_overlay_repeats_the_base(name: str) -> None:
    overlay = yaml.safe_load((CONFIGS / name).read_text())
    keys = leaves(overlay)
    assert len(keys) >= 1
    repeated = set(keys) - set(differences(overlay, parse("fit", ("argen/base.yaml",))))
    assert (repeated == set(keys)) if name in SAME_AS_BASE else (repeated <= ALSO_IN_BASE)


def test_every_hardware_overlay_has_the_global_batch_of_the_paper() -> None:
    batches = {}
    for name in HARDWARE[1:]:
        assert name is not None
        parsed = parse("fit", ("argen/base.yaml", name))
        trainer, batch = parsed["trainer"], parsed["data"]["init_args"]["batch_size"]
        ranks = int(trainer["devices"]) * int(trainer["num_nodes"])
        batches[Path(name).stem] = batch * ranks * trainer["accumulate_grad_batches"]
    assert batches == {"one_gpu": 256, "ddp": 256, "ddp_nodes": 256, "fsdp": 512, "fsdp_nodes": 512}


def test_every_published_size_is_shipped() -> None:
    assert {path.stem for path in (CONFIGS / "argen" / "size").iterdir()} == set(GPT_PARAMETERS)


def test_the_base_is_gpt_b() -> None:
    small, base = (
        parse("fit", names)["model"] for names in (("argen/base.yaml", "argen/size/B.yaml"), ("argen/base.yaml",))
    )
    assert small == base


def test_the_sizes_have_the_heads_of_the_paper() -> None:
    for size, shape in SHAPES.items():
        net = parse("fit", ("argen/base.yaml", f"argen/size/{size}.yaml"))["model"]["init_args"]["net"]
        assert {name: net[name] for name in ("n_layer", "n_head", "dim")} == shape, size


def test_the_recipes_have_the_values_of_the_paper() -> None:
    argen, vqgan = (parse("fit", (base,)) for base in BASES)
    for recipe, epochs, weight_decay, batch_size in ((argen, 300, 0.05, 256), (vqgan, 40, 0.0, 16)):
        trainer, optimizer = recipe["trainer"], recipe["model"]["init_args"]["optimizer"]
        assert (trainer["max_epochs"], trainer["gradient_clip_val"]) == (epochs, 1.0)
        assert (optimizer["lr"], list(optimizer["betas"]), optimizer["weight_decay"]) == (
            1e-4,
            [0.9, 0.95],
            weight_decay,
        )
        assert (optimizer["warmup_steps"], optimizer["schedule"]) == (0, "constant")
        assert recipe["data"]["init_args"]["batch_size"] == batch_size
        assert trainer["callbacks"][0]["class_path"].endswith("EMA")
        assert trainer["callbacks"][0]["init_args"]["decay"] == 0.9999
    net = GPTConfig(**argen["model"]["init_args"]["net"])
    assert {net.condition_dropout, net.token_dropout, net.resid_dropout, net.ffn_dropout} == {0.1}
    loss = vqgan["model"]["init_args"]["loss"]
    weights = ("reconstruction_weight", "perceptual_weight", "codebook_weight", "commitment_weight", "entropy_weight")
    assert [loss[name] for name in weights] == [1.0, 1.0, 1.0, 0.25, 0.0]
    assert (loss["reconstruction"], loss["adversarial"]) == ("l2", "hinge")
    assert (loss["adversarial_weight"], loss["adversarial_start"], loss["adaptive_weight"]) == (0.5, 20_000, False)


@pytest.mark.parametrize("name", [name for names in OVERLAYS.values() for name in names if Path(name).stem in STAGES])
def test_results_are_those_of_the_averages(name: str) -> None:
    parsed = parse(STAGES[Path(name).stem], (f"{name.split('/')[0]}/base.yaml", name))
    assert any(each["class_path"].endswith(".EMA") for each in parsed["trainer"]["callbacks"])


TEXT_CHAINS = ("argen/base.yaml", "argen/t2i_stage1.yaml"), ("argen/base.yaml", "argen/t2i_stage2.yaml")


def test_the_second_stage_of_text_to_image_differs_from_the_first_only_in_the_options_it_lists() -> None:
    first, second = (parse("fit", names) for names in TEXT_CHAINS)
    assert sorted(differences(first, second)) == [
        ".data.init_args.root",
        ".data.init_args.short_caption_share",
        ".model.init_args.init_adapt",
        ".model.init_args.init_from",
        ".model.init_args.net.block_size",
        ".trainer.default_root_dir",
        ".trainer.logger.init_args.save_dir",
        ".trainer.max_steps",
    ]
    assert parse("fit", (*TEXT_CHAINS[0], "argen/t2i_stage2.yaml")) == second
    listed = (CONFIGS / TEXT_CHAINS[1][1]).read_text().split("trainer:")[0]
    for option in ("init_from", "init_adapt", "block_size", "short_caption_share", "root", "max_steps"):
        assert f"#   {option}" in listed or f", {option}" in listed


@pytest.mark.parametrize(("names", "grid"), [(TEXT_CHAINS[0], 16), (TEXT_CHAINS[1], 32)], ids=["stage 1", "stage 2"])
def test_the_text_models_have_the_published_size_and_the_recipe(names: tuple[str, ...], grid: int) -> None:
    config = parse("fit", names)
    net = GPTConfig(**config["model"]["init_args"]["net"])
    with torch.device("meta"):
        assert parameters(GPT(net)) == 777_678_080  # uncond_embedding is a buffer
    assert (net.grid_size, net.caption_length, net.caption_dim, net.condition_dropout) == (grid, 120, 2048, 0.1)
    assert net.rope_condition == "zero"
    sampling = config["model"]["init_args"]["sampling"]
    assert (sampling["guidance_scale"], sampling["top_k"], sampling["temperature"]) == (7.5, 1000, 1.0)
    assert config["data"]["init_args"]["batch_size"] == 256
    prompts = parse("predict", (*names, "argen/prompts.yaml"))
    assert config["data"]["init_args"]["clean_captions"] == "published"
    assert prompts["data"]["init_args"]["clean_captions"] == "published"
    assert TextEncoderConfig() == TextEncoderConfig("google/flan-t5-xl", "bfloat16")


@pytest.mark.parametrize("names", TOKENIZER_PARAMETERS, ids="+".join)
def test_a_tokenizer_has_the_published_number_of_parameters(names: tuple[str, ...]) -> None:
    net = parse("fit", names)["model"]["init_args"]["net"]
    with torch.device("meta"):
        vqgan = VQGAN(VQGANConfig(**net))
    assert parameters(vqgan) == TOKENIZER_PARAMETERS[names]


def test_the_codes_of_the_quickstart_fit_both_models() -> None:
    tokenizer = parse("fit", ("vqgan/base.yaml", "vqgan/digits.yaml"))
    argen = parse("fit", ("argen/base.yaml", "argen/digits.yaml"))
    net = tokenizer["model"]["init_args"]["net"]
    side = tokenizer["data"]["init_args"]["image_size"] // 2 ** (len(net["channel_multipliers"]) - 1)
    assert argen["model"]["init_args"]["net"]["block_size"] == side**2
    assert argen["model"]["init_args"]["net"]["vocab_size"] == net["codebook_size"]
    makefile = (CONFIGS.parent / "Makefile").read_text().replace("$(RUN)", "runs/quickstart")
    extraction = re.search(r"vqgan/extract\.yaml .*\n.*--trainer\.default_root_dir (\S+)", makefile)
    assert extraction is not None
    assert argen["data"]["init_args"]["root"] == extraction[1]
    run = tokenizer["trainer"]["default_root_dir"]
    assert argen["model"]["init_args"]["tokenizer"] == f"{run}/checkpoints/last.ckpt"


def test_extracted_features_fit_the_text_model() -> None:
    module = parse("predict", ("text/extract.yaml",))["model"]["init_args"]
    net = parse("fit", ("argen/base.yaml", "argen/t2i_stage1.yaml"))["model"]["init_args"]["net"]
    assert module["caption_length"] == net["caption_length"]
    assert TextEncoderConfig(**module["encoder"]) == TextEncoderConfig()


def test_an_unknown_key_of_an_overlay_is_an_error_that_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for base, *keys in (
        ("argen/base.yaml", "model", "init_args", "net", "n_layers"),
        ("argen/base.yaml", "model", "init_args", "optimizer", "learning_rate"),
        ("vqgan/base.yaml", "model", "init_args", "net", "channel"),
        ("vqgan/base.yaml", "model", "init_args", "nets"),
        ("vqgan/base.yaml", "data", "init_args", "batchsize"),
        ("argen/base.yaml", "trainer", "max_epoch"),
        ("argen/base.yaml", "modle"),
    ):
        tree: Any = 3
        for key in reversed(keys):
            tree = {key: tree}
        overlay = tmp_path / "overlay.yaml"
        overlay.write_text(yaml.safe_dump(tree))
        with pytest.raises(SystemExit) as end:
            main(["fit", "--config", str(CONFIGS / base), "--config", str(overlay), "--print_config"])
        assert end.value.code == 2, keys
        captured = capsys.readouterr()
        assert keys[-1] in captured.err.replace(str(overlay), "")
        assert captured.out == ""


# The overlays that are for any run.
GENERAL = [
    ("predict", ("argen/base.yaml", "argen/size/B.yaml", "argen/sample.yaml")),
    ("predict", ("argen/base.yaml", "argen/t2i_stage1.yaml", "argen/prompts.yaml")),
    ("test", ("argen/base.yaml", "argen/evaluate.yaml")),
    ("predict", ("vqgan/base.yaml", "vqgan/extract.yaml")),
    ("test", ("vqgan/base.yaml", "vqgan/evaluate.yaml")),
    ("predict", ("text/extract.yaml",)),
]


@pytest.mark.parametrize(("stage", "names"), GENERAL, ids=lambda value: value if isinstance(value, str) else value[-1])
def test_general_overlays_name_no_run_and_the_missing_folder_is_an_error(
    stage: str,
    names: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "runs/" not in (CONFIGS / names[-1]).read_text()
    monkeypatch.chdir(tmp_path)
    arguments = [argument for name in names for argument in ("--config", str(CONFIGS / name))]
    prompts = ["--data.init_args.prompts=[a]"] if "prompts" in names[-1] else []
    with pytest.raises(SystemExit) as end:
        main([stage, *arguments, *prompts])
    assert end.value.code == 2
    assert "give --trainer.default_root_dir" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_missing_prompts_are_an_error_that_names_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    _, names = GENERAL[1]
    with pytest.raises(SystemExit) as end:
        main(["predict", *(argument for name in names for argument in ("--config", str(CONFIGS / name)))])
    assert end.value.code == 2
    assert "required: prompts" in capsys.readouterr().err


@pytest.mark.parametrize("overlay", ["sample", "evaluate"])
def test_images_of_all_classes_of_the_model_are_generated(overlay: str) -> None:
    general = parse(STAGES[overlay], ("argen/base.yaml", f"argen/{overlay}.yaml"))
    digits = parse(STAGES[overlay], ("argen/base.yaml", "argen/digits.yaml", f"argen/{overlay}.yaml"))
    assert [parsed["data"]["init_args"]["classes"] for parsed in (general, digits)] == [1000, 10]
    assert general["data"]["init_args"] == {"classes": 1000, "per_class": 50, "batch_size": 64}
