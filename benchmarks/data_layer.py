"""Images and codes per second on one core: this data layer compared with plain ones.

    python -m benchmarks.data_layer FOLDER [--image-size 256] [--rounds 7]

FOLDER holds class folders of images. All parts run in alternation on one core, in one process: decoding alone, cropping
alone, and complete pipelines from files to batches of float32 in [-1, 1]. The pipelines are Pillow with ADM's centre
crop, the same in a torch DataLoader over the folder, and this layer from the folder and from shards. For codes, this
layer reads shards, and is compared with a DataLoader over one ``.npy`` file per image, the format of LlamaGen's
published code. Prints tables, then one line of JSON.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules import CodeDataModule, ImageDataModule
from datamodules.packing import pack
from datamodules.storage.folders import class_folders, index_folder
from datamodules.storage.shards import CODES_FORMAT, ShardDataset
from datamodules.transforms.crops import centre_crop
from datamodules.transforms.decode import read_image

BATCH = 16
CODE_SAMPLES, VIEWS, GRID, VOCABULARY, CODE_BATCH = 20_000, 10, 16, 16_384, 256


def plain_decode(data: bytes) -> Image.Image:
    return Image.open(BytesIO(data)).convert("RGB")


def plain_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop by Pillow."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def plain_image(path: str, size: int) -> Tensor:
    with open(path, "rb") as file:
        image = plain_crop(plain_decode(file.read()), size)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


class PlainFolder(Dataset[Tensor]):
    """Images of a folder, decoded and cropped by Pillow."""

    def __init__(self, paths: list[str], size: int) -> None:
        self.paths, self.size = paths, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> Tensor:
        return plain_image(self.paths[number], self.size)


class PlainCodes(Dataset[tuple[Tensor, int]]):
    """A random view of the codes, from one file per image."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __len__(self) -> int:
        return CODE_SAMPLES

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        codes = np.load(self.folder / f"{number}.npy")
        label = int(np.load(self.folder / f"{number}.label.npy"))
        view = int(torch.randint(len(codes), ()))
        return torch.from_numpy(codes[view].astype(np.int64)).flatten(), label


def write_codes(root: Path, plain: Path) -> None:
    plain.mkdir()
    generator = np.random.default_rng(0)
    shards = ShardDataset(root, {}, hint="")
    shards.begin(("train", "val"))
    written = {"train": 2, "val": 1}
    for split, count in written.items():
        for piece in range(count):
            with shards.shard(split, piece) as writer:
                for number in range(
                    piece * CODE_SAMPLES // 2, (piece + 1) * CODE_SAMPLES // 2 if split == "train" else 9
                ):
                    codes = generator.integers(0, VOCABULARY, (VIEWS, GRID, GRID)).astype(np.uint16)
                    buffer = BytesIO()
                    np.save(buffer, codes)
                    writer.write(f"{split}/{number}", {"npy": buffer.getvalue()}, number % 1000)
                    if split == "train":
                        np.save(plain / f"{number}.npy", codes.astype(np.int64))
                        np.save(plain / f"{number}.label.npy", number % 1000)
    meta = {
        "format": CODES_FORMAT, "vocabulary": VOCABULARY, "grid": [GRID, GRID], "views": VIEWS, "num_classes": 1000,
        "tokenizer": "0" * 64,
    }  # fmt: skip
    shards.finish(written, meta, rejected={}, max_bad_share=0.0)


def image_loader(root: str, size: int) -> Any:
    data = ImageDataModule(root, size, BATCH, random_crop=False, flip=False, num_workers=0)
    data.setup("fit")
    return data.train_dataloader()


def count_images(loader: Any) -> int:
    return sum(len(batch["images"] if isinstance(batch, dict) else batch) for batch in loader)


def measure(parts: dict[str, Callable[[], int]], rounds: int) -> dict[str, dict[str, float]]:
    """Items per second of each part; the parts run in alternation."""
    rates: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(rounds + 1):
        for name, part in parts.items():
            start = time.perf_counter()
            count = part()
            if turn:  # the first turn is a warm-up
                rates[name].append(count / (time.perf_counter() - start))
    return {
        name: {
            "median": round(statistics.median(each), 1),
            **dict(zip(("q1", "q3"), (round(q, 1) for q in np.percentile(each, [25, 75]).tolist()), strict=True)),
        }
        for name, each in rates.items()
    }


