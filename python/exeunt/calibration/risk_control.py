"""Risk control: conformal (on average) and by the Waudby-Smith-Ramdas bound (with a stated confidence)."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike

from exeunt.calibration._checks import Array, between, enough, exact
from exeunt.calibration._checks import losses as checked
from exeunt.calibration.learn_then_test import last_passed

__all__ = ["capital", "risk_control"]

Method = Literal["crc", "wsr"]


def risk_control(
    losses: ArrayLike | torch.Tensor,
    level: float,
    method: Method = "crc",
    *,
    confidence: float | None = None,
    monotonise: bool = True,
    candidates: ArrayLike | torch.Tensor | None = None,
) -> int | None:
    """Loosest candidate whose risk is controlled at ``level``.

    Parameters
    ----------
    losses : array
        [K, n] loss within 0..1 of unit i (a prompt, an example) under candidate k, from safe to loose, against the
        output at full depth (which has no loss then). The grid has to be fixed before these data are seen.
    level : float
        Risk to stay below, between 0 and 1.
    method : {"crc", "wsr"}, default "crc"
        ``crc``, conformal risk control (Angelopoulos et al. 2022): the expected loss of the *next* unit is at most
        ``level``, on average over the draw of the calibration units, if all are exchangeable:
        ``(sum of losses + 1) / (n + 1) <= level``. ``wsr``: as :func:`learn_then_test`, with the betting bound of
        Waudby-Smith and Ramdas as Bates et al. (2021) use it: with probability ``confidence`` the risk is at most
        ``level``, if units are independent; the bound gains where losses vary little.
    confidence : float
        For ``wsr``, between 0 and 1.
    monotonise : bool, default True
        ``crc`` needs losses that never fall from safe to loose. True takes each unit's largest loss so far in place of
        a lower one, which can only make the choice safer; False refuses losses that fall.
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
    >>> losses = np.zeros((4, 199))
    >>> losses[1, :5] = losses[2, :19] = losses[3, :20] = 1
    >>> calibration.risk_control(losses, 0.1)                    # (19 + 1) / 200 = 0.1
    2
    >>> calibration.risk_control(losses, 0.1, "wsr", confidence=0.95)
    1
    """
    x = checked(losses, candidates)
    between("level", level)
    n = x.shape[1]
    if method == "crc":
        if confidence is not None:
            raise ValueError(f"method 'crc' holds on average and takes no confidence, got {confidence}")
        enough("risk_control (crc)", n, lambda count: exact(level) * (count + 1) >= 1)
        if not monotonise and (np.diff(x, axis=0) < 0).any():
            row, unit = np.argwhere(np.diff(x, axis=0) < 0)[0].tolist()
            raise ValueError(
                "method 'crc' needs losses that never fall from safe to loose, "
                f"got {x[row, unit]:g} before {x[row + 1, unit]:g} for unit {unit}: set monotonise=True"
            )
        return last_passed(np.maximum.accumulate(x).sum(1) + 1 <= float(exact(level) * (n + 1)))
    if method == "wsr":
        if confidence is None:
            raise ValueError("method 'wsr' needs a confidence between 0 and 1, got none")
        between("confidence", confidence)
        enough("risk_control (wsr)", n, lambda count: _passes(np.zeros((1, count)), level, confidence)[0])
        return last_passed(_passes(x, level, confidence))
    raise ValueError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}")


def _passes(x: Array, level: float, confidence: float) -> Array:
    """Whether betting on a risk below the level has ever multiplied the capital by 1 / (1 - confidence)."""
    return capital(x, level, confidence).max(1) >= -np.log(1 - confidence)


def capital(x: Array, level: float, confidence: float) -> Array:
    """Logarithm [K, n] of the capital of one who bets, loss after loss, that the mean is below the level.

    The bet on loss i depends on the losses before it, so that under a mean at the level the capital is a martingale,
    and passes 1 / (1 - confidence) with probability 1 - confidence at most.

    >>> capital(np.array([[0.0, 0.0, 1.0]]), 0.5, 0.9).round(3)
    array([[0.405, 0.811, 0.118]])
    """
    n = x.shape[1]
    i = np.arange(1, n + 1)
    mean = (0.5 + x.cumsum(1)) / (i + 1)
    variance = (0.25 + ((x - mean) ** 2).cumsum(1)) / (i + 1)
    before = np.concatenate([np.full((len(x), 1), 0.25), variance[:, :-1]], axis=1)
    bets = np.minimum(1.0, np.sqrt(-2 * np.log(1 - confidence) / (n * before)))
    return np.log1p(bets * (level - x)).cumsum(1)
