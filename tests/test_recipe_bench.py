"""The bench of recipes: how a recipe is parsed and applied, and what its report says."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from benchmarks import recipe_argen, recipe_times, recipe_tokenizer, recipes
from benchmarks.recipe_argen import DATA
from benchmarks.recipe_report import groups, table, verdict
from benchmarks.recipe_runs import Recipe, Stage, prepare
from benchmarks.recipe_tokenizer_run import measure
from lightning_modules import VQGANModule
from lightning_modules.vqgan_config import VQGANLossConfig
from llamagen.metrics import FID
from llamagen.metrics.classifier import SmallClassifier
from llamagen.models.quantizer import build_quantizer, check_quantizer_spec
from llamagen.models.vqgan import VQGAN, VQGANConfig
from llamagen.sampling.pixels import to_pixels
from tests.command_line.test_configs import differences, parse

CIFAR, TOKENIZERS = DATA["cifar10"], recipe_tokenizer.DATA
STAGES = [*DATA.values(), *TOKENIZERS.values()]


def record_of(**losses: list[float]) -> dict[str, Any]:
    """A record with these validation losses, one for each seed."""
    return {
        "recipes": {
            name: {
                "seeds": {
                    str(seed): {"val_loss": loss, "curve": [[10, loss + 1], [20, loss]]}
                    for seed, loss in enumerate(each)
                }
            }
            for name, each in losses.items()
        }
    }


def better(record: dict[str, Any], metric: str = "val_loss", direction: str = "min") -> list[str]:
    return verdict(record, list(record["recipes"]), metric, direction)


def test_overlays_come_before_the_budget_and_options_after_it() -> None:
    recipe = Recipe.parse("mine=configs/argen/fid_monitor.yaml --model.init_args.net.qk_norm=true")
    arguments = recipe.arguments(CIFAR)
    files = [arguments[place + 1] for place, item in enumerate(arguments) if item == "--config"]
    assert files == ["configs/argen/base.yaml", "configs/argen/fid_monitor.yaml", str(CIFAR.overlay)]
    assert arguments[-1] == "--model.init_args.net.qk_norm=true"


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("mine", "NAME=PARTS"),
        ("=x", "NAME=PARTS"),
        ("../a=", "NAME=PARTS"),
        ("a=absent.yaml", "absent.yaml does not exist"),
        ("a=--config configs/argen/rar.yaml", "leave --config out"),
    ],
)
def test_a_wrong_recipe_is_an_error_of_one_line(text: str, phrase: str) -> None:
    with pytest.raises(ValueError, match=phrase):
        Recipe.parse(text)


def test_a_recipe_is_better_only_if_its_worst_seed_beats_the_best_one() -> None:
    record = record_of(paper=[4.0, 4.1], clear=[3.8, 3.9], close=[3.7, 4.05])
    assert better(record) == ["clear"]
    assert "by validation loss, nats: clear." in table(record, CIFAR.columns)
    assert "| close | 2 | 3.875 (3.700 – 4.050) | — | — |" in table(record, CIFAR.columns)


def test_recipes_with_other_seeds_are_not_compared() -> None:
    record = record_of(paper=[4.0, 4.1], fewer=[3.0])
    assert better(record) == []


def test_a_name_belongs_to_one_recipe(tmp_path: Path) -> None:
    overlay = tmp_path / "mine.yaml"
    overlay.write_text("model: {init_args: {compile: false}}")
    recipe = Recipe.parse(f"mine={overlay}")
    recipe.identify(CIFAR, tmp_path)
    recipe.identify(CIFAR, tmp_path)
    with pytest.raises(ValueError, match="with other options or files; give this recipe another name"):
        Recipe.parse(f"mine={overlay} --model.init_args.compile=true").identify(CIFAR, tmp_path)
    overlay.write_text("model: {init_args: {compile: true}}")
    with pytest.raises(ValueError, match="with other options or files; give this recipe another name"):
        recipe.identify(CIFAR, tmp_path)


def test_an_overlay_changes_neither_budget_nor_evaluation() -> None:
    names = ("argen/base.yaml", "argen/rar.yaml", f"../{CIFAR.overlay}")
    plain, changed = parse("fit", (names[0], names[2])), parse("fit", names)
    net, given = ".model.init_args.net.", (".model.init_args.order", ".model.init_args.optimizer.betas")
    allowed = {f"{net}qk_norm", f"{net}adaptive_norm", f"{net}attn_dropout", ".model.init_args.optimizer.weight_decay"}
    allowed |= {".trainer.logger.init_args.save_dir", ".trainer.default_root_dir"}  # the bench gives another folder
    allowed |= {".model.init_args.sampling.guidance_power"}  # without effect
    assert [each for each in differences(plain, changed) if each not in allowed and not each.startswith(given)] == []


def test_the_budgets_set_the_same_options() -> None:
    def options(value: Any, where: str = "") -> set[str]:
        if not isinstance(value, dict):
            return {where}
        return {path for key, each in value.items() for path in options(each, f"{where}.{key}")}

    for stages in (DATA, TOKENIZERS):
        first, *others = (options(yaml.safe_load(data.overlay.read_text())) for data in stages.values())
        assert all(each == first for each in others)


def test_without_a_second_seed_nothing_is_better() -> None:
    assert better(record_of(paper=[4.0], other=[3.0])) == []


def test_the_plot_is_an_image(tmp_path: Path) -> None:
    CIFAR.plot(record_of(paper=[4.0, 4.1], other=[3.9, 4.0]), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("data", STAGES, ids=lambda stage: stage.overlay.stem)
def test_data_have_size_and_budget(data: Stage) -> None:
    overlay = yaml.safe_load(data.overlay.read_text())
    assert overlay["trainer"]["max_steps"] % overlay["trainer"]["val_check_interval"] == 0  # ends with a validation


def test_finished_runs_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []
    monkeypatch.setattr(recipe_argen, "run", lambda command, log: commands.append(command))
    recipe = Recipe.parse("paper=")
    folder = CIFAR.run_folder(tmp_path, recipe, 3)
    (folder / "logs").mkdir(parents=True)
    CIFAR.perform(recipe, tmp_path, 3, None)
    assert [command[:2] for command in commands] == [["main.py", "fit"], ["main.py", "test"]]
    assert "--seed_everything=3" in commands[0]
    (folder / "report").mkdir()
    metrics = {
        "gfid_classifier/reference": 2.5,
        "precision_classifier/reference": 0.5,
        "recall_classifier/reference": 0.25,
    }
    (folder / "report/metrics.json").write_text(json.dumps({"metrics": metrics}))
    (folder / "logs/metrics.csv").write_text("step,train/loss,val/loss\n10,5.0,\n10,,4.5\n20,,4.25\n")
    CIFAR.perform(recipe, tmp_path, 3, None)
    assert len(commands) == 2
    assert CIFAR.results(recipe, tmp_path, 3) == {
        "val_loss": 4.25,
        "curve": [[10, 4.5], [20, 4.25]],
        "gfid": 2.5,
        "precision": 0.5,
        "recall": 0.25,
    }


def tokenizer_record(**psnr: list[float]) -> dict[str, Any]:
    """A record of tokenizers: VQ, FSQ, … with 512 codes, and VQ_4 and so on with 4,096."""
    record = record_of(**psnr)
    for name, entry in record["recipes"].items():
        for seed in entry["seeds"].values():
            value = seed.pop("val_loss")
            seed |= {
                "codes": 4096 if name.endswith("4") else 512,
                "psnr": value,
                "rfid": 30 - value,
                "perplexity": 50.0,
            }
    return record


def test_tokenizers_are_compared_with_the_first_one_of_the_same_size(tmp_path: Path) -> None:
    record = tokenizer_record(VQ=[20.0, 20.2], VQ_4=[21.0, 21.2], FSQ=[20.3, 20.4], FSQ_4=[20.4, 21.1])
    assert groups(record) == [["VQ", "FSQ"], ["VQ_4", "FSQ_4"]]
    text = table(record, TOKENIZERS["cifar10"].columns)
    assert "“VQ” with every seed, by PSNR, dB: FSQ." in text  # more is better
    assert "“VQ” with every seed, by rFID: FSQ." in text  # less is better
    assert "“VQ_4” with every seed, by PSNR, dB: none." in text
    assert (
        "| FSQ_4 | 4,096 | 2 | 9.250 (8.900 – 9.600) | 20.75 (20.40 – 21.10) | 50.00 (50.00 – 50.00) | — | — |" in text
    )
    TOKENIZERS["cifar10"].plot(record, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_recipes_of_tokenizers_have_the_number_of_codes_in_their_names() -> None:
    for text in TOKENIZERS["cifar10"].recipes:
        recipe = Recipe.parse(text)
        option, _, value = recipe.options[0].partition("=")
        if option.endswith("quantizer"):
            with torch.device("meta"):
                assert build_quantizer(check_quantizer_spec(json.loads(value))).size == int(recipe.name.split()[-1])
        else:
            assert (option, value) == ("--model.init_args.net.codebook_size", recipe.name.split()[-1])


def test_finished_tokenizers_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []
    monkeypatch.setattr(recipe_tokenizer, "run", lambda command, log: commands.append(command))
    stage, recipe = TOKENIZERS["cifar10"], Recipe.parse("VQ 512=--model.init_args.net.codebook_size=512")
    folder = stage.run_folder(tmp_path, recipe, 3)
    (folder / "logs").mkdir(parents=True)
    stage.perform(recipe, tmp_path, 3, Path("vgg.pth"))
    assert {"--seed_everything=3", "--ckpt_path=last", "--count=2000", "--lpips=vgg.pth"} <= set(commands[0])
    (folder / "metrics.json").write_text(json.dumps({"codes": 512, "psnr": 21.0}))
    (folder / "logs/metrics.csv").write_text("step,val/psnr,val/reconstruction\n10,19.0,0.5\n20,,\n20,20.5,0.25\n")
    stage.perform(recipe, tmp_path, 3, None)
    assert len(commands) == 1
    assert stage.results(recipe, tmp_path, 3) == {
        "codes": 512,
        "psnr": 21.0,
        "curve": [[10, 19.0], [20, 20.5]],
        "reconstruction": [[10, 0.5], [20, 0.25]],
    }


def test_few_images_need_a_classifier(tmp_path: Path) -> None:
    stage = TOKENIZERS["imagenet64"]
    with pytest.raises(ValueError, match="give --classifier FILE"):
        next(prepare(stage, tmp_path, tmp_path / "bench"))
    with pytest.raises(ValueError, match=r"absent\.safetensors, which does not exist"):
        next(prepare(stage, tmp_path, tmp_path / "bench", tmp_path / "absent.safetensors"))
    (tmp_path / "own.safetensors").write_text("weights")
    assert next(prepare(stage, tmp_path, tmp_path / "bench", tmp_path / "own.safetensors")) == "pack the images"
    assert (tmp_path / "bench/classifier.safetensors").read_text() == "weights"
    # The same one may be given again, but not another one.
    next(prepare(stage, tmp_path, tmp_path / "bench", tmp_path / "own.safetensors"))
    (tmp_path / "own.safetensors").write_text("Weights")
    with pytest.raises(ValueError, match=r"bench/classifier\.safetensors is another one"):
        next(prepare(stage, tmp_path, tmp_path / "bench", tmp_path / "own.safetensors"))
    assert (tmp_path / "bench/classifier.safetensors").read_text() == "weights"


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        ("prepare cifar10 . W --stage argen --classifier c", "--classifier is only for prepare with --stage tokenizer"),
        ("run cifar10 W --stage tokenizer --classifier c", "--classifier is only for prepare with --stage tokenizer"),
        ("run cifar10 W --stage argen --lpips vgg.pth", "--lpips is only for run with --stage tokenizer"),
        ("times cifar10 W --stage tokenizer --lpips vgg.pth", "--lpips is only for run with --stage tokenizer"),
        ("report cifar10 W --stage tokenizer --lpips vgg.pth", "--lpips is only for run with --stage tokenizer"),
    ],
)
def test_options_without_effect_are_refused(arguments: str, phrase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["recipes", *arguments.split()])
    with pytest.raises(ValueError, match=phrase) as error:
        recipes.main()
    assert "\n" not in str(error.value)


class Measured(recipe_tokenizer.Tokenizer):
    """A stage whose runs are finished."""

    def is_prepared(self, work: Path) -> bool:
        return True

    def perform(self, recipe: Recipe, work: Path, seed: int, lpips: Path | None) -> None:
        pass

    def results(self, recipe: Recipe, work: Path, seed: int) -> dict[str, Any]:
        return {"codes": 512, "psnr": 20.0, "curve": [[10, 20.0]]}

    def plot(self, record: dict[str, Any], path: Path) -> None:
        pass


def test_later_recipes_do_not_become_the_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Measured("cifar10", "images", 0.1, 10, 0)
    monkeypatch.setitem(recipes.STAGES, "tokenizer", {"cifar10": stage})
    for command, recipe in (("run", "one="), ("run", "two="), ("report", "two=")):
        given = [command, "cifar10", str(tmp_path), "--stage", "tokenizer", "--seeds", "0", "--recipe", recipe]
        monkeypatch.setattr("sys.argv", ["recipes", *given])
        recipes.main()
    record = json.loads((tmp_path / stage.record).read_text())
    assert groups(record) == [["one", "two"]]


def test_seconds_are_divided_by_those_of_the_first_recipe_of_the_same_size(monkeypatch: pytest.MonkeyPatch) -> None:
    costs, clock = {"VQ.4": 1.0, "VQ.8": 10.0, "FSQ.8": 15.0, "FSQ.4": 2.0}, [0.0]

    def step_of(name: str) -> Any:
        return lambda: clock.append(clock[-1] + costs[name])

    def timed(run: Any) -> float:
        start = clock[-1]
        run()
        return clock[-1] - start

    stage: Any = SimpleNamespace(
        base=(),
        overlay="budget.yaml",
        training_paths=lambda work, folder: [],
        training_step=step_of,
        group_of=lambda name: int(name[-1]),
    )
    built = SimpleNamespace(main=lambda arguments: next(each for each in arguments if each in costs))
    monkeypatch.setattr(recipe_times, "main", built)
    monkeypatch.setattr(recipe_times, "timed", timed)
    found = recipe_times.measure([Recipe(name, (), (name,)) for name in costs], stage, Path("work"), 3)
    assert {name: each["ratio"] for name, each in found.items()} == {
        "VQ.4": 1.0,
        "VQ.8": 1.0,
        "FSQ.8": 1.5,
        "FSQ.4": 2.0,
    }


def test_the_measurement_of_a_tokenizer_equals_its_metrics() -> None:
    torch.manual_seed(0)
    net = VQGANConfig(channels=32, channel_multipliers=(1, 1), num_res_blocks=1, z_channels=32, codebook_size=4)
    vqgan = VQGAN(net).eval()
    module = torch.nn.Module()
    module.vqgan, module.device = vqgan, torch.device("cpu")
    module.forward = vqgan.forward  # type: ignore[method-assign]
    batches = [{"images": torch.rand(4, 3, 16, 16) * 2 - 1} for _ in range(3)]
    classifier = SmallClassifier(2, 8, width=8)
    found = measure(module, batches, 6, classifier, 8, None)
    images = torch.cat([batch["images"] for batch in batches])[:6]
    with torch.no_grad():
        output = vqgan(images)
    shares = output.encoding.codes.flatten().bincount(minlength=4).double() / output.encoding.codes.numel()
    entropy = -torch.xlogy(shares, shares).sum() / torch.tensor(2.0).log()
    assert found["entropy"] == pytest.approx(entropy.item(), abs=1e-5)
    assert found["usage"] == (shares > 0).double().mean()
    assert found["perplexity"] == pytest.approx(2 ** found["entropy"])
    assert (found["codes"], found["count"]) == (4, 6)
    error = (images - output.reconstruction.clamp(-1, 1)).square().mean((1, 2, 3)) / 4
    assert found["psnr"] == pytest.approx((-10 * error.log10()).mean().item(), abs=1e-4)
    fid = FID(classifier, 8)
    for real, each in ((True, images), (False, output.reconstruction)):
        fid.update(to_pixels(each, 8, 8).permute(0, 3, 1, 2), real=real)
    assert found["rfid"] == pytest.approx(fid.compute().item(), rel=1e-4)


def test_a_timed_step_of_a_tokenizer_trains_its_quantizer() -> None:
    net = VQGANConfig(channels=32, channel_multipliers=(1, 1), num_res_blocks=1, z_channels=32, codebook_size=4)
    module = VQGANModule(net, VQGANLossConfig(perceptual_weight=0.0, adversarial_weight=0.0))
    assert TOKENIZERS["cifar10"].group_of(SimpleNamespace(model=module)) == 4
    before = module.vqgan.quantize.embedding.weight.clone()
    recipe_tokenizer.Step(module, SimpleNamespace(image_size=8, batch_size=2), nullcontext)()
    assert not torch.equal(before, module.vqgan.quantize.embedding.weight)
