"""Temperatures that make an exit's probabilities honest."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.special import logsumexp, softmax

from exeunt.calibration._checks import Array, array

__all__ = ["temperature", "temperatures"]

SMALLEST, LARGEST = 0.01, 100.0


def temperature(logits: ArrayLike | torch.Tensor, labels: ArrayLike | torch.Tensor) -> float:
    """Temperature T that minimises the mean negative log-likelihood of ``softmax(logits / T)``.

    Guo et al. (2017). The objective is convex in 1/T and minimised by L-BFGS. It carries no guarantee: it makes scores
    of different exits comparable, which thresholds shared by all exits profit from.

    Parameters
    ----------
    logits : array
        [n, C], finite.
    labels : array
        [n] int in 0..C-1: the truth, or what full depth says.

    Returns
    -------
    float
        Within 0.01..100. Where the largest logit always is the label no temperature is too low: a small one.

    Examples
    --------
    >>> import numpy as np
    >>> from exeunt import calibration
    >>> logits = np.array([[4.0, 0.0]] * 4)                       # says 98 % ...
    >>> round(calibration.temperature(logits, [0, 0, 0, 1]), 4)   # ... and is right in 3 of 4: T = 4 / log 3
    3.641
    """
    from scipy.optimize import minimize  # here, since it takes a third of the time of importing exeunt

    z, y = array("logits", logits, 2).astype(np.float64), array("labels", labels, 1)
    if len(y) != len(z):
        raise ValueError(f"labels must be one per row of logits ({len(z)}), got {len(y)}")
    if not np.isfinite(z).all():
        raise ValueError(f"logits must be finite, got {z[~np.isfinite(z)][0]}")
    if y.dtype.kind not in "iu" or y.min() < 0 or y.max() >= z.shape[1]:
        raise ValueError(f"labels must be integers in 0..{z.shape[1] - 1}, got {y.dtype} in {y.min()}..{y.max()}")
    ahead = z - z[np.arange(len(z)), y][:, None]  # of the label's logit

    def nll(inverse: Array) -> tuple[float, Array]:
        scaled = inverse[0] * ahead
        slope = (softmax(scaled, axis=1) * ahead).sum(1)
        return float(logsumexp(scaled, axis=1).mean()), np.array([slope.mean()])

    found = minimize(nll, [1.0], jac=True, method="L-BFGS-B", bounds=[(1 / LARGEST, 1 / SMALLEST)], tol=1e-12)
    return float(1 / found.x[0])


def temperatures(
    exits: Sequence[ArrayLike | torch.Tensor | Callable[[list[Array]], ArrayLike]],
    labels: ArrayLike | torch.Tensor,
) -> list[float]:
    """Temperature of each exit, in order, where later heads read the logits of earlier ones.

    A head that reads scaled logits (RightTool) changes with every temperature before it, so its own can only be
    fitted after those.

    Parameters
    ----------
    exits : sequence
        For each exit its logits [n, C], or a function of the list of the earlier exits' logits, each divided by its
        temperature, that returns them.
    labels : array
        [n] int, as for :func:`temperature`.

    Returns
    -------
    list of float

    Examples
    --------
    >>> import numpy as np
    >>> from exeunt import calibration
    >>> first = np.array([[4.0, 0.0]] * 4)
    >>> [round(t, 2) for t in calibration.temperatures([first, lambda scaled: 2 * scaled[0]], [0, 0, 0, 1])]
    [3.64, 2.0]
    """
    found: list[float] = []
    scaled: list[Array] = []
    for logits in exits:
        z = array("logits", logits(list(scaled)) if callable(logits) else logits, 2)
        found.append(temperature(z, labels))
        scaled.append(z / found[-1])
    return found
