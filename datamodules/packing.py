"""Turn images into webdataset shards: ``python -m datamodules.packing SOURCE OUT``.

SOURCE is what a DataModule takes as root: a folder of class folders, one with ``train`` and ``val``, or shards, to pack
them anew. OUT gets ``train``, ``val`` and at last ``meta.json``. The same command goes on where it was stopped.
"""

import hashlib
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from datamodules.storage.bad_examples import BadExampleError, Skipped
from datamodules.storage.class_order import CLASS_ORDERS, ClassOrder
from datamodules.storage.index import IMAGES, WHOLE, Example, ExampleIndex
from datamodules.storage.index_store import START_METHOD
from datamodules.storage.remote import is_remote
from datamodules.storage.shards import IMAGES_FORMAT, META_FILE, ShardSet
from datamodules.storage.sources import SPLITS
from llamagen.command import run_command
from llamagen.option_checks import check_integer, check_positive
from llamagen.output_paths import check_output
from llamagen.parser_errors import OneLineParser

SKIPPED_FILE = "skipped.tsv"
PARTS = (*IMAGES, "txt", "json")


def pack(
    source: str,
    out: Path | str,
    shard_mb: float = 500.0,
    val_share: float = 0.05,
    seed: int = 0,
    workers: int | None = None,
    max_bad_share: float = 0.05,
    class_order: ClassOrder = "auto",
) -> None:
    """Write a set of shards, and say so in one line.

    Files are copied as they are; what is in them is seen to when they are read. Texts that hold none are left out.

    Args:
        source: a data set as a DataModule takes it.
        out: folder of the new set.
        shard_mb: megabytes (10⁶ bytes) that a shard may have, unless a single example has more.
        val_share: share that is kept for validation where ``source`` has nothing for it.
        seed: of the order of the examples.
        workers: processes; None for as many as there are cores.
        max_bad_share: share of files that may be empty or unreadable.
        class_order: how class folders are numbered, as in a DataModule.

    Raises:
        ValueError: in one line, if there is nothing to pack, too much is bad, or ``out`` holds something else.
    """
    check_positive("shard_mb", shard_mb)
    if workers is not None:
        check_integer("workers", workers, 1)
    check_integer("seed", seed, 0)
    if not source:
        raise ValueError("source is empty; give a folder of class folders, or one with webdataset shards")
    out = Path(out)
    check_output(out, "out")
    if out.exists() and not out.is_dir():
        raise ValueError(f"out {out} is a file; give the name of a folder, which is made")
    if others := _foreign(out):
        raise ValueError(f"out {out} holds other things already ({', '.join(others[:3])}); choose another folder")
    if not is_remote(source) and out.resolve().is_relative_to(Path(source).resolve()):
        raise ValueError(f"{out} lies within {source} and would become a part of it; choose another folder")
    from datamodules.images import ImageDataModule  # not for worker processes, which import this file, too

    data = ImageDataModule(source, val_share=val_share, max_bad_share=max_bad_share, class_order=class_order)
    data.setup("predict")
    for line in data.numbering:
        print(line)
    indexes = {split: data.datasets[split].examples for split in SPLITS}  # type: ignore[attr-defined]
    sizes = {split: _sizes_in_tar(index) for split, index in indexes.items()}
    plan = {
        "format": IMAGES_FORMAT,
        "samples": {split: data.fingerprint(split) for split in SPLITS},
        "sizes": {split: hashlib.sha256(sizes[split].tobytes()).hexdigest() for split in SPLITS},
        "classes": data.class_names,
        "shard_mb": shard_mb,
        "seed": seed,
    }
    shards = ShardSet(out, plan, hint="delete it or choose another folder")
    shards.check()
    pieces = {split: list(_pieces(sizes[split], shard_mb * 1e6, seed)) for split in SPLITS}
    shards.begin(SPLITS)
    left = [
        (split, number)
        for split in SPLITS
        for number in range(len(pieces[split]))
        if not shards.is_written(split, number)
    ]
    with ProcessPoolExecutor(min(workers or os.cpu_count() or 1, max(len(left), 1)), get_context(START_METHOD)) as pool:
        jobs = [pool.submit(_write, shards, *job, indexes[job[0]].select(pieces[job[0]][job[1]])) for job in left]
        try:
            for job in tqdm(as_completed(jobs), "packing", len(jobs), unit="shard"):
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    meta = {"format": IMAGES_FORMAT, "classes": data.class_names, "num_classes": len(data.class_names)}
    known = {split: data.tallies[split].known for split in SPLITS}
    shards.finish({split: len(pieces[split]) for split in SPLITS}, meta, known, max_bad_share)
    counts = ", ".join(f"{len(indexes[split]):,} for {split} in {len(pieces[split])} shards" for split in SPLITS)
    print(f"{out}: {counts}")


