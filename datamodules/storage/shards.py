"""The shard format: webdataset tar files, and sets of them, written shard by shard, each whole or not at all.

A sample is a run of tar members with one key: ``000017.png``, ``000017.cls``. A set is a folder for each split
(``train``, ``val``) beside a ``meta.json``, which is written last: without it the set is not complete.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import webdataset

from datamodules.storage.bad_samples import Skipped, Tally
from datamodules.storage.remote import is_remote, read_small
from llamagen.files import PendingFile, atomic_file, remove_leftovers, sha256_of
from llamagen.full_disk import full_disk_reported

META_FILE = "meta.json"
PLAN_FILE = ".plan.json"
IMAGES_FORMAT = "llamagen-images"
CODES_FORMAT = "llamagen-codes"
CAPTIONS_FORMAT = "llamagen-captions"


RENAMED_PLAN_KEYS = {"number of pictures": "number of images", "picture_size": "image_size", "pictures": "images"}
"""Keys of plans that earlier versions wrote, and what they are called now."""


def read_plan(path: Path) -> dict[str, Any]:
    """The plan of a stopped run, also of an earlier version.

    Raises:
        ValueError: if it is not JSON.
        TypeError: if it is not an object.
    """
    plan: dict[str, Any] = dict(json.loads(path.read_text()))
    return {RENAMED_PLAN_KEYS.get(key, key): value for key, value in plan.items()}


def read_meta(root: Path | str, hint: str) -> dict[str, Any]:
    """The description of a set of shards, from its folder or address.

    Raises:
        ValueError: if the set is missing or was not completed.
    """
    path = f"{str(root).rstrip('/')}/{META_FILE}"
    if is_remote(path):
        text = read_small(path)
    elif not Path(root).is_dir():
        raise ValueError(f"shard folder {root} does not exist; {hint}")
    elif not Path(path).is_file():
        raise ValueError(f"shard folder {root} has no {META_FILE}, so it was not written to its end; {hint}")
    else:
        text = Path(path).read_bytes()
    try:
        meta = json.loads(text)
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(f"{path} is not valid JSON ({error}); {hint}") from error
    if not isinstance(meta, dict):
        raise ValueError(f"{path} must hold a JSON object; {hint}")
    return meta


class ShardNote(NamedTuple):
    """What ``meta.json`` says of a shard.

    Attributes:
        name: of its file.
        samples: how many it holds.
        sha256: checksum of its file.
    """

    name: str
    samples: int
    sha256: str


def shard_notes(meta: Mapping[str, Any], split: str, root: Path | str) -> list[ShardNote]:
    """What ``meta.json`` says of the shards of a split.

    Raises:
        ValueError: if they are not described as they should be; a name is the name of a file and no path.
    """
    try:
        shards = meta["splits"][split]["shards"]
        notes = [ShardNote(str(note["name"]), int(note["count"]), str(note["sha256"])) for note in shards]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{META_FILE} of {root} does not describe the shards of {split}; write the set again"
        ) from error
    for name, _, _ in notes:
        if not name.endswith(".tar") or "/" in name or "\\" in name or name.startswith("."):
            raise ValueError(f"{META_FILE} of {root} names the shard {name!r}, which is no file name; correct it")
    return notes


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2) + "\n"
    with atomic_file(path, len(text)) as temporary:
        temporary.write_text(text)


class ShardWriter:
    """Writes a tar file of samples, which gets its name when it is whole. A context manager: an error leaves nothing.

    Beside it, a note says what it holds.

    Args:
        path: the file.

    Attributes:
        count: samples that were written.
        highest_label: −1 if none had one.
        skipped: put what was planned for the shard and could not be used in here.
        counted: put numbers in here that :meth:`ShardSet.counted` adds up over the set.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self.highest_label = -1
        self.skipped: list[Skipped] = []
        self.counted: Counter[str] = Counter()
        self._keys: set[str] = set()
        self._file = PendingFile(path)
        self._writer = webdataset.TarWriter(str(self._file.temporary), encoder=False, mtime=0)

    def write(self, key: str, parts: Mapping[str, bytes], label: int = -1) -> None:
        """Add a sample.

        Args:
            key: its name; ``_`` is added while another sample of the file has it, and stands for each dot in its last
                part, which would be read as the beginning of an extension.
            parts: the bytes of each part by extension.
            label: its class, written as a cls part; −1 for none.

        Raises:
            ValueError: if the last part of the key is empty.
        """
        folder, slash, name = key.rpartition("/")
        if not name:
            raise ValueError(f"key {key!r} cannot be written; the last part of a key must not be empty")
        key = f"{folder}{slash}{name.replace('.', '_')}"
        while key in self._keys:  # the keys of several shards may be unique within each of them alone
            key += "_"
        labelled = {"cls": str(label).encode()} if label >= 0 else {}
        with full_disk_reported(self.path, temporary=self._file.temporary):
            self._writer.write({"__key__": key, **parts, **labelled})
        self._keys.add(key)
        self.count += 1
        self.highest_label = max(self.highest_label, label)

    def close(self) -> None:
        """Give the file its name.

        Raises:
            DiskFullError: if there is no room; nothing is left of the file then.
        """
        with self._file.discarded_on_error():
            try:
                self._writer.close()
            except OSError:
                self._give_up()
                raise
            temporary = self._file.temporary
            note = {"count": self.count, "bytes": temporary.stat().st_size, "sha256": sha256_of(temporary)}
            more = {"highest_label": self.highest_label, "bad": [list(sample) for sample in self.skipped]}
            _write_json(_note(self.path), {**note, **more, "counted": self.counted})
        self._file.publish()

    def abort(self) -> None:
        """Drop what was written."""
        self._file.discard()
        try:
            self._writer.close()
        except OSError:  # there was no room for what is dropped now
            self._give_up()

    def _give_up(self) -> None:
        # Else it would be tried again when the object goes, and the error be shown at some later time.
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


