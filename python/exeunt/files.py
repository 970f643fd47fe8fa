"""Files that are either whole or absent."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["unfinished", "write"]


def unfinished(path: str | os.PathLike[str]) -> Path:
    """Where a file is written before it gets its name: in the same folder, hidden, one a process."""
    return Path(path).with_name(f".{Path(path).name}.{os.getpid()}")


def write(path: str | os.PathLike[str], content: bytes) -> None:
    """Write completely or not at all; an interrupted write leaves what was there.

    Examples
    --------
    >>> import tempfile
    >>> from exeunt import files
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     files.write(Path(folder) / "a", b"whole")
    ...     (Path(folder) / "a").read_bytes()
    b'whole'
    """
    try:
        unfinished(path).write_bytes(content)
        os.replace(unfinished(path), path)
    finally:
        unfinished(path).unlink(missing_ok=True)
