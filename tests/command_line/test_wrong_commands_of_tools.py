"""Wrong arguments of the tools: one line that names them, exit code 2, and no files."""

import importlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

MODULES = {
    "evaluation": "evaluation.__main__",
    "export": "llamagen.checkpoints.export",
    "cost": "llamagen.cost.__main__",
    "packing": "datamodules.packing",
    "inspection": "datamodules.inspection",
}
EVERYTHING = "--features=tests.metrics.extractors.Everything"
BASE = str(Path(__file__).parents[2] / "configs/argen/base.yaml")
CLASSIFIER = "evaluation classifier classes c.safetensors tiny --image_size=8 --width=8 --batch_size=4"

WRONG: dict[str, str] = {
    f"evaluation compare text real {EVERYTHING}": "text",
    f"evaluation compare real empty {EVERYTHING}": "empty",
    f"evaluation compare bytes real {EVERYTHING}": "bytes",
    f"evaluation compare broken real {EVERYTHING}": "broken",
    f"evaluation compare real broken {EVERYTHING}": "broken",
    f"evaluation compare missing.tar real {EVERYTHING}": "missing.tar",
    f"evaluation compare real real {EVERYTHING} --report=text/a": "text/a",
    f"evaluation compare real real {EVERYTHING} --report=/proc/nowhere/a": "/proc/nowhere/a",
    f"evaluation compare real real {EVERYTHING} --report=classes": "classes exists and is not a report",
    f"evaluation compare missing real {EVERYTHING} --batch_size=0": "batch_size is 0",
    f"evaluation compare missing real {EVERYTHING} --num_workers=-1": "num_workers is -1",
    f"evaluation compare real real {EVERYTHING} --batch_size=1.5": "batch_size",
    f"evaluation compare real real {EVERYTHING} --image_size=0": "image_size is 0",
    "evaluation compare real real --features=Classifier --features.weights=classes": "classes",
    "evaluation compare real real --features=Inception --features.weights=text": "text cannot be read as Inception",
    f"evaluation reference real text/o.npz {EVERYTHING}": "out text/o.npz cannot be written",
    f"evaluation reference real /proc/nowhere/o.npz {EVERYTHING}": "out /proc/nowhere/o.npz cannot be written",
    f"evaluation reference real samples.npz {EVERYTHING}": "out is samples.npz, which exists and is not a reference",
    f"evaluation reference real o.npz {EVERYTHING} --batch_size=-1": "batch_size is -1",
    "evaluation classifier classes text tiny": "out is text; give the name of a file, *.safetensors",
    "evaluation classifier classes text/c.safetensors tiny": "out text/c.safetensors cannot be written",
    "evaluation classifier classes/a c.safetensors tiny": "classes/a",
    "evaluation classifier one_class c.safetensors tiny --image_size=8 --batch_size=2": "one_class are of one class",
    f"{CLASSIFIER} --lr=0": "lr is 0.0; it must be above 0",
    f"{CLASSIFIER} --lr=-1": "lr is -1.0",
    f"{CLASSIFIER} --seed=99999999999999999999": "seed is 99999999999999999999",
    f"{CLASSIFIER} --epochs=x": "epochs",
    f"{CLASSIFIER} --device=gpu": "device is 'gpu'",
    "evaluation clip text": "text is not a folder",
    "evaluation clip classes": "classes has no metadata.jsonl",
    "evaluation clip classes --out=text": "out is text; give the name of a file, *.json",
    "evaluation clip classes --out=text/a.json": "out text/a.json cannot be written",
    "evaluation clip classes --batch_size=0": "batch_size is 0",
    "export text o.pt": "text cannot be read as a checkpoint",
    "export classes o.pt": "classes is a folder",
    "export samples.npz o.pt": "samples.npz cannot be read as a checkpoint",
    "export text text/o.pt": "text/o.pt cannot be written",
    "export text /proc/nowhere/o.safetensors": "/proc/nowhere/o.safetensors cannot be written",
    "export text samples.npz": "samples.npz would be of an unknown format",
    "export text": "give either OUT, the file to write, or --to",
    "export text o.pt --to new": "give either OUT, the file to write, or --to",
    "export text o.pt --name a": "--name needs --to",
    "export text --to new": "text cannot be read as a checkpoint",
    "export classes --to new": "classes holds no model",
    "export missing --to new": "missing does not exist",
    "export text --to classes": "classes exists and is not an exported model",
    "export text --to text --overwrite": "text exists and is not an exported model",
    "export text --to text/new": "to text/new cannot be written",
    "export text --to new --samples -1": "samples is -1",
    "export text --to new --license MIT": "license is 'MIT'; give a licence as the hub names it",
    "export text --to hf://owner": "hf://owner is not a repository of the hub",
    "export text --to hf://owner/repository --overwrite": "overwrite is for folders",
    "cost --config missing": "missing cannot be read",
    "cost --config classes": "classes cannot be read",
    "cost --config bytes": "bytes cannot be read",
    "cost --config text": "text is not a mapping",
    f"cost --config {BASE} --batch_size=0": "batch_size is 0",
    f"cost --config {BASE} --batch_size=8 --gpus=0": "gpus is 0",
    f"cost --config {BASE} --batch_size=8 --peak_tflops=inf": "peak_tflops is inf",
    f"cost --config {BASE} --batch_size=8 --images=0": "images is 0",
    f"cost --config {BASE} --batch_size=8 --mfu=nan": "mfu is nan",
    "packing empty new": "empty",
    "packing text new": "text",
    "packing classes text": "out text is a file",
    "packing classes text/new": "out text/new cannot be written",
    "packing classes /proc/nowhere/new": "out /proc/nowhere/new cannot be written",
    "packing classes real": "out real already holds other files (000.png, 001.png, 002.png)",
    "packing classes new --shard_mb=nan": "shard_mb is nan",
    "packing classes new --shard_mb=inf": "shard_mb is inf",
    "packing classes new --val_share=2": "val_share is 2.0",
    "packing classes new --workers=0": "workers is 0",
    "packing classes new --max_bad_share=nan": "max_bad_share is nan",
    "inspection text": "text",
    "inspection classes --sheet=real": "sheet is real",
    "inspection classes --sheet=text/a.png": "sheet text/a.png cannot be written",
    "inspection classes --sheet=/proc/nowhere/a.png": "sheet /proc/nowhere/a.png cannot be written",
    "inspection classes --sheet=a.jpg": "sheet is a.jpg",
    "inspection classes --num_workers=-1": "num_workers is -1",
    "inspection classes --seed=-1": "seed is -1",
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (18, 8, 8, 3), np.uint8)
    for number, image in enumerate(images):
        for folder in ("real", f"classes/{'ab'[number % 2]}", "one_class/a"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(tmp_path / folder / f"{number:03d}.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    for name in "abc":
        (tmp_path / f"broken/{name}.png").write_bytes(b"no image")
    (tmp_path / "text").write_text("hello\n")
    (tmp_path / "bytes").write_bytes(bytes(range(256)))
    np.savez(tmp_path / "samples.npz", images)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_wrong_arguments_are_one_line_errors_and_write_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    for command, phrase in WRONG.items():
        name, *arguments = command.split()
        with pytest.raises(SystemExit) as end:
            importlib.import_module(MODULES[name]).main(arguments)
        assert end.value.code == 2, command
        lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert len(lines) == 1, command
        assert phrase in lines[0], f"{command}: {lines[0]}"
        assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before, command
