"""Thresholds from error rates of the exits: rows that leave an exit are wrong no more often than a level (BEEM)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike

from exeunt.calibration._checks import array, same_shape

__all__ = ["error_rates"]


def error_rates(
    scores: ArrayLike | torch.Tensor, wrong: ArrayLike | torch.Tensor, level: float, *, at_least: int = 10
) -> tuple[float, ...]:
    """For each exit the lowest threshold at which those that leave there err at the level or less: no guarantee.

    Exits are taken in order, each on the rows that the exits before it leave behind.

    Parameters
    ----------
    scores : array
        [n, E], larger is safer; for BEEM the sums of :meth:`exeunt.policies.Accumulate.sums`.
    wrong : array
        [n, E] bool, whether the exit's answer is wrong.
    level : float
        Error rate, within 0..1: for instance that of full depth.
    at_least : int, default 10
        Rows that have to leave before a rate is believed.

    Returns
    -------
    tuple of float
        [E]; ``inf`` where no threshold keeps the level.

    Examples
    --------
    >>> from exeunt.calibration import error_rates
    >>> scores, wrong = [[0.9], [0.8], [0.7], [0.2]], [[False], [False], [True], [False]]
    >>> error_rates(scores, wrong, 0.0, at_least=1), error_rates(scores, wrong, 0.34, at_least=1)
    ((0.8,), (0.2,))
    """
    s, bad = array("scores", scores, 2), array("wrong", wrong, 2).astype(bool)
    same_shape("wrong", bad, "scores", s)
    if not 0 <= level <= 1:
        raise ValueError(f"level must lie in 0..1, got {level}")
    if at_least < 1:
        raise ValueError(f"at_least must be 1 or more, got {at_least}")
    stays, found = np.ones(len(s), bool), []
    for own, off in zip(s.T, bad.T, strict=True):
        order = np.flatnonzero(stays)[np.argsort(-own[stays], kind="stable")]
        values = own[order]
        rate = np.cumsum(off[order]) / np.arange(1, len(order) + 1)
        last = np.append(values[1:] != values[:-1], True) if len(order) else np.zeros(0, bool)  # ties leave together
        good = np.flatnonzero(last & (rate <= level) & (np.arange(1, len(order) + 1) >= at_least))
        threshold = float(values[good[-1]]) if good.size else np.inf
        found.append(threshold)
        stays &= own < threshold
    return tuple(found)
