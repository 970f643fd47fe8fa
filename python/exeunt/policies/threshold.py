"""One number against one score: thresholds, and how they change along a generation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from exeunt.policies.protocol import At, Evidence, Policy, Position, State

__all__ = ["Decay", "Threshold"]


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
    >>> from exeunt.policies import Decay, Position
    >>> decay = Decay(tau=4.0, length=100)
    >>> [round(decay(0.8, Position(t, None)), 3) for t in (0, 50, 100)]
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
class Threshold(Policy):
    """Leave at the first exit whose score reaches the threshold; scores that are not finite stay.

    Parameters
    ----------
    value : float or tuple of float
        In the range of the confidence measure, or ``math.inf`` to never exit; several: one for each exit.
    decay : Decay, optional
        Makes the threshold depend on the position.
    strict : bool, default False
        ``score > value`` instead of ``score >= value``.
    min_exit : int, default 0
        Layer (0-based) before which no row leaves.
    interval : int, default 1
        Only exits at every so many-th layer from there on let rows leave; the others are not looked at.
    fallback : {"last", "most_confident"}
        What rows that no exit let go answer: what full depth says, or the most confident of all exits and full depth
        (Shallow-Deep Networks; the earliest among equals).

    Examples
    --------
    >>> import torch
    >>> from exeunt.policies import At, Evidence, Threshold
    >>> Threshold(0.9).step({}, Evidence(torch.tensor([0.95, 0.9, float("nan")])), At(exit=0, layer=3, exits=2))
    tensor([ True,  True, False])
    >>> Threshold((0.99, 0.9), strict=True).step({}, Evidence(torch.tensor([0.95, 0.9])), At(1, 7, 2))
    tensor([ True, False])
    """

    value: float | tuple[float, ...]
    decay: Decay | None = None
    strict: bool = False
    min_exit: int = 0
    interval: int = 1
    fallback: Literal["last", "most_confident"] = "last"

    def __post_init__(self) -> None:
        if isinstance(self.value, str):
            raise TypeError(f"Threshold: expected a number, or one for each exit, got {self.value!r}")
        if not isinstance(self.value, (int, float)):
            object.__setattr__(self, "value", tuple(float(v) for v in self.value))
        if self.min_exit < 0:
            raise ValueError(f"Threshold: min_exit must be a layer, 0 or larger, got {self.min_exit}")
        if self.interval < 1:
            raise ValueError(f"Threshold: interval must be at least 1, got {self.interval}")
        if self.fallback not in ("last", "most_confident"):
            raise ValueError(f"Threshold: fallback must be 'last' or 'most_confident', got {self.fallback!r}")

    @property
    def needs(self) -> frozenset[str]:
        """The score; labels as well where the most confident one may be the answer."""
        return frozenset({"score", "label"} if self.answers else {"score"})

    @property
    def answers(self) -> bool:
        """Whether rows that stayed answer with their most confident exit."""
        return self.fallback == "most_confident"

    @property
    def positional(self) -> bool:
        """Whether it decays."""
        return self.decay is not None

    def check(self, low: float, high: float, measure: str, exits: int | None = None) -> None:
        """Raise ValueError unless every threshold lies in the measure's range, and there is one for each exit."""
        values = self.value if isinstance(self.value, tuple) else (self.value,)
        for value in values:
            if value != math.inf and not (low <= value <= high):
                raise ValueError(
                    f"threshold must lie in {low:g}..{high:g} for {measure} (or be inf, to never exit), got {value}"
                )
        if isinstance(self.value, tuple) and exits is not None and len(values) != exits:
            raise ValueError(f"threshold must be one number, or one for each of {exits} exits, got {len(values)}")
        if self.decay is not None and (low, high) != (0.0, 1.0):
            raise ValueError(f"decay needs a measure within 0..1, got {measure} with range {low:g}..{high:g}")

    def looks(self, at: At) -> bool:
        """Whether rows may leave here, or full depth may come back to what they show."""
        return self.answers or self._opens(at)

    def bound(self, at: At) -> float | None:
        """The threshold, unless it changes or the most confident exit may have to be remembered."""
        if self.answers or self.positional or not self._opens(at):
            return None
        return self.value[at.exit] if isinstance(self.value, tuple) else self.value

    def _opens(self, at: At) -> bool:
        return at.layer >= self.min_exit and (at.layer - self.min_exit) % self.interval == 0

    def start(self, rows: int, device: torch.device | str | None = None, classes: int | None = None) -> State:
        """Most confident score and label so far; its logits join them where there are some."""
        if not self.answers:
            return {}
        label = torch.full((rows,), -1, dtype=torch.int64, device=device)
        return {"best": torch.full((rows,), -math.inf, device=device), "label": label}

    def step(self, state: State, seen: Evidence, at: At) -> Tensor:
        """True where the score reaches the threshold of this exit and position."""
        score = seen.score
        assert score is not None
        if self.answers:
            self._note(state, seen)
        if at.last or not self._opens(at):
            return torch.full_like(score, at.last, dtype=torch.bool)
        value = self.value[at.exit] if isinstance(self.value, tuple) else self.value
        if self.decay is not None and value != math.inf:
            if at.position is None:
                raise ValueError("Decay: expected rows of a generation, which has positions, got none")
            value = self.decay(value, at.position)
        return (score > value if self.strict else score >= value) & (score < math.inf)

    def _note(self, state: State, seen: Evidence) -> None:
        assert seen.score is not None and seen.label is not None
        better = (seen.score > state["best"]) & (seen.score < math.inf)
        state["best"] = torch.where(better, seen.score, state["best"])
        state["label"] = torch.where(better, seen.label, state["label"])
        if seen.logits is not None:
            state["logits"] = torch.where(better[:, None], seen.logits, state.get("logits", seen.logits))

    def answer(self, state: State, seen: Evidence, at: At) -> Evidence:
        """The exit's own, or at full depth the most confident one's."""
        if not (self.answers and at.last):
            return seen
        assert seen.label is not None
        none = state["label"] < 0  # no finite score anywhere
        answer = Evidence(score=state["best"], label=torch.where(none, seen.label, state["label"]))
        if seen.logits is not None:
            answer = answer._replace(logits=torch.where(none[:, None], seen.logits, state["logits"]))
        return answer
