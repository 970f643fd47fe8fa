"""What every policy is made of, and the one that joins several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["At", "Evidence", "FirstOf", "Policy", "Position", "State", "keep"]

State = dict[str, Tensor]
"""What a policy remembers: tensors whose first dimension is the rows."""


def keep(state: State, rows: Tensor) -> State:
    """State of some rows, chosen by a mask [n] bool or by indices.

    Examples
    --------
    >>> import torch
    >>> from exeunt.policies import keep
    >>> keep({"count": torch.tensor([4, 5, 6])}, torch.tensor([True, False, True]))
    {'count': tensor([4, 6])}
    """
    return {name: tensor[rows] for name, tensor in state.items()}


class Position(NamedTuple):
    """Where in a generation a token stands.

    Attributes
    ----------
    produced : int
        New tokens that this generation has already produced (the first one comes from the prompt itself).
    limit : int or None
        New tokens that it may produce at most, None where nobody said.

    Examples
    --------
    >>> import torch
    >>> from exeunt.policies import At, Decay, Evidence, Position, Threshold
    >>> policy = Threshold(0.8, Decay(tau=4.0))  # stricter for the first tokens
    >>> seen = Evidence(torch.tensor([0.8]))
    >>> [bool(policy.step({}, seen, At(0, 3, 2, Position(produced, limit=100)))) for produced in (1, 50)]
    [False, True]
    """

    produced: int
    limit: int | None


class At(NamedTuple):
    """Where rows are when they are looked at.

    Attributes
    ----------
    exit : int
        Index among the exits, from 0; ``exits`` at full depth.
    layer : int
        0-based layer that has just run.
    exits : int
        Number of exits, full depth not counted.
    position : Position or None
        In a generation: which token this is.

    Examples
    --------
    >>> from exeunt.policies import At
    >>> exits = (3, 7)  # of a model with 12 layers
    >>> [At(k, layer, len(exits)).last for k, layer in enumerate((*exits, 11))]
    [False, False, True]
    """

    exit: int
    layer: int
    exits: int
    position: Position | None = None

    @property
    def last(self) -> bool:
        """Whether this is full depth, where every row leaves."""
        return self.exit >= self.exits


class Evidence(NamedTuple):
    """What n rows show at an exit; a host fills in what the policy ``needs`` and may leave the rest None.

    Attributes
    ----------
    score : Tensor or None
        [n] float32 confidence, larger is safer.
    label : Tensor or None
        [n] int64, what the exit predicts; -1 for rows with NaN.
    prob : Tensor or None
        [n] float32 probability of that label.
    logits : Tensor or None
        [n, C] float32; C is 1 for regression.
    truth : Tensor or None
        [n] int64, what an oracle knows: the right label, or that of full depth.

    Examples
    --------
    >>> import torch
    >>> from exeunt.policies import Evidence
    >>> seen = Evidence(torch.tensor([0.4, 0.95]), label=torch.tensor([2, 0]))
    >>> seen.take(seen.score > 0.9)
    Evidence(score=tensor([0.9500]), label=tensor([0]), prob=None, logits=None, truth=None)
    """

    score: Tensor | None = None
    label: Tensor | None = None
    prob: Tensor | None = None
    logits: Tensor | None = None
    truth: Tensor | None = None

    def take(self, rows: Tensor) -> Evidence:
        """Evidence of some rows, chosen by a mask or by indices."""
        return Evidence(*(None if field is None else field[rows] for field in self))


@dataclass(frozen=True)
class Policy:
    """Base of all policies: what a rule is unless it says otherwise.

    Examples
    --------
    >>> import torch
    >>> from dataclasses import dataclass
    >>> from exeunt.policies import At, Evidence, Policy
    >>> @dataclass(frozen=True)
    ... class Loosening(Policy):
    ...     first: float
    ...     by: float
    ...
    ...     def step(self, state, seen, at):
    ...         return seen.score >= self.first - self.by * at.exit
    >>> [Loosening(0.9, 0.1).step({}, Evidence(torch.tensor([0.85])), At(k, 4 * k + 3, 2)) for k in range(2)]
    [tensor([False]), tensor([True])]
    """

    @property
    def needs(self) -> frozenset[str]:
        """Fields of :class:`Evidence` that ``step`` reads."""
        return frozenset({"score"})

    @property
    def answers(self) -> bool:
        """Whether :meth:`answer` differs from the exit's own; then ``step`` is also called at full depth."""
        return False

    @property
    def positional(self) -> bool:
        """Whether ``step`` reads ``at.position``."""
        return False

    def check(self, low: float, high: float, measure: str, exits: int | None = None) -> None:
        """Raise ValueError, in one sentence, unless the policy can use a measure with the range low..high.

        Parameters
        ----------
        low, high : float
            Range of the measure.
        measure : str
            Its name.
        exits : int, optional
            Number of exits, where it is known.
        """

    def looks(self, at: At) -> bool:
        """Whether ``step`` has to see this exit."""
        return True

    def bound(self, at: At) -> float | None:
        """What a row's score must reach to leave here, where that is all that :meth:`step` looks at; else None.

        With it, a kernel that has the score may decide on its own, unless the score lies close to the bound.
        """
        return None

    def start(self, rows: int, device: torch.device | str | None = None, classes: int | None = None) -> State:
        """State of rows that have passed no exit yet.

        Parameters
        ----------
        rows : int
            How many.
        device : torch.device, optional
            Of the evidence to come.
        classes : int, optional
            Number of labels, for policies that count them.
        """
        return {}

    def step(self, state: State, seen: Evidence, at: At) -> Tensor:
        """Decide for each of n rows, and bring the state up to date.

        Parameters
        ----------
        state : dict of str to Tensor
            Of these rows; changed in place.
        seen : Evidence
            What they show.
        at : At
            Where they are.

        Returns
        -------
        Tensor
            [n] bool, True where the row leaves.
        """
        raise NotImplementedError(f"{type(self).__name__} has no step")

    def answer(self, state: State, seen: Evidence, at: At) -> Evidence:
        """What rows that leave here answer: their label, and logits where the host gave some.

        Parameters
        ----------
        state, seen, at
            As for :meth:`step`, after it, of the rows that leave.
        """
        return seen


