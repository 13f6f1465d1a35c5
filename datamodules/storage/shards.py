"""The shard format: webdataset tar files, and datasets of shards, each of which is complete or absent.

An example is a sequence of tar members with the same key: ``000017.png``, ``000017.cls``. A dataset is a folder per
split (``train``, ``val``) and a ``meta.json``, which is written last: a dataset without it is incomplete.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import webdataset

from datamodules.storage.bad_examples import Skipped, Tally
from datamodules.storage.remote import is_remote, read_small
from llamagen.files import PendingFile, atomic_file, remove_leftovers, sha256_of
from llamagen.full_disk import full_disk_reported

META_FILE = "meta.json"
PLAN_FILE = ".plan.json"
IMAGES_FORMAT = "llamagen-images"
CODES_FORMAT = "llamagen-codes"
CAPTIONS_FORMAT = "llamagen-captions"


RENAMED_PLAN_KEYS = {"number of pictures": "number of images", "picture_size": "image_size", "pictures": "images"}
"""New name of each plan key that earlier versions wrote."""


def read_plan(path: Path) -> dict[str, Any]:
    """Read the plan of a stopped run, which an earlier version may have written.

    Raises:
        ValueError: if the file is not valid JSON.
        TypeError: if it does not hold a JSON object.
    """
    plan: dict[str, Any] = dict(json.loads(path.read_text()))
    return {RENAMED_PLAN_KEYS.get(key, key): value for key, value in plan.items()}


def read_meta(root: Path | str, hint: str) -> dict[str, Any]:
    """Read ``meta.json`` of a dataset of shards, from its folder or address.

    Args:
        root: folder or address of the dataset.
        hint: remedy that ends the error messages.

    Raises:
        ValueError: if the dataset is missing or incomplete, or the file is invalid.
    """
    path = f"{str(root).rstrip('/')}/{META_FILE}"
    if is_remote(path):
        text = read_small(path)
    elif not Path(root).is_dir():
        raise ValueError(f"shard folder {root} does not exist; {hint}")
    elif not Path(path).is_file():
        raise ValueError(f"shard folder {root} has no {META_FILE}, so it is incomplete; {hint}")
    else:
        text = Path(path).read_bytes()
    try:
        meta = json.loads(text)
    except ValueError as error:  # invalid JSON or UTF-8
        raise ValueError(f"{path} is not valid JSON ({error}); {hint}") from error
    if not isinstance(meta, dict):
        raise ValueError(f"{path} must hold a JSON object; {hint}")
    return meta


class ShardEntry(NamedTuple):
    """Entry of a shard in ``meta.json``.

    Attributes:
        name: name of its file.
        examples: number of its examples.
        sha256: checksum of its file.
    """

    name: str
    examples: int
    sha256: str


def shard_entries(meta: Mapping[str, Any], split: str, root: Path | str) -> list[ShardEntry]:
    """Read the entries of a split's shards in ``meta.json``.

    Raises:
        ValueError: if the entries are invalid, for example if a name is a path and not the name of a file.
    """
    try:
        shards = meta["splits"][split]["shards"]
        entries = [ShardEntry(str(entry["name"]), int(entry["count"]), str(entry["sha256"])) for entry in shards]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{META_FILE} of {root} does not describe the shards of {split}; write the dataset again"
        ) from error
    for name, _, _ in entries:
        if not name.endswith(".tar") or "/" in name or "\\" in name or name.startswith("."):
            raise ValueError(f"{META_FILE} of {root} names the shard {name!r}, which is not a file name; correct it")
    return entries


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2) + "\n"
    with atomic_file(path, len(text)) as temporary:
        temporary.write_text(text)


class ShardWriter:
    """Writes a tar file of examples, which gets its name only when it is complete.

    As a context manager it removes the file if there is an error. Facts about the shard are written to a hidden file
    next to it, until :meth:`ShardDataset.finish` collects them.

    Args:
        path: path of the shard.

    Attributes:
        count: number of examples written.
        highest_label: highest label written, −1 for none.
        skipped: bad examples of this shard; callers append to it.
        counts: numbers that :meth:`ShardDataset.total_counts` sums over all shards; callers add to it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self.highest_label = -1
        self.skipped: list[Skipped] = []
        self.counts: Counter[str] = Counter()
        self._keys: set[str] = set()
        self._file = PendingFile(path)
        self._writer = webdataset.TarWriter(str(self._file.temporary), encoder=False, mtime=0)

    def write(self, key: str, members: Mapping[str, bytes], label: int = -1) -> None:
        """Write an example.

        Args:
            key: its key. Dots after the last ``/`` are replaced by ``_``, because they would start an extension. ``_``
                is appended until the key is unique in this shard.
            members: bytes of each member, by extension.
            label: its class, written as a cls member; −1 for none.

        Raises:
            ValueError: if there is nothing after the last ``/`` of the key.
        """
        folder, slash, name = key.rpartition("/")
        if not name:
            raise ValueError(f"key {key!r} cannot be written; it must not end in /")
        key = f"{folder}{slash}{name.replace('.', '_')}"
        while key in self._keys:  # keys from several source shards need not be unique
            key += "_"
        labelled = {"cls": str(label).encode()} if label >= 0 else {}
        with full_disk_reported(self.path, temporary=self._file.temporary):
            self._writer.write({"__key__": key, **members, **labelled})
        self._keys.add(key)
        self.count += 1
        self.highest_label = max(self.highest_label, label)

    def close(self) -> None:
        """Complete the file and give it its name.

        Raises:
            DiskFullError: if the disk is full; the file is removed.
        """
        with self._file.discarded_on_error():
            try:
                self._writer.close()
            except OSError:
                self._prevent_second_close()
                raise
            temporary = self._file.temporary
            entry = {"count": self.count, "bytes": temporary.stat().st_size, "sha256": sha256_of(temporary)}
            more = {"highest_label": self.highest_label, "bad": [list(example) for example in self.skipped]}
            _write_json(_facts_file(self.path), {**entry, **more, "counted": self.counts})
        self._file.publish()

    def abort(self) -> None:
        """Remove the file."""
        self._file.discard()
        try:
            self._writer.close()
        except OSError:  # the disk is full, but the file is removed anyway
            self._prevent_second_close()

    def _prevent_second_close(self) -> None:
        # footgun: the tar stream would close again when it is garbage collected, and show the error at a random time.
        self._writer.tarstream.fileobj.closed = True

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


