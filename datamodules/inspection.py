"""What a data set holds: ``python -m datamodules.inspection ROOT [--sheet sheet.png]``.

Reads every example as training would, and prints counts, classes, sizes, kinds of files and what could not be used, by
reason; writes a contact sheet of images drawn at random. ROOT is what a DataModule takes: images, codes, or
features of captions, of which only the sizes are looked at.
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
from datamodules.storage.class_order import CLASS_ORDERS, ClassOrder
from datamodules.storage.features import StoredFeatures
from datamodules.storage.index import FEATURES, IMAGES, SHORT_FEATURES, ExampleIndex
from datamodules.storage.remote import ShardCache, is_remote
from datamodules.storage.shards import CAPTIONS_FORMAT, CODES_FORMAT, shard_notes
from datamodules.storage.sources import SPLITS, Source, find_sources
from datamodules.transforms.crops import centre_crop
from datamodules.transforms.decode import open_image, read_image
from llamagen.command import run_command
from llamagen.files import atomic_file, sha256_of
from llamagen.option_checks import check_integer
from llamagen.output_paths import check_output_file
from llamagen.parser_errors import OneLineParser

TILE = 112
COLUMNS = 10
ROWS = 6
MAX_LISTED = 5
HINT = "give the folder or address of a data set"


class Facts(Dataset[Any]):
    """Of each image: width, height, kind, colour mode, and whether it can be used.

    Args:
        examples: of a split.
        decode: decode the pixels, too: slower, but finds all that is broken.
    """

    def __init__(self, examples: ExampleIndex, decode: bool) -> None:
        self.examples, self.decode = examples, decode

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, number: int) -> Any:
        """``(width, height, kind, mode)``, or what is wrong with it."""
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
    """Describe a data set.

    Args:
        root: of images, codes or features of captions, as a DataModule takes it.
        sheet: PNG file for a contact sheet of images; None writes none.
        decode: decode every image, not only its header.
        num_workers: processes that read images; 0 for none.
        seed: of the choice of images for the sheet.
        class_order: how class folders are numbered, as in a DataModule.

    Returns:
        Lines of text.

    Raises:
        ValueError: if there is nothing, a shard is missing, a number makes no sense, or the sheet cannot be written.
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
            held = "codes" if kind == CODES_FORMAT else "features of captions"
            raise ValueError(f"{root} holds {held}, of which there is no contact sheet; leave --sheet out")
        return _inspect_codes(root) if kind == CODES_FORMAT else _inspect_features(root, meta, (train, val), cache)
    lines = [f"{root}: images"]
    shown: list[ExampleIndex] = []
    # What has no validation split is shown as it is, and not as a DataModule would divide it.
    for name, source in (("train" if val is not None else "all", train), ("val", val)):
        if source is None:
            continue
        examples = source.index(cache).usable(IMAGES)
        shown.append(examples)
        lines += ["", f"{name}: {len(examples):,} examples, {_in_files(len(source.shards))}"]
        lines += _classes(examples.labels, source.classes)
        lines += [f"  {source.numbering}"] if source.numbering else []
        facts, bad = _read(Facts(examples, decode), num_workers, name)
        lines += _images(facts) + _bad([*examples.bad, *bad])
        if "txt" in examples.members:
            lines.append(f"  captions: {(examples.members['txt'][:, 0] >= 0).sum():,}")
        if decode:
            lines += _checksums(source)
    if sheet is not None:
        classes = train.classes if train is not None else []
        _write_sheet(shown[0], classes, sheet, seed)
        lines += ["", f"contact sheet: {sheet}"]
    return lines


def _check_sheet(sheet: Path, folder: Path) -> None:
    """A contact sheet in a class folder would be one of its images from then on."""
    place, root = sheet.resolve().parent, folder.resolve()
    if place != root and place.is_relative_to(root):
        raise ValueError(f"--sheet is {sheet}, which lies in the images' folder {folder}; write it elsewhere")


def _checksums(source: Source) -> list[str]:
    """Of local shards that are described; remote ones were compared when they were fetched."""
    described = {path: note for path, note in source.described.items() if not is_remote(path)}
    if not described:
        return []
    wrong = []
    for path, note in tqdm(described.items(), "checksums", unit="shard", leave=False):
        if sha256_of(path) != note.sha256:
            wrong.append(f"    {path} is not what was written")
    right = len(described) - len(wrong)
    return [f"  checksums: {right} of {len(described)} right", *wrong]


def _inspect_codes(root: str) -> list[str]:
    from datamodules.codes import CodeDataModule  # not for worker processes, which import this file, too

    data = CodeDataModule(root, max_bad_share=1.0)
    data.setup("fit")
    meta = data.code_meta
    height, width = meta["grid"]
    lines = [
        f"{root}: codes, {height} × {width} an image out of {meta['vocabulary']}, {meta['views']} views, tokenizer "
        f"{meta['tokenizer'][:12]}"
    ]
    features = StoredFeatures(meta[FEATURES], root) if FEATURES in meta else None
    lines += [] if features is None else [f"features of captions: {_kind(features, meta)}"]
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
        lines += ["", f"{split}: {len(examples):,} examples, {_in_files(len(shard_notes(meta, split, root)))}"]
        lines += _classes(examples.labels, data.class_names)
        lines.append(f"  codes in use (first view): {used.mean():.1%}")
        lines += [] if features is None else _features(examples, features)[0]
        lines += _bad([*examples.bad, *bad])
    return lines


