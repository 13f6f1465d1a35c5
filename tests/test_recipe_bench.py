"""The bench of recipes: how a recipe is parsed and applied, and what its report says."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import recipe_runs
from benchmarks.recipe_report import plot, table, verdict
from benchmarks.recipe_runs import DATA, Data, Recipe, evaluate, results, run_folder, train
from tests.command_line.test_configs import differences, parse

CIFAR = DATA["cifar10"]


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
    assert verdict(record, "val_loss") == ["clear"]
    assert "by validation loss, nats: clear." in table(record)
    assert "| close | 2 | 3.875 (3.700 – 4.050) | — | — |" in table(record)


def test_recipes_with_other_seeds_are_not_compared() -> None:
    record = record_of(paper=[4.0, 4.1], fewer=[3.0])
    assert verdict(record, "val_loss") == []


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

    first, *others = (options(yaml.safe_load(data.overlay.read_text())) for data in DATA.values())
    assert all(each == first for each in others)


def test_without_a_second_seed_nothing_is_better() -> None:
    assert verdict(record_of(paper=[4.0], other=[3.0]), "val_loss") == []


def test_the_plot_is_an_image(tmp_path: Path) -> None:
    plot(record_of(paper=[4.0, 4.1], other=[3.9, 4.0]), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("data", DATA.values(), ids=list(DATA))
def test_data_have_size_and_budget(data: Data) -> None:
    overlay = yaml.safe_load(data.overlay.read_text())
    assert overlay["trainer"]["max_steps"] % overlay["trainer"]["val_check_interval"] == 0  # ends with a validation


def test_finished_runs_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []
    monkeypatch.setattr(recipe_runs, "run", lambda command, log: commands.append(command))
    recipe = Recipe.parse("paper=")
    folder = run_folder(tmp_path, recipe, 3)
    (folder / "logs").mkdir(parents=True)
    train(recipe, CIFAR, tmp_path, 3)
    evaluate(recipe, CIFAR, tmp_path, 3)
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
    train(recipe, CIFAR, tmp_path, 3)
    evaluate(recipe, CIFAR, tmp_path, 3)
    assert len(commands) == 2
    assert results(recipe, tmp_path, 3) == {
        "val_loss": 4.25,
        "curve": [[10, 4.5], [20, 4.25]],
        "gfid": 2.5,
        "precision": 0.5,
        "recall": 0.25,
    }
