"""Files that outlive whoever writes them: replaced in one piece, refused where foreign."""

from __future__ import annotations

import glob
import os
import tempfile
from pathlib import Path

FOREIGN = "is damaged, or not a file of studies.digits"


class UnusableError(Exception):
    """A file in the way: foreign, damaged, or of another comparison. The message is one line."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path} {why}; delete it or choose another --out")


def write(path: Path, content: bytes) -> None:
    """Replaces a file. Whenever the process is killed or the power fails, there is the old one or
    the new one, whole, and the files of earlier calls."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name != "nt":  # the new name is safe once the folder is; Windows opens no folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read(path: Path) -> bytes | None:
    """The file's bytes, or None if there is none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UnusableError(path, f"cannot be read ({error.strerror})") from None


def sweep(path: Path) -> None:
    """Removes what `write` left beside the file where it was killed."""
    for left in path.parent.glob(f"{glob.escape(path.name)}.????????.tmp"):
        left.unlink(missing_ok=True)
