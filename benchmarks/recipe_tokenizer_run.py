"""Train a tokenizer of benchmarks/recipes.py and measure it, in one process, because a start takes many seconds.

    python -m benchmarks.recipe_tokenizer_run FOLDER --classifier FILE --count N -- OPTIONS OF main.py fit

``metrics.json`` in FOLDER, the folder of the run, has the metrics of the averaged weights on the first N images that
were held out. rFID compares the features of reconstructions and images, at the size that the classifier was trained on.
"""

import json
import math
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.timing import timed
from lightning_modules.reconstruction_metrics import ReconstructionMetrics
from llamagen.checkpoints.weights import load_weights, read_weights
from llamagen.command import run_command
from llamagen.files import atomic_file
from llamagen.metrics import FID
from llamagen.metrics.classifier import Classifier
from llamagen.models.lpips import LPIPS, read_vgg16
from llamagen.option_checks import check_integer
from llamagen.parser_errors import OneLineParser
from llamagen.sampling.pixels import to_pixels

METRICS = "metrics.json"


@torch.no_grad()
def measure(
    module: Any, batches: Iterable[Any], limit: int, classifier: nn.Module, side: int, lpips: LPIPS | None
) -> dict[str, float]:
    """Metrics of reconstructions.

    Args:
        module: a ``VQGANModule``.
        batches: batches with ``images`` (B, 3, H, W) in [-1, 1].
        limit: images to measure; fewer if there are no more.
        classifier: extractor of the features of rFID.
        side: side in pixels at which rFID is measured.
        lpips: LPIPS; None to leave it out.

    Returns:
        ``rfid``; ``psnr`` and ``ssim`` as in docs/evaluation.md; ``usage``, the fraction of the codes that occurred;
        ``perplexity`` and ``entropy``, in bits, of the codes' frequencies; ``codes``, their number; ``count``, the
        number of images; ``lpips`` if it is given.
    """
    size = module.vqgan.quantize.size
    module.eval()
    fid, metrics, distances, count = FID(classifier, side), ReconstructionMetrics(size), 0.0, 0
    fid.to(module.device), metrics.to(module.device), classifier.to(module.device)
    for batch in batches:
        images = batch["images"][: limit - count].to(module.device)
        output = module(images)
        reconstruction = output.reconstruction.float()
        metrics.update(images, reconstruction, output.encoding.codes)
        for real, each in ((True, images), (False, reconstruction)):
            fid.update(to_pixels(each, side, side).permute(0, 3, 1, 2), real=real)
        if lpips is not None:
            distances += lpips.to(module.device)(reconstruction, images).sum().item()
        count += len(images)
        if count == limit:
            break
    values, usage = metrics.finish()
    perplexity = usage.perplexity.item()
    found = {"rfid": fid.compute().item(), **{name: value.item() for name, value in values.items()}}
    found |= {"usage": usage.usage.item(), "perplexity": perplexity, "entropy": math.log2(perplexity)}
    return found | {"codes": size, "count": count} | ({} if lpips is None else {"lpips": distances / count})


def run(folder: Path, classifier: Path, count: int, weights: Path | None, options: list[str]) -> None:
    """Train, or resume, and measure. Writes ``metrics.json``, with the seconds of the parts."""
    import main  # here: `--help` does not need Lightning

    extractor = Classifier(classifier)
    lpips = None if weights is None else LPIPS(read_vgg16(weights)).eval()
    started = time.perf_counter()
    cli = main.main(["fit", *options, f"--trainer.default_root_dir={folder}"])
    fitted = time.perf_counter() - started
    averaged = read_weights(folder / "checkpoints/last.ckpt", averaged=True)
    load_weights(cli.model.vqgan, averaged.state, averaged.source)
    cli.datamodule.setup("validate")
    found: dict[str, Any] = {}
    batches, side = cli.datamodule.val_dataloader(), extractor.image_size
    with cli.trainer.precision_plugin.forward_context():
        measured = timed(lambda: found.update(measure(cli.model, batches, count, extractor, side, lpips)))
    found["parameters"] = sum(each.numel() for each in cli.model.vqgan.parameters())
    found["seconds"] = {"fit": round(fitted, 2), "measure": round(measured, 2)}
    with atomic_file(folder / METRICS) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(found, flush=True)


def command() -> None:
    """Parse the options, and run."""
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    parser = OneLineParser("python -m benchmarks.recipe_tokenizer_run", "Train and measure a tokenizer.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--classifier", type=Path, required=True, help="file of `python -m evaluation classifier`")
    parser.add_argument("--count", type=int, required=True, help="images to measure on")
    parser.add_argument("--lpips", type=Path, help="weights of LPIPS; without them it is not measured")
    given = parser.parse_args(words[:end])
    check_integer("count", given.count, 2)
    run(given.folder, given.classifier, given.count, given.lpips, words[end + 1 :])


if __name__ == "__main__":
    run_command(command)