class ShardSet:
    """A set of shards that is being written, by several processes if need be, and gone on with where it was stopped.

    Which samples go into which shard is planned before. A shard gets its name when it is whole; its number of samples
    and its checksum are put down beside it until ``meta.json`` takes them up.

    Args:
        root: folder of the set.
        plan: what decides the contents of the set, primitives only; a set that was begun with another plan is refused.
        hint: what to do then; ends the message.
    """

    def __init__(self, root: Path, plan: Mapping[str, Any], hint: str) -> None:
        self.root, self.plan, self.hint = root, json.loads(json.dumps(plan)), hint

    def check(self) -> None:
        """See that the set can be begun or gone on with; changes nothing.

        Raises:
            ValueError: if the folder holds a complete set, one with another plan, or shards that nobody planned.
        """
        if (self.root / META_FILE).exists():
            raise ValueError(f"{self.root} already holds a complete set; {self.hint}")
        plan = self.root / PLAN_FILE
        if plan.is_file():
            begun = read_plan(plan)
            if differing := sorted(key for key in begun | self.plan if begun.get(key) != self.plan.get(key)):
                raise ValueError(f"{self.root} was begun with another {', '.join(differing)}; {self.hint}")
        elif shards := sorted(self.root.glob("*/*.tar")):
            raise ValueError(f"{self.root} already holds shards ({shards[0].name}); {self.hint}")

    def begin(self, splits: Sequence[str]) -> None:
        """Make the folders and put the plan down; on one process."""
        for split in splits:
            (self.root / split).mkdir(parents=True, exist_ok=True)
        _write_json(self.root / PLAN_FILE, self.plan)
        for folder in (self.root, *(self.root / split for split in splits)):
            remove_leftovers(folder, owned=True)

    def path(self, split: str, number: int) -> Path:
        """Where shard ``number`` of a split goes."""
        return self.root / split / f"{split}-{number:06d}.tar"

    def is_written(self, split: str, number: int) -> bool:
        """Whether a shard is there, whole."""
        path = self.path(split, number)
        return path.exists() and _note(path).exists()

    def shard(self, split: str, number: int) -> ShardWriter:
        """A writer for a shard."""
        return ShardWriter(self.path(split, number))

    def counted(self, shards: Mapping[str, int]) -> Counter[str]:
        """The sum of what was counted for each shard that is written; until :meth:`finish`.

        Args:
            shards: number of shards of each split.
        """
        written = (
            self.path(split, number)
            for split, number_of_shards in shards.items()
            for number in range(number_of_shards)
            if self.is_written(split, number)
        )
        return sum((Counter(json.loads(_note(path).read_text()).get("counted")) for path in written), Counter[str]())

    def finish(
        self,
        shards: Mapping[str, int],
        meta: Mapping[str, Any],
        known: Mapping[str, Sequence[Skipped]],
        max_bad_share: float,
    ) -> None:
        """Complete the set: describe it in ``meta.json``; on one process.

        Args:
            shards: number of shards of each split.
            meta: more entries. ``num_classes`` grows to the highest label + 1; ``count`` is the number of samples.
            known: what of each split was known not to be usable before the shards were planned. All that is not in the
                set stands in ``skipped.tsv``, if there is anything.
            max_bad_share: greatest tolerable share of what is not in the set.

        Raises:
            ValueError: if a shard is not there, or too much could not be used.
        """
        splits = {}
        highest = -1
        notes, lines = [], []
        everything, missing = 0, list[Skipped]()
        for split, number_of_shards in shards.items():
            entries, bad = [], list(known.get(split, ()))
            for number in range(number_of_shards):
                path = self.path(split, number)
                if not self.is_written(split, number):
                    raise ValueError(f"shard {path} was not written to its end; run the same command again to go on")
                note = json.loads(_note(path).read_text())
                highest = max(highest, note.pop("highest_label"))
                bad += [Skipped(*sample) for sample in note.pop("bad")]
                note.pop("counted", None)
                entries.append({"name": path.name, **note})
                notes.append(_note(path))
            count = sum(entry["count"] for entry in entries)
            everything += count
            missing += bad
            reasons = Counter(sample.reason for sample in bad)
            splits[split] = {"count": count, "skipped": reasons, "shards": entries}
            lines += ["\t".join(" ".join(text.split()) for text in (split, *sample[1:])) for sample in bad]
        Tally("the set", everything, missing, max_bad_share)
        if lines:
            table = "\n".join(["split\tkey\treason\tmessage", *lines]) + "\n"
            with atomic_file(self.root / "skipped.tsv") as temporary:  # names of files may be anything
                temporary.write_text(table, encoding="utf-8", errors="backslashreplace")
        _write_json(
            self.root / META_FILE,
            {
                **meta,
                "num_classes": max(meta.get("num_classes", 0), highest + 1),
                "count": everything,
                "splits": splits,
            },
        )
        for note in notes:
            note.unlink()
        (self.root / PLAN_FILE).unlink()


def _note(path: Path) -> Path:
    return path.with_name(f".{path.name}.json")
