"""The folder of sampled images: file names, finished images, and the plan of the run. N images."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.storage.shards import PLAN_FILE, read_plan
from llamagen.files import atomic_file, remove_leftovers

IMAGES = "images"
OLD_IMAGES = "pictures"
"""Name of the folder in earlier versions, whose stopped runs can be resumed."""
ARCHIVE = "samples.npz"
GRID = "grid.png"
METADATA = "metadata.jsonl"


class SampleFolder:
    """``images/<label>/<index:06d>_class<label>.png``, ``samples.npz``, ``grid.png`` and a hidden plan.

    With prompts, names of images end in ``_prompt<number>``, and there is also a ``metadata.jsonl``.

    The plan holds everything that determines the images, so that a stopped run can be resumed and is not mixed with
    another one. It is kept when the run is complete.

    Args:
        root: the folder.
        labels: class of each image, or number of its prompt, (N,) int64.
        label_name: ``class`` or ``prompt``.
    """

    def __init__(self, root: Path, labels: np.ndarray, label_name: str = "class") -> None:
        self.root, self.labels, self.label_name = root, labels, label_name
        self._name = re.compile(rf"(\d{{6,}})_{label_name}\d+\.png")
        self._digits = len(str(labels.max()))  # pads names of folders, so that they sort by class

    def path(self, index: int) -> Path:
        """Path of an image."""
        return self.root / self._relative_path(index)

    def _relative_path(self, index: int) -> Path:
        label = self.labels[index]
        return Path(IMAGES, f"{label:0{self._digits}d}", f"{index:06d}_{self.label_name}{label}.png")

    def check_free(self) -> None:
        """Check that a run can start or resume in the folder; changes nothing.

        Raises:
            ValueError: if the folder holds a complete run, or images without a plan.
        """
        has_plan = (self.root / PLAN_FILE).exists()
        unplanned = not has_plan and (self._has_images() or any(self.root.glob(f"*_{self.label_name}*.png")))
        if unplanned or (self.root / ARCHIVE).exists():
            raise ValueError(f"{self.root} already holds samples; delete them or choose another folder")

    def _images(self) -> Path:
        """Folder of the images; it has its old name if a run of an old version was stopped."""
        images, old = self.root / IMAGES, self.root / OLD_IMAGES
        return old if old.is_dir() and not images.is_dir() else images

    def _has_images(self) -> bool:
        return any(self._images().glob("*/*.png"))

    def finished(self) -> list[int]:
        """Indices of the images that exist, sorted."""
        images = self._images()
        found = []
        for folder in os.scandir(images) if images.is_dir() else ():
            for entry in os.scandir(folder) if folder.is_dir() else ():
                if match := self._name.fullmatch(entry.name):
                    index = int(match[1])
                    planned = index < len(self.labels) and self._is_path_of(index, folder.name, entry.name)
                    if planned and entry.stat().st_size:  # a crash of the machine may leave an empty file
                        found.append(index)
        return sorted(found)

    def _is_path_of(self, index: int, folder: str, file: str) -> bool:
        return self._relative_path(index).parts[1:] == (folder, file)

    def begin(self, plan: Mapping[str, Any]) -> None:
        """Write the plan, or compare it with that of the stopped run, and remove temporary files of killed processes.

        Call it in one process, before any image is written.

        Args:
            plan: primitives only.

        Raises:
            ValueError: if the folder holds images of another plan, or its plan is not that of a sampling run.
        """
        path = self.root / PLAN_FILE
        if path.exists():
            self._compare(path, json.loads(json.dumps(plan)))
        if self._images().name == OLD_IMAGES:
            self._images().rename(self.root / IMAGES)
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(plan, indent=2) + "\n")
        for folder in (self.root, *self.root.glob(f"{IMAGES}/*")):
            remove_leftovers(folder, owned=True)

    def _compare(self, path: Path, plan: dict[str, Any]) -> None:
        try:
            old = read_plan(path)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is not the plan of a run ({error}); choose another folder") from error
        keys = ["format"]
        if old.get("format") == plan["format"] and self._has_images():  # without images, the settings may change
            keys = sorted(old | plan)
        pairs = {key: (old.get(key), plan.get(key)) for key in keys}
        differing = [f"{key} ({_short(a)} then, {_short(b)} now)" for key, (a, b) in pairs.items() if a != b]
        if differing:
            raise ValueError(
                f"{self.root} was started with another {', '.join(differing)}; resume it with the command that started "
                "it, or choose another folder"
            )


def _short(value: Any) -> str:
    """A value for a message; the first characters of a SHA-256."""
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)
