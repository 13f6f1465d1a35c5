"""What a run recorded about the training and the quality of a checkpoint. Missing or damaged records are left out."""

import csv
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from llamagen.checkpoints.contents import read_checkpoint
from llamagen.pretrained.run_folder import Run

FID = re.compile(r"[gr]fid[_/]")
"""Start of the names under which FIDMonitor logs FID."""
RECONSTRUCTIONS = "reconstructions"


class Metric(NamedTuple):
    """A logged value.

    Attributes:
        name: name as logged, such as ``val/loss``.
        value: value.
        batch: number of batches that each rank had trained on.
    """

    name: str
    value: float
    batch: int


class Evaluation(NamedTuple):
    """The report of an evaluation.

    Attributes:
        metrics: values by name.
        facts: how they were measured, by name.
    """

    metrics: dict[str, float]
    facts: dict[str, str]


class RunFacts(NamedTuple):
    """Facts about a checkpoint.

    Attributes:
        training: how it was trained, by name.
        metrics: last value of each validation metric up to the checkpoint.
        best: lowest FID of the run, of each reference.
        evaluation: report of an evaluation of exactly these weights.
        reconstructions: newest grid of reconstructions up to the checkpoint.
    """

    training: dict[str, str] = {}  # noqa: RUF012  a constant
    metrics: tuple[Metric, ...] = ()
    best: tuple[Metric, ...] = ()
    evaluation: Evaluation | None = None
    reconstructions: Path | None = None


def read_run_facts(run: Run | None, checkpoint: Path, averaged: bool, checksum: str) -> RunFacts:
    """Collect the facts about a checkpoint.

    Args:
        run: the run that the checkpoint belongs to; None if unknown.
        checkpoint: the checkpoint, or any file of weights.
        averaged: whether the averaged (EMA) weights are meant.
        checksum: checksum of the weights, see :func:`~llamagen.checkpoints.contents.weights_checksum`.
    """
    saved = _saved(checkpoint)
    batch = saved.get("batch")
    training = _training(run, saved, averaged)
    if run is None:
        return RunFacts(training)
    rows = list(_logged(run.folder / "logs"))
    stage = "val_raw/" if not averaged and _ema_decay(run) is not None else "val/"
    metrics, best = dict[str, Metric](), dict[str, Metric]()
    for each in rows:
        if FID.match(each.name) and (each.name not in best or each.value < best[each.name].value):
            best[each.name] = each
        belongs = each.name.startswith(stage) or ("val" not in each.name.split("/")[0] and stage == "val/")
        if belongs and (batch is None or each.batch <= batch):
            metrics[each.name] = each
    found = run.folder / RECONSTRUCTIONS
    grids = {int(path.stem[5:]): path for path in found.glob("step_*.png") if path.stem[5:].isdecimal()}
    steps = [step for step in grids if batch is None or step <= batch]
    return RunFacts(
        training,
        tuple(metrics.values()),
        tuple(best.values()),
        _evaluation(run.folder / "report/metrics.json", checksum),
        grids[max(steps)] if steps else None,
    )


def data_root(run: Run) -> Path | None:
    """Local folder of a run's training data; None if it is remote or does not exist any more."""
    root = _init_args(run.settings.get("data")).get("root")
    folder = Path(run.locate(root)) if isinstance(root, str) else None
    return folder if folder is not None and folder.is_dir() else None


def data_meta(run: Run) -> dict[str, Any]:
    """The ``meta.json`` of a run's training data; empty if there is none."""
    root = data_root(run)
    meta = _read_json(root / "meta.json") if root is not None else None
    return meta if isinstance(meta, dict) else {}


def sample_prompts(run: Run | None) -> tuple[str, ...]:
    """Prompts of the run's ``SampleGrid``."""
    prompts = _callback(run, "SampleGrid").get("prompts") if run is not None else None
    return tuple(each for each in prompts if isinstance(each, str)) if isinstance(prompts, list) else ()


def _saved(checkpoint: Path) -> dict[str, Any]:
    """Counts of a training checkpoint; empty for other files."""
    if checkpoint.suffix != ".ckpt":
        return {}
    try:
        content = read_checkpoint(checkpoint, wanted=lambda _: False)
    except ValueError:
        return {}
    loop = content.get("loops", {}).get("fit_loop", {})
    counts = {
        "batch": loop.get("epoch_loop.batch_progress", {}).get("total", {}).get("ready"),
        "steps": content.get("global_step"),
        "lightning": content.get("pytorch-lightning_version"),
        "hours": content.get("callbacks", {}).get("Throughput", {}).get("hours"),
        "position": next((content[key].get("train") for key in content if key.endswith("DataModule")), None),
    }
    return {name: value for name, value in counts.items() if value is not None}


