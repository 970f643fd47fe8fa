"""Online tuning of thresholds by utility, as Apparate does it."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike

from exeunt.calibration._checks import Array, array, between, same_shape
from exeunt.calibration.leaving import first_exit

__all__ = ["utility"]


def utility(
    scores: ArrayLike | torch.Tensor,
    consistent: ArrayLike | torch.Tensor,
    layers: ArrayLike,
    max_loss: float,
    *,
    step: float = 0.1,
    smallest: float = 0.01,
) -> Array:
    """Thresholds, one an exit, tuned on a recent window of requests that also ran at full depth.

    **No contract**: the share of exits that differ from full depth stays below ``max_loss`` on this window, and
    nothing is promised of the next one. Call it again as traffic goes on, and use :func:`learn_then_test` where a
    promise is needed.

    Greedy search after Apparate (Dai et al., SOSP 2024): nothing leaves at first; each round tries to lower each exit's
    threshold by its step, takes the one that saves most layers for the loss that it adds and doubles its step, and
    halves the steps of those that would exceed ``max_loss``; it ends when all steps are small or all exits open.

    Parameters
    ----------
    scores : array
        [n, E] confidence of the window's requests at each of E exits, larger is safer; infinite ones never leave.
    consistent : array
        [n, E] whether the exit predicts what full depth does.
    layers : array
        [E + 1] layers that run when a request leaves at each exit, and at full depth; ascending.
    max_loss : float
        Share of requests that may differ from full depth, between 0 and 1.
    step, smallest : float, default 0.1 and 0.01
        First and smallest step, in units of the score.

    Returns
    -------
    array
        [E] thresholds for ``score >= threshold``; inf where an exit stays shut.

    Examples
    --------
    >>> import numpy as np
    >>> from exeunt import calibration
    >>> scores = np.linspace(0, 1, 101)[:, None]
    >>> calibration.utility(scores, scores > 0.295, layers=[4, 12], max_loss=0.1).round(2)
    array([0.2])
    """
    s, c = array("scores", scores, 2).astype(np.float64), array("consistent", consistent, 2).astype(bool)
    same_shape("consistent", c, "scores", s)
    depth = array("layers", layers, 1)
    if len(depth) != s.shape[1] + 1 or (np.diff(depth) <= 0).any():
        raise ValueError(f"layers must be {s.shape[1] + 1} ascending numbers, got {depth.tolist()}")
    between("max_loss", max_loss)
    if not 0 < smallest <= step:
        raise ValueError(f"steps must be positive and smallest at most step, got {smallest} and {step}")
    wrong = np.concatenate([~c, np.zeros((len(c), 1), bool)], axis=1)

    def judge(trial: Array) -> tuple[float, float]:
        left = first_exit(s, trial)
        return float(depth[-1] - depth[left].mean()), float(wrong[np.arange(len(s)), left].mean())

    finite = np.isfinite(s)
    highest, lowest = np.where(finite, s, -np.inf).max(0), np.where(finite, s, np.inf).min(0)
    thresholds = np.where(finite.any(0), np.nextafter(highest, np.inf), np.inf)
    steps = np.full(s.shape[1], float(step))
    saved, lost = judge(thresholds)
    while (open_ := np.flatnonzero((steps >= smallest) & (thresholds > lowest))).size:
        trials = []
        for e in open_:
            trial = thresholds.copy()
            trial[e] = max(trial[e] - steps[e], lowest[e])  # no lower than the measure goes
            outcome = judge(trial)
            if outcome[1] > max_loss:
                steps[e] /= 2
            else:
                worth = (outcome[0] - saved) / max(outcome[1] - lost, 0.1 / len(s))
                trials.append((worth, e, trial, outcome))
        if trials:
            _, e, thresholds, (saved, lost) = max(trials, key=lambda t: t[0])
            steps[e] *= 2
    return np.where(thresholds > highest, np.inf, thresholds)