def differences(data: list[bytes], size: int) -> dict[str, float]:
    """Differences between our pixels and Pillow's, in levels of 0 to 255."""
    worst = [
        np.abs(
            np.asarray(plain_crop(plain_decode(file), size)).astype(int)
            - centre_crop(read_image(file, ""), size).astype(int)
        )
        for file in data
    ]
    every = np.concatenate([difference.flatten() for difference in worst])
    return {
        "most": int(every.max()),
        "share_above_0": float((every > 0).mean()),
        "share_above_1": float((every > 1).mean()),
    }


def image_parts(folder: Path, shards: Path, size: int) -> tuple[dict[str, Callable[[], int]], dict[str, float]]:
    index = index_folder(folder, class_folders(folder))
    paths = list(index.paths)
    data = [Path(path).read_bytes() for path in paths]
    images = [plain_decode(file) for file in data]
    pixels = [read_image(file, "") for file in data]
    from_folder, from_shards = image_loader(str(folder), size), image_loader(str(shards), size)
    plain_loader = DataLoader(PlainFolder(paths, size), BATCH, shuffle=True)

    def plain() -> int:
        for first in range(0, len(paths), BATCH):
            torch.stack([plain_image(path, size) for path in paths[first : first + BATCH]])
        return len(paths)

    parts: dict[str, Callable[[], int]] = {
        "decode: Pillow": lambda: len([plain_decode(file) for file in data]),
        "decode: ours": lambda: len([read_image(file, "") for file in data]),
        "crop: Pillow": lambda: len([plain_crop(image, size) for image in images]),
        "crop: ours": lambda: len([centre_crop(each, size) for each in pixels]),
        "pipeline: Pillow + ADM crop": plain,
        "pipeline: DataLoader over the folder": lambda: count_images(plain_loader),
        "pipeline: ours, folder": lambda: count_images(from_folder),
        "pipeline: ours, shards": lambda: count_images(from_shards),
    }
    return parts, differences(data, size)


def code_parts(folder: Path) -> dict[str, Callable[[], int]]:
    write_codes(folder / "codes", folder / "plain")
    data = CodeDataModule(folder / "codes", CODE_BATCH, num_workers=0)
    data.setup("fit")
    ours = data.train_dataloader()
    plain = DataLoader(PlainCodes(folder / "plain"), CODE_BATCH, shuffle=True)
    return {
        "codes: one .npy an image": lambda: sum(len(codes) for codes, _ in plain),
        "codes: ours, shards": lambda: sum(len(batch["codes"]) for batch in ours),
    }


def ratios(rates: dict[str, dict[str, float]]) -> dict[str, float]:
    def ratio(ours: str, plain: str) -> float:
        return round(rates[ours]["median"] / rates[plain]["median"], 2)

    return {
        "decode": ratio("decode: ours", "decode: Pillow"),
        "crop": ratio("crop: ours", "crop: Pillow"),
        "pipeline, folder": ratio("pipeline: ours, folder", "pipeline: Pillow + ADM crop"),
        "pipeline, shards": ratio("pipeline: ours, shards", "pipeline: Pillow + ADM crop"),
        "codes": ratio("codes: ours, shards", "codes: one .npy an image"),
    }


def processor() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    if not options.folder.is_dir():
        parser.error(f"{options.folder} is not a folder; give a folder of class folders of images")
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["XDG_CACHE_HOME"] = temporary
        pack(str(options.folder), Path(temporary) / "shards", workers=1)
        parts, pixels = image_parts(options.folder, Path(temporary) / "shards", options.image_size)
        rates = measure({**parts, **code_parts(Path(temporary))}, options.rounds)
    print(f"{'one core':40}{'items/s':>10}{'quartiles':>22}")
    for name, rate in rates.items():
        print(f"{name:40}{rate['median']:10.0f}{rate['q1']:12.0f} {rate['q3']:9.0f}")
    print("\n" + ", ".join(f"{name}: {ratio} times plain" for name, ratio in ratios(rates).items()))
    print(f"pixels differ by at most {pixels['most']} levels, {pixels['share_above_1']:.4%} by more than 1")
    result = {
        "benchmark": "data_layer",
        "command": " ".join(["python -m benchmarks.data_layer", "FOLDER", *sys.argv[2:]]),
        "machine": f"{processor()}, one core, Python {platform.python_version()}",
        "versions": {"torch": torch.__version__, "pillow": PIL.__version__, "numpy": np.__version__},
        "options": {"image_size": options.image_size, "rounds": options.rounds, "batch_size": BATCH},
        "codes": {"samples": CODE_SAMPLES, "views": VIEWS, "length": GRID**2, "batch_size": CODE_BATCH},
        "items_a_second": rates,
        "ratios": ratios(rates),
        "pixels": pixels,
    }
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    main()