def _training(run: Run | None, saved: Mapping[str, Any], averaged: bool) -> dict[str, str]:
    facts: dict[str, Any] = {}
    settings = {} if run is None else run.settings
    trainer, data = _mapping(settings.get("trainer")), _init_args(settings.get("data"))
    count = None
    if run is not None:
        meta = data_meta(run)
        count = _mapping(_mapping(meta.get("splits")).get("train")).get("count")
        facts["Data"] = PurePosixPath(str(data["root"]).rstrip("/")).name if data.get("root") else None
        facts["Training images"] = f"{count:,}" if isinstance(count, int) else None
        if start := run.options.get("init_from"):
            facts["Initialised from"] = f"`{str(start) if _is_address(start) else Path(str(start)).name}`"
    if "steps" in saved:
        facts["Optimizer steps"] = f"{saved['steps']:,}"
    if (position := saved.get("position")) and isinstance(count, int) and count and position["epoch"] >= 0:
        facts["Epochs"] = f"{position['epoch'] + position['consumed'] / count:.4g}"
    if run is not None:
        facts["Batch size"] = _batch_size(trainer, data)
        facts["Optimizer"] = _optimizer(run.options.get("optimizer"))
        facts["Gradient clipping"] = trainer.get("gradient_clip_val")
        facts["Precision"] = trainer.get("precision")
        decay = _ema_decay(run)
        if decay is not None:
            facts["Weights"] = f"averages (EMA) with decay {decay:g}" if averaged else "raw, without averages (EMA)"
        seed = settings.get("seed_everything")
        facts["Seed"] = seed if isinstance(seed, int) and not isinstance(seed, bool) else None
    if saved.get("hours", 0) >= 0.01:
        facts["Hours of training"] = f"{saved['hours']:.2g}"
    facts["Lightning"] = saved.get("lightning")
    return {name: str(value) for name, value in facts.items() if value is not None}


def _batch_size(trainer: Mapping[str, Any], data: Mapping[str, Any]) -> str | None:
    """Batch size per device, with devices and accumulation where they are known."""
    size = data.get("batch_size")
    if not isinstance(size, int):
        return None
    text = f"{size} on each device"
    devices, nodes = trainer.get("devices"), trainer.get("num_nodes")
    if isinstance(devices, int | str) and str(devices).isdecimal() and isinstance(nodes, int):
        text = f"{size} × {int(devices) * nodes} devices"
    if (accumulated := trainer.get("accumulate_grad_batches")) not in (None, 1):
        text += f" × {accumulated} accumulated batches"
    return text


def _optimizer(options: Any) -> str | None:
    if not isinstance(options, Mapping):
        return None
    given = ", ".join(f"{name} {value}" for name, value in options.items() if value is not None)
    return f"AdamW ({given})"


def _ema_decay(run: Run) -> float | None:
    decay = _callback(run, "EMA").get("decay")
    return float(decay) if isinstance(decay, int | float) else None


def _callback(run: Run, name: str) -> dict[str, Any]:
    """Arguments of a callback; empty if the run did not use it."""
    callbacks = _mapping(run.settings.get("trainer")).get("callbacks")
    for each in callbacks if isinstance(callbacks, list) else ():
        if isinstance(each, Mapping) and str(each.get("class_path", "")).rpartition(".")[2] == name:
            return _init_args(each)
    return {}


def _init_args(part: Any) -> dict[str, Any]:
    return _mapping(_mapping(part).get("init_args"))


def _mapping(part: Any) -> dict[str, Any]:
    return dict(part) if isinstance(part, Mapping) else {}


def _is_address(start: Any) -> bool:
    return str(start).startswith("hf:/")


def _logged(folder: Path) -> list[Metric]:
    """Finite values in all ``metrics.csv`` of a run, without those of the training batches, in the order of writing."""
    found: list[Metric] = []
    for file in sorted(folder.glob("version_*/metrics.csv"), key=lambda path: _number(path.parent.name)):
        try:
            with file.open(newline="") as lines:
                rows = list(csv.DictReader(lines))
        except (OSError, UnicodeDecodeError, csv.Error):
            continue
        for row in rows:
            step = _float(row.get("step"))
            for name, text in row.items():
                if step is None or name in (None, "step", "epoch") or name.startswith("train/"):
                    continue
                if (value := _float(text)) is not None:
                    found.append(Metric(name, value, int(step)))
    return found


def _number(name: str) -> int:
    digits = name.rpartition("_")[2]
    return int(digits) if digits.isdecimal() else -1


def _float(text: Any) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _evaluation(file: Path, checksum: str) -> Evaluation | None:
    """The report in a run's folder, if it is of the weights with this checksum."""
    content = _mapping(_read_json(file))
    if _mapping(content.get("model")).get("weights") != checksum:
        return None
    values = {name: _float(value) for name, value in _mapping(content.get("metrics")).items()}
    metrics = {name: value for name, value in values.items() if value is not None}
    images, reference = _mapping(content.get("images")), content.get("reference")
    facts = {
        "Images": f"{images['count']:,} of {images['resolution']} px"
        if {"count", "resolution"} <= set(images)
        else None,
        "Compared with": reference.get("name") if isinstance(reference, dict) else reference,
        "Features": _mapping(content.get("extractor")).get("name"),
        "Precision": content.get("precision"),
        "Sampling": ", ".join(
            f"{name} {value}" for name, value in _mapping(content.get("sampling")).items() if value is not None
        ),
        "Versions": ", ".join(f"{name} {value}" for name, value in _mapping(content.get("versions")).items()),
    }
    return Evaluation(metrics, {name: str(value) for name, value in facts.items() if value})


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None
