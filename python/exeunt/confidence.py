"""Confidence measures: what an exit point sees, turned into a score in which larger means safer to leave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from exeunt import ops
from exeunt.stats import ExitStats

if TYPE_CHECKING:
    from exeunt.heads import ExitHead

__all__ = ["MEASURES", "Confidence", "ExitPoint", "measure"]


@dataclass(frozen=True)
class ExitPoint:
    """What the n rows at one exit can be judged by.

    Attributes
    ----------
    hidden : Tensor
        [n, D] output of the exit's layer.
    previous : Tensor
        [n, D] input of the same layer.
    head : ExitHead
        What the exit has of its own (translator, probe).
    stats : ExitStats or None
        Statistics of the exit's logits, for measures with ``reads_head``.
    """

    hidden: Tensor
    previous: Tensor
    head: ExitHead
    stats: ExitStats | None


@dataclass(frozen=True)
class Confidence:
    """A confidence measure.

    Attributes
    ----------
    name : str
        How recipes and the command line call it.
    low, high : float
        Range of the score; a threshold has to lie in it.
    reads_head : bool
        Whether it needs the logits' statistics, which cost one read of the head. A measure that does not lets the
        rows that leave read the head once at the end, and the rows that stay not at all.
    score : callable
        ``score(point: ExitPoint) -> Tensor`` [n] float32; NaN never exits.

    Examples
    --------
    >>> import torch, exeunt
    >>> stats = exeunt.ExitStats.from_logits(torch.tensor([[0.0, 2.0, 0.0]]))
    >>> point = exeunt.confidence.ExitPoint(torch.zeros(1, 8), torch.zeros(1, 8), exeunt.heads.ExitHead(), stats)
    >>> round(float(exeunt.confidence.measure("margin").score(point)), 3)
    0.68
    """

    name: str
    low: float
    high: float
    reads_head: bool
    score: Callable[[ExitPoint], Tensor]


def _stats(point: ExitPoint) -> ExitStats:
    assert point.stats is not None  # reads_head is set
    return point.stats


def _saturation(point: ExitPoint) -> Tensor:
    return ops.saturation(point.hidden, point.previous)


def _probe(point: ExitPoint) -> Tensor:
    probe = point.head.probe
    assert probe is not None  # the recipe has checked
    return ops.probe(point.hidden, probe.weight, probe.bias, norm="rms", eps=probe.eps)


#: Every measure by name. ``max_prob`` (BERxiT, EE-LLM and others), ``margin`` (CALM's softmax response, FREE),
#: ``neg_entropy`` (DeeBERT, in nats, negated), ``saturation`` (CALM: cosine of a layer's output and input, no head
#: read), ``probe`` (CALM's classifier: a learned linear map of the exit state, no head read).
MEASURES: dict[str, Confidence] = {
    m.name: m
    for m in (
        Confidence("max_prob", 0.0, 1.0, True, lambda p: _stats(p).max_prob),
        Confidence("margin", 0.0, 1.0, True, lambda p: _stats(p).margin),
        Confidence("neg_entropy", float("-inf"), 0.0, True, lambda p: -_stats(p).entropy),
        Confidence("saturation", -1.0, 1.0, False, _saturation),
        Confidence("probe", 0.0, 1.0, False, _probe),
    )
}


def measure(which: str | Confidence) -> Confidence:
    """Return the measure of that name, or the measure itself.

    Examples
    --------
    >>> import exeunt
    >>> exeunt.confidence.measure("saturation").reads_head
    False
    """
    if isinstance(which, Confidence):
        return which
    if which not in MEASURES:
        raise ValueError(f"confidence must be one of {', '.join(MEASURES)}, got {which!r}")
    return MEASURES[which]
