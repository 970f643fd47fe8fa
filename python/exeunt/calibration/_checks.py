"""What the methods ask of their arrays, and the arithmetic of levels that they share."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

__all__ = ["Array", "array", "between", "enough", "exact", "losses", "same_shape"]

Array = NDArray[Any]


def array(name: str, values: ArrayLike | torch.Tensor, ndim: int) -> Array:
    """Return values as an array of that many dimensions, neither empty nor with NaN; torch tensors come to the CPU."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.dtype in (torch.bfloat16, torch.float16) else values).numpy()
    a = np.asarray(values)
    if a.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimension{'s' * (ndim > 1)}, got shape {list(a.shape)}")
    if a.size == 0:
        raise ValueError(f"{name} must not be empty, got shape {list(a.shape)}")
    if a.dtype.kind == "f" and np.isnan(a).any():
        raise ValueError(f"{name} must be numbers, got NaN at {np.argwhere(np.isnan(a))[0].tolist()}")
    return a


def same_shape(name: str, a: Array, other: str, b: Array) -> None:
    """Raise unless both have one shape."""
    if a.shape != b.shape:
        raise ValueError(f"{name} must have the shape {list(b.shape)} of {other}, got {list(a.shape)}")


def between(name: str, value: float, low: float = 0.0, high: float = 1.0) -> None:
    """Raise unless the value lies strictly between."""
    if not low < value < high:
        raise ValueError(f"{name} must lie strictly between {low:g} and {high:g}, got {value}")


def losses(values: ArrayLike | torch.Tensor, candidates: ArrayLike | torch.Tensor | None) -> Array:
    """Losses [K, n] as float64 within 0..1; ``candidates`` [K], where given, run from safe to loose."""
    x = array("losses", values, 2)
    low, high = float(x.min()), float(x.max())
    if low < 0 or high > 1:
        raise ValueError(f"losses must lie in 0..1, got {low if low < 0 else high:g}")
    if candidates is not None:
        c = array("candidates", candidates, 1)
        if len(c) != len(x):
            raise ValueError(f"candidates must be one per row of losses ({len(x)}), got {len(c)}")
        rising = np.flatnonzero(np.diff(c) >= 0)
        if rising.size:
            first, second = c[rising[0]], c[rising[0] + 1]
            raise ValueError(f"candidates must descend from safe to loose, got {first:g} before {second:g}")
    return x.astype(np.float64, copy=False)


def exact(level: float) -> Fraction:
    """Return the level as the decimal that was written, so that ``0.29 * 100`` is 29 and not a little less.

    >>> exact(0.29) * 100
    Fraction(29, 1)
    """
    return Fraction(repr(float(level)))


def enough(method: str, n: int, passes: Callable[[int], bool]) -> None:
    """Raise where even n units without any loss do not pass; the sentence says how many would."""
    if passes(n):
        return
    high = 1 << math.ceil(math.log2(n + 1))
    while not passes(high):
        high *= 2
    needed = bisect_left(range(high), True, key=passes)
    raise ValueError(f"{method} at this level needs at least {needed} examples, got {n}")
