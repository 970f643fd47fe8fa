"""Files that are written completely or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["unfinished", "write", "written"]


def unfinished(path: str | os.PathLike[str]) -> Path:
    """Where a file is written before it gets its name: in the same folder, hidden, one a process.

    Examples
    --------
    >>> from exeunt.files import unfinished
    >>> path = unfinished("figures/speed.txt")
    >>> path.parent.name, path.name.startswith(".speed.txt.")
    ('figures', True)
    """
    return Path(path).with_name(f".{Path(path).name}.{os.getpid()}")


@contextmanager
def written(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file to write beside `path` that takes its place when the block ends well; else `path` stays as it was.

    Parameters
    ----------
    path : path

    Raises
    ------
    OSError
        If it cannot be written, for example since the disk is full: one sentence.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from exeunt.files import written
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with written(Path(folder, "figures.txt")) as partial:
    ...         _ = partial.write_text("42")
    ...     Path(folder, "figures.txt").read_text()
    '42'
    """
    path, partial = Path(path), unfinished(path)
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        kept = "what was there before is kept" if path.is_file() else "nothing was written"
        raise OSError(f"{path} could not be written ({error.strerror or error}), {kept}") from error
    finally:
        partial.unlink(missing_ok=True)


def write(path: str | os.PathLike[str], content: bytes) -> None:
    """Write `content` through :func:`written`.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(Path(folder) / "a", b"whole")
    ...     (Path(folder) / "a").read_bytes()
    b'whole'
    """
    with written(path) as partial:
        partial.write_bytes(content)
