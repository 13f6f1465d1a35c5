"""Requests for images of classes."""

import re
from pathlib import Path
from typing import Any

from datamodules.requests.base import RequestDataModule
from datamodules.storage.index import MAX_CLASSES
from datamodules.storage.text_files import decode_text

CLASS_NUMBER = re.compile("[0-9]{1,9}")


def read_labels(path: Path) -> list[int]:
    """Read the class numbers in a text file, one per line. Blank lines are ignored.

    Raises:
        ValueError: if the file cannot be read, is empty, or a line is not a class number.
    """
    try:
        lines = decode_text(path.read_bytes()).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise ValueError(
            f"classes is {path}, which cannot be read ({reason}); give a number, a list, or a text file with one class "
            "number per line"
        ) from error
    labels = []
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text:
            continue
        if not CLASS_NUMBER.fullmatch(text) or int(text) >= MAX_CLASSES:
            raise ValueError(
                f"{path}, line {number}: {text[:40]!r} is not a class number; write one integer from 0 to "
                f"{MAX_CLASSES - 1} in each line"
            )
        labels.append(int(text))
    if not labels:
        raise ValueError(f"{path} holds no class numbers; write one in each line")
    return labels


class ClassRequestDataModule(RequestDataModule):
    """Requests for ``per_class`` images of each class.

    ``predict`` saves the images, ``test`` measures them. Batches hold ``index`` of each image in the run and
    ``condition``, its class, both (B,) int64.

    Args:
        classes: a list of classes; or a number of classes, where 10 means 0 to 9; or a text file with one class number
            per line, which may repeat classes, for example 50,000 random labels with ``per_class`` 1.
        per_class: images per entry of ``classes``.
        batch_size: images per batch and rank.

    Attributes:
        classes: class of each entry, in order.
    """

    label_name = "class"

    def __init__(self, classes: int | list[int] | Path | str = 1000, per_class: int = 50, batch_size: int = 64) -> None:
        if isinstance(classes, (str, Path)):
            labels = read_labels(Path(classes).expanduser())
        else:
            if isinstance(classes, int) and classes > MAX_CLASSES:
                raise ValueError(f"classes is {classes}; it must be at most {MAX_CLASSES}")
            labels = list(range(classes)) if isinstance(classes, int) else list(classes or [])
            if not labels or len(set(labels)) < len(labels) or not all(map(_is_label, labels)):
                raise ValueError(
                    f"classes is {classes}; give a positive number, a list of different class numbers, or a text file "
                    "with one class number per line"
                )
        super().__init__(labels, per_class, batch_size)
        self.classes = labels

    def request(self, index: int) -> dict[str, Any]:
        """``index`` of the image in the run and ``condition``, its class."""
        return {"index": index, "condition": int(self.labels[index])}


def _is_label(label: int) -> bool:
    return isinstance(label, int) and not isinstance(label, bool) and 0 <= label < MAX_CLASSES
