"""Rules over the labels that successive exits predict: patience, votes, windows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from exeunt.policies.protocol import At, Evidence, Policy, State

__all__ = ["Patience", "Vote", "Window", "agrees"]


@dataclass(frozen=True)
class Patience(Policy):
    """Leave after so many exits in a row that agree with the one before (PABEE).

    With ``patience`` t a row needs t + 1 equal labels in a row, so that exit t, from 0, is its first chance.

    Parameters
    ----------
    patience : int
        1 or larger.
    tolerance : float, optional
        For regression: two exits agree if their values differ by less.

    Examples
    --------
    >>> import torch
    >>> from exeunt.policies import At, Evidence, Patience
    >>> policy, labels = Patience(2), [[0], [1], [1], [1]]
    >>> state = policy.start(1)
    >>> [policy.step(state, Evidence(label=torch.tensor(y)), At(k, k, 4)).tolist() for k, y in enumerate(labels)]
    [[False], [False], [False], [True]]
    """

    patience: int
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.patience, bool) or not isinstance(self.patience, int) or self.patience < 1:
            raise ValueError(f"Patience: patience must be a whole number from 1 on, got {self.patience}")
        if self.tolerance is not None and not (math.isfinite(self.tolerance) and self.tolerance > 0):
            raise ValueError(f"Patience: tolerance must be finite and larger than 0, got {self.tolerance}")

    @property
    def needs(self) -> frozenset[str]:
        """Labels; for regression the values themselves."""
        return frozenset({"label" if self.tolerance is None else "logits"})

    def check(self, low: float, high: float, measure: str, exits: int | None = None) -> None:
        """Raise ValueError if there are too few exits for anything to ever leave."""
        if exits is not None and self.patience >= exits:
            raise ValueError(
                f"patience must be less than the number of exits ({exits}), or no row ever leaves, got {self.patience}"
            )

    def start(self, rows: int, device: torch.device | str | None = None, classes: int | None = None) -> State:
        """The label (or value) before, and how often in a row it agreed with the one before that."""
        count = torch.zeros(rows, dtype=torch.int64, device=device)
        if self.tolerance is None:
            return {"label": torch.full((rows,), -1, dtype=torch.int64, device=device), "count": count}
        return {"value": torch.full((rows,), math.nan, device=device), "count": count}

    def step(self, state: State, seen: Evidence, at: At) -> Tensor:
        """True where the count reaches the patience."""
        if self.tolerance is None:
            same = agrees(state, seen)
        else:
            assert seen.logits is not None
            value = seen.logits[:, 0]
            same = (value - state["value"]).abs() < self.tolerance
            state["value"] = value
        state["count"] = torch.where(same, state["count"] + 1, 0)
        return state["count"] >= self.patience


@dataclass(frozen=True)
class Vote(Policy):
    """Leave once enough of the exits so far vote for one class, and answer with it (Sun et al. 2021).

    With m exits passed, of which the most frequent class has n: leave if ``n / m^alpha >= share``. ``alpha`` 0 counts
    votes, 1 takes their share. Rows that stay to the end have the full depth's vote too.

    Parameters
    ----------
    share : float
        Larger than 0.
    alpha : float, default 1.0
        Within 0..1.

    Examples
    --------
    >>> import torch
    >>> from exeunt.policies import At, Evidence, Vote
    >>> policy = Vote(2.0, alpha=0.0)
    >>> state = policy.start(1, classes=3)
    >>> [policy.step(state, Evidence(label=torch.tensor([y])), At(k, k, 3)).item() for k, y in enumerate([2, 0, 2])]
    [False, False, True]
    >>> policy.answer(state, Evidence(label=torch.tensor([2])), At(2, 2, 3)).label
    tensor([2])
    """

    share: float
    alpha: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.share) and self.share > 0):
            raise ValueError(f"Vote: share must be finite and larger than 0, got {self.share}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"Vote: alpha must lie in 0..1, got {self.alpha}")

    @property
    def needs(self) -> frozenset[str]:
        """Labels."""
        return frozenset({"label"})

    @property
    def answers(self) -> bool:
        """Rows answer with the class that has most votes."""
        return True

    def start(self, rows: int, device: torch.device | str | None = None, classes: int | None = None) -> State:
        """Votes of each class."""
        if classes is None:
            raise ValueError("Vote: expected the number of classes, which only a classifier has, got none")
        return {"votes": torch.zeros(rows, classes, device=device)}

    def step(self, state: State, seen: Evidence, at: At) -> Tensor:
        """True where the most frequent class has the share."""
        assert seen.label is not None
        cast = (seen.label >= 0)[:, None].float()  # rows with NaN have no vote
        state["votes"] = state["votes"].scatter_add(1, seen.label.clamp_min(0)[:, None], cast)
        return state["votes"].amax(1) / (at.exit + 1) ** self.alpha >= self.share

    def answer(self, state: State, seen: Evidence, at: At) -> Evidence:
        """The class with most votes, the lowest among equals; as logits the logarithm of each class's share."""
        votes = state["votes"]
        cast = votes.sum(1)
        label = torch.where(cast > 0, votes.argmax(1), -1)
        return Evidence(label=label, logits=(votes / cast[:, None]).log())


