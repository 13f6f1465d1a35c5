"""Values computed from the files in ``fixtures/before``; ``expected.json`` holds those at the commit that wrote them.

Before a call, :func:`unpack` must have put the files into ``runs/before`` of the working directory, where they were
written. ``python -m tests.before`` writes ``expected.json``; run it only at the commit that wrote the files.
"""

import csv
import json
import os
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import main
from datamodules import CodeDataModule, ImageDataModule
from evaluation.__main__ import main as evaluate
from evaluation.prompt_images import read_prompt_images
from evaluation.reference import read_reference
from llamagen.checkpoints.contents import build_model, load_vqgan, weights_checksum
from llamagen.checkpoints.weights import read_weights
from llamagen.models.gpt import GPT
from llamagen.sampling import generate
from tests.golden import normal_input

FIXTURES = Path(__file__).parent / "fixtures/before"
EXPECTED = FIXTURES / "expected.json"
ROOT = Path("runs/before")
RATES = ("hours", "_a_second", "seconds")
"""Ends of the names of metrics that measure time."""
SKIPPED = "skipped/"
"""How the names of the numbers of skipped samples begin; what follows is the reason in words, which may change."""

Facts = dict[str, Any]


def unpack(folder: Path) -> None:
    """Unpack the files into ``folder``."""
    for archive in sorted(FIXTURES.glob("*.tar.xz")):
        with tarfile.open(archive) as tar:
            tar.extractall(folder / ROOT, filter="data")


def last(name: str) -> Path:
    """The checkpoint of a run."""
    return ROOT / name / "checkpoints/last.ckpt"


def saved(stage: str, name: str, *more: str) -> list[str]:
    """Arguments of a command with the saved configuration of a run."""
    return [stage, "--config", str(ROOT / name / f"{stage}.yaml"), *more]


def rows(name: str) -> list[dict[str, float]]:
    """Logged metrics of a run, without rates and times."""
    found: list[dict[str, float]] = []
    for path in sorted((ROOT / name / "logs").rglob("metrics.csv")):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                numbers = {key: float(value) for key, value in row.items() if value and not key.endswith(RATES)}
                skipped = [value for key, value in numbers.items() if key.startswith(SKIPPED)]
                numbers = {key: value for key, value in numbers.items() if not key.startswith(SKIPPED)}
                numbers |= {"skipped": sum(skipped)} if skipped else {}
                found += [numbers] if len(numbers) > 1 else []
    return found


def resumed(name: str, steps: int, *more: str) -> Facts:
    """Metrics and weights of a run that is trained for two more steps."""
    before = len(rows(name))
    main.main(saved("fit", name, "--ckpt_path=last", f"--trainer.max_steps={steps + 2}", *more))
    weights = {
        kind: sum(float(value.double().norm()) for value in read_weights(last(name), averaged).state.values())
        for kind, averaged in (("weights", False), ("averages", True))
    }
    return {"metrics": rows(name)[before:], **weights}


def gpt_of(path: Path) -> GPT:
    """The model in a file of weights. The weights of a ``.pt`` are loaded into the model of the checkpoint."""
    model = build_model(read_weights(path if path.suffix != ".pt" else last(path.stem)))
    assert isinstance(model, GPT)
    model.load_state_dict(read_weights(path).state)
    return model


def tokenizer() -> Facts:
    """Codes and pixels of the tokenizer's averaged weights, and their checksum."""
    model = load_vqgan(last("tokenizer"))
    codes = model.encode(normal_input("images", (2, 3, 8, 8)).clamp(-1, 1)).codes
    pixels = model.decode_codes(codes)
    return {
        "codes": codes.flatten(1).tolist(),
        "pixels": [float(pixels.mean()), float(pixels.std())],
        "weights": weights_checksum(model),
        "exported": weights_checksum(load_vqgan(ROOT / "exported/tokenizer.safetensors")),
    }


def sampled() -> Facts:
    """Codes of two classes and of two captions, by the weights of checkpoints and of exported files."""
    labels, captions = torch.tensor([3, 7]), normal_input("captions", (2, 8, 8))
    facts: Facts = {}
    for name in ("argen", "sharded", "text_argen"):
        condition = captions if name == "text_argen" else labels
        exported = sorted((ROOT / "exported").glob(f"{name}.*"))
        for path in (last(name), *exported):
            gpt = gpt_of(path)
            generated = generate(gpt, condition, {"guidance_scale": 2.0})
            facts[f"{name} {path.suffix}"] = {"codes": generated.tolist(), "weights": weights_checksum(gpt)}
    return facts


