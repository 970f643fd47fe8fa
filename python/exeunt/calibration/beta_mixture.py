"""FREE's threshold from a mixture of two Beta distributions."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.special import betaln, expit, xlog1py, xlogy

from exeunt.calibration._checks import Array, array, between, same_shape

__all__ = ["beta_mixture"]

EDGE = 1e-4  # scores are kept this far from 0 and 1, where the densities may be infinite
SURE = 0.9995  # responsibility of its own component for a score whose agreement is known


def beta_mixture(
    scores: ArrayLike | torch.Tensor,
    agrees: ArrayLike | torch.Tensor,
    *,
    posterior: float = 0.4,
    as_code: bool = False,
) -> float:
    """Threshold above which a score more likely comes from tokens on which shallow and deep layers agree.

    FREE (Bae et al., EMNLP 2023) fits two Beta distributions to the shallow exit's confidences and lets tokens leave
    whose posterior of the higher one exceeds 0.4. **No contract**: nothing is promised about the risk.

    Here the fit is expectation-maximisation: agreement starts the responsibilities, each step refits both components
    by weighted moments (their weights included) and recomputes the responsibilities from the densities. The released
    code overwrites the latter by the agreements, so that it fits each class once; looks at ten points from 0.3 to 0.9
    only, with equal weights; and falls back to 0.9, where users found it stuck.

    Parameters
    ----------
    scores : array
        [n] confidences within 0..1 of tokens that also ran at full depth.
    agrees : array
        [n] whether the exit predicted what full depth did; at least two of either kind.
    posterior : float, default 0.4
        To exceed, between 0 and 1.
    as_code : bool, default False
        Do what the released code does. (Its division by zero where a class has one value only is left out.)

    Returns
    -------
    float
        In thousandths; inf (never exit) if the posterior exceeds nowhere.

    Examples
    --------
    >>> import numpy as np
    >>> from exeunt import calibration
    >>> rng = np.random.default_rng(0)
    >>> agrees = rng.random(2000) < 0.6
    >>> scores = np.where(agrees, rng.beta(8, 2, 2000), rng.beta(2, 6, 2000))
    >>> calibration.beta_mixture(scores, agrees), calibration.beta_mixture(scores, agrees, as_code=True)
    (0.507, 0.567)
    """
    x, a = array("scores", scores, 1).astype(np.float64), array("agrees", agrees, 1).astype(bool)
    same_shape("agrees", a, "scores", x)
    between("posterior", posterior)
    if x.min() < 0 or x.max() > 1:
        raise ValueError(f"scores must lie in 0..1, got {x.min() if x.min() < 0 else x.max():g}")
    if min(a.sum(), (~a).sum()) < 2:
        raise ValueError(f"beta_mixture needs two scores of either kind, got {a.sum()} that agree of {len(a)}")
    x = x.clip(EDGE, 1 - EDGE)
    safe = np.where(a, SURE, 1 - SURE)
    if as_code:
        grid = np.linspace(0.3, 0.9, 10)
        passing = grid[_fit(x, safe, equal=True).posterior(grid) > posterior]
        return float(passing[0].round(3)) if passing.size else 0.9
    grid = np.arange(1, 1000) / 1000
    fails = np.flatnonzero(~(_expectation_maximisation(x, safe).posterior(grid) > posterior))
    first = fails[-1] + 1 if fails.size else 0  # from here on up every score passes
    return float(grid[first]) if first < len(grid) else float("inf")


class _Mixture(NamedTuple):
    """Two Beta components, the one of lower mean first."""

    weight: Array
    alpha: Array
    beta: Array

    def posterior(self, x: Array) -> Array:
        """Probability [n] of the higher component."""
        t = x[:, None]
        density = xlogy(self.alpha - 1, t) + xlog1py(self.beta - 1, -t) - betaln(self.alpha, self.beta)
        joint = np.log(self.weight) + density
        return expit(joint[:, 1] - joint[:, 0])


def _fit(x: Array, safe: Array, equal: bool = False) -> _Mixture:
    """Maximisation: each component's moments under its responsibilities."""
    r = np.stack([1 - safe, safe], axis=1)
    total = r.sum(0)
    mean = r.T @ x / total
    variance = np.maximum((r * (x[:, None] - mean) ** 2).sum(0) / total, 1e-6)
    alpha = mean * (mean * (1 - mean) / variance - 1)
    parts = np.full(2, 0.5) if equal else total / len(x), alpha, alpha * (1 - mean) / mean
    order = np.argsort(mean, kind="stable")
    return _Mixture(*(part[order] for part in parts))


def _expectation_maximisation(x: Array, safe: Array, steps: int = 200) -> _Mixture:
    for _ in range(steps):
        mixture = _fit(x, safe)
        updated = mixture.posterior(x).clip(1e-6, 1 - 1e-6)
        if np.abs(updated - safe).max() < 1e-6:
            break
        safe = updated
    return mixture
