"""Rules of taggers: each word, or the whole sentence, stops being computed once it and its neighbours are certain.

The rows of these policies are words. Beside what a policy remembers itself, the host puts into its state ``row`` (the
text that a word belongs to), ``segment`` (words of one segment are neighbours; see :mod:`exeunt.words`) and ``halted``
(words that have stopped), each [n], in the order of the text; words go on being looked at until all of their row have
halted, because a window reads them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from exeunt.policies.protocol import At, Evidence, Policy, State

__all__ = ["Sentence", "WordPolicy", "WordWindow", "window_min"]


def window_min(score: Tensor, segment: Tensor, window: int) -> Tensor:
    """The least score [n] within a centred window of words that does not cross the end of a segment.

    Parameters
    ----------
    score : Tensor
        [n] float; NaN counts as -inf.
    segment : Tensor
        [n] int64, not descending.
    window : int
        Full width, odd.

    Examples
    --------
    >>> window_min(torch.tensor([0.9, 0.1, 0.8, 0.7]), torch.tensor([0, 0, 0, 1]), 3)
    tensor([0.1000, 0.1000, 0.1000, 0.7000])
    """
    if window == 1 or not len(score):
        return score.nan_to_num(nan=-math.inf)
    half = window // 2
    opens = torch.zeros_like(segment)
    opens[1:] = segment[1:] != segment[:-1]
    at = torch.arange(len(score), device=score.device) + half * opens.cumsum(0)  # with room for the window between
    doubt = score.new_full((int(at[-1]) + 1,), -math.inf)
    doubt[at] = (-score).nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
    return -F.max_pool1d(doubt[None, None], window, 1, half)[0, 0][at]


@dataclass(frozen=True)
class WordPolicy(Policy):
    """What rules over words have in common.

    Parameters
    ----------
    value : float or tuple of float
        In the range of the confidence measure; strict: a score has to be larger. Several: one for each exit.
    pieces : {"all", "first"}
        Which pieces of a word stop with it; those that do not go on until their text ends.
    transitions : Tensor, optional
        [C, C] bool, whether label b may follow label a: rules out labels of a word next to one that has halted.

    Examples
    --------
    >>> import torch
    >>> from dataclasses import dataclass
    >>> from exeunt.policies import At, Evidence, WordPolicy
    >>> @dataclass(frozen=True)
    ... class Alone(WordPolicy):
    ...     def step(self, state, seen, at):
    ...         return seen.score > self.value
    >>> Alone(0.9).step({}, Evidence(torch.tensor([0.95, 0.85])), At(exit=1, layer=5, exits=2))
    tensor([ True, False])
    """

    value: float | tuple[float, ...]
    pieces: Literal["all", "first"] = "all"
    transitions: Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.value, (int, float)):
            object.__setattr__(self, "value", tuple(float(v) for v in self.value))
        if self.pieces not in ("all", "first"):
            raise ValueError(f"{type(self).__name__}: pieces must be 'all' or 'first', got {self.pieces!r}")
        t = self.transitions
        if t is not None and (t.dtype != torch.bool or t.dim() != 2 or t.shape[0] != t.shape[1]):
            raise ValueError(
                f"{type(self).__name__}: transitions must be a square bool tensor [C, C], got {list(t.shape)} {t.dtype}"
            )

    def _bounds(self) -> tuple[float, ...]:
        return self.value if isinstance(self.value, tuple) else (self.value,)

    def check(self, low: float, high: float, measure: str, exits: int | None = None) -> None:
        """Raise ValueError unless every threshold lies in the measure's range, and there is one for each exit."""
        for value in self._bounds():
            if value != math.inf and not (low <= value <= high):
                raise ValueError(
                    f"threshold must lie in {low:g}..{high:g} for {measure} (or be inf, to never exit), got {value}"
                )
        if isinstance(self.value, tuple) and exits is not None and len(self.value) != exits:
            raise ValueError(f"threshold must be one number, or one for each of {exits} exits, got {len(self.value)}")

    def _at(self, at: At) -> float:
        return self.value[at.exit] if isinstance(self.value, tuple) else self.value