def _inspect_features(
    root: str, meta: dict[str, Any], sources: Sequence[Source | None], cache: ShardCache
) -> list[str]:
    """Of a set of captions without codes, from the headers of its shards."""
    features = StoredFeatures(meta.get(FEATURES, {}), root)
    lines = [f"{root}: features of captions, {_kind(features, meta)}"]
    for split, source in zip(SPLITS, sources, strict=True):
        if source is not None:
            examples = source.index(cache)
            lines += ["", f"{split}: {len(examples):,} examples, {_in_files(len(source.shards))}"]
            said, bad = _features(examples, features)
            lines += [*_classes(examples.labels, source.classes), *said, *_bad([*examples.bad, *bad])]
    return lines


def _kind(features: StoredFeatures, meta: dict[str, Any]) -> str:
    short = ", also of first sentences" if features.short else ""
    encoder = meta[FEATURES].get("encoder")
    return f"up to {features.caption_length} tokens of width {features.width}, encoder {encoder}{short}"


def _features(examples: ExampleIndex, features: StoredFeatures) -> tuple[list[str], list[Skipped]]:
    """How many examples have features, and of how many tokens; and whose are not there or no whole tokens."""
    nothing = np.full((len(examples), 2), -1, np.int64)
    offsets, sizes = examples.members.get(FEATURES, nothing).T
    tokens = features.tokens_in(sizes[offsets >= 0])
    good = tokens[tokens > 0]
    length = f"{good.mean():.1f} tokens on average, {good.max()} at most" if len(good) else "none whole"
    wrong = np.zeros(len(examples), bool)
    for part in (FEATURES, SHORT_FEATURES):
        offsets, sizes = examples.members.get(part, nothing).T
        wrong |= (offsets >= 0) & (features.tokens_in(sizes) == 0)
    missing = examples.members.get(FEATURES, nothing)[:, 0] < 0
    bad = [
        Skipped(number, examples.keys[number], reason, f"example {examples.keys[number]} {story}")
        for which, reason, story in (
            (missing, "no caption", "has no features"),
            (wrong, "broken features", "has features of another size than whole tokens have"),
        )
        for number in np.flatnonzero(which).tolist()
    ]
    return [f"  features: of {len(tokens):,} examples, {length}"], bad


def _in_files(shards: int) -> str:
    return f"in {shards} shards" if shards else "in folders"


def _classes(labels: np.ndarray, names: list[str]) -> list[str]:
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
        f"{line}; examples a class: {counts[fewest]} ({name(fewest)}) to {counts[most]} ({name(most)}), "
        f"median {int(np.median(counts[present]))}"
    ]


def _read(facts: Facts, num_workers: int, split: str) -> tuple[list[Any], list[Skipped]]:
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


def _images(facts: list[Any]) -> list[str]:
    if not facts:
        return []
    widths, heights, kinds, modes = zip(*facts, strict=True)
    short = np.minimum(widths, heights)
    low, middle, high = np.percentile(short, [5, 50, 95])
    return [
        f"  short side: {short.min()} to {short.max()} px, median {middle:.0f}, nine tenths {low:.0f} to {high:.0f}",
        f"  width: {min(widths)} to {max(widths)} px, height: {min(heights)} to {max(heights)} px",
        f"  kinds: {_numbers(Counter(kinds))}; colours: {_numbers(Counter(modes))}",
    ]


def _numbers(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.most_common())


def _bad(bad: list[Skipped]) -> list[str]:
    if not bad:
        return ["  bad examples: none"]
    lines = [f"  bad examples: {len(bad):,} ({_numbers(Counter(example.reason for example in bad))})"]
    return lines + [f"    {example.message}" for example in bad[:MAX_LISTED]]


def _write_sheet(examples: ExampleIndex, names: list[str], path: Path, seed: int) -> None:
    """Images drawn at random, sorted by class, with the class below each."""
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
    for place, (label, image) in enumerate(sorted(tiles, key=lambda tile: tile[0])):
        left, top = 4 + place % COLUMNS * (TILE + 4), 4 + place // COLUMNS * (TILE + 18)
        sheet.paste(image, (left, top))
        name = names[label] if 0 <= label < len(names) else str(label) if label >= 0 else ""
        pen.text((left, top + TILE + 1), name[:18], fill="black")
    with atomic_file(path) as temporary:
        sheet.save(temporary, format="png")


def main(args: list[str] | None = None) -> None:
    """The command.

    Args:
        args: instead of the command line's.
    """
    parser = OneLineParser("python -m datamodules.inspection", "Say what a data set holds.")
    parser.add_argument("root", help="folder or address of images, codes or features of captions")
    parser.add_argument("--sheet", type=Path, help="PNG file for a contact sheet of images")
    parser.add_argument("--headers_only", action="store_true", help="do not decode the images: faster, finds less")
    parser.add_argument("--num_workers", type=int, default=2, help="processes that read images (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of images for the sheet (default: 0)")
    parser.add_argument(
        "--class_order", choices=CLASS_ORDERS, default="auto", help="how class folders are numbered (default: auto)"
    )
    options = parser.parse_args(args)
    numbers = options.num_workers, options.seed
    try:
        lines = inspect(options.root, options.sheet, not options.headers_only, *numbers, options.class_order)
    except ValueError as error:
        parser.error(str(error))
    print("\n".join(lines))


if __name__ == "__main__":
    run_command(main)