@dataclass(frozen=True)
class FirstOf(Policy):
    """Leave as soon as one of several policies says so (ELBERT: entropy, or else its window).

    Parameters
    ----------
    policies : sequence of Policy
        All see the same evidence. Policies that answer for themselves can't be joined.

    Examples
    --------
    >>> import torch
    >>> from exeunt.policies import At, Evidence, FirstOf, Patience, Threshold
    >>> policy = FirstOf((Threshold(0.9), Patience(1)))
    >>> state = policy.start(2)
    >>> policy.step(state, Evidence(torch.tensor([0.95, 0.2]), torch.tensor([1, 0])), At(0, 0, 3))
    tensor([ True, False])
    >>> policy.step(state, Evidence(torch.tensor([0.3, 0.2]), torch.tensor([0, 0])), At(1, 1, 3))
    tensor([False,  True])
    """

    policies: Sequence[Policy]

    def __post_init__(self) -> None:
        if not self.policies:
            raise ValueError("FirstOf: expected policies, got none")
        own = [type(p).__name__ for p in self.policies if p.answers]
        if own:
            raise ValueError(f"FirstOf: expected policies that answer with the exit's own label, got {own[0]}")
        object.__setattr__(self, "policies", tuple(self.policies))

    @property
    def needs(self) -> frozenset[str]:
        """What any of them reads."""
        return frozenset().union(*(p.needs for p in self.policies))

    @property
    def positional(self) -> bool:
        """Whether one of them reads the position."""
        return any(p.positional for p in self.policies)

    def check(self, low: float, high: float, measure: str, exits: int | None = None) -> None:
        """Each has to be able to use the measure."""
        for policy in self.policies:
            policy.check(low, high, measure, exits)

    def looks(self, at: At) -> bool:
        """Whether one of them has to see this exit."""
        return any(p.looks(at) for p in self.policies)

    def start(self, rows: int, device: torch.device | str | None = None, classes: int | None = None) -> State:
        """State of all of them, each name led by the policy's number."""
        started = enumerate(p.start(rows, device, classes) for p in self.policies)
        return {f"{i}.{name}": tensor for i, state in started for name, tensor in state.items()}

    def step(self, state: State, seen: Evidence, at: At) -> Tensor:
        """True where one of them lets the row leave."""
        leave: Tensor | None = None
        for i, policy in enumerate(self.policies):
            if policy.looks(at):
                own = {name.removeprefix(f"{i}."): t for name, t in state.items() if name.startswith(f"{i}.")}
                says = policy.step(own, seen, at)
                state.update({f"{i}.{name}": tensor for name, tensor in own.items()})
                leave = says if leave is None else leave | says
        assert leave is not None  # looks(at)
        return leave
