"""Policies: scores over depth -> exit or stay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

__all__ = ["Decay", "Position", "Threshold"]


class Position(NamedTuple):
    """Where in a generation a token stands.

    Attributes
    ----------
    produced : int
        New tokens that this generation has already produced (the first one comes from the prompt itself).
    limit : int or None
        New tokens that it may produce at most, None where nobody said.
    """

    produced: int
    limit: int | None


@dataclass(frozen=True)
class Decay:
    """CALM's decaying threshold: strict for the first tokens, whose errors reach all later ones.

    ``lambda_t = clip(0.9 lambda + 0.1 exp(-tau t / N), 0, 1)`` (Schuster et al. 2022, section 3.4), for measures
    within 0..1.

    Parameters
    ----------
    tau : float, default 4.0
        Speed of the decay.
    length : int, optional
        N; by default the most new tokens that the running ``generate`` allows.

    Examples
    --------
    >>> import exeunt
    >>> decay = exeunt.policies.Decay(tau=4.0, length=100)
    >>> [round(decay(0.8, exeunt.policies.Position(t, None)), 3) for t in (0, 50, 100)]
    [0.82, 0.734, 0.722]
    """

    tau: float = 4.0
    length: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.tau) and self.tau >= 0):
            raise ValueError(f"Decay: tau must be finite and not negative, got {self.tau}")
        if self.length is not None and self.length < 1:
            raise ValueError(f"Decay: length must be at least 1, got {self.length}")

    def __call__(self, value: float, at: Position) -> float:
        """Threshold at a position."""
        length = self.length or at.limit
        if length is None:
            raise ValueError("Decay: give it a length, since this generation does not say how long it may become")
        return min(max(0.9 * value + 0.1 * math.exp(-self.tau * at.produced / length), 0.0), 1.0)


@dataclass(frozen=True)
class Threshold:
    """Leave at the first exit whose score reaches the threshold (``score >= value``; NaN stays).

    Parameters
    ----------
    value : float
        In the range of the confidence measure; ``math.inf`` never exits.
    decay : Decay, optional
        Makes the threshold depend on the position.

    Examples
    --------
    >>> import torch, exeunt
    >>> policy = exeunt.policies.Threshold(0.9)
    >>> policy.exits(torch.tensor([0.95, 0.5, float("nan")]), exeunt.policies.Position(3, 128))
    tensor([ True, False, False])
    """

    value: float
    decay: Decay | None = None

    def check(self, low: float, high: float, measure: str) -> None:
        """Raise ValueError unless the threshold lies in the measure's range low..high."""
        if self.value != math.inf and not (low <= self.value <= high):
            raise ValueError(
                f"threshold must lie in {low:g}..{high:g} for {measure} (or be inf, to never exit), got {self.value}"
            )
        if self.decay is not None and (low, high) != (0.0, 1.0):
            raise ValueError(f"decay needs a measure within 0..1, got {measure} with range {low:g}..{high:g}")

    def exits(self, scores: Tensor, at: Position) -> Tensor:
        """Decide for each of n rows.

        Parameters
        ----------
        scores : Tensor
            [n] scores of one exit, larger is safer.
        at : Position
            Where the tokens stand.

        Returns
        -------
        Tensor
            [n] bool, True where the row leaves.
        """
        value = self.value
        if self.decay is not None and value != math.inf:
            value = self.decay(value, at)
        return scores >= value
