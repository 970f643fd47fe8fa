"""What a threshold was calibrated to promise."""

from __future__ import annotations

from dataclasses import dataclass
from math import floor
from typing import Literal

from scipy.special import betaincinv

from exeunt.calibration._checks import between, enough, exact

__all__ = ["Contract"]


@dataclass(frozen=True)
class Contract:
    """The promise that a calibration carries.

    Attributes
    ----------
    risk : str
        What is bounded, for instance "label disagreement".
    level : float
        What it stays below.
    confidence : float or "marginal"
        A number, for instance 0.95: the risk of *these* thresholds is at most the level, in that share of all
        calibrations. "marginal": only the mean risk over all calibrations is.
    n : int
        Calibration units behind the thresholds; for conformal's ``shared`` variant those with an inconsistent exit, for
        ``independent`` those at the exit that has fewest.
    method : str
        For instance "learn_then_test, hoeffding_bentkus".
    unit : str, default "example"
        What is drawn: "example" or "prompt", never a token.
    parts : int, default 1
        Thresholds that share the level: the number of exits for conformal's ``independent`` variant.

    Examples
    --------
    >>> from exeunt.calibration import Contract
    >>> print(Contract("label disagreement", 0.05, 0.95, 500, "learn_then_test, hoeffding_bentkus"))
    label disagreement <= 0.05 with confidence 0.95 (learn_then_test, hoeffding_bentkus; 500 examples), if calibration
    and later examples are independent draws from one distribution, and candidates were fixed before the data
    """

    risk: str
    level: float
    confidence: float | Literal["marginal"]
    n: int
    method: str
    unit: str = "example"
    parts: int = 1

    def __post_init__(self) -> None:
        between("level", self.level)
        if isinstance(self.confidence, str):
            if self.confidence != "marginal":
                raise ValueError(f"confidence must be a number or 'marginal', got {self.confidence!r}")
            enough("a marginal contract", self.n, lambda n: exact(self.level) / self.parts * (n + 1) >= 1)
        else:
            between("confidence", self.confidence)
        if self.n < 1 or self.parts < 1:
            raise ValueError(f"n and parts must be at least 1, got {self.n} and {self.parts}")

    @property
    def assumptions(self) -> str:
        """What the promise rests on."""
        draws = "exchangeable" if self.confidence == "marginal" else "independent draws from one distribution"
        return f"calibration and later {self.unit}s are {draws}, and candidates were fixed before the data"

    def __str__(self) -> str:
        how = (
            "on average over calibrations" if self.confidence == "marginal" else f"with confidence {self.confidence:g}"
        )
        basis = f"{self.method}; {self.n} {self.unit}s"
        return f"{self.risk} <= {self.level:g} {how} ({basis}), if {self.assumptions}"

    def audited_level(self, gamma: float) -> float:
        """Risk above which the contract is to be called broken.

        A contract with a confidence is held to its level. A marginal one is not: valid thresholds exceed their level in
        up to half of all calibrations. Their risk, given the calibration data, follows a Beta distribution whose mean
        is the level (Vovk 2012), and they are held to its 1 - gamma quantile: exact for losses of 0 and 1 whose scores
        do not tie, above it where they tie; for fractional losses a convention.

        Parameters
        ----------
        gamma : float
            Share of valid marginal calibrations that may lie above, between 0 and 1.

        Returns
        -------
        float

        Examples
        --------
        >>> from exeunt.calibration import Contract
        >>> contract = Contract("label disagreement", 0.1, "marginal", 199, "conformal, unconditional")
        >>> round(contract.audited_level(0.05), 3)
        0.137
        """
        if self.confidence != "marginal":
            return self.level
        between("gamma", gamma)
        allowed = floor(exact(self.level) / self.parts * (self.n + 1))
        return min(1.0, self.parts * float(betaincinv(allowed, self.n + 1 - allowed, 1 - gamma / self.parts)))
