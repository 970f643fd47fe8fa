"""Files that are written completely or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["written"]


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
    ...     with written(Path(folder, "figures.txt")) as unfinished:
    ...         _ = unfinished.write_text("42")
    ...     Path(folder, "figures.txt").read_text()
    '42'
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield unfinished
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        kept = "what was there before is kept" if path.is_file() else "nothing was written"
        raise OSError(f"{path} could not be written ({error.strerror or error}), {kept}") from error
    finally:
        unfinished.unlink(missing_ok=True)