def _foreign(out: Path) -> list[str]:
    """What a folder holds that packing does not write; hidden files are nobody's."""
    here = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    return [name for name in here if name not in (*SPLITS, META_FILE, SKIPPED_FILE) and not name.startswith(".")]


def _pieces(sizes: np.ndarray, max_bytes: float, seed: int) -> Iterator[np.ndarray]:
    """The examples of each shard: shuffled, and cut where the next one would make the file too large."""
    order = np.random.default_rng(seed).permutation(len(sizes))
    first, total = 0, 0
    for place, number in enumerate(order):
        if place > first and total + sizes[number] > max_bytes - tarfile.RECORDSIZE:
            yield order[first:place]
            first, total = place, 0
        total += sizes[number]
    if len(order):
        yield order[first:]


def _sizes_in_tar(index: ExampleIndex) -> np.ndarray:
    """Bytes that each example takes in a tar file, (N,) int64."""
    lengths = np.diff(index.keys.ends, prepend=0)
    is_foreign = np.bitwise_or.reduceat(np.frombuffer(index.keys.block, np.uint8), index.keys.ends - lengths) > 127
    # A name that is long or not ASCII has a header and blocks of its own.
    header_blocks = 1 + np.where(is_foreign | (lengths > 90), 2 + (lengths + 50) // tarfile.BLOCKSIZE, 0)
    blocks = np.where(index.labels >= 0, header_blocks + 1, 0)
    for extension in PARTS:
        if extension in index.members:
            offset, size = index.members[extension].T
            sizes = _sizes(index, extension, size)
            blocks += np.where(offset >= 0, header_blocks - (-sizes // tarfile.BLOCKSIZE), 0)
    return blocks * tarfile.BLOCKSIZE


def _sizes(index: ExampleIndex, extension: str, sizes: np.ndarray) -> np.ndarray:
    """Of members, with those of whole files looked up."""
    looked_up = sizes.copy()
    for number in np.flatnonzero(sizes == WHOLE).tolist():
        member = index.member(number, extension)
        try:
            looked_up[number] = 0 if member is None else os.stat(member.path).st_size
        except OSError:  # it is skipped when it is read
            looked_up[number] = 0
    return looked_up


def _write(shards: ShardSet, split: str, number: int, examples: ExampleIndex) -> None:
    with shards.shard(split, number) as writer:
        for example in examples:
            try:
                writer.write(example.key, _parts(example), example.label)
            except BadExampleError as error:
                writer.skipped.append(Skipped(-1, example.key, error.reason, str(error)))


def _parts(example: Example) -> dict[str, bytes]:
    return {
        extension: example.read(extension)
        for extension in PARTS
        if extension in example.members and (extension in IMAGES or example.read_text(extension))
    }


def main(args: list[str] | None = None) -> None:
    """The command.

    Args:
        args: instead of the command line's.
    """
    parser = OneLineParser("python -m datamodules.packing", "Turn images into webdataset shards.")
    parser.add_argument("source", help="folder of class folders, one with train and val, or shards")
    parser.add_argument("out", type=Path, help="folder of the new set")
    parser.add_argument("--shard_mb", type=float, default=500.0, help="megabytes a shard (default: 500)")
    parser.add_argument(
        "--val_share", type=float, default=0.05, help="share kept for validation where SOURCE has none (default: 0.05)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of the examples (default: 0)")
    parser.add_argument("--workers", type=int, help="processes (default: one a core)")
    parser.add_argument(
        "--max_bad_share", type=float, default=0.05, help="share of files that may be unreadable (default: 0.05)"
    )
    parser.add_argument(
        "--class_order",
        choices=CLASS_ORDERS,
        default="auto",
        help="number class folders by their names as whole numbers, or in the order of the names (default: auto: by "
        "number where all names are whole numbers)",
    )
    options = parser.parse_args(args)
    try:
        pack(**vars(options))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    run_command(main)
