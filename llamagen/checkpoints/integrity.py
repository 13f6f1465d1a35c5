"""Integrity of checkpoints: verifies stored checksums, which loading does not. Plain torch."""

import zipfile
from io import BytesIO
from pathlib import Path

from llamagen.checkpoints.sharded import META_FILE, read_index
from llamagen.hub.errors import remedy_for_damage

DAMAGES = (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RuntimeError)


def check_integrity(path: Path) -> None:
    """Compare the content of a checkpoint with its stored CRC-32 checksums; takes about a second per gigabyte.

    Any reader notices a truncated file. footgun: PyTorch does not notice changed bytes; it loads them as weights.

    Args:
        path: a file written by ``torch.save``, or the folder of a sharded checkpoint. Files written by PyTorch before
            1.6 have no checksums and are not checked.

    Raises:
        ValueError: in one line, if the content is changed or incomplete.
    """
    try:
        if path.is_dir():
            _check(path / META_FILE)
            for part in read_index(path).storage_data.values():
                with (path / part.relative_path).open("rb") as file:
                    file.seek(part.offset)
                    content = file.read(part.length)
                if len(content) != part.length:
                    raise EOFError(f"{part.relative_path} is truncated")
                if zipfile.is_zipfile(BytesIO(content)):
                    _check(BytesIO(content))
        elif zipfile.is_zipfile(path):
            _check(path)
    except DAMAGES as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        remedy = remedy_for_damage(path, "take another checkpoint")
        raise ValueError(f"{path} is damaged ({reason}); {remedy}") from error


def _check(file: Path | BytesIO) -> None:
    with zipfile.ZipFile(file) as archive:
        if (member := archive.testzip()) is not None:
            raise EOFError(f"the checksum of {member} is wrong")