@dataclass(frozen=True)
class Window(Policy):
    """Leave once the last exits agree on a class and their probabilities of it settle (ELBERT's three biases).

    The published rule watches the probability of class 0 of two; here it is that of the class predicted now, which says
    the same for two classes and works for more. A change of class starts the window afresh.

    Parameters
    ----------
    size : int
        Exits in the window, 1 or larger.
    kind : {"side", "monotone", "steady"}
        ``side``: all probabilities exceed 0.5 + margin (bias 1). ``monotone``: the first of them does, and none is
        smaller than the one before (bias 2). ``steady``: as ``side``, and the largest exceeds the smallest by at most
        ``spread`` (bias 3).
    margin : float, default 0.0
        Within 0..0.5.
    spread : float, default 0.1
        For ``steady``.

    Examples
    --------
    >>> import torch
    >>> from exeunt.policies import At, Evidence, Window
    >>> policy, probs = Window(2, "monotone", margin=0.1), [0.7, 0.65, 0.8]
    >>> state, label = policy.start(1), torch.tensor([1])
    >>> [policy.step(state, Evidence(label=label, prob=torch.tensor([p])), At(k, k, 4)).item()
    ...  for k, p in enumerate(probs)]
    [False, False, True]
    """

    size: int
    kind: Literal["side", "monotone", "steady"] = "side"
    margin: float = 0.0
    spread: float = 0.1

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"Window: size must be a whole number from 1 on, got {self.size}")
        if self.kind not in ("side", "monotone", "steady"):
            raise ValueError(f"Window: kind must be 'side', 'monotone' or 'steady', got {self.kind!r}")
        if not 0 <= self.margin < 0.5:
            raise ValueError(f"Window: margin must lie in 0..0.5, below 0.5, got {self.margin}")
        if not 0 <= self.spread <= 1:
            raise ValueError(f"Window: spread must lie in 0..1, got {self.spread}")

    @property
    def needs(self) -> frozenset[str]:
        """Labels and their probabilities."""
        return frozenset({"label", "prob"})

    def check(self, low: float, high: float, measure: str, exits: int | None = None) -> None:
        """Raise ValueError if the window has more places than there are exits."""
        if exits is not None and self.size > exits:
            raise ValueError(f"Window: size must be at most the number of exits ({exits}), got {self.size}")

    def start(self, rows: int, device: torch.device | str | None = None, classes: int | None = None) -> State:
        """The window, oldest first, NaN where nothing is yet; and the label that it belongs to."""
        label = torch.full((rows,), -1, dtype=torch.int64, device=device)
        return {"label": label, "window": torch.full((rows, self.size), math.nan, device=device)}

    def step(self, state: State, seen: Evidence, at: At) -> Tensor:
        """True where the window is full and settled; NaN in it compares False."""
        assert seen.prob is not None
        old = torch.where(agrees(state, seen)[:, None], state["window"][:, 1:], math.nan)
        window = state["window"] = torch.cat((old, seen.prob[:, None]), 1)
        beyond = window > 0.5 + self.margin
        if self.kind == "monotone":
            return beyond[:, 0] & (window[:, 1:] >= window[:, :-1]).all(1)
        leave = beyond.all(1)
        if self.kind == "steady":
            leave &= window.amax(1) - window.amin(1) <= self.spread
        return leave


def agrees(state: State, seen: Evidence) -> Tensor:
    """Whether the label is that of the exit before; notes it for the next.

    Examples
    --------
    >>> import torch
    >>> from exeunt.policies import Evidence
    >>> from exeunt.policies.labels import agrees
    >>> state = {"label": torch.tensor([2, 0, -1])}
    >>> agrees(state, Evidence(label=torch.tensor([2, 1, -1]))), state["label"]
    (tensor([ True, False, False]), tensor([ 2,  1, -1]))
    """
    assert seen.label is not None
    same = (seen.label == state["label"]) & (seen.label >= 0)
    state["label"] = seen.label
    return same
