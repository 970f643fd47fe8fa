"""The audit of a contract while it is in use."""

from __future__ import annotations

import math
import warnings
from bisect import bisect_left
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.special import betaincc, betaln, rel_entr, xlog1py, xlogy

from exeunt.calibration._checks import Array, array, between
from exeunt.calibration.contract import Contract

__all__ = ["Audit", "evidence"]

OnViolation = Literal["warn", "full_depth"]


class Audit:
    """Observed losses of requests that also ran at full depth, held against a contract, after each of them.

    Which requests are audited must not depend on what they hold. The evidence may be looked at as often as one likes:
    as long as every audited request's expected loss, given the ones before, is within the contract, the probability
    that it is ever called refuted is at most ``alpha``. Evidence weighs the whole stream since the audit began, so that
    a long good past delays the discovery of a bad present; begin a new audit now and then.

    Parameters
    ----------
    contract : Contract
        One with a confidence is audited at its level, a marginal one at the 1 - alpha / 2 quantile of what valid
        calibrations have (:meth:`Contract.audited_level`), with the other half of alpha for the stream.
    alpha : float, default 0.05
        Probability of refuting a contract that holds.
    on_violation : {"warn", "full_depth"}, default "warn"
        Whether ``exits_allowed`` stays True when the contract is refuted. Either way one RuntimeWarning says so; a
        request under way is not touched.

    Attributes
    ----------
    level : float
        What the mean loss is held to.
    count : int
        Requests audited.
    refuted : bool
        Whether the lower bound of the mean loss has ever exceeded the level.

    Examples
    --------
    >>> from exeunt.calibration import Audit, Contract
    >>> contract = Contract("label disagreement", 0.1, 0.95, 500, "learn_then_test, binomial")
    >>> audit = Audit(contract, on_violation="full_depth")
    >>> audit.observe([0, 0, 1, 0, 0, 0, 0, 0, 0, 0])
    >>> [round(bound, 2) for bound in audit.interval()], audit.exits_allowed
    ([0.0, 0.5], True)
    >>> audit.observe([1, 1, 1, 1, 1, 1])       # warns
    >>> audit.refuted, audit.exits_allowed
    (True, False)
    """

    def __init__(self, contract: Contract, *, alpha: float = 0.05, on_violation: OnViolation = "warn") -> None:
        between("alpha", alpha)
        if on_violation not in get_args(OnViolation):
            raise ValueError(f"on_violation must be one of {', '.join(get_args(OnViolation))}, got {on_violation!r}")
        self.contract, self.on_violation = contract, on_violation
        marginal = contract.confidence == "marginal"
        self.level = contract.audited_level(alpha / 2)
        self.alpha = alpha / 2 if marginal else alpha
        self.count, self.total, self.refuted = 0, 0.0, False

    def observe(self, losses: ArrayLike | torch.Tensor) -> None:
        """Take in the losses of audited requests.

        Parameters
        ----------
        losses : array
            [n] within 0..1, in the order in which the requests came; n may be 0.
        """
        if not np.size(losses):
            return
        x = array("losses", losses, 1).astype(np.float64)
        if x.min() < 0 or x.max() > 1:
            raise ValueError(f"losses must lie in 0..1, got {x.min() if x.min() < 0 else x.max():g}")
        totals, counts = self.total + x.cumsum(), self.count + np.arange(1, len(x) + 1)
        crossed = evidence(totals, counts, self.level) >= -math.log(self.alpha)
        self.total, self.count = float(totals[-1]), int(counts[-1])
        if crossed.any() and not self.refuted:
            self.refuted, first = True, int(crossed.argmax())
            mean, stay = totals[first] / counts[first], "are to stay off" if not self.exits_allowed else "stay on"
            warnings.warn(
                f"contract refuted after {counts[first]} audited requests with a mean loss of {mean:.3f}, audited at "
                f"{self.level:.3f}; exits {stay}: {self.contract}",
                RuntimeWarning,
                stacklevel=2,
            )

    @property
    def exits_allowed(self) -> bool:
        """Whether the next request may leave early; ask before each."""
        return not (self.refuted and self.on_violation == "full_depth")

    def interval(self) -> tuple[float, float]:
        """Lower and upper bound of the mean loss, each of which holds at all times at once but for ``alpha``.

        Returns
        -------
        tuple of float
            (0, 1) before the first request. Of a marginal contract each side has half of alpha.
        """
        return self._below(self.total), 1 - self._below(self.count - self.total)

    def requests_to_refute(self, risk: float) -> int:
        """Audited requests after which a stream with this mean loss has certainly refuted the contract.

        Parameters
        ----------
        risk : float
            Observed mean loss, above the audited level and at most 1.

        Returns
        -------
        int
            Smallest n with ``n kl(risk, level) >= log(1 / alpha) + log(n) / 2 + log(2)``.

        Examples
        --------
        >>> from exeunt.calibration import Audit, Contract
        >>> contract = Contract("token disagreement", 0.05, 0.95, 200, "risk_control, wsr", "prompt")
        >>> Audit(contract).requests_to_refute(0.1)
        319
        """
        if not self.level < risk <= 1:
            raise ValueError(f"risk must lie above the audited level {self.level:g} and within 1, got {risk}")
        kl = float(rel_entr(risk, self.level) + rel_entr(1 - risk, 1 - self.level))

        def refuted(n: int) -> bool:
            return n * kl >= -math.log(self.alpha) + math.log(n) / 2 + math.log(2)

        high = 1
        while not refuted(high):
            high *= 2
        return bisect_left(range(1, high + 1), True, key=refuted) + 1

    def _below(self, total: float) -> float:
        """Lower bound of the mean of losses with this sum."""
        from scipy.optimize import brentq  # here, since it takes a third of the time of importing exeunt

        def excess(mean: float) -> float:
            return float(evidence(total, self.count, mean) + math.log(self.alpha))

        smallest = 1e-12
        if total == 0 or excess(smallest) <= 0:
            return 0.0
        return float(brentq(excess, smallest, min(total / self.count, 1 - smallest)))


def evidence(total: ArrayLike, count: ArrayLike, mean: float) -> Array:
    """Logarithm of the evidence that the mean of losses within 0..1 exceeds ``mean``.

    With S the sum of n losses and B Jeffreys' prior Beta(1/2, 1/2) restricted to ``mean``..1::

        W = integral of q^S (1 - q)^(n - S) dB(q) / (mean^S (1 - mean)^(n - S))

    a mixture of likelihood ratios (Robbins 1970). For losses of 0 and 1 it is a supermartingale while their conditional
    mean is at most ``mean``, and below one for losses in between; so it ever reaches 1 / alpha with probability alpha
    at most (Ville).

    Parameters
    ----------
    total, count : array
        S and n, of one shape.
    mean : float
        Strictly between 0 and 1.

    Returns
    -------
    array
        log W, in the same shape; -inf where nothing speaks for a larger mean.

    Examples
    --------
    >>> from exeunt.calibration.audit import evidence
    >>> evidence([5.0, 15.0], [100, 100], 0.05).round(2)
    array([-3.02,  4.65])
    """
    s, n = np.asarray(total, np.float64), np.asarray(count, np.float64)
    a, b = s + 0.5, n - s + 0.5
    with np.errstate(divide="ignore"):
        mixture = betaln(a, b) + np.log(betaincc(a, b, mean)) - betaln(0.5, 0.5) - np.log(betaincc(0.5, 0.5, mean))
    return mixture - xlogy(s, mean) - xlog1py(n - s, -mean)
