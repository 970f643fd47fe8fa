"""The threshold that meets a mean depth."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike

from exeunt.calibration._checks import array

__all__ = ["budget"]


def budget(scores: ArrayLike | torch.Tensor, layers: ArrayLike, mean_depth: float) -> float:
    """Safest threshold, shared by all exits, whose mean depth on these data is at most ``mean_depth``.

    **No contract**: nothing is promised about the risk, and the depth of other data will differ.

    Parameters
    ----------
    scores : array
        [n, E] confidence at each of E exits, larger is safer.
    layers : array
        [E + 1] layers that run when an example leaves at each exit, and at full depth; ascending.
    mean_depth : float
        Layers that an example may run on average.

    Returns
    -------
    float
        For ``score >= threshold``; inf where full depth is within the budget.

    Examples
    --------
    >>> from exeunt import calibration
    >>> scores = [[0.9, 0.9], [0.2, 0.8], [0.6, 0.7], [0.1, 0.3]]
    >>> calibration.budget(scores, layers=[4, 8, 12], mean_depth=8)     # depths 4, 8, 8, 12
    0.7
    """
    s, depth = array("scores", scores, 2), array("layers", layers, 1)
    if len(depth) != s.shape[1] + 1 or (np.diff(depth) <= 0).any():
        raise ValueError(f"layers must be {s.shape[1] + 1} ascending numbers, got {depth.tolist()}")
    if not mean_depth >= depth[0]:
        raise ValueError(f"mean_depth must be at least {depth[0]}, the depth of the first exit, got {mean_depth}")
    # An example runs past exit e if none of its scores up to e reaches the threshold: each such pair costs the gap.
    best = np.maximum.accumulate(s, axis=1).ravel()
    order = np.argsort(best, kind="stable")
    gaps = np.tile(np.diff(depth), len(s))[order]
    over = np.flatnonzero(gaps.cumsum() > (mean_depth - depth[0]) * len(s) * (1 + 1e-12))
    return float(best[order[over[0]]]) if over.size else float("inf")