def images() -> Facts:
    """Classes, number and pixels of image shards."""
    data = ImageDataModule(ROOT / "images", image_size=8, batch_size=10, num_workers=0)
    data.setup("validate")
    (batch,) = data.val_dataloader()
    return {
        "classes": data.class_names,
        "keys": batch["keys"],
        "labels": batch["labels"].tolist(),
        "pixels": batch["images"].mean((1, 2, 3)).tolist(),
    }


def shards_of(meta: Facts) -> Facts:
    """Entries of the shards in ``meta.json``, with the number of skipped examples but without the reasons."""
    return {
        split: {"shards": described["shards"], "skipped": sum(described["skipped"].values())}
        for split, described in meta["splits"].items()
    }


def codes() -> Facts:
    """Description and first batch of code shards, without and with features of captions."""
    facts: Facts = {}
    for name in ("codes", "features"):
        data = CodeDataModule(ROOT / name, batch_size=10, num_workers=0)
        data.setup("validate")
        (batch,) = data.val_dataloader()
        facts[name] = {
            "meta": {**data.code_meta, "splits": shards_of(data.code_meta)},
            **{key: value.float().mean().item() for key, value in batch.items() if isinstance(value, torch.Tensor)},
        }
    return facts


def extraction() -> Facts:
    """The shards of a stopped extraction that is resumed, with their checksums."""
    main.main(saved("predict", "codes_stopped", "--trainer.limit_predict_batches=null"))
    return shards_of(json.loads((ROOT / "codes_stopped/meta.json").read_text()))


def number_of_files(name: str) -> int:
    """Number of image files of a sampling run. One file per image means that a resumed run used the existing files."""
    return len(list((ROOT / name).rglob("[0-9]*_*.png")))


def samples() -> Facts:
    """Class samples of a killed command that is repeated. One existing file is made black and must be kept."""
    (first,) = (ROOT / "samples_stopped").rglob("000000_class0.png")
    Image.new("RGB", (6, 6)).save(first)
    main.main(saved("predict", "samples_stopped"))
    with np.load(ROOT / "samples_stopped/samples.npz") as archive:
        pixels, labels = archive["arr_0"], archive["arr_1"]
    return {
        "shape": list(pixels.shape),
        "means": pixels.mean((1, 2, 3)).tolist(),
        "labels": labels.tolist(),
        "files": number_of_files("samples_stopped"),
    }


def prompts() -> Facts:
    """Samples of prompts of a killed command that is repeated, and of an uninterrupted command."""
    main.main(saved("predict", "prompts_stopped"))
    facts: Facts = {}
    for name in ("prompts", "prompts_stopped"):
        with np.load(ROOT / name / "samples.npz") as archive:
            means = archive["arr_0"].mean((1, 2, 3)).tolist()
        lines = (ROOT / name / "metadata.jsonl").read_text().splitlines()
        facts[name] = {
            "means": means,
            "prompts": [[each.number, each.prompt] for each in read_prompt_images(ROOT / name)],
            "truncated": [json.loads(line)["truncated"] for line in lines],
            "files": number_of_files(name),
        }
    return facts


def measured() -> Facts:
    """Description of the reference, and metrics of 20 random images against it."""
    folder = ROOT / "evaluation"
    features = ["--features=Classifier", f"--features.weights={folder / 'classifier.safetensors'}"]
    reference = folder / "reference.npz"
    evaluate(["compare", str(folder / "images.npz"), str(reference), *features, f"--report={folder / 'report'}"])
    report = json.loads((folder / "report/metrics.json").read_text())
    return {"facts": read_reference(reference).facts(), "metrics": report["metrics"]}


FACTS: dict[str, Callable[[], Facts]] = {
    "tokenizer": tokenizer,
    "tokenizer resumed": lambda: resumed("tokenizer", 4),
    "argen resumed": lambda: resumed("argen", 6),
    "text_argen resumed": lambda: resumed("text_argen", 6),
    "sharded resumed": lambda: resumed(
        "sharded", 6, "--trainer.strategy=auto", "--trainer.devices=1", "--data.init_args.batch_size=8"
    ),
    "sampled": sampled,
    "images": images,
    "codes": codes,
    "extraction": extraction,
    "samples": samples,
    "prompts": prompts,
    "measured": measured,
}


def record() -> None:
    """Write ``expected.json``."""
    expected, home = {}, Path.cwd()
    for name, facts in FACTS.items():
        with tempfile.TemporaryDirectory() as folder:
            unpack(Path(folder))
            os.chdir(folder)
            expected[name] = facts()
            os.chdir(home)
    EXPECTED.write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    record()
