"""Whether a checkpoint holds what was written: checksums that loading does not look at. Plain torch."""

import zipfile
from io import BytesIO
from pathlib import Path

from llamagen.checkpoints.sharded import META_FILE, read_index

DAMAGES = (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RuntimeError)


def check_integrity(path: Path) -> None:
    """Compare all that is in a checkpoint with the CRC-32 that was stored with it; about a second for each gigabyte.

    A file that was cut off has no directory of its contents and is found at once, by any reader. Bytes that were
    changed in the middle are found here alone: PyTorch loads them as if they were weights.

    Args:
        path: a file of ``torch.save``, or the folder of a sharded checkpoint. Files of PyTorch before 1.6 have no
            checksums.

    Raises:
        ValueError: in one line, if something was changed or is missing.
    """
    try:
        if path.is_dir():
            _check(path / META_FILE)
            for part in read_index(path).storage_data.values():
                with (path / part.relative_path).open("rb") as file:
                    file.seek(part.offset)
                    content = file.read(part.length)
                if len(content) != part.length:
                    raise EOFError(f"{part.relative_path} is cut off")
                if zipfile.is_zipfile(BytesIO(content)):
                    _check(BytesIO(content))
        elif zipfile.is_zipfile(path):
            _check(path)
    except DAMAGES as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is damaged ({reason}); take another checkpoint") from error


def _check(file: Path | BytesIO) -> None:
    with zipfile.ZipFile(file) as archive:
        if (member := archive.testzip()) is not None:
            raise EOFError(f"{member} has another checksum than when it was written")
