"""Follow each image of a folder into the batches of the autoregressive model: only broken images may get lost.

    python -m benchmarks.account_for_keys FOLDER [--broken 5]

Copies FOLDER (class folders of images), damages some images in different ways, packs the copy into shards, extracts
codes of ten crops at two sizes with a small untrained tokenizer, and reads the codes for one epoch of training and one
of validation. Prints the number of keys at each stage, then one line of JSON.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import main as command_line
from datamodules import CodeDataModule, ImageDataModule
from datamodules.packing import pack
from datamodules.storage.folders import class_folders, index_folder

WAYS: dict[str, Callable[[bytes], bytes]] = {
    "cut off in the middle": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "text": lambda data: b"this is a page that says 404",
    "end missing": lambda data: data[:-500],
    "header damaged": lambda data: b"\0" * 20 + data[20:],
}
SIZE = 64


def break_images(folder: Path, count: int) -> dict[str, str]:
    """Damage some images. Returns the damage by key."""
    index = index_folder(folder, class_folders(folder))
    broken = {}
    for place, number in enumerate(np.random.default_rng(0).permutation(len(index))[:count]):
        way = list(WAYS)[place % len(WAYS)]
        path = Path(index.paths[int(number)])
        path.write_bytes(WAYS[way](path.read_bytes()))
        broken[index.keys[int(number)]] = way
    return broken


def keys_of(data: Any) -> list[str]:
    """Keys of one epoch of training and one of validation."""
    data.setup("fit")
    return [
        key for loader in (data.train_dataloader(), data.val_dataloader()) for batch in loader for key in batch["keys"]
    ]


def extract(shards: Path, folder: Path) -> None:
    """Train a small tokenizer for one step, then extract codes with it."""
    shared = [
        *("--config", "configs/vqgan/base.yaml", "--config", "configs/vqgan/small.yaml"),
        *("--trainer.accelerator=cpu", "--model.init_args.loss.perceptual_weight=0", "--trainer.logger=false"),
        *(f"--data.init_args.root={shards}", f"--data.init_args.image_size={SIZE}", "--data.init_args.num_workers=1"),
    ]
    fit = ["fit", *shared, f"--trainer.default_root_dir={folder}/tokenizer", "--trainer.max_steps=1"]
    command_line.main([*fit, "--trainer.limit_val_batches=0", "--trainer.callbacks=[{class_path: EMA}]"])
    overlays = ["--config", "configs/vqgan/extract.yaml", "--config", "configs/vqgan/ten_crop.yaml"]
    predict = ["predict", *shared, *overlays, f"--trainer.default_root_dir={folder}/codes"]
    (checkpoint,) = (folder / "tokenizer").rglob("*.ckpt")
    command_line.main([*predict, f"--ckpt_path={checkpoint}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--broken", type=int, default=5)
    options = parser.parse_args()
    if not options.folder.is_dir():
        parser.error(f"{options.folder} is not a folder; give a folder of class folders of images")
    with tempfile.TemporaryDirectory() as temporary:
        work, start = Path(temporary), time.perf_counter()
        shutil.copytree(options.folder, work / "images", copy_function=shutil.copyfile)
        broken = break_images(work / "images", options.broken)
        keys = set(index_folder(work / "images", class_folders(work / "images")).keys)
        pack(str(work / "images"), work / "shards", shard_mb=10, val_share=0.1)
        stations = {"folder": sorted(keys)}
        stations["batches from the folder"] = keys_of(ImageDataModule(str(work / "images"), SIZE, num_workers=1))
        stations["batches from shards"] = keys_of(ImageDataModule(str(work / "shards"), SIZE, num_workers=1))
        extract(work / "shards", work)
        stations["batches of codes"] = keys_of(CodeDataModule(work / "codes", num_workers=1))
        skipped = [line.split("\t")[1:3] for line in (work / "codes/skipped.tsv").read_text().splitlines()[1:]]
        packed = json.loads((work / "shards/meta.json").read_text())["splits"]
    result = {
        "benchmark": "account_for_keys",
        "command": " ".join(["python -m benchmarks.account_for_keys", "FOLDER", *sys.argv[2:]]),
        "broken": broken,
        "keys": {name: len(each) for name, each in stations.items()},
        "twice": {name: len(each) - len(set(each)) for name, each in stations.items()},
        "lost": {name: sorted(keys - set(each)) for name, each in stations.items()},
        "skipped_in_packing": {split: packed[split]["skipped"] for split in packed},
        "skipped_in_extraction": dict(skipped),
        "lost_exactly_the_broken": all(
            keys - set(each) == set(broken) for name, each in stations.items() if name != "folder"
        ),
        "seconds": round(time.perf_counter() - start, 1),
    }
    for name, each in stations.items():
        print(f"{name:28}{len(each):6} keys, {len(keys) - len(set(each))} lost, {len(each) - len(set(each))} twice")
    print(f"exactly the broken images are lost: {result['lost_exactly_the_broken']}")
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    main()
