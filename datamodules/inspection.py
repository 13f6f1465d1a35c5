"""Describe a dataset: ``python -m datamodules.inspection ROOT [--sheet sheet.png]``.

Reads every example as training would. Prints counts, classes, sizes, file formats, and bad examples by reason. Writes a
contact sheet of random images. ROOT is anything that a DataModule accepts: images, codes or caption features. For
caption features, only the sizes are checked.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from datamodules.loading.order import NO_EPOCH
from datamodules.storage.bad_examples import BadExampleError, Skipped
from datamodules.storage.class_order import ClassOrder, add_class_order
from datamodules.storage.code_dtype import code_dtype
from datamodules.storage.features import StoredFeatures
from datamodules.storage.index import FEATURES, IMAGES, SHORT_FEATURES, ExampleIndex
from datamodules.storage.remote import ShardCache, is_remote
from datamodules.storage.shards import CAPTIONS_FORMAT, CODES_FORMAT, shard_entries
from datamodules.storage.sources import SPLITS, Source, find_sources
from datamodules.transforms.decode import open_image, read_image
from llamagen.centre_crop import centre_crop
from llamagen.command import run_command
from llamagen.files import atomic_file, sha256_of
from llamagen.option_checks import check_integer
from llamagen.output_paths import check_output_file
from llamagen.parser_errors import OneLineParser

TILE = 112
COLUMNS = 10
ROWS = 6
MAX_LISTED = 5
HINT = "give the folder or address of a dataset"


class ImageFacts(Dataset[Any]):
    """Width, height, format and colour mode of each image, or the reason why it is bad.

    Args:
        examples: examples of a split.
        decode: also decode the pixels. This is slower but finds all broken images.
    """

    def __init__(self, examples: ExampleIndex, decode: bool) -> None:
        self.examples, self.decode = examples, decode

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, number: int) -> Any:
        """``(width, height, format, mode)``, or a :class:`~datamodules.storage.bad_examples.Skipped`."""
        example = self.examples[number]
        where = f"example {example.key} of {example.source}"
        try:
            data = example.read_image()
            image = open_image(data, where)
            if self.decode:
                read_image(data, where)
        except BadExampleError as error:
            return Skipped(number, example.key, error.reason, str(error))
        return image.width, image.height, str(image.format), image.mode


def inspect(
    root: str,
    sheet: Path | None = None,
    decode: bool = True,
    num_workers: int = 2,
    seed: int = 0,
    class_order: ClassOrder = "auto",
) -> list[str]:
    """Describe a dataset.

    Args:
        root: images, codes or caption features, as a DataModule accepts them.
        sheet: PNG file for a contact sheet of images; None writes none.
        decode: decode every image, not only its header.
        num_workers: worker processes that read images; 0 reads in the main process.
        seed: seed of the choice of images for the sheet.
        class_order: how class folders are numbered, see :class:`~datamodules.base.ShardDataModule`.

    Returns:
        Lines of text.

    Raises:
        ValueError: if there are no data, a shard is missing, an option is invalid, or the sheet cannot be written.
    """
    if not root:
        raise ValueError(f"root is empty; {HINT}")
    if sheet is not None:
        check_output_file(sheet, (".png", ""), "sheet")
    check_integer("num_workers", num_workers, 0)
    check_integer("seed", seed, 0)
    train, val, meta = find_sources(root, None, None, HINT, class_order=class_order)
    for source in (train, val):
        if sheet is not None and source is not None and source.folder is not None:
            _check_sheet(sheet, source.folder)
    cache = ShardCache()
    if (kind := meta.get("format")) in (CODES_FORMAT, CAPTIONS_FORMAT):
        if sheet is not None:
            content = "codes" if kind == CODES_FORMAT else "caption features"
            raise ValueError(f"{root} holds {content} and no images for a contact sheet; leave --sheet out")
        return _inspect_codes(root) if kind == CODES_FORMAT else _inspect_features(root, meta, (train, val), cache)
    lines = [f"{root}: images"]
    shown: list[ExampleIndex] = []
    # Without a validation split all examples are described together, not split as in a DataModule.
    for name, source in (("train" if val is not None else "all", train), ("val", val)):
        if source is None:
            continue
        examples = source.index(cache).usable(IMAGES)
        shown.append(examples)
        # Printed lines say samples, the word of webdataset and img2dataset, whose users compare these counts.
        lines += ["", f"{name}: {len(examples):,} samples, {_in_files(len(source.shards))}"]
        lines += _describe_classes(examples.labels, source.classes)
        lines += [f"  {source.numbering}"] if source.numbering else []
        facts, bad = _read_images(ImageFacts(examples, decode), num_workers, name)
        lines += _describe_images(facts) + _describe_bad([*examples.bad, *bad])
        if "txt" in examples.members:
            lines.append(f"  captions: {(examples.members['txt'][:, 0] >= 0).sum():,}")
        if decode:
            lines += _check_checksums(source)
    if sheet is not None:
        classes = train.classes if train is not None else []
        _write_sheet(shown[0], classes, sheet, seed)
        lines += ["", f"contact sheet: {sheet}"]
    return lines


def _check_sheet(sheet: Path, folder: Path) -> None:
    """Refuse a sheet inside a class folder, where it would become one of the images."""
    parent, root = sheet.resolve().parent, folder.resolve()
    if parent != root and parent.is_relative_to(root):
        raise ValueError(f"--sheet is {sheet}, which is inside the image folder {folder}; write it elsewhere")


def _check_checksums(source: Source) -> list[str]:
    """Compare the checksums of local shards with ``meta.json``. Those of remote shards were compared after download."""
    entries = {path: entry for path, entry in source.entries.items() if not is_remote(path)}
    if not entries:
        return []
    wrong = []
    for path, entry in tqdm(entries.items(), "checksums", unit="shard", leave=False):
        if sha256_of(path) != entry.sha256:
            wrong.append(f"    {path} has changed since it was written")
    correct = len(entries) - len(wrong)
    return [f"  checksums: {correct} of {len(entries)} correct", *wrong]


def _inspect_codes(root: str) -> list[str]:
    from datamodules.codes import CodeDataModule  # here: worker processes import this file, too, and need no Lightning

    data = CodeDataModule(root, max_bad_share=1.0)
    data.setup("fit")
    meta = data.code_meta
    height, width = meta["grid"]
    vocabulary = f"{meta['vocabulary']} ({code_dtype(meta['vocabulary'])})"
    lines = [
        f"{root}: codes, {height} × {width} per image, vocabulary {vocabulary}, {meta['views']} views, "
        f"tokenizer {meta['tokenizer'][:12]}"
    ]
    features = StoredFeatures(meta[FEATURES], root) if FEATURES in meta else None
    lines += [] if features is None else [f"caption features: {_describe_encoder(features, meta)}"]
    for split in SPLITS:
        dataset: Any = data.datasets[split]
        examples: ExampleIndex = dataset.examples
        used = np.zeros(meta["vocabulary"], bool)
        bad = []
        for first in tqdm(range(0, len(examples), 1000), split, leave=False):
            addresses = [(number, NO_EPOCH) for number in range(first, min(first + 1000, len(examples)))]
            good, _, skipped = dataset.read_many(addresses)
            bad += skipped
            for example in good:
                used[example["codes"]] = True
        lines += ["", f"{split}: {len(examples):,} samples, {_in_files(len(shard_entries(meta, split, root)))}"]
        lines += _describe_classes(examples.labels, data.class_names)
        lines.append(f"  codes in use (first view): {used.mean():.1%}")
        lines += [] if features is None else _check_features(examples, features)[0]
        lines += _describe_bad([*examples.bad, *bad])
    return lines


def _inspect_features(
    root: str, meta: dict[str, Any], sources: Sequence[Source | None], cache: ShardCache
) -> list[str]:
    """Describe a dataset of caption features without codes, from the headers of its shards."""
    features = StoredFeatures(meta.get(FEATURES, {}), root)
    lines = [f"{root}: caption features, {_describe_encoder(features, meta)}"]
    for split, source in zip(SPLITS, sources, strict=True):
        if source is not None:
            examples = source.index(cache)
            lines += ["", f"{split}: {len(examples):,} samples, {_in_files(len(source.shards))}"]
            description, bad = _check_features(examples, features)
            classes = _describe_classes(examples.labels, source.classes)
            lines += [*classes, *description, *_describe_bad([*examples.bad, *bad])]
    return lines


def _describe_encoder(features: StoredFeatures, meta: dict[str, Any]) -> str:
    short = ", also of first sentences" if features.short else ""
    encoder = meta[FEATURES].get("encoder")
    return f"up to {features.caption_length} tokens of width {features.width}, encoder {encoder}{short}"


def _check_features(examples: ExampleIndex, features: StoredFeatures) -> tuple[list[str], list[Skipped]]:
    """Count the examples with features and their tokens, and find missing features and sizes that are not whole
    tokens.
    """
    nothing = np.full((len(examples), 2), -1, np.int64)
    offsets, sizes = examples.members.get(FEATURES, nothing).T
    tokens = features.count_tokens(sizes[offsets >= 0])
    good = tokens[tokens > 0]
    length = f"{good.mean():.1f} tokens on average, {good.max()} at most" if len(good) else "none complete"
    wrong = np.zeros(len(examples), bool)
    for part in (FEATURES, SHORT_FEATURES):
        offsets, sizes = examples.members.get(part, nothing).T
        wrong |= (offsets >= 0) & (features.count_tokens(sizes) == 0)
    missing = examples.members.get(FEATURES, nothing)[:, 0] < 0
    bad = [
        Skipped(number, examples.keys[number], reason, f"example {examples.keys[number]} {story}")
        for which, reason, story in (
            (missing, "no caption", "has no features"),
            (wrong, "broken features", "has features whose size is not a whole number of tokens"),
        )
        for number in np.flatnonzero(which).tolist()
    ]
    return [f"  features: {len(tokens):,} samples, {length}"], bad


def _in_files(shards: int) -> str:
    return f"in {shards} shards" if shards else "in folders"


def _describe_classes(labels: np.ndarray, names: list[str]) -> list[str]:
    labels = labels[labels >= 0]
    if not len(labels):
        return ["  classes: none"]
    counts = np.bincount(labels)
    present = np.flatnonzero(counts)
    line = f"  classes: {len(present):,}" + (f" of {len(names):,}" if names else f", numbers up to {labels.max()}")
    fewest, most = int(present[counts[present].argmin()]), int(counts.argmax())

    def name(label: int) -> str:
        return names[label] if label < len(names) else str(label)

    return [
        f"{line}; samples per class: {counts[fewest]} ({name(fewest)}) to {counts[most]} ({name(most)}), "
        f"median {int(np.median(counts[present]))}"
    ]


def _read_images(facts: ImageFacts, num_workers: int, split: str) -> tuple[list[Any], list[Skipped]]:
    good, bad = [], []
    loader = DataLoader(facts, batch_size=64, num_workers=num_workers, collate_fn=list)
    with tqdm(total=len(facts), desc=split, unit="image", leave=False) as bar:
        for batch in loader:
            for fact in batch:
                if isinstance(fact, Skipped):
                    bad.append(fact)
                else:
                    good.append(fact)
            bar.update(len(batch))
    return good, bad


def _describe_images(facts: list[Any]) -> list[str]:
    if not facts:
        return []
    widths, heights, formats, modes = zip(*facts, strict=True)
    short = np.minimum(widths, heights)
    low, middle, high = np.percentile(short, [5, 50, 95])
    return [
        f"  short side: {short.min()} to {short.max()} px, median {middle:.0f}, 90 % from {low:.0f} to {high:.0f}",
        f"  width: {min(widths)} to {max(widths)} px, height: {min(heights)} to {max(heights)} px",
        f"  formats: {_listed(Counter(formats))}; colour modes: {_listed(Counter(modes))}",
    ]


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.most_common())


def _describe_bad(bad: list[Skipped]) -> list[str]:
    if not bad:
        return ["  bad samples: none"]
    lines = [f"  bad samples: {len(bad):,} ({_listed(Counter(example.reason for example in bad))})"]
    return lines + [f"    {example.message}" for example in bad[:MAX_LISTED]]


def _write_sheet(examples: ExampleIndex, names: list[str], path: Path, seed: int) -> None:
    """Write a grid of random images, sorted by class, each with its class below it."""
    order = np.random.default_rng(seed).permutation(len(examples))
    tiles: list[tuple[int, Image.Image]] = []
    for number in order:
        if len(tiles) == COLUMNS * ROWS:
            break
        example = examples[int(number)]
        try:
            pixels = read_image(example.read_image(), example.key)
            tiles.append((example.label, Image.fromarray(centre_crop(pixels, TILE))))
        except BadExampleError:
            continue
    rows = -(-len(tiles) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (TILE + 4) + 4, rows * (TILE + 18) + 4), "white")
    pen = ImageDraw.Draw(sheet)
    for position, (label, image) in enumerate(sorted(tiles, key=lambda tile: tile[0])):
        left, top = 4 + position % COLUMNS * (TILE + 4), 4 + position // COLUMNS * (TILE + 18)
        sheet.paste(image, (left, top))
        name = names[label] if 0 <= label < len(names) else str(label) if label >= 0 else ""
        pen.text((left, top + TILE + 1), name[:18], fill="black")
    with atomic_file(path) as temporary:
        sheet.save(temporary, format="png")


def main(args: list[str] | None = None) -> None:
    """Run the command.

    Args:
        args: command-line arguments; None for those of the process.
    """
    parser = OneLineParser("python -m datamodules.inspection", "Describe a dataset.")
    parser.add_argument("root", help="folder or address of images, codes or caption features")
    parser.add_argument("--sheet", type=Path, help="PNG file for a contact sheet of images")
    parser.add_argument(
        "--headers_only", action="store_true", help="do not decode the images: faster, but finds fewer errors"
    )
    parser.add_argument("--num_workers", type=int, default=2, help="processes that read images (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of images for the sheet (default: 0)")
    add_class_order(parser)
    options = parser.parse_args(args)
    numbers = options.num_workers, options.seed
    try:
        lines = inspect(options.root, options.sheet, not options.headers_only, *numbers, options.class_order)
    except ValueError as error:
        parser.error(str(error))
    print("\n".join(lines))


if __name__ == "__main__":
    run_command(main)
