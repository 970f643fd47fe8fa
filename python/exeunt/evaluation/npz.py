"""Recordings that something else wrote: logits in an .npz file."""

from __future__ import annotations

import os
import zipfile
from typing import Any

import numpy as np

from exeunt.replay import Recording

__all__ = ["of_npz"]


def of_npz(path: str | os.PathLike[str]) -> Recording:
    """Recording out of an .npz file that something else wrote.

    Parameters
    ----------
    path : path
        With ``logits`` [n, E + 1, C] and, optionally, whole numbers ``labels`` [n], ``exits`` [E] and ``layers``.

    Raises
    ------
    ValueError
        One sentence, if it is no such file.

    Examples
    --------
    >>> import tempfile, numpy as np
    >>> from exeunt.evaluation import of_npz
    >>> with tempfile.NamedTemporaryFile(suffix=".npz") as file:
    ...     np.savez(file.name, logits=np.zeros((5, 3, 2)), exits=[3, 7], layers=12)
    ...     of_npz(file.name).exits
    (3, 7)
    """
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError):
        arrays = {}
    if "logits" not in arrays:
        raise ValueError(f"{path} must be a recording, or an .npz file with logits [n, exits + 1, classes]")
    logits = arrays["logits"]
    if logits.dtype.kind not in "fiu" or logits.ndim != 3 or not logits.size:
        raise ValueError(
            f"{path} must have logits [n, exits + 1, classes], n 1 or more, of numbers, "
            f"got {list(logits.shape)} of {logits.dtype}"
        )
    n, depths, _ = logits.shape
    shapes: dict[str, tuple[int, ...]] = {"labels": (n,), "exits": (depths - 1,), "layers": ()}
    labels, exits, layers = (_whole(path, arrays, name, shape) for name, shape in shapes.items())
    return Recording.of_logits(
        logits.astype(np.float32),
        exits=None if exits is None else exits.tolist(),
        layers=None if layers is None else int(layers),
        labels=labels,
    )


def _whole(path: Any, arrays: dict[str, Any], name: str, shape: tuple[int, ...]) -> Any:
    """An array of whole numbers, where there is one; others are not rounded."""
    array = arrays.get(name)
    if array is not None and (array.dtype.kind not in "biu" or array.shape != shape):
        raise ValueError(
            f"{path} must have {name} {list(shape)} of whole numbers, got {list(array.shape)} of {array.dtype}"
        )
    return None if array is None else array.astype(np.int64)
