"""Conformal thresholds of Confident Adaptive Transformers."""

from __future__ import annotations

from fractions import Fraction
from math import floor
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike

from exeunt.calibration._checks import Array, array, between, enough, exact, same_shape

__all__ = ["conformal"]

Variant = Literal["shared", "independent", "unconditional"]


def conformal(
    scores: ArrayLike | torch.Tensor,
    consistent: ArrayLike | torch.Tensor,
    level: float,
    variant: Variant = "shared",
) -> Array:
    """Thresholds at which an exit says something else than full depth with probability ``level`` at most.

    The promise is marginal, over the draw of calibration examples and of the one that follows:
    ``P(prediction at the exit != prediction at full depth) <= level``, if they are exchangeable. (Schuster et al.,
    EMNLP 2021.) With V the score of an example's most confident inconsistent exit, the threshold is the smallest
    number above V's ``ceil((1 - level) * (n + 1))``-th smallest value.

    Parameters
    ----------
    scores : array
        [n, E] confidence at each of E exits, larger is safer; the last layer is not among them.
    consistent : array
        [n, E] whether the exit predicts what full depth does.
    level : float
        Between 0 and 1, taken as the decimal that it is written as.
    variant : {"shared", "independent", "unconditional"}, default "shared"
        ``shared``, the paper's: one threshold, from the examples that have an inconsistent exit; the promise holds
        even among those, so that over all examples it is more than kept. ``unconditional``: one threshold, from all
        examples; leaves earlier. ``independent``: one threshold an exit, each from the examples that are inconsistent
        there at ``level / E``; the published code breaks ties at random, here they stay.

    Returns
    -------
    array
        [E] thresholds in the floating dtype of the scores, for ``score >= threshold``; inf never exits, and where
        everything may leave it is the lowest score seen.

    Raises
    ------
    ValueError
        One sentence, for instance that n is too small for the level and which would do.

    Examples
    --------
    >>> import numpy as np
    >>> from exeunt import calibration
    >>> scores = np.linspace(0, 1, 100)[:, None]         # the higher, the better
    >>> consistent = scores > 0.255
    >>> calibration.conformal(scores, consistent, 0.1, "unconditional").round(3)    # 10 of 101 may be wrong
    array([0.162])
    >>> calibration.conformal(scores, consistent, 0.1, "shared").round(3)           # 2 of the 26 + 1 wrong ones
    array([0.242])
    """
    if variant not in get_args(Variant):
        raise ValueError(f"variant must be one of {', '.join(get_args(Variant))}, got {variant!r}")
    s, c = array("scores", scores, 2), array("consistent", consistent, 2).astype(bool)
    s = s if s.dtype.kind == "f" else s.astype(np.float64)
    same_shape("consistent", c, "scores", s)
    between("level", level)
    n, exits = s.shape
    allowed = exact(level) / (exits if variant == "independent" else 1)
    enough(f"conformal ({variant})", n, lambda count: allowed * (count + 1) >= 1)
    if variant == "independent":
        return np.array([_above_quantile(s[~c[:, e], e], allowed) for e in range(exits)])
    worst = np.where(c, -np.inf, s).max(1)
    if variant == "shared":
        worst = worst[~c.all(1)]
    # Where the quantile is that of examples without an inconsistent exit: a threshold that the measure can have.
    return np.full(exits, max(_above_quantile(worst, allowed), s.min()))


def _above_quantile(values: Array, level: Fraction) -> np.floating:
    """Smallest number of the values' dtype above their ceil((1 - level) (n + 1))-th smallest, inf if n is less."""
    n, infinity = len(values), values.dtype.type(np.inf)
    rank = n + 1 - floor(level * (n + 1))
    if rank > n:
        return infinity
    return np.nextafter(np.partition(values, rank - 1)[rank - 1], infinity)
