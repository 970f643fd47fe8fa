"""Where each example of recorded scores leaves: what thresholds do when an exit changes nothing for later ones."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike

from exeunt.calibration._checks import Array, array

__all__ = ["first_exit"]


def first_exit(scores: ArrayLike | torch.Tensor, thresholds: ArrayLike | torch.Tensor) -> Array:
    """Index of the first exit whose score reaches its threshold.

    Parameters
    ----------
    scores : array
        [n, E] confidence at each of E exits, larger is safer; infinite ones stay, as in a `Threshold` policy.
    thresholds : array
        [E], or one number for all exits.

    Returns
    -------
    array
        [n] int in 0..E; E is full depth.

    Examples
    --------
    >>> from exeunt import calibration
    >>> calibration.first_exit([[0.2, 0.9], [0.8, 0.1], [0.3, 0.4]], 0.8)
    array([1, 0, 2])
    """
    s = array("scores", scores, 2)
    leaves = (s >= np.asarray(thresholds)) & (s < np.inf)
    return np.where(leaves.any(1), leaves.argmax(1), s.shape[1])
