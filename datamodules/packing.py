"""Pack images into webdataset shards: ``python -m datamodules.packing SOURCE OUT``.

SOURCE is anything that a DataModule accepts as root: a folder of class folders, a folder with ``train`` and ``val``, or
shards to pack again. ``train``, ``val`` and finally ``meta.json`` are written to OUT. To resume a stopped run, repeat
the command.
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
from datamodules.storage.class_order import ClassOrder, add_class_order
from datamodules.storage.index import IMAGES, WHOLE_FILE, Example, ExampleIndex
from datamodules.storage.index_store import START_METHOD
from datamodules.storage.remote import is_remote
from datamodules.storage.shards import IMAGES_FORMAT, META_FILE, ShardDataset
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
    """Write a dataset of shards and print a summary in one line.

    Files are copied without decoding them; they are checked when they are read. Empty texts are left out.

    Args:
        source: a dataset that a DataModule accepts as root.
        out: folder of the new dataset.
        shard_mb: maximum size of a shard in megabytes (10⁶ bytes); a single larger example gets its own shard.
        val_share: share of the examples held out for validation if ``source`` has no validation split.
        seed: seed of the order of the examples.
        workers: processes; None for one per core.
        max_bad_share: maximum share of empty or unreadable files.
        class_order: how class folders are numbered, see :class:`~datamodules.base.ShardDataModule`.

    Raises:
        ValueError: if there is nothing to pack, too many files are bad, or ``out`` holds something else.
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
        raise ValueError(f"out {out} is a file; give the name of a folder")
    if others := _foreign_files(out):
        raise ValueError(f"out {out} already holds other files ({', '.join(others[:3])}); choose another folder")
    if not is_remote(source) and out.resolve().is_relative_to(Path(source).resolve()):
        raise ValueError(f"out {out} is inside {source} and would become part of it; choose another folder")
    from datamodules.images import (
        ImageDataModule,
    )  # here: worker processes import this file, too, and need no Lightning

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
    shards = ShardDataset(out, plan, hint="delete it or choose another folder")
    shards.check()
    pieces = {split: list(_pieces(sizes[split], shard_mb * 1e6, seed)) for split in SPLITS}
    shards.begin(SPLITS)
    unfinished = [
        (split, number)
        for split in SPLITS
        for number in range(len(pieces[split]))
        if not shards.is_written(split, number)
    ]
    with ProcessPoolExecutor(
        min(workers or os.cpu_count() or 1, max(len(unfinished), 1)), get_context(START_METHOD)
    ) as pool:
        jobs = [pool.submit(_write, shards, *job, indexes[job[0]].select(pieces[job[0]][job[1]])) for job in unfinished]
        try:
            for job in tqdm(as_completed(jobs), "packing", len(jobs), unit="shard"):
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    meta = {"format": IMAGES_FORMAT, "classes": data.class_names, "num_classes": len(data.class_names)}
    rejected = {split: data.tallies[split].rejected for split in SPLITS}
    shards.finish({split: len(pieces[split]) for split in SPLITS}, meta, rejected, max_bad_share)
    counts = ", ".join(f"{len(indexes[split]):,} for {split} in {len(pieces[split])} shards" for split in SPLITS)
    print(f"{out}: {counts}")


def _foreign_files(out: Path) -> list[str]:
    """Names in a folder that packing does not write. Hidden files are ignored."""
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    return [name for name in names if name not in (*SPLITS, META_FILE, SKIPPED_FILE) and not name.startswith(".")]


def _pieces(sizes: np.ndarray, max_bytes: float, seed: int) -> Iterator[np.ndarray]:
    """Numbers of the examples of each shard: shuffled, then split where the next example would exceed the size."""
    order = np.random.default_rng(seed).permutation(len(sizes))
    first, total = 0, 0
    for position, number in enumerate(order):
        if position > first and total + sizes[number] > max_bytes - tarfile.RECORDSIZE:
            yield order[first:position]
            first, total = position, 0
        total += sizes[number]
    if len(order):
        yield order[first:]


def _sizes_in_tar(index: ExampleIndex) -> np.ndarray:
    """Bytes of each example in a tar file, (N,) int64."""
    lengths = np.diff(index.keys.ends, prepend=0)
    not_ascii = np.bitwise_or.reduceat(np.frombuffer(index.keys.block, np.uint8), index.keys.ends - lengths) > 127
    # tar stores a long or non-ASCII name in an extra header with blocks of its own.
    header_blocks = 1 + np.where(not_ascii | (lengths > 90), 2 + (lengths + 50) // tarfile.BLOCKSIZE, 0)
    blocks = np.where(index.labels >= 0, header_blocks + 1, 0)
    for extension in PARTS:
        if extension in index.members:
            offset, size = index.members[extension].T
            sizes = _file_sizes(index, extension, size)
            blocks += np.where(offset >= 0, header_blocks - (-sizes // tarfile.BLOCKSIZE), 0)
    return blocks * tarfile.BLOCKSIZE


def _file_sizes(index: ExampleIndex, extension: str, sizes: np.ndarray) -> np.ndarray:
    """Sizes of members in bytes, with whole files looked up on disk."""
    looked_up = sizes.copy()
    for number in np.flatnonzero(sizes == WHOLE_FILE).tolist():
        member = index.member(number, extension)
        try:
            looked_up[number] = 0 if member is None else os.stat(member.path).st_size
        except OSError:  # the example is skipped when it is read
            looked_up[number] = 0
    return looked_up


def _write(shards: ShardDataset, split: str, number: int, examples: ExampleIndex) -> None:
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
    """Run the command.

    Args:
        args: command-line arguments; None for those of the process.
    """
    parser = OneLineParser("python -m datamodules.packing", "Pack images into webdataset shards.")
    parser.add_argument("source", help="folder of class folders, folder with train and val, or shards")
    parser.add_argument("out", type=Path, help="folder of the new dataset")
    parser.add_argument("--shard_mb", type=float, default=500.0, help="maximum megabytes per shard (default: 500)")
    parser.add_argument(
        "--val_share",
        type=float,
        default=0.05,
        help="share held out for validation if SOURCE has no validation split (default: 0.05)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the order of the examples (default: 0)")
    parser.add_argument("--workers", type=int, help="processes (default: one per core)")
    parser.add_argument(
        "--max_bad_share", type=float, default=0.05, help="maximum share of unreadable files (default: 0.05)"
    )
    add_class_order(parser)
    options = parser.parse_args(args)
    try:
        pack(**vars(options))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    run_command(main)
