"""Rules that add up scores over the exits: adaptive computation time, and confidence while exits agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exeunt.policies.labels import agrees
from exeunt.policies.protocol import At, Evidence, Policy, State

__all__ = ["Accumulate", "Halting"]


def _within_0_1(policy: str, low: float, high: float, measure: str) -> None:
    if not (low >= 0 and high <= 1):
        raise ValueError(f"{policy}: expected a measure within 0..1, got {measure} with range {low:g}..{high:g}")


@dataclass(frozen=True)
class Halting(Policy):
    """Adaptive computation time: stop when the halting scores sum to 1 - eps, and answer with their mean (Graves 2016).

    A row leaves at the first exit N with ``a_1 + .. + a_N >= 1 - eps``. Its answer is the mean of the logits of exits
    1..N, weighted by ``a_n`` before N and by the remainder ``1 - (a_1 + .. + a_(N-1))`` at N; a row that never gets
    there gives the remainder to full depth.

    Parameters
    ----------
    eps : float, default 0.01
        Between 0 and 1; lets the first exit suffice.

    Examples
    --------
    >>> import torch
    >>> from exeunt.policies import At, Evidence, Halting
    >>> policy = Halting()
    >>> state, first, second = policy.start(1), torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    >>> policy.step(state, Evidence(torch.tensor([0.75]), logits=first), At(0, 0, 2))
    tensor([False])
    >>> seen = Evidence(torch.tensor([0.5]), logits=second)
    >>> policy.step(state, seen, At(1, 1, 2)), policy.answer(state, seen, At(1, 1, 2)).logits
    (tensor([True]), tensor([[3., 1.]]))
    """

    eps: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.eps < 1:
            raise ValueError(f"Halting: eps must lie between 0 and 1, got {self.eps}")

    @property
    def needs(self) -> frozenset[str]:
        """Halting scores, and the logits that they weigh."""
        return frozenset({"score", "logits"})

    @property
    def answers(self) -> bool:
        """Rows answer with the weighted mean."""
        return True

    def check(self, low: float, high: float, measure: str, exits: int | None = None) -> None:
        """Raise ValueError unless the measure can be a halting score."""
        _within_0_1("Halting", low, high, measure)

    def start(self, rows: int, device: torch.device | str | None = None, classes: int | None = None) -> State:
        """Sum of the scores; the weighted sum of the logits joins it."""
        return {"total": torch.zeros(rows, device=device)}

    def step(self, state: State, seen: Evidence, at: At) -> Tensor:
        """True where the scores are used up. A score that is not finite counts as 0."""
        assert seen.score is not None and seen.logits is not None
        score = torch.where(seen.score.isfinite(), seen.score, 0.0)
        reached = state["total"] + score
        leave = torch.full_like(reached, True, dtype=torch.bool) if at.last else reached >= 1 - self.eps
        weight = torch.where(leave, 1 - state["total"], score)[:, None]
        part = torch.where(weight > 0, weight * seen.logits, 0.0)  # what weighs nothing may be NaN
        state["total"] = reached
        state["logits"] = state["logits"] + part if "logits" in state else part
        return leave

    def answer(self, state: State, seen: Evidence, at: At) -> Evidence:
        """The weighted mean, and the class that is largest there."""
        logits = state["logits"]
        return Evidence(label=torch.where(logits.isnan().any(1), -1, logits.argmax(1)), logits=logits)


@dataclass(frozen=True)
class Accumulate(Policy):
    """Add up confidence while successive exits agree, and leave once the sum suffices (BEEM).

    ``S_k = S_(k-1) + w_k c_k`` where exit k predicts what exit k-1 did, else ``w_k c_k``; leave if
    ``S_k >= threshold``. A score that is not finite starts afresh from 0.

    Parameters
    ----------
    threshold : float or sequence of float
        Larger than 0, or ``math.inf``; several: one for each exit.
    weights : sequence of float, optional
        One for each exit, for instance its cost or its accuracy on held-out data; by default 1.

    Examples
    --------
    >>> import torch
    >>> from exeunt.policies import Accumulate, At, Evidence
    >>> policy, label = Accumulate(1.2), torch.tensor([1])
    >>> state = policy.start(1)
    >>> [policy.step(state, Evidence(torch.tensor([c]), label), At(k, k, 4)).item() for k, c in enumerate([0.7, 0.6])]
    [False, True]
    """

    threshold: float | Sequence[float]
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.threshold, (int, float)):
            object.__setattr__(self, "threshold", tuple(float(t) for t in self.threshold))
        for t in self.threshold if isinstance(self.threshold, tuple) else (self.threshold,):
            if not t > 0:
                raise ValueError(f"Accumulate: threshold must be larger than 0, got {t}")
        if self.weights is not None:
            object.__setattr__(self, "weights", tuple(float(w) for w in self.weights))
            wrong = [w for w in self.weights if not (math.isfinite(w) and w >= 0)]
            if wrong:
                raise ValueError(f"Accumulate: weights must be finite and not negative, got {wrong[0]}")

    @property
    def needs(self) -> frozenset[str]:
        """Scores and labels."""
        return frozenset({"score", "label"})

    def check(self, low: float, high: float, measure: str, exits: int | None = None) -> None:
        """Raise ValueError unless the measure adds up, and there is a weight for each exit."""
        _within_0_1("Accumulate", low, high, measure)
        if exits is not None and self.weights is not None and len(self.weights) != exits:
            raise ValueError(f"Accumulate: expected one weight for each of {exits} exits, got {len(self.weights)}")
        if exits is not None and isinstance(self.threshold, tuple) and len(self.threshold) != exits:
            raise ValueError(
                f"Accumulate: threshold must be one number, or one for each of {exits} exits, got {len(self.threshold)}"
            )

    def start(self, rows: int, device: torch.device | str | None = None, classes: int | None = None) -> State:
        """The sum so far, and the label that it belongs to."""
        label = torch.full((rows,), -1, dtype=torch.int64, device=device)
        return {"label": label, "total": torch.zeros(rows, device=device)}

    def step(self, state: State, seen: Evidence, at: At) -> Tensor:
        """True where the sum reaches the threshold."""
        assert seen.score is not None
        same, weight = agrees(state, seen), 1.0 if self.weights is None else self.weights[at.exit]
        usable = seen.score.isfinite()
        gained = torch.where(usable, weight * seen.score, 0.0)
        state["total"] = torch.where(same & usable, state["total"] + gained, gained)
        threshold = self.threshold if isinstance(self.threshold, (int, float)) else self.threshold[at.exit]
        return state["total"] >= threshold

    def sums(self, scores: Tensor, labels: Tensor) -> Tensor:
        """[n, E] sums of rows that no exit lets go, from their scores and labels [n, E]: what a threshold is to bound.

        Examples
        --------
        >>> import torch
        >>> from exeunt.policies import Accumulate
        >>> Accumulate(1.0).sums(torch.tensor([[0.5, 0.25, 1.0]]), torch.tensor([[1, 1, 0]]))
        tensor([[0.5000, 0.7500, 1.0000]])
        """
        state, exits, found = self.start(len(scores), scores.device), scores.shape[1], []
        for k in range(exits):
            self.step(state, Evidence(scores[:, k], labels[:, k]), At(k, k, exits))
            found.append(state["total"])
        return torch.stack(found, 1)