@dataclass(frozen=True)
class WordWindow(WordPolicy):
    """TOKEE's rule: a word halts once all words of a window around it are certain (Li et al., ACL 2021).

    Parameters
    ----------
    value, pieces, transitions
        As for all rules over words.
    window : int, default 5
        Full width, odd; 1 is the word alone.
    own : float, optional
        A word whose own score is larger than this halts whatever its neighbours say.
    halted : {"recomputed", "certain"}
        How words of the window that have halted count: by what this exit says of their frozen state, as the published
        code does, or as certain, as it was meant to.

    Examples
    --------
    >>> import torch
    >>> from exeunt.policies import At, Evidence, WordWindow
    >>> policy = WordWindow(0.8, window=3)
    >>> state = {"segment": torch.tensor([0, 0, 0, 0]), "halted": torch.zeros(4, dtype=torch.bool)}
    >>> policy.step(state, Evidence(torch.tensor([0.9, 0.95, 0.9, 0.3])), At(0, 0, 2))
    tensor([ True,  True, False, False])
    """

    window: int = 5
    own: float | None = None
    halted: Literal["recomputed", "certain"] = "recomputed"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1 or not self.window % 2:
            raise ValueError(f"WordWindow: window must be odd, so that it has a centre, got {self.window}")
        if self.halted not in ("recomputed", "certain"):
            raise ValueError(f"WordWindow: halted must be 'recomputed' or 'certain', got {self.halted!r}")

    def check(self, low: float, high: float, measure: str, exits: int | None = None) -> None:
        """The word's own threshold has to lie in the range too."""
        super().check(low, high, measure, exits)
        if self.own is not None and not low <= self.own <= high:
            raise ValueError(f"own must lie in {low:g}..{high:g} for {measure}, got {self.own}")

    def step(self, state: State, seen: Evidence, at: At) -> Tensor:
        """True where the least certain word of the window is certain enough, or the word alone is."""
        assert seen.score is not None
        score = seen.score
        counted = score if self.halted == "recomputed" else score.masked_fill(state["halted"], math.inf)
        leave = window_min(counted, state["segment"], self.window) > self._at(at)
        if self.own is not None:
            leave |= score > self.own
        return leave & (score < math.inf)  # NaN and +inf stay


@dataclass(frozen=True)
class Sentence(WordPolicy):
    """SENTEE's rule: a sentence leaves whole, once its least certain word, or the mean of its words, is certain.

    Parameters
    ----------
    value, pieces, transitions
        As for all rules over words.
    over : {"max", "mean"}
        The largest doubt of the words, or its mean.

    Examples
    --------
    >>> import torch
    >>> from exeunt.policies import At, Evidence, Sentence
    >>> state = {"row": torch.tensor([0, 0, 3]), "halted": torch.zeros(3, dtype=torch.bool)}
    >>> Sentence(0.8).step(state, Evidence(torch.tensor([0.9, 0.7, 0.9])), At(0, 0, 2))
    tensor([False, False,  True])
    >>> Sentence(0.79, over="mean").step(state, Evidence(torch.tensor([0.9, 0.7, 0.9])), At(0, 0, 2))
    tensor([True, True, True])
    """

    over: Literal["max", "mean"] = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.over not in ("max", "mean"):
            raise ValueError(f"Sentence: over must be 'max' or 'mean', got {self.over!r}")

    def step(self, state: State, seen: Evidence, at: At) -> Tensor:
        """True for all words of a sentence, or for none."""
        assert seen.score is not None
        score, row = seen.score.nan_to_num(nan=-math.inf, posinf=-math.inf), state["row"]
        if not len(row):
            return torch.zeros_like(score, dtype=torch.bool)
        kind = "amin" if self.over == "max" else "mean"
        of_rows = score.new_zeros(int(row.max()) + 1).scatter_reduce(0, row, score, kind, include_self=False)
        return of_rows[row] > self._at(at)
