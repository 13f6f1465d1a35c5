"""A figure of inpainting: validation images of a run, masks, and several results for each.

Each row has an image as the tokenizer decodes it, the image without the masked codes, and the results. Prints one JSON
line. The run is one of ``ARGenModule`` with classes whose model was trained in random orders (``model.order``):

    python -m benchmarks.inpainting runs/rar docs/images/inpainting.png
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datamodules import CodeDataModule
from llamagen import LlamaGen
from llamagen.files import atomic_file
from llamagen.grids import grid_image
from llamagen.pretrained.run_folder import find_run

GREY = 128
RESULTS = 3
MIN_SIDE = 96
"""Smaller images are enlarged to at least this side in pixels, without interpolation."""


def masks_of(grid: int) -> list[Tensor]:
    """Masks (h, w) bool: centre, left half, upper half, right half, lower right quarter, every second column."""
    half, quarter = grid // 2, grid // 4
    parts: list[tuple[slice, slice]] = [
        (slice(quarter, grid - quarter), slice(quarter, grid - quarter)),
        (slice(None), slice(0, half)),
        (slice(0, half), slice(None)),
        (slice(None), slice(half, None)),
        (slice(half, None), slice(half, None)),
        (slice(None), slice(1, None, 2)),
    ]
    masks = []
    for part in parts:
        mask = torch.zeros(grid, grid, dtype=torch.bool)
        mask[part] = True
        masks.append(mask)
    return masks


def examples_of(root: str, count: int) -> tuple[Tensor, list[int]]:
    """Codes (N, L) and classes of validation examples, of as many classes as possible."""
    data = CodeDataModule(root, batch_size=256, num_workers=0)
    data.setup("validate")
    codes, classes = list[Any](), list[int]()
    for batch in data.val_dataloader():
        if "condition" not in batch:
            raise ValueError(f"{root} has no classes; give a run of a class-conditional model")
        codes += list(batch["codes"])
        classes += batch["condition"].tolist()
    rank = [classes[:number].count(each) for number, each in enumerate(classes)]
    chosen = sorted(sorted(range(len(codes)), key=lambda number: (rank[number], number))[:count])
    return torch.stack([codes[number] for number in chosen]).long(), [classes[number] for number in chosen]


def figure(originals: np.ndarray, masks: Tensor, results: np.ndarray) -> Image.Image:
    """Arrange the images.

    Args:
        originals: (N, S, S, 3) uint8.
        masks: (N, h, w) bool.
        results: (M · N, S, S, 3) uint8; result r of image k is number r · N + k.
    """
    side, count = originals.shape[1], len(originals)
    cells = side // masks.shape[1]
    hidden = masks.numpy().repeat(cells, 1).repeat(cells, 2)
    masked = np.where(hidden[..., None], np.uint8(GREY), originals)
    factor = -(-MIN_SIDE // side)
    rows = [[originals[row], masked[row], *results[row::count]] for row in range(count)]
    return grid_image([[image.repeat(factor, 0).repeat(factor, 1) for image in row] for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a training run")
    parser.add_argument("out", type=Path, help="PNG file to write")
    parser.add_argument("--rows", type=int, default=6, help="number of images")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        model = LlamaGen.from_pretrained(options.run)
        assert model.gpt is not None
        root = find_run(options.run).settings["data"]["init_args"]["root"]
        codes, classes = examples_of(root, options.rows)
        grid = model.gpt.config.grid_size
        grids, shapes = codes.view(-1, grid, grid).to(model.device), masks_of(grid)
        masks = torch.stack([shapes[row % len(shapes)] for row in range(len(grids))])
        found = model.inpaint_codes(grids, masks, classes, images_per_prompt=RESULTS, seed=options.seed)
    except ValueError as error:
        parser.error(str(error))
    known = ~masks.repeat(RESULTS, 1, 1)
    assert torch.equal(found.cpu()[known], grids.cpu().repeat(RESULTS, 1, 1)[known])
    originals, results = (model.pixels(each).numpy() for each in (grids, found))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(options.out) as temporary:
        figure(originals, masks, results).save(temporary, "PNG")
    record = {
        "benchmark": "inpainting",
        "model": repr(model),
        "seed": options.seed,
        "classes": classes,
        "masked": masks.flatten(1).sum(1).tolist(),
        "known_codes_kept": True,
        "changed_codes": round(float((found.cpu() != grids.cpu().repeat(RESULTS, 1, 1))[~known].float().mean()), 3),
        "figure": str(options.out),
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