class ShardDataset:
    """A dataset of shards that one or several processes write; a stopped run can resume.

    The assignment of examples to shards is planned in advance. A shard gets its name only when it is complete. Its
    count and checksum are kept in a hidden file next to it until :meth:`finish` writes them to ``meta.json``.

    Args:
        root: folder of the dataset.
        plan: everything that determines the contents, primitives only. A folder started with another plan is refused.
        hint: remedy that ends the error messages.
    """

    def __init__(self, root: Path, plan: Mapping[str, Any], hint: str) -> None:
        self.root, self.plan, self.hint = root, json.loads(json.dumps(plan)), hint

    def check(self) -> None:
        """Check that writing can start or resume; changes nothing.

        Raises:
            ValueError: if the folder holds a complete dataset, one with another plan, or shards without a plan.
        """
        if (self.root / META_FILE).exists():
            raise ValueError(f"{self.root} already holds a complete dataset; {self.hint}")
        plan = self.root / PLAN_FILE
        if plan.is_file():
            started = read_plan(plan)
            if differing := sorted(key for key in started | self.plan if started.get(key) != self.plan.get(key)):
                raise ValueError(f"{self.root} was started with another {', '.join(differing)}; {self.hint}")
        elif shards := sorted(self.root.glob("*/*.tar")):
            raise ValueError(f"{self.root} already holds shards ({shards[0].name}); {self.hint}")

    def begin(self, splits: Sequence[str]) -> None:
        """Create the folders and write the plan; call it in one process."""
        for split in splits:
            (self.root / split).mkdir(parents=True, exist_ok=True)
        _write_json(self.root / PLAN_FILE, self.plan)
        for folder in (self.root, *(self.root / split for split in splits)):
            remove_leftovers(folder, owned=True)

    def path(self, split: str, number: int) -> Path:
        """Path of shard ``number`` of a split."""
        return self.root / split / f"{split}-{number:06d}.tar"

    def is_written(self, split: str, number: int) -> bool:
        """Whether a shard is complete."""
        path = self.path(split, number)
        return path.exists() and _facts_file(path).exists()

    def shard(self, split: str, number: int) -> ShardWriter:
        """Open a writer for a shard."""
        return ShardWriter(self.path(split, number))

    def total_counts(self, shards: Mapping[str, int]) -> Counter[str]:
        """Sum of :attr:`ShardWriter.counts` over all complete shards. Call it before :meth:`finish`.

        Args:
            shards: number of shards of each split.
        """
        written = (
            self.path(split, number)
            for split, number_of_shards in shards.items()
            for number in range(number_of_shards)
            if self.is_written(split, number)
        )
        return sum(
            (Counter(json.loads(_facts_file(path).read_text()).get("counted")) for path in written), Counter[str]()
        )

    def finish(
        self,
        shards: Mapping[str, int],
        meta: Mapping[str, Any],
        rejected: Mapping[str, Sequence[Skipped]],
        max_bad_share: float,
    ) -> None:
        """Complete the dataset by writing ``meta.json``; call it in one process.

        All bad examples are listed in ``skipped.tsv``, if there are any.

        Args:
            shards: number of shards of each split.
            meta: more entries of ``meta.json``. ``num_classes`` is increased to the highest label + 1 if necessary.
            rejected: by split, bad examples found before the shards were planned.
            max_bad_share: maximum share of bad examples.

        Raises:
            ValueError: if a shard is missing, or there are too many bad examples.
        """
        splits = {}
        highest = -1
        facts_files, lines = [], []
        total, all_bad = 0, list[Skipped]()
        for split, number_of_shards in shards.items():
            entries, bad = [], list(rejected.get(split, ()))
            for number in range(number_of_shards):
                path = self.path(split, number)
                if not self.is_written(split, number):
                    raise ValueError(f"shard {path} is incomplete; repeat the command to resume")
                facts = json.loads(_facts_file(path).read_text())
                highest = max(highest, facts.pop("highest_label"))
                bad += [Skipped.from_record(record) for record in facts.pop("bad")]
                facts.pop("counted", None)
                entries.append({"name": path.name, **facts})
                facts_files.append(_facts_file(path))
            count = sum(entry["count"] for entry in entries)
            total += count
            all_bad += bad
            reasons = Counter(example.reason for example in bad)
            splits[split] = {"count": count, "skipped": reasons, "shards": entries}
            lines += ["\t".join(" ".join(text.split()) for text in (split, *example[1:])) for example in bad]
        Tally("the dataset", total, all_bad, max_bad_share)
        if lines:
            table = "\n".join(["split\tkey\treason\tmessage", *lines]) + "\n"
            with atomic_file(self.root / "skipped.tsv") as temporary:  # file names need not be valid UTF-8
                temporary.write_text(table, encoding="utf-8", errors="backslashreplace")
        _write_json(
            self.root / META_FILE,
            {
                **meta,
                "num_classes": max(meta.get("num_classes", 0), highest + 1),
                "count": total,
                "splits": splits,
            },
        )
        for facts_file in facts_files:
            facts_file.unlink()
        (self.root / PLAN_FILE).unlink()


def _facts_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.json")
