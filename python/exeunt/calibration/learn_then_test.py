"""Learn then test: thresholds whose risk is below a level with a stated confidence."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.special import bdtr, rel_entr

from exeunt.calibration._checks import Array, between, enough
from exeunt.calibration._checks import losses as checked

__all__ = ["last_passed", "learn_then_test", "p_values"]

PValue = Literal["hoeffding_bentkus", "hoeffding", "binomial"]


def learn_then_test(
    losses: ArrayLike | torch.Tensor,
    level: float,
    confidence: float,
    p_value: PValue = "hoeffding_bentkus",
    *,
    candidates: ArrayLike | torch.Tensor | None = None,
) -> int | None:
    """Loosest candidate of which the data show that its risk is at most ``level``.

    With probability ``confidence`` over the draw of the calibration units, the mean loss of the returned candidate is
    at most ``level``, if units are independent draws from one distribution. Candidates are tested in order from safe
    to loose; the first that fails ends the test, and the last that passed is returned. (Angelopoulos et al. 2021,
    "Learn then test"; CALM's calibration.) Risks need not rise from candidate to candidate.

    Parameters
    ----------
    losses : array
        [K, n] loss within 0..1 of unit i (a prompt, an example) under candidate k, from safe to loose. The grid has to
        be fixed before these data are seen.
    level : float
        Risk to stay below, between 0 and 1.
    confidence : float
        Between 0 and 1, for instance 0.95.
    p_value : {"hoeffding_bentkus", "hoeffding", "binomial"}, default "hoeffding_bentkus"
        ``binomial`` is exact and the most powerful, for losses of 0 and 1 only; Hoeffding-Bentkus is close to it.
    candidates : array, optional
        [K] thresholds that the rows stand for; only checked to descend.

    Returns
    -------
    int or None
        Row of ``losses``; None where not even the safest candidate passes: full depth, if that has no loss.

    Raises
    ------
    ValueError
        One sentence, for instance that n is too small for the level and which would do.

    Examples
    --------
    >>> import numpy as np
    >>> from exeunt import calibration
    >>> losses = np.zeros((4, 200))
    >>> losses[1, :5] = losses[2, :10] = losses[3, :40] = 1         # risks 0, 2.5, 5 and 20 %
    >>> calibration.learn_then_test(losses, 0.1, 0.95, candidates=[0.95, 0.9, 0.8, 0.7])
    2
    """
    x = checked(losses, candidates)
    between("confidence", confidence)
    enough(
        f"learn_then_test ({p_value})",
        x.shape[1],
        lambda n: bool(p_values(np.zeros(1), n, level, p_value)[0] <= 1 - confidence),
    )
    fractional = x[(x > 0) & (x < 1)] if p_value == "binomial" else x[:0]
    if fractional.size:
        raise ValueError(f"p_value 'binomial' needs losses of 0 and 1, got {fractional[0]:g}")
    return last_passed(p_values(x.sum(1), x.shape[1], level, p_value) <= 1 - confidence)


def last_passed(passed: Array) -> int | None:
    """Index of the last candidate before the first that fails, None if that is the first.

    One published calibrator returns the first that fails, which the data have just not shown to be safe.

    >>> last_passed(np.array([True, True, False, True])), last_passed(np.array([False, True]))
    (1, None)
    """
    count = int(np.logical_and.accumulate(passed).sum())
    return count - 1 if count else None


def p_values(totals: Array, n: int, level: float, p_value: PValue) -> Array:
    """P-values of "the risk exceeds the level" for sums of n losses.

    Parameters
    ----------
    totals : array
        [K] sums of n losses within 0..1.
    n : int
        How many losses were summed.
    level : float
        The risk in question.
    p_value : str
        As for :func:`learn_then_test`.

    Returns
    -------
    array
        [K]; under a risk above the level each is at most u with probability u at most.

    Examples
    --------
    >>> p_values(np.array([0.0, 5.0]), 100, 0.1, "binomial").round(6)
    array([2.7000e-05, 5.7577e-02])
    """
    between("level", level)
    mean = totals / n
    if p_value == "hoeffding":
        return np.exp(-2 * n * np.maximum(level - mean, 0) ** 2)
    if p_value == "binomial":
        return bdtr(totals, n, level)
    if p_value == "hoeffding_bentkus":
        below = np.minimum(mean, level)
        hoeffding = np.exp(-n * (rel_entr(below, level) + rel_entr(1 - below, 1 - level)))
        return np.minimum(hoeffding, np.e * bdtr(np.ceil(totals), n, level))
    raise ValueError(f"p_value must be one of {', '.join(get_args(PValue))}, got {p_value!r}")
