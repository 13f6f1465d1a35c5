"""The folder of a run that draws images: what goes where, what is there, and what it was begun with. N images."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.storage.shards import PLAN_FILE
from llamagen.files import atomic_file, remove_leftovers

IMAGES = "images"
ARCHIVE = "samples.npz"
GRID = "grid.png"
METADATA = "metadata.jsonl"


class SampleFolder:
    """``images/<label>/<index:06d>_class<label>.png``, ``samples.npz``, ``grid.png`` and a plan, which is hidden.

    Of prompts the names end in ``_prompt<number>``, and there is a ``metadata.jsonl``.

    The plan says what decides the images, so that a stopped run can be gone on with and is not mixed with another.
    It stays when the run is complete.

    Args:
        root: of all this.
        labels: class of each image, or number of its prompt, (N,) int64.
        label_name: ``class`` or ``prompt``.
    """

    def __init__(self, root: Path, labels: np.ndarray, label_name: str = "class") -> None:
        self.root, self.labels, self.label_name = root, labels, label_name
        self._name = re.compile(rf"(\d{{6,}})_{label_name}\d+\.png")
        self._digits = len(str(labels.max()))  # so that the order of names is that of the classes

    def path(self, index: int) -> Path:
        """Where an image goes."""
        label = self.labels[index]
        folder = self.root / IMAGES / f"{label:0{self._digits}d}"
        return folder / f"{index:06d}_{self.label_name}{label}.png"

    def check_free(self) -> None:
        """See that a run can begin or go on here; changes nothing.

        Raises:
            ValueError: if the folder holds a complete run, or images that nobody planned.
        """
        planned = (self.root / PLAN_FILE).exists()
        foreign = not planned and (self._has_images() or any(self.root.glob(f"*_{self.label_name}*.png")))
        if foreign or (self.root / ARCHIVE).exists():
            raise ValueError(f"{self.root} already holds samples; delete them or choose another folder")

    def _has_images(self) -> bool:
        return any(self.root.glob(f"{IMAGES}/*/*.png"))

    def drawn(self) -> list[int]:
        """Indices of the images that are there, in order."""
        images = self.root / IMAGES
        found = []
        for folder in os.scandir(images) if images.is_dir() else ():
            for entry in os.scandir(folder) if folder.is_dir() else ():
                if match := self._name.fullmatch(entry.name):
                    index = int(match[1])
                    there = index < len(self.labels) and self.path(index) == Path(entry.path)
                    if there and entry.stat().st_size:  # a crash of the machine may leave an empty file
                        found.append(index)
        return sorted(found)

    def begin(self, plan: Mapping[str, Any]) -> None:
        """Put the plan down, or see that the run was begun with the same one, and clear away what a killed run left.

        On one process, while no other writes.

        Args:
            plan: primitives only.

        Raises:
            ValueError: if the folder holds images of another plan, or the plan of something else.
        """
        path = self.root / PLAN_FILE
        if path.exists():
            self._compare(path, json.loads(json.dumps(plan)))
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(plan, indent=2) + "\n")
        for folder in (self.root, *self.root.glob(f"{IMAGES}/*")):
            remove_leftovers(folder, owned=True)

    def _compare(self, path: Path, plan: dict[str, Any]) -> None:
        try:
            begun = dict(json.loads(path.read_text()))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is not the plan of a run ({error}); choose another folder") from error
        keys = ["format"]
        if begun.get("format") == plan["format"] and self._has_images():  # without any, other settings may be tried
            keys = sorted(begun | plan)
        pairs = {key: (begun.get(key), plan.get(key)) for key in keys}
        if other := [f"{key} ({_short(a)} there, {_short(b)} here)" for key, (a, b) in pairs.items() if a != b]:
            raise ValueError(
                f"{self.root} was begun with another {', '.join(other)}; go on by the command that began it, or choose "
                "another folder"
            )


def _short(value: Any) -> str:
    """A value for a message; of a SHA-256 the beginning."""
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)
