"""Rules that read no confidence: depths fixed beforehand, and oracles that bound what any rule could gain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from exeunt.policies.protocol import At, Evidence, Policy, Position, State

__all__ = ["Falling", "FixedDepth", "Oracle"]


@dataclass(frozen=True)
class Falling:
    """SkipDecode's schedule: later tokens leave no deeper than earlier ones.

    Falls linearly from ``deepest`` at the first new token to ``shallowest`` at the last, rounded to whole layers.

    Parameters
    ----------
    deepest, shallowest : int
        0-based layers.
    length : int, optional
        New tokens over which it falls; by default the most that the running ``generate`` allows.

    Examples
    --------
    >>> from exeunt.policies import Falling, Position
    >>> [Falling(20, 10)(Position(t, 101)) for t in (0, 50, 100, 200)]
    [20, 15, 10, 10]
    """

    deepest: int
    shallowest: int
    length: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.shallowest <= self.deepest:
            raise ValueError(
                f"Falling: expected layers 0 <= shallowest <= deepest, got {self.shallowest} and {self.deepest}"
            )
        if self.length is not None and self.length < 1:
            raise ValueError(f"Falling: length must be at least 1, got {self.length}")

    def __call__(self, at: Position) -> int:
        """Layer after which the token leaves."""
        length = self.length or at.limit
        if length is None:
            raise ValueError("Falling: give it a length, since this generation does not say how long it may become")
        done = min(at.produced / max(length - 1, 1), 1.0)
        return int(self.deepest - done * (self.deepest - self.shallowest) + 0.5)


@dataclass(frozen=True)
class FixedDepth(Policy):
    """Leave at the first exit at or behind a layer that is fixed beforehand.

    Parameters
    ----------
    depth : int or Falling
        0-based layer, or a schedule over positions.

    Examples
    --------
    >>> import torch
    >>> from exeunt.policies import At, Evidence, FixedDepth
    >>> policy = FixedDepth(4)
    >>> policy.step(policy.start(2), Evidence(), At(exit=1, layer=5, exits=3))
    tensor([True, True])
    """

    depth: int | Falling

    def __post_init__(self) -> None:
        if not isinstance(self.depth, Falling) and (
            isinstance(self.depth, bool) or not isinstance(self.depth, int) or self.depth < 0
        ):
            raise ValueError(f"FixedDepth: depth must be a layer, 0 or larger, or a schedule, got {self.depth}")

    @property
    def needs(self) -> frozenset[str]:
        """Nothing."""
        return frozenset()

    @property
    def positional(self) -> bool:
        """Whether the depth follows a schedule."""
        return isinstance(self.depth, Falling)

    def start(self, rows: int, device: torch.device | str | None = None, classes: int | None = None) -> State:
        """A count of the rows, for want of anything else that has them as its first dimension."""
        return {"rows": torch.zeros(rows, dtype=torch.bool, device=device)}

    def step(self, state: State, seen: Evidence, at: At) -> Tensor:
        """True for all rows, or for none."""
        return torch.full_like(state["rows"], self.leaves(at))

    def leaves(self, at: At) -> bool:
        """Whether rows leave there."""
        if isinstance(self.depth, int):
            return at.layer >= self.depth
        if at.position is None:
            raise ValueError("Falling: expected rows of a generation, which has positions, got none")
        return at.layer >= self.depth(at.position)


@dataclass(frozen=True)
class Oracle(Policy):
    """Leave at the first exit that is right: an upper bound for every rule, on recordings alone.

    Parameters
    ----------
    kind : {"consistency", "label"}
        Right is what full depth predicts, or the recorded label.

    Examples
    --------
    >>> import torch
    >>> from exeunt.policies import At, Evidence, Oracle
    >>> Oracle().step({}, Evidence(label=torch.tensor([1, 0]), truth=torch.tensor([1, 1])), At(0, 0, 3))
    tensor([ True, False])
    """

    kind: Literal["consistency", "label"] = "consistency"

    def __post_init__(self) -> None:
        if self.kind not in ("consistency", "label"):
            raise ValueError(f"Oracle: kind must be 'consistency' or 'label', got {self.kind!r}")

    @property
    def needs(self) -> frozenset[str]:
        """Labels, and the truth."""
        return frozenset({"label", "truth"})

    def step(self, state: State, seen: Evidence, at: At) -> Tensor:
        """True where the label is the true one."""
        assert seen.label is not None and seen.truth is not None
        return (seen.label == seen.truth) & (seen.label >= 0)
