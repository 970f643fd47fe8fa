"""A threshold that follows what deeper layers say of the tokens that left."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from exeunt.policies.protocol import At, Evidence, Policy, State

__all__ = ["Adaptive"]


@dataclass
class _Lessons:
    """What has been learned so far."""

    threshold: float
    sequences: int = 0
    scores: list[Tensor] = field(default_factory=list)
    agrees: list[Tensor] = field(default_factory=list)
    used: int = 0  # of the lists, for the threshold


@dataclass(frozen=True, eq=False)
class Adaptive(Policy):
    """FREE's adaptive threshold: refitted before each new sequence to the tokens that ran at both depths.

    Two depths only. The host tells :meth:`learn` how confident the exit was of tokens that have run at full depth, and
    whether it was right; tokens that left come to that through :class:`exeunt.states.Defer`. What it has learned
    belongs to the policy: all generations share it.

    Parameters
    ----------
    estimate : callable
        ``estimate(scores, agrees) -> threshold`` of float32 [n] and bool [n] tensors, ValueError if it takes more of
        them; as :func:`exeunt.calibration.beta_mixture`.
    first : float, default 0.9
        Threshold before anything was learned, within 0..1.
    sequences : int, default 300
        After so many sequences the threshold stays.

    Examples
    --------
    >>> import torch
    >>> from exeunt.policies import Adaptive, At, Evidence
    >>> policy = Adaptive(lambda scores, agrees: float(scores[~agrees].max()))
    >>> policy.learn(torch.tensor([0.2, 0.5, 0.7]), torch.tensor([False, False, True]))
    >>> policy.begin(1)
    >>> policy.threshold
    0.5
    >>> policy.step({}, Evidence(torch.tensor([0.4, 0.6])), At(exit=0, layer=3, exits=1))
    tensor([False,  True])
    """

    estimate: Callable[[Tensor, Tensor], float]
    first: float = 0.9
    sequences: int = 300
    _lessons: _Lessons = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.sequences < 0:
            raise ValueError(f"Adaptive: sequences must be 0 or more, got {self.sequences}")
        object.__setattr__(self, "_lessons", _Lessons(self.first))

    @property
    def needs(self) -> frozenset[str]:
        """The score, and the label that deeper layers may confirm."""
        return frozenset({"score", "label"})

    @property
    def threshold(self) -> float:
        """What a score has to exceed now."""
        return self._lessons.threshold

    @property
    def learns(self) -> bool:
        """Whether more tokens can change the threshold."""
        return self._lessons.sequences <= self.sequences

    def check(self, low: float, high: float, measure: str, exits: int | None = None) -> None:
        """Raise ValueError for a measure outside of 0..1, a first threshold outside of it, or several exits."""
        if (low, high) != (0.0, 1.0):
            raise ValueError(f"Adaptive: expected a measure within 0..1, got {measure} with range {low:g}..{high:g}")
        if self.first != math.inf and not low <= self.first <= high:
            raise ValueError(f"Adaptive: first must lie in 0..1 (or be inf, to begin at full depth), got {self.first}")
        if exits is not None and exits != 1:
            raise ValueError(f"Adaptive: expected one exit, got {exits}")

    def step(self, state: State, seen: Evidence, at: At) -> Tensor:
        """True where the score exceeds the threshold as it is now."""
        assert seen.score is not None
        return (seen.score > self.threshold) & (seen.score < math.inf)

    def learn(self, scores: Tensor, agrees: Tensor) -> None:
        """Of tokens that have run at full depth: the exit's scores [n], and whether its labels were full depth's."""
        finite = torch.isfinite(scores)
        self._lessons.scores.append(scores[finite].float())
        self._lessons.agrees.append(agrees[finite])

    def begin(self, sequences: int) -> None:
        """So many new sequences begin: refit if there is something new."""
        lessons = self._lessons
        if self.learns and len(lessons.scores) > lessons.used:
            lessons.used = len(lessons.scores)
            scores, agrees = (torch.cat(parts).cpu() for parts in (lessons.scores, lessons.agrees))
            with contextlib.suppress(ValueError):  # too few of either kind so far
                lessons.threshold = self.estimate(scores, agrees)
        lessons.sequences += sequences
